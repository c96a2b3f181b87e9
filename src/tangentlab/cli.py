"""The command line: parses, calls, prints. Bad input is one line on stderr and exit code 2."""

from __future__ import annotations

import argparse
import ctypes
import os
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from tangentlab import __version__
from tangentlab.errors import (
    ConfigError,
    DivergedError,
    InterruptedRunError,
    OtherProcessError,
    RunFolderError,
    TangentlabError,
)

if TYPE_CHECKING:
    from tangentlab.runs import RunConfig

BAD_INPUT, INTERRUPTED = 2, 130


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        """Print the message without the usage and exit with code 2."""
        self.exit(BAD_INPUT, f"{self.prog}: {message}\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command, by default the process's own; returns the exit code."""
    if argv is None:
        _keep_freed_memory()
    parser = _parser()
    options, rest = parser.parse_known_args(argv)
    options.words = list(sys.argv[1:] if argv is None else argv)
    if rest and options.call is not _train:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if getattr(options, "allow_import", None):
        sys.path.insert(0, os.getcwd())  # as python -m does; a console script leaves it out
    try:
        call: Callable[..., None] = options.call
        call(options, rest)
    except InterruptedRunError as error:
        return _fail(error, INTERRUPTED) if _speaks() else 0
    except (DivergedError, OtherProcessError) as error:
        return _fail(error, BAD_INPUT) if _speaks() else 0
    except ConfigError as error:  # the same in all of them, before they meet
        return _fail(error, BAD_INPUT) if _speaks() else BAD_INPUT
    except TangentlabError as error:
        return _fail(error, BAD_INPUT)
    except BrokenPipeError:  # whoever read our output has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        return _fail(f"{error.filename or 'the output'}: {error.strerror or error}", BAD_INPUT)
    except KeyboardInterrupt:
        return _fail("interrupted", INTERRUPTED)
    return 0


def _keep_freed_memory() -> None:
    """Have glibc keep freed memory for the next batch, in this process and in those that it starts.

    Else a CPU faults each batch's activations in anew. What the environment says already holds.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is None:
        return
    # mallopt(3): the largest threshold that all versions take, and what is kept at most.
    for name, number, size in (("MMAP", -3, 32 << 20), ("TRIM", -1, 1 << 30)):
        variable = f"MALLOC_{name}_THRESHOLD_"
        if variable not in os.environ:
            os.environ[variable] = str(size)
            mallopt(number, size)


def _parser() -> Parser:
    parser = Parser(prog="tangentlab", description="Adversarial training and its neural tangent kernel.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=Parser)

    demo = commands.add_parser("demo", help="train a small network three ways and write a report")
    demo.add_argument(
        "--out",
        type=Path,
        help="folder, gone on with where it exists (default: the first free of runs/demo, runs/demo-2, ...)",
    )
    demo.add_argument("--seed", type=int, default=0)
    demo.set_defaults(call=_demo)

    train = commands.add_parser("train", help="train one configuration", add_help=False, allow_abbrev=False)
    train.add_argument("config", nargs="?", metavar="CONFIG", help="YAML file, run folder, or shipped name")
    train.add_argument("--out", type=Path, help="run folder (default: runs/NAME)")
    train.add_argument("--resume", action="store_true", help="go on from the run folder's last checkpoint")
    train.add_argument("--seeds", type=_seed, nargs="+", metavar="SEED",
                       help="a run a seed, in OUT/seed-SEED: finished ones stay, others go on")  # fmt: skip
    train.add_argument("--jobs", type=_positive, help="with --seeds: runs at a time (default: 1)")
    train.add_argument("--backend", metavar="NAME",
                       help="with --seeds: loky (processes here, the default), dask or ray")  # fmt: skip
    train.add_argument("--print_config", action="store_true", help="print the resolved settings and stop")
    train.add_argument("--allow-import", action="append", default=[], metavar="PACKAGE",
                       help="package that a model may be imported from")  # fmt: skip
    train.add_argument("-h", "--help", action="store_true", help="show this and every setting")
    train.epilog = "Settings follow as --name value or --section.name value; see CONFIG --help for all."
    train.set_defaults(call=_train, parser=train)

    evaluate = commands.add_parser("evaluate", help="clean and robust accuracy of a run's checkpoints")
    evaluate.add_argument("run", type=Path, metavar="RUN")
    evaluate.add_argument(
        "--attacks", nargs="+", default=["none", "fgsm", "pgd"], metavar="ATTACK",
        help="of none fgsm pgd apgd autoattack (default: none fgsm pgd)",
    )  # fmt: skip
    evaluate.add_argument(
        "--checkpoints", nargs="+", metavar="CHECKPOINT", help="of best last (default: those there are)"
    )
    evaluate.add_argument(
        "--num_steps", type=_positive, help="PGD's steps (default: the run's setting), APGD's (default: 100)"
    )
    evaluate.add_argument("--num_restarts", type=_positive, help="PGD restarts (default: the run's setting)")
    evaluate.add_argument("--test_size", type=_positive, help="test examples (default: the run's setting)")
    evaluate.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    evaluate.add_argument("--allow-import", action="append", default=[], metavar="PACKAGE")
    evaluate.set_defaults(call=_evaluate)

    study = commands.add_parser("study", help="a study of claims: its runs, what is measured, the verdicts")
    study.add_argument(
        "name",
        metavar="NAME",
        help="evolution, normalization, gap, lazy, transfer, overfitting, cure; or all, for the ledger",
    )
    study.add_argument("folders", type=Path, nargs="*", metavar="FOLDER",
                       help="with all: where to take claims from (default: results/studies/*)")  # fmt: skip
    study.add_argument("--out", type=Path,
                       help="folder, gone on with where it exists (default: runs/NAME); with all: HTML file "
                       "to write instead of printing")  # fmt: skip
    study.add_argument("--source", metavar="TEXT", help="with all: claims whose source holds this text")
    study.add_argument(
        "--tier", type=int, default=1, help="0 to 2 (cure: to 3): data and network (default: 1)"
    )
    study.add_argument("--seeds", type=_seed, nargs="+", metavar="SEED",
                       help="default: the first three that the study judges")  # fmt: skip
    study.add_argument("--only", nargs="+", default=[], metavar="RUN",
                       help="runs of these names alone, such as pgd (default: all)")  # fmt: skip
    study.add_argument("--precision", default="fp32",
                       help="of training steps: fp32, or bf16 where the processor has instructions for it "
                       "(default: fp32)")  # fmt: skip
    study.add_argument("--jobs", type=_positive, default=1, help="runs at a time (default: 1)")
    study.set_defaults(call=_study)

    report = commands.add_parser(
        "report", help="one HTML file about runs or a study, and its figures as SVG and PDF"
    )
    report.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run folders, or one study's")
    report.add_argument(
        "--out", type=Path, help="HTML file (default: report.html in the run's or parent folder)"
    )
    report.set_defaults(call=_report)
    return parser


def _demo(options: argparse.Namespace, _: list[str]) -> None:
    from tangentlab.report.terminal import runs_table
    from tangentlab.runs.display import ProgressDisplay
    from tangentlab.studies.demo import free_folder, run_demo

    out = options.out or free_folder(Path("runs/demo"))
    try:
        with ProgressDisplay() as display:
            records, report = run_demo(out, seed=options.seed, display=display)
    except InterruptedRunError as error:
        again = shlex.join(["tangentlab", "demo", "--out", str(out), "--seed", str(options.seed)])
        raise InterruptedRunError(f"{str(error).partition(';')[0]}; go on with: {again}") from error
    _print(runs_table(records))
    _print(f"Report: {report}")


def _train(options: argparse.Namespace, rest: list[str]) -> None:
    from tangentlab.report.terminal import evaluations_table
    from tangentlab.runs import is_first_process, train
    from tangentlab.runs import parsing as configs
    from tangentlab.runs.display import ProgressDisplay

    allow = options.allow_import
    if options.help:
        values = (
            configs.merge(configs.read_yaml(options.config), configs.parse_overrides(rest))
            if options.config
            else {}
        )
        _print(options.parser.format_help())
        _print(configs.config_parser(values, allow_import=allow).format_help())
        return
    if options.config is None:
        choices = ", ".join(map(repr, configs.shipped_configs()))
        options.parser.error(f"CONFIG is missing; give a YAML file, a run folder, or {choices}")
    config = configs.load_config(options.config, rest, allow_import=allow)
    if options.print_config:
        _print(configs.dump(config))
        return
    if options.seeds:
        _train_seeds(options, config, configs.parse_overrides(rest))
        return
    for name in ("jobs", "backend"):
        if getattr(options, name) is not None:
            options.parser.error(f"--{name} {getattr(options, name)} is for --seeds")
    given = Path(options.config)
    out = options.out or (given if (given / "config.yaml").is_file() else None)
    with ProgressDisplay() as display:
        record = train(config, out, resume=options.resume, allow_import=allow, display=display)
    if not is_first_process():
        return
    _print(evaluations_table(record))
    _print(f"Run: {record.folder}")
    _print(f"Report: {_write_report([record.folder], None)}")


def _train_seeds(options: argparse.Namespace, config: RunConfig, overrides: Mapping[str, Any]) -> None:
    from tangentlab.records import read_run
    from tangentlab.report.terminal import seeds_table
    from tangentlab.runs import check_outcomes, train_many
    from tangentlab.runs.display import ProgressDisplay

    if "seed" in overrides:
        options.parser.error(f"--seed {overrides['seed']} and --seeds exclude each other")
    repeated = sorted({seed for seed in options.seeds if options.seeds.count(seed) > 1})
    if repeated:
        options.parser.error(f"--seeds names {', '.join(map(str, repeated))} more than once")
    out = options.out or Path("runs") / config.name
    if (out / "config.yaml").exists():
        raise RunFolderError(f"{out} is a run's own folder; give another --out for the runs of --seeds")
    runs = {out / f"seed-{seed}": replace(config, seed=seed) for seed in options.seeds}
    with ProgressDisplay() as display:
        outcomes = train_many(
            runs,
            jobs=options.jobs or 1,
            backend=options.backend or "loky",
            allow_import=options.allow_import,
            display=display,
        )
    finished = [outcome.folder for outcome in outcomes if outcome.state.endswith("finished")]
    if finished:
        _print(seeds_table([read_run(folder) for folder in finished]))
        _print(f"Report: {_write_report(finished, out / 'report.html')}")
    try:
        check_outcomes(outcomes)
    except InterruptedRunError as error:
        raise InterruptedRunError(
            f"{error}; go on with: {shlex.join(['tangentlab', *options.words])}"
        ) from error


def _evaluate(options: argparse.Namespace, _: list[str]) -> None:
    from tangentlab.records import read_run
    from tangentlab.report.terminal import evaluations_table, flag_lines
    from tangentlab.runs import evaluate
    from tangentlab.runs.display import EvaluationDisplay

    try:
        with EvaluationDisplay() as display:
            evaluate(
                options.run,
                attacks=options.attacks,
                checkpoints=options.checkpoints,
                num_steps=options.num_steps,
                num_restarts=options.num_restarts,
                test_size=options.test_size,
                device=options.device,
                allow_import=options.allow_import,
                progress=display,
            )
    except KeyboardInterrupt as error:
        again = shlex.join(["tangentlab", *options.words])
        raise InterruptedRunError(f"interrupted; go on with: {again}") from error
    record = read_run(options.run)
    _print(evaluations_table(record))
    for line in flag_lines(record):
        _print(line)


def _study(options: argparse.Namespace, _: list[str]) -> None:
    from tangentlab.report import write_ledger
    from tangentlab.runs.display import ProgressDisplay
    from tangentlab.studies import judge_study, ledger, of_source, run_study

    if options.name == "all":
        results = Path("results/studies").glob("*/config.yaml")
        folders = options.folders or sorted(path.parent for path in results)
        if options.only:
            raise ConfigError(f"--only {' '.join(options.only)} is for one study, not for 'all'")
        found = [of_source(judge_study(folder), options.source or "") for folder in folders]
        if options.source and found and not any(study["claims"] for study in found):
            raise ConfigError(f"no claim has a source that holds {options.source!r}")
        table = ledger(found)
        _print(table if options.out is None else f"Ledger: {write_ledger(found, options.out)}")
        return
    if options.source is not None:
        raise ConfigError(f"--source {options.source!r} is for 'all'")
    if options.folders:
        raise ConfigError(f"{options.folders[0]} is for 'all'; study {options.name!r} takes --out FOLDER")
    out = options.out or Path("runs") / options.name
    with ProgressDisplay() as display:
        verdicts = run_study(
            options.name,
            out,
            tier=options.tier,
            seeds=options.seeds,
            only=options.only,
            precision=options.precision,
            jobs=options.jobs,
            display=display,
        )
    _print(ledger([verdicts]))
    _print(f"Study: {out}")
    _print(f"Report: {_write_report([out], None)}")


def _report(options: argparse.Namespace, _: list[str]) -> None:
    _print(f"Report: {_write_report(options.runs, options.out)}")


def _write_report(runs: list[Path], out: Path | None) -> Path:
    from tangentlab.report import write_report

    return write_report(runs, out or (runs[0] if len(runs) == 1 else runs[0].parent) / "report.html")


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is out of range; a whole number of at least 1")
    return int(text)


def _seed(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text} is no seed; a whole number of at least 0")
    return int(text)


def _print(what: Any) -> None:
    """A table drawn by rich, or plain text as it is."""
    if isinstance(what, str):
        sys.stdout.write(what + "\n")
        return
    from rich.console import Console

    Console().print(what)


def _speaks() -> bool:
    """Whether this is the process that tells what all of them stop for.

    The others end well: one that fails is taken for the cause, and the first is killed while it saves.
    """
    from tangentlab.runs import is_first_process

    return is_first_process()


def _fail(error: object, code: int) -> int:
    sys.stderr.write(f"tangentlab: {' '.join(str(error).split())}\n")
    return code


if __name__ == "__main__":
    sys.exit(main())
