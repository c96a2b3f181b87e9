"""Runs from configurations: every data set and model, Python and command line, processes and precision."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

import tangentlab as tl
from tangentlab.errors import ConfigError, InterruptedRunError, ModelError
from tangentlab.files import read_tensors
from tangentlab.runs import RunConfig, hooks, load_config, resolve, shipped_configs, train
from tangentlab.runs.build import build_data, build_model, every_steps
from tangentlab.runs.evaluation import count_correct
from tangentlab.runs.parsing import dump
from tiny import TINY

Make = Callable[..., RunConfig]

# A few steps of any configuration, in a second.
BRIEF = [
    "--training.epochs=1",
    "--training.batch_size=20",
    "--method.num_steps=1",
    "--evaluation.num_steps=1",
    "--evaluation.test_num_steps=1",
    "--evaluation.test_size=20",
    "--probe.num_steps=1",
]


@pytest.fixture
def data_root(tmp_path: Path, authors: ModuleType) -> Path:
    root = tmp_path / "data"
    authors.write_idx(root / "MNIST", train=160, test=40)
    authors.write_idx(root / "FashionMNIST", train=160, test=40)
    authors.write_cifar10(root / "cifar-10-batches-py", n=40)
    authors.write_cifar100(root / "cifar-100-python", n=300)
    return root


@pytest.mark.parametrize("name", shipped_configs())
def test_every_shipped_configuration_runs(name: str, data_root: Path, tmp_path: Path) -> None:
    as_shipped = load_config(name)
    small = [*BRIEF, f"--data.root={data_root}"]
    small += ["--data.train_size=100", "--data.validation_size=40"]
    if "num_steps" not in as_shipped.method:
        small.remove("--method.num_steps=1")
    if as_shipped.model["name"] == "preactresnet18":
        small.append("--model.width=4")
    if as_shipped.data.name == "cifar100":
        # Class kernels of 100 outputs take a hundred backward passes: minutes, not the test's matter.
        small += ["--data.train_size=200", "--data.validation_size=100", "--probe.size=0"]
    else:
        small.append("--probe.size=10")
    record = train(load_config(name, small), tmp_path / "run")
    assert record.state == "finished"
    assert {line["attack"] for line in record.evaluations} == {"none", "fgsm", "pgd"}
    assert as_shipped.probe.size >= (100 if as_shipped.data.name == "cifar100" else 10)
    assert record.config["probe"]["size"] == 0 or record.series("kernel/pgd/class/entropy_rank")[1]
    again = resolve(record.config)  # the folder's configuration reruns the run
    assert again.to_dict() == record.config


def test_the_default_configuration_is_a_run(tmp_path: Path) -> None:
    config = resolve({"training": {"epochs": 1}, "probe": {"size": 0}, "evaluation": {"test_num_steps": 1}})
    assert train(config, tmp_path / "run").state == "finished"


def test_from_python_in_a_handful_of_lines(tmp_path: Path) -> None:
    config = tl.RunConfig(
        name="mine", eps=0.2, method={"name": "fgsm"}, model={"name": "mlp", "widths": [16]}
    )
    config = resolve({**config.to_dict(), "training": {"epochs": 1}, "probe": {"size": 10}})
    record = tl.train(config, tmp_path / "run")
    assert record.config["method"].items() >= {"name": "fgsm", "eps": 0.2}.items()
    lines = tl.evaluate(tmp_path / "run", num_steps=2, test_size=30)
    assert [line["n"] for line in lines] == [30] * 6


def test_the_log_counts_what_the_method_costs(tiny_config: Make, tmp_path: Path) -> None:
    record = train(tiny_config("--method.num_steps=10", "--training.epochs=2"), tmp_path / "run")
    line = [line for line in record.metrics if "cost" in line][-1]
    assert (line["forwards"], line["input_backwards"], line["full_backwards"]) == (22, 20, 2)
    assert line["cost"] == 22 + 20 + 2 * 2
    assert line["summed_learning_rate"] == pytest.approx(6 * 0.1)
    assert record.status["probe_seconds"] > 0
    # The untrained network is on the curve, but no candidate.
    assert record.status["best"]["robust_accuracy"] == max(record.series("robust_accuracy")[1][1:])


def test_replays_of_a_batch_are_counted(tmp_path: Path) -> None:
    tiny = [word for word in TINY if not word.startswith("--method")]
    words = [*tiny, "--method=free", "--method.replays=4", "--training.epochs=2", "--probe.size=0"]
    config = load_config("digits", words)
    line = [line for line in train(config, tmp_path / "run").metrics if "cost" in line][-1]
    assert (line["forwards"], line["input_backwards"], line["full_backwards"]) == (8, 0, 8)


def test_a_switch_is_counted_and_logged_with_its_evidence(tiny_config: Make, tmp_path: Path) -> None:
    words = ["--method.num_steps=4", "--switch.rule=fixed", "--switch.epoch=1", "--switch.held_out=30"]
    record = train(tiny_config(*words, "--switch.to=fgsm_rs", "--switch.every=1"), tmp_path / "run")
    costs = {line["epoch"]: line for line in record.metrics if "cost" in line}
    assert [costs[epoch]["input_backwards"] for epoch in (1, 2, 3)] == [4, 5, 6]
    # PGD-5 and a forward on 30 points at epoch 1 and 2, over 120 examples.
    assert costs[3]["steering_cost"] == 2 * 30 * 11 / 120
    assert costs[3]["cost"] == (5 + 4 + 2) + 2 * (2 + 1 + 2) + costs[3]["steering_cost"]
    assert record.status["steering_seconds"] > 0
    looks = [line for line in record.metrics if "switch/phase" in line]
    assert [(look["epoch"], look["switch/phase"]) for look in looks] == [
        (0, "full"),
        (1, "cheap"),
        (2, "cheap"),
    ]
    assert looks[1]["switch/reason"] == "step 3 is reached"
    assert looks[2]["switch/robust_accuracy"] >= looks[2]["switch/least_robust_accuracy"]
    assert looks[2]["switch/least_robust_accuracy"] >= looks[1]["switch/robust_accuracy"] - 0.05


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--switch.rule=fixed", "--switch.epoch=0.1"],
            "switch.epoch=0.1 is step 0; the training's are 1 to 8",
        ),
        (
            ["--switch.rule=fixed", "--switch.epoch=2.9"],
            "switch.epoch=2.9 is step 9; the training's are 1 to 8",
        ),
        (
            ["--switch.rule=kernel", "--switch.held_out=5000"],
            "switch.held_out=5000 is out of range; the valid",
        ),
    ],
)
def test_a_switch_that_could_never_act_is_refused(
    tiny_config: Make, tmp_path: Path, words: list[str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        train(tiny_config(*words), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("value", ["kernel", "3"])
def test_a_section_takes_no_value(value: str) -> None:
    with pytest.raises(ConfigError, match="switch is a section, not a setting; its settings are switch.rule"):
        load_config("digits", ["--switch", value])
    with pytest.raises(ConfigError, match="switch.rule"):
        load_config("digits", ["--switch.rule", "[kernel]"])


def test_lazy_is_pgd_with_the_kernels_switch_to_what_it_kept(tmp_path: Path) -> None:
    lazy = load_config("digits", ["--method=lazy", "--method.num_steps=7", "--eps=0.2"])
    assert lazy.method["name"] == "pgd"
    assert lazy.method["num_steps"] == 7
    assert lazy.method["keep_perturbations"]
    assert lazy.switch.rule == "kernel"
    assert lazy.switch.to["name"] == "atta"
    assert lazy.switch.to["eps"] == 0.2
    assert resolve(lazy.to_dict()) == lazy
    assert lazy.switch.to["crafting_statistics"] == "batch"
    assert lazy.switch.to["buffer_updates"] == ("crafting", "loss")
    words = ["--method.crafting_statistics=running", "--method.buffer_updates=[loss]"]
    for own in (words, ["--method=trades", "--switch.rule=kernel"]):
        running = load_config("digits", ["--method=lazy", *own] if own is words else own)
        assert running.switch.to["crafting_statistics"] == "running"
        assert running.switch.to["buffer_updates"] == ("loss",)
    other = load_config("digits", ["--method=lazy", "--switch.to=pgd", "--switch.to.num_steps=2"])
    assert not other.method["keep_perturbations"]
    assert other.switch.to["step_size"] == other.eps / 4
    (tmp_path / "config.yaml").write_text(dump(other))
    again = load_config(tmp_path, ["--eps=0.4"])
    assert again.switch.to["eps"] == 0.4
    assert again.switch.to["step_size"] == 0.1
    (tmp_path / "config.yaml").write_text(dump(lazy))
    off = load_config(tmp_path, ["--switch.rule=none"])
    assert (off.switch.rule, off.switch.to, off.method["keep_perturbations"]) == ("none", {}, False)
    assert (
        load_config("digits", ["--method=atta", "--method.reset_epochs=null"]).method["reset_epochs"] is None
    )
    plain = load_config("digits", [])
    (tmp_path / "config.yaml").write_text(dump(plain))
    on = load_config(tmp_path, ["--method=lazy"])
    assert (on.switch.rule, on.switch.to["name"], on.method["keep_perturbations"]) == ("kernel", "atta", True)
    assert resolve(plain.to_dict()) == plain
    assert plain.switch.to == {}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--switch.to=fgsm"], "switch.to is given, but switch.rule is 'none'"),
        (
            ["--switch.rule=kernel", "--switch.to=free"],
            "takes each batch 8 times in a row and method 'pgd' 1",
        ),
        (["--switch.rule=kernel", "--switch.to=fgs"], "switch.to 'fgs' is unknown; did you mean 'fgsm'"),
        (["--switch.rule=fixed"], r"switch.epoch=0.0 is out of range \(0, 36\)"),
        (["--switch.rule=fixed", "--switch.epoch=36"], "switch.epoch=36.0 is out of range"),
        (["--switch.rule=kernel", "--switch.patience=0"], "switch.patience=0 is out of range"),
        (["--switch.rule=kernel", "--switch.max_fall=1"], "switch.max_fall=1.0 is out of range"),
        (["--method=lazy", "--switch.rule=fixed"], "'lazy' is pgd with switch.rule 'kernel', not 'fixed'"),
        (["--switch.rule=kernel", "--switch.every=0"], "switch.every=0.0 is out of range"),
        (["--switch.rule=kernel", "--switch.threshold=0"], "switch.threshold=0.0 and switch.resume"),
        (["--switch.rule=sometimes"], "switch.rule 'sometimes' is unknown"),
        (["--switch.rule=kernel", "--switch.to.epss=1"], "did you mean 'switch.to.eps'"),
        (["--method=lazzy"], "did you mean 'lazy'"),
    ],
)
def test_a_switch_that_cannot_be_is_refused(words: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        train(load_config("digits", words), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_best_checkpoint_is_chosen_on_the_validation_split(tiny_config: Make, tmp_path: Path) -> None:
    config = tiny_config("--training.epochs=4", "--probe.size=0")
    record = train(config, tmp_path / "run")
    best = record.status["best"]
    examples = build_data(config)
    model = build_model(config, examples, torch.device("cpu"))
    tensors, metadata = read_tensors(tmp_path / "run" / "checkpoints" / "best.safetensors")
    model.load_state_dict({k.removeprefix("model/"): v for k, v in tensors.items()})
    clean = count_correct(model, examples.validation, None, seed=0, device=torch.device("cpu"))
    assert clean / len(examples.validation) == best["clean_accuracy"]
    assert metadata["step"] == best["step"]
    assert not set(map(tuple, examples.train.images.flatten(1).tolist())) & set(
        map(tuple, examples.test.images.flatten(1).tolist())
    )


def test_the_seed_decides_everything_and_global_state_nothing(tiny_config: Make, tmp_path: Path) -> None:
    def weights(name: str, *words: str) -> bytes:
        train(tiny_config("--training.epochs=1", "--probe.size=0", *words), tmp_path / name)
        tensors, _ = read_tensors(tmp_path / name / "checkpoints" / "last.safetensors")
        return b"".join(tensors[key].numpy().tobytes() for key in sorted(tensors))

    torch.manual_seed(5)
    first = weights("a")
    torch.manual_seed(6)
    before = torch.get_rng_state()
    assert weights("b") == first
    assert torch.equal(before, torch.get_rng_state())
    assert weights("c", "--seed=1") != first


class Outsider(nn.Module):
    """Somebody else's model; its constructor knows neither input_shape nor num_classes."""

    def __init__(self, units: int = 8, *, outputs: int = 10) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(64, units), nn.Linear(units, outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(torch.tanh(self.a(x.flatten(1))))


def make_outsider(num_classes: int, units: int = 8) -> nn.Module:
    return Outsider(units, outputs=num_classes)


OWN = ["--data.train_size=60", "--data.validation_size=40", *BRIEF, "--probe.size=10"]


@pytest.mark.parametrize("attribute", ["Outsider", "make_outsider"])
def test_any_module_by_import_path(attribute: str, tmp_path: Path) -> None:
    name = f"{__name__}:{attribute}"
    words = [*OWN, f"--model={name}", "--model.units=5"]
    with pytest.raises(ModelError, match=f"add --allow-import {__name__}"):
        load_config("digits", words)
    config = load_config("digits", words, allow_import=[__name__])
    record = train(config, tmp_path / "run", allow_import=[__name__])
    assert record.config["model"]["units"] == 5
    with pytest.raises(ConfigError, match=r"'model.unit' is unknown; did you mean 'model.units'\?"):
        load_config("digits", [*OWN, f"--model={name}", "--model.unit=5"], allow_import=[__name__])


class Unusual(nn.Module):
    """A model whose constructor takes a class, and something untyped."""

    def __init__(self, units=6, act: type[nn.Module] = nn.ReLU, fail: str = "", stage: str = "") -> None:
        super().__init__()
        if fail == "build":
            raise KeyError("nothing here")
        self.layers = nn.Sequential(
            nn.Flatten(), nn.Linear(64, units), act(), nn.Dropout(), nn.Linear(units, 10)
        )
        self.fail = fail

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.fail == "forward" or (self.fail == "training" and self.training):
            raise ValueError
        return self.layers(x)

    def get_extra_state(self) -> object:
        return {"fail": 1} if self.fail == "state" else torch.zeros(1)

    def set_extra_state(self, state: object) -> None:
        pass


@pytest.mark.parametrize(
    ("fail", "message"),
    [
        ("build", "cannot be built: 'nothing here'"),
        ("forward", "fails on inputs of shape .*: ValueError"),
        ("training", "training fails at step 0: ValueError"),
        ("state", "the model's state '_extra_state' is a dict; checkpoints hold tensors"),
    ],
)
def test_somebody_elses_errors_are_one_line(fail: str, message: str, tmp_path: Path) -> None:
    words = [*OWN, f"--model={__name__}:Unusual", f"--model.fail={fail}"]
    config = load_config("digits", words, allow_import=[__name__])
    with pytest.raises(ModelError, match=message):
        train(config, tmp_path / "run", allow_import=[__name__])


def test_a_setting_that_takes_a_class_cannot_be_set(tmp_path: Path) -> None:
    (tmp_path / "side.py").write_text("raise SystemExit('executed')")
    words = [*OWN, f"--model={__name__}:Unusual", "--model.act=side.A"]
    with pytest.raises(ConfigError, match="'model.act' is unknown"):
        load_config("digits", words, allow_import=[__name__])


def test_dropout_follows_the_seed_and_survives_a_resume(tmp_path: Path) -> None:
    words = [*OWN, f"--model={__name__}:Unusual", "--training.epochs=2"]
    config = load_config("digits", words, allow_import=[__name__])

    def weights(name: str) -> bytes:
        tensors, _ = read_tensors(tmp_path / name / "checkpoints" / "last.safetensors")
        return b"".join(tensors[key].numpy().tobytes() for key in sorted(tensors))

    torch.manual_seed(0)
    before = torch.get_rng_state()
    train(config, tmp_path / "whole", allow_import=[__name__])
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hooks.Interruption, "heard", True, raising=False)
        patch.setattr(hooks.Interruption, "__init__", lambda self: None)
        with pytest.raises(InterruptedRunError, match=f"--resume --allow-import {__name__}"):
            train(config, tmp_path / "broken", allow_import=[__name__])
    torch.manual_seed(2)
    train(config, tmp_path / "broken", resume=True, allow_import=[__name__])
    assert weights("whole") == weights("broken")


