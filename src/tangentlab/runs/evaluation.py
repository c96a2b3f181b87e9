"""Clean and robust accuracy of a network, and of a run's best and last checkpoints on the test set.

RUN/evaluations/CHECKPOINT-ATTACK.json says of every test point what broke it. It is written after every
batch and marked with all that the result depends on: an evaluation that was killed goes on from it, a
finished one is read from it, and another one takes its place.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tangentlab import metrics, modes, randomness
from tangentlab.attacks import APGD, FGSM, Attack, AutoAttack, Evaluation
from tangentlab.attacks.threat import check_count
from tangentlab.attacks.verdicts import CLEAN, VerdictFile, Verdicts, evaluation_marks, weights_digest
from tangentlab.data import Split
from tangentlab.errors import CheckpointError, ConfigError, unknown_choice
from tangentlab.files import write_atomic
from tangentlab.records import Run, read_run
from tangentlab.runs.build import Examples, build_attack, build_data, build_model, resolve_device
from tangentlab.runs.config import RunConfig
from tangentlab.runs.parsing import resolve
from tangentlab.training import load_weights

BEFORE_ALARM = "before-alarm"
CHECKPOINTS = ("best", "last", BEFORE_ALARM)
# name -> those of its settings that an evaluation may choose
ATTACKS: dict[str, tuple[str, ...]] = {
    "none": (),
    "fgsm": (),
    "pgd": ("num_steps", "num_restarts"),
    "apgd": ("num_steps",),
    "autoattack": (),
}
DEFAULT_ATTACKS = ("none", "fgsm", "pgd")
# Points at a time; on a CPU more than its caches hold are slower.
BATCH = {"cpu": 125, "cuda": 500}

Progress = Callable[[str], None]


def count_correct(
    model: nn.Module, split: Split, attack: Attack | None, *, seed: int, device: torch.device
) -> int:
    """How many examples of the split the model classifies correctly after the attack.

    Evaluation mode, fp32, the model's state untouched; the attack's noise is a function of (seed, batch), so
    two evaluations of one network agree.
    """
    return sum(
        int((_codes(model, split, number, attack, seed=seed, device=device) == 0).sum())
        for number in range(_count_batches(split, device))
    )


def evaluate(
    run: str | Path,
    *,
    attacks: Iterable[str] = DEFAULT_ATTACKS,
    checkpoints: Iterable[str] | None = None,
    num_steps: int | None = None,
    num_restarts: int | None = None,
    test_size: int | None = None,
    device: str = "auto",
    allow_import: Iterable[str] = (),
    progress: Progress | None = None,
) -> list[dict[str, Any]]:
    """Evaluate a run's checkpoints on the test set; each line goes to its evaluations.jsonl when it is found.

    Called again with the same arguments after an interruption (Ctrl-C or a kill), it goes on at the batch it
    was in and ends with the uninterrupted one's result. What is finished is read, not computed again.

    Args:
        run: the run folder.
        attacks: of "none", "fgsm", "pgd", "apgd" (APGD on the cross-entropy) and "autoattack" (the standard
            version), all in the linf ball of the run's eps.
        checkpoints: of "best", "last" and "before-alarm"; None for those that exist.
        num_steps: of PGD (None: the run's ``evaluation.test_num_steps``) and APGD (None: 100).
        num_restarts: of PGD; None for the run's.
        test_size: the first so many test examples; None for the run's.
        device: "auto", "cpu" or "cuda".
        allow_import: packages that the model may be imported from.
        progress: called with one line as an attack begins and after each of its batches.

    Returns:
        A line for each checkpoint and attack: accuracy with n and its 95 % Wilson interval, settings, wall
        seconds; AutoAttack's with the points ``remaining`` after each attack and its ``flags``.

    Raises:
        ConfigError: an unknown name, or a setting that none of the attacks has.
        RunFolderError, CheckpointError, DataError: there is nothing to evaluate, or not with what.
    """
    names = list(dict.fromkeys(attacks))
    wanted = None if checkpoints is None else list(dict.fromkeys(checkpoints))
    _check_names("attack", names, ATTACKS)
    _check_names("checkpoint", CHECKPOINTS if wanted is None else wanted, CHECKPOINTS)
    _check_settings(names, num_steps=num_steps, num_restarts=num_restarts)
    if test_size is not None:
        check_count(test_size, "test_size")
    folder = Path(run)
    config = resolve(read_run(folder).config, allow_import=allow_import)
    there = [name for name in CHECKPOINTS if checkpoint_path(folder, name).exists()]
    if not there:
        raise CheckpointError(f"{folder} has no checkpoint yet; train it first")
    for name in wanted or ():
        if name not in there:
            raise CheckpointError(f"{folder} has no checkpoint {name!r}; choose {there[0]!r}")
    chosen = build_attacks(config, names, num_steps=num_steps, num_restarts=num_restarts)
    examples = build_data(config)
    model = build_model(config, examples, resolve_device(device), allow_import=allow_import)
    with Run.open(folder) as writer:
        return evaluate_checkpoints(
            writer,
            config,
            examples,
            model,
            attacks=chosen,
            checkpoints=wanted or there,
            test_size=test_size or config.evaluation.test_size,
            progress=progress,
        )


def build_attacks(
    config: RunConfig,
    names: Iterable[str] = DEFAULT_ATTACKS,
    *,
    num_steps: int | None = None,
    num_restarts: int | None = None,
) -> dict[str, Attack | None]:
    """The attacks of the run's threat model by name; settings that are None are the run's own."""
    pgd_steps = config.evaluation.test_num_steps if num_steps is None else num_steps
    restarts = config.evaluation.test_num_restarts if num_restarts is None else num_restarts
    made: dict[str, Callable[[], Attack | None]] = {
        "none": lambda: None,
        "fgsm": lambda: FGSM(config.eps),
        "pgd": lambda: build_attack(config, num_steps=pgd_steps, num_restarts=restarts),
        "apgd": lambda: APGD(config.eps) if num_steps is None else APGD(config.eps, num_steps),
        "autoattack": lambda: AutoAttack(config.eps),
    }
    return {name: made[name]() for name in names}


def evaluate_checkpoints(
    run: Run,
    config: RunConfig,
    examples: Examples,
    model: nn.Module,
    *,
    attacks: Mapping[str, Attack | None],
    checkpoints: Iterable[str],
    test_size: int | None,
    progress: Progress | None = None,
) -> list[dict[str, Any]]:
    """The lines of :func:`evaluate`; ``model`` is overwritten by the weights of each checkpoint there is."""
    split = examples.test.select(torch.arange(min(test_size or len(examples.test), len(examples.test))))
    first: dict[str, str] = {}  # of the checkpoints with these weights
    lines = []
    for checkpoint in checkpoints:
        path = checkpoint_path(run.folder, checkpoint)
        if not path.exists():
            continue
        saved = load_weights(path, model)
        twin = first.setdefault(weights_digest(model), checkpoint)
        for name, attack in attacks.items():
            verdicts = verdicts_path(run.folder, checkpoint, name)
            if twin != checkpoint:
                write_atomic(verdicts, verdicts_path(run.folder, twin, name).read_bytes())
            say = _Prefixed(f"{checkpoint}, {name}", progress)
            say("")
            found: Verdicts | Evaluation
            if isinstance(attack, AutoAttack):
                found = _run_autoattack(attack, model, split, seed=config.seed, path=verdicts, progress=say)
            else:
                found = _evaluate_points(
                    model, split, name, attack, seed=config.seed, path=verdicts, progress=say
                )
            line = {
                "checkpoint": checkpoint,
                "step": saved["step"],
                "epoch": saved["extra"].get("epoch"),
                "split": "test",
                "attack": name,
                "settings": _settings(attack),
                **_outcome(found),
            }
            run.write_evaluations([line])
            lines.append(line)
    return lines


def checkpoint_path(folder: Path, name: str) -> Path:
    """Where the checkpoint called "best", "last", "before-alarm" or "step-N" lies."""
    return folder / "checkpoints" / f"{name}.safetensors"


def kept_checkpoints(folder: Path) -> dict[int, Path]:
    """step -> file of the weights that ``training.keep_every`` kept, in order of the steps."""
    kept = {int(path.stem.partition("-")[2]): path for path in folder.glob("checkpoints/step-*.safetensors")}
    return dict(sorted(kept.items()))


def verdicts_path(folder: Path, checkpoint: str, attack: str) -> Path:
    """Where it lies what broke each test point of a checkpoint under an attack."""
    return folder / "evaluations" / f"{checkpoint}-{attack}.json"


def _evaluate_points(
    model: nn.Module,
    split: Split,
    name: str,
    attack: Attack | None,
    *,
    seed: int,
    path: Path,
    progress: Progress,
) -> Verdicts:
    """One attack on every point, batch by batch, from where the file stands."""
    device = next(model.parameters()).device
    size = BATCH[device.type]
    marks = evaluation_marks(_settings(attack), model, split.images, split.labels, seed=seed, batch_size=size)
    file = VerdictFile(path, marks)
    try:
        verdicts = file.read()
    except CheckpointError:  # another evaluation's
        verdicts = None
    verdicts = verdicts or Verdicts([None] * len(split))
    batches = _count_batches(split, device)
    names = (None, CLEAN, name)
    for number in range(verdicts.done.get(name, 0), batches):
        codes = _codes(model, split, number, attack, seed=seed, device=device).tolist()
        start = number * size
        verdicts.broken_by[start : start + len(codes)] = [names[code] for code in codes]
        verdicts.done[name] = number + 1
        verdicts.finished = number + 1 == batches
        file.write(verdicts)
        left = verdicts.broken_by[: start + len(codes)].count(None)
        progress(f": batch {number + 1} of {batches}, {left} of {start + len(codes)} correct")
    return verdicts


def _run_autoattack(
    attack: AutoAttack, model: nn.Module, split: Split, *, seed: int, path: Path, progress: Progress
) -> Evaluation:
    def run() -> Evaluation:
        stream = randomness.generator(seed, "evaluation/autoattack")
        return attack.run(
            model,
            split.x(),
            split.labels,
            generator=stream,
            batch_size=BATCH[next(model.parameters()).device.type],
            resume=path,
            progress=lambda text: progress(f", {text}"),
        )

    with warnings.catch_warnings():
        # Its flags: they stand in the line.
        warnings.filterwarnings("ignore", module=re.escape(__name__))
        try:
            return run()
        except CheckpointError:  # another evaluation's
            path.unlink()
            return run()


def _codes(
    model: nn.Module, split: Split, number: int, attack: Attack | None, *, seed: int, device: torch.device
) -> Tensor:
    """Of each point of a batch: 0 still correct, 1 misclassified without an attack, 2 after it."""
    size = BATCH[device.type]
    part = slice(number * size, (number + 1) * size)
    stream = randomness.generator(seed, "evaluation", number, device=device)
    with ExitStack() as stack:
        stack.enter_context(modes.evaluation(model))
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.autocast(device.type, enabled=False))
        x, y = split.x(part, device), split.labels[part].to(device)
        if attack is None:
            return _wrong(model, x, y).long()
        if not isinstance(attack, APGD):
            return 2 * _wrong(model, attack(model, x, y, generator=stream), y).long()
        # It begins on the ball's surface and would climb all its steps; a misclassified point is its own
        # adversarial example.
        codes = _wrong(model, x, y).long()
        left = (codes == 0).nonzero().squeeze(1)
        if len(left):
            x_adv = attack(model, x[left], y[left], generator=stream)
            codes[left] = 2 * _wrong(model, x_adv, y[left]).long()
        return codes


def _wrong(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    predicted: Tensor = model(x).argmax(dim=1)
    return predicted != y


def _count_batches(split: Split, device: torch.device) -> int:
    return -(-len(split) // BATCH[device.type])


def _outcome(found: Verdicts | Evaluation) -> dict[str, Any]:
    n, correct = len(found.broken_by), found.broken_by.count(None)
    outcome = {
        "n": n,
        "correct": correct,
        "accuracy": correct / n,
        "interval": list(metrics.wilson_interval(correct, n)),
        "seconds": found.seconds,
    }
    if isinstance(found, Evaluation):
        outcome |= {"remaining": found.remaining, "flags": [asdict(flag) for flag in found.flags]}
    return outcome


def _settings(attack: Attack | None) -> dict[str, Any]:
    return {} if attack is None else asdict(attack)  # type: ignore[call-overload,no-any-return]


def _check_names(what: str, names: Collection[str], choices: Iterable[str]) -> None:
    if not names:
        raise ConfigError(f"no {what} is named; choose from {', '.join(map(repr, choices))}")
    for name in names:
        if name not in choices:
            raise ConfigError(unknown_choice(what, name, choices))


def _check_settings(attacks: list[str], **settings: int | None) -> None:
    """No setting is silently without effect."""
    for setting, value in settings.items():
        having = [name for name, own in ATTACKS.items() if setting in own]
        if value is not None and not set(having) & set(attacks):
            raise ConfigError(
                f"{setting}={value} is a setting of {' and '.join(map(repr, having))}; "
                f"chosen: {', '.join(map(repr, attacks))}"
            )


class _Prefixed:
    """Progress lines that begin with what is evaluated."""

    def __init__(self, prefix: str, progress: Progress | None) -> None:
        self._prefix, self._progress = prefix, progress

    def __call__(self, text: str) -> None:
        if self._progress is not None:
            self._progress(self._prefix + text)