def test_a_network_that_dies_is_trained_to_the_end_with_the_probe_too(
    tiny_config: Make, tmp_path: Path
) -> None:
    words = ["--training.learning_rate=100", "--model.hidden=4", "--training.weight_decay=0.009"]
    runs = [
        train(tiny_config(*words, f"--probe.size={size}"), tmp_path / f"probe {size}") for size in (20, 0)
    ]
    assert [run.state for run in runs] == ["finished", "finished"]
    assert runs[0].series("train_loss") == runs[1].series("train_loss")


def test_a_model_with_another_output_is_refused(tmp_path: Path) -> None:
    words = [*OWN, f"--model={__name__}:Outsider", "--model.outputs=9"]
    config = load_config("digits", words, allow_import=[__name__])
    with pytest.raises(ModelError, match=r"returns shape \(2, 9\) for 2 examples, not \[n, C\] = \(2, 10\)"):
        train(config, tmp_path / "run", allow_import=[__name__])


def test_bf16_trains_and_is_evaluated_in_fp32(tiny_config: Make, tmp_path: Path) -> None:
    record = train(tiny_config("--precision=bf16", "--training.epochs=2"), tmp_path / "run")
    tensors, _ = read_tensors(tmp_path / "run" / "checkpoints" / "last.safetensors")
    assert all(t.dtype == torch.float32 for k, t in tensors.items() if "weight" in k)
    exact = train(tiny_config("--training.epochs=2"), tmp_path / "exact")
    losses = [r.series("train_loss")[1] for r in (record, exact)]
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=0.05)


def test_normalize_is_a_switch_or_a_way(tiny_config: Make) -> None:
    assert tiny_config("--data.normalize=per-image").data.normalize == "per-image"
    assert tiny_config("--data.normalize=true").data.normalize is True
    with pytest.raises(ConfigError, match="data.normalize 'per-imag' is unknown; did you mean 'per-image'"):
        tiny_config("--data.normalize=per-imag")


def test_normalize_is_the_first_layer_and_travels_with_the_weights(tiny_config: Make, tmp_path: Path) -> None:
    config = tiny_config("--data.normalize=true", "--training.epochs=1")
    train(config, tmp_path / "run")
    tensors, _ = read_tensors(tmp_path / "run" / "checkpoints" / "last.safetensors")
    x = build_data(config).train.x()
    assert tensors["model/0.mean"].item() == pytest.approx(x.mean().item(), rel=1e-5)
    assert tensors["model/0.std"].item() == pytest.approx(x.std().item(), rel=1e-5)


def test_an_interval_in_epochs_is_at_least_a_step() -> None:
    assert [every_steps(e, 17) for e in (0.01, 0.5, 1, 2)] == [1, 8, 17, 34]


def test_early_snapshots_are_dense_and_leave_the_others_alone(tiny_config: Make, tmp_path: Path) -> None:
    words = ["--data.train_size=200", "--training.batch_size=20", "--training.epochs=2"]
    plain, early = (
        train(tiny_config(*words, f"--probe.early={value}"), tmp_path / value) for value in ("false", "true")
    )
    assert plain.kernel_steps() == [0, 10, 20]
    assert early.kernel_steps() == [0, 1, 2, 4, 8, 10, 20]
    name = "kernel/clean/class/distance_from_first"
    assert early.series(name)[0] == [0.1, 0.2, 0.4, 0.8, 1.0, 2.0]
    velocity = "kernel/pgd/class/angle_velocity"
    assert early.series(velocity) == plain.series(velocity)
    assert len(plain.series(velocity)[1]) == 2
