"""The command line: every bad input is one line on stderr and exit code 2, and nothing is lost."""

from __future__ import annotations

import gzip
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import yaml

from tangentlab.cli import main
from tangentlab.metrics import mean_interval
from tangentlab.records import read_run
from tangentlab.runs import load_config, shipped_configs
from tiny import TINY

Fails = Callable[..., str]


@pytest.fixture
def fails(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Fails:
    """Run a command in an empty folder; it must fail with one line and code 2, which is returned."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def run(*argv: object) -> str:
        try:
            code = main([str(word) for word in argv])
        except SystemExit as error:  # from the argument parser
            code = error.code
        err = capsys.readouterr().err
        lines = [line for line in err.splitlines() if line.strip()]
        assert code == 2, err
        assert "Traceback" not in err
        message = [line for line in lines if line.startswith("tangentlab")]
        assert len(message) == 1, err
        assert lines[-1] == message[0]
        return message[0]

    return run


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--traning.epochs", 3], "setting 'traning.epochs' is unknown; did you mean 'training.epochs'?"),
        (["--method.num_step", 3], "did you mean 'method.num_steps'?"),
        (["--training.epochs", "many"], "training.epochs='many' is not of type int"),
        (["--training.epochs", 0], "training.epochs=0 is out of range; at least 1"),
        (["--alarm.every", 0.5], "alarm.every=0.5 is not of type int, nor null"),
        (["--eps", 8], "eps=8 is out of range (0, 1]; inputs are in [0, 1]: write 8/255"),
        (["--eps", "-8/255"], "eps='-8/255' is not of type float"),
        (["--eps", "nan"], "eps="),
        (
            ["--method", "pdg"],
            "method 'pdg' is unknown; did you mean 'pgd'? Choose from 'standard', 'pgd', 'trades',",
        ),
        (["--model", "cnn"], "model 'cnn' is unknown"),
        (["--model", "os:getcwd"], "add --allow-import os"),
        (["--data.name", "cifar11"], "data.name 'cifar11' is unknown; did you mean 'cifar10'?"),
        (["--data.padding", "mirror"], "data.padding 'mirror' is unknown; choose from 'zero', 'reflect'"),
        (["--device", "tpu"], "device 'tpu' is unknown"),
        (["--precision", "fp8"], "precision 'fp8' is unknown"),
        (["--training.batch_size", 5000], "batch_size=5000"),
        (["--data.train_size", 100000], "100000"),
        (["--training", 5], "training is a section, not a setting"),
        (["--training.epochs"], "--training.epochs has no value"),
        (["epochs"], "'epochs' is not a setting"),
        (["--name", "a/b"], "name 'a/b' is no folder name"),
        (["--model.widths", "[4]"], "differ in length"),
        (["--model.hidden", "[4]"], "model.hidden=[4] is not of type int"),
        (["--probe.memory", "2 gigs"], "2 gigs"),
        (["--probe.size", -1], "probe.size=-1 is out of range; at least 0"),
        (["--epochs", 3], "setting 'epochs' is unknown; did you mean 'training.epochs'?"),
        (["--training.learning_rate", "null"], "training.learning_rate is null; leave it out"),
        (["--training.learning_rate", ".inf"], "training.learning_rate=inf is out of range"),
        (["--evaluation.every", ".inf"], "evaluation.every=inf is out of range"),
        (["--seed", "null"], "seed is null"),
        (["--model.strides", "[0,1]"], "must be at least 1"),
        (["--model", ":Net"], "no import path; write package.module:Class"),
        (["--training.warmup", 1], "training.warmup=1.0 is out of range [0, 1)"),
        (["--training.schedule", "step"], "training.schedule 'step' is unknown"),
        (["--processes", 3], "training.batch_size=40 is no multiple of processes=3"),
        (["--schema", 2], "schema 2 is unknown; this version reads 1"),
    ],
)
def test_bad_settings(fails: Fails, tmp_path: Path, words: list, message: str) -> None:
    assert message in fails("train", "digits", *TINY, "--out", tmp_path / "run", *words)
    assert not (tmp_path / "run").exists()  # so that the corrected command can be given


def test_eps_may_be_written_as_a_fraction_anywhere(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("eps: 8/255\nmethod: {name: pgd, step_size: 2 / 255}\n")
    config = load_config(tmp_path / "c.yaml")
    assert config.eps == config.method["eps"] == 8 / 255
    assert config.method["step_size"] == 2 / 255
    assert load_config(tmp_path / "c.yaml", ["--eps=16/255"]).method["eps"] == 16 / 255
    assert load_config(tmp_path / "c.yaml", ["--method.eps=4/255"]).method["eps"] == 4 / 255
    # YAML takes 1e-2, without a point, for text.
    assert load_config("digits", ["--eps=1e-2"]).method == {
        **load_config("digits").method,
        "eps": 0.01,
        "step_size": 0.0025,
    }


def test_another_eps_takes_along_what_was_derived_from_the_first(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(load_config("digits").to_dict()))
    method = load_config(tmp_path / "c.yaml", ["--eps=0.1"]).method
    assert (method["eps"], method["step_size"]) == (0.1, 0.025)
    method = load_config(tmp_path / "c.yaml", ["--method.eps=0.2"]).method
    assert (method["eps"], method["step_size"]) == (0.2, 0.05)
    chosen = ["--eps=0.1", "--method.step_size=0.07", "--method.eps=0.3"]
    method = load_config(tmp_path / "c.yaml", chosen).method
    assert (method["eps"], method["step_size"]) == (0.3, 0.07)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no configuration"),
        ("a: [", "is not YAML"),
        ("- 1", "holds a list, not settings"),
        ("epsilon: 1", "did you mean 'eps'?"),
        ("training: 3", "training is a section"),
        ("method: pgd", "write method: {name: pgd}"),
        ("!!python/object/apply:os.getcwd []", "is not YAML"),
    ],
)
def test_bad_configuration_files(fails: Fails, tmp_path: Path, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / "c.yaml").write_text(content)
    assert message in fails("train", tmp_path / "c.yaml")


@pytest.mark.parametrize("damage", ["missing", "truncated", "label"])
def test_bad_data(
    fails: Fails, tmp_path: Path, damage: str, monkeypatch: pytest.MonkeyPatch, authors: ModuleType
) -> None:
    # No network: what downloads must say so at once.
    monkeypatch.setattr("urllib.request.urlopen", _refuse)
    folder = tmp_path / "data" / "MNIST"
    authors.write_idx(folder, train=200, test=50)
    if damage == "label":
        labels = np.arange(200) % 10
        labels[7] = 12
        (folder / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(authors.idx(labels)))
    target = folder / "train-images-idx3-ubyte.gz"
    if damage == "missing":
        target.unlink()
    if damage == "truncated":
        target.write_bytes(target.read_bytes()[:-40])
    line = fails("train", "mnist", *TINY, "--data.root", tmp_path / "data", "--out", tmp_path / "run")
    expected = {"missing": str(folder), "truncated": "train-images-idx3-ubyte.gz", "label": "12"}[damage]
    assert expected in line


def _refuse(*_: object, **__: object) -> None:
    raise OSError("Network is unreachable")


def test_a_folder_that_exists_is_refused_and_untouched(fails: Fails, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert main(["train", "digits", *TINY, "--training.epochs=1", "--out", str(out)]) == 0
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    assert "exists; give another --out, or --resume" in fails("train", "digits", *TINY, "--out", out)
    message = "was run with training.epochs=1, not 2"
    assert message in fails("train", "digits", *TINY, "--training.epochs=2", "--out", out, "--resume")
    after = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    assert before == after


def test_a_lost_checkpoint_does_not_wipe_the_run(fails: Fails, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert main(["train", "digits", *TINY, "--training.epochs=1", "--out", str(out)]) == 0
    (out / "checkpoints" / "last.safetensors").unlink()
    before = (out / "metrics.jsonl").read_bytes()
    assert "came to step 3, but" in fails("train", out, "--resume")
    assert (out / "metrics.jsonl").read_bytes() == before
    assert read_run(out).state == "finished"


def test_a_report_is_a_file(fails: Fails, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert main(["train", "digits", *TINY, "--training.epochs=1", "--out", str(out)]) == 0
    assert "is a folder; name the HTML file" in fails("report", out, "--out", tmp_path)
    assert not (tmp_path / "figures").exists()
    assert "cannot write" in fails("report", out, "--out", "/dev/null/x.html")
    assert "File name too long" in fails("train", "digits", *TINY, "--out", tmp_path / ("x" * 300))


def test_nan_stops_and_keeps_the_last_good_checkpoint(fails: Fails, tmp_path: Path) -> None:
    out = tmp_path / "run"
    words = ["--training.learning_rate=1e30", "--training.schedule=cyclic", "--model.name=mlp"]
    line = fails("train", "digits", *TINY[:4], "--training.epochs=9", *words, "--out", out)
    assert "at step" in line
    assert any(words in line for words in ("is not finite", "are not finite", "the loss is", "is NaN"))
    record = read_run(out)
    assert record.state == "failed"
    assert "at step" in record.status["message"]


def test_a_full_disk_stops_the_run_and_it_goes_on_later(tmp_path: Path) -> None:
    """The system refuses files beyond a size, as a full disk would; then there is room again."""
    out = tmp_path / "run"
    words = [*TINY, "--training.epochs=4", "--probe.size=40", "--out", str(out)]
    code = (
        "import resource, signal, sys\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))\n"
        "from tangentlab.cli import main\n"
        f"sys.exit(main({['train', 'digits', *words]!r}))\n"
    )
    full = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert full.returncode == 2
    assert "Traceback" not in full.stderr
    assert "cannot write" in full.stderr.strip().splitlines()[-1]
    assert read_run(out).state == "failed"
    assert main(["train", "digits", *words, "--resume"]) == 0
    assert read_run(out).state == "finished"


def test_a_command_that_is_not_one(fails: Fails) -> None:
    assert "trian" in fails("trian")
    assert "CONFIG is missing; give a YAML file, a run folder, or 'cifar10'" in fails("train")
    assert "unrecognized arguments: --frobnicate" in fails("evaluate", "x", "--frobnicate")
    assert "is not a folder" in fails("evaluate", "absent")
    assert "is not a folder" in fails("report", "absent")
    assert "0 is out of range" in fails("evaluate", "x", "--num_steps", 0)
    assert "a is out of range; a whole number" in fails("evaluate", "x", "--num_steps", "a")
    assert "attack 'pdg' is unknown; did you mean 'pgd'?" in fails("evaluate", "x", "--attacks", "pdg")
    assert "checkpoint 'x' is unknown" in fails("evaluate", "x", "--checkpoints", "x")
    assert "is a setting of 'pgd'" in fails("evaluate", "x", "--attacks", "apgd", "--num_restarts", 2)


def test_evaluating_what_has_no_checkpoint(fails: Fails, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert main(["train", "digits", *TINY, "--training.epochs=1", "--out", str(out)]) == 0
    (out / "checkpoints" / "best.safetensors").write_bytes(b"torn")
    assert "best.safetensors cannot be read" in fails("evaluate", out)
    for path in (out / "checkpoints").iterdir():
        path.unlink()
    assert "has no checkpoint yet; train it first" in fails("evaluate", out)


def test_evaluate_states_n_settings_and_interval(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    assert main(["train", "digits", *TINY, "--training.epochs=1", "--out", str(out)]) == 0
    words = ["--num_steps", "3", "--num_restarts", "2", "--test_size", "40"]
    assert main(["evaluate", str(out), *words]) == 0
    assert main(["evaluate", str(out), *words]) == 0  # the same again takes the place of the first
    lines = read_run(out).evaluations
    assert len(lines) == 12
    pgd = [line for line in lines if line["attack"] == "pgd" and line["n"] == 40]
    assert [line["checkpoint"] for line in pgd] == ["best", "last"]
    for line in pgd:
        assert line["settings"]["num_steps"] == 3
        assert line["settings"]["num_restarts"] == 2
        assert line["interval"][0] <= line["accuracy"] == line["correct"] / 40 <= line["interval"][1]
    assert "95 % interval" in capsys.readouterr().out


def test_help_and_print_config(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "digits", "--help"]) == 0
    text = capsys.readouterr().out
    assert "--method.num_steps" in text
    assert "--training.learning_rate" in text
    assert "radius of the linf ball" in " ".join(text.split())
    assert main(["train", "digits", "--print_config", "--method=fgsm"]) == 0
    values = yaml.safe_load(capsys.readouterr().out)
    assert values["method"].items() >= {"name": "fgsm", "eps": values["eps"]}.items()


def test_every_shipped_configuration_is_named_in_the_help() -> None:
    assert {"cifar10", "cifar100", "digits", "fashion-mnist", "mnist"} <= set(shipped_configs())


def test_importing_is_light() -> None:
    code = (
        "import sys, tangentlab, tangentlab.cli\n"
        "tangentlab.KernelProbe, tangentlab.attacks, tangentlab.ntk, tangentlab.Run\n"
        "heavy = {'plotly', 'matplotlib', 'sklearn', 'lightning_fabric', 'pandas', 'rich'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"


def test_seeds_are_trained_tabled_and_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.yaml").write_text("name: mine\nthreads: 1\nmethod: {name: pgd}\n")
    words = ["train", "c.yaml", *TINY, "--training.epochs=1", "--probe.size=0", "--seeds", "3", "0"]
    assert main(words) == 0
    out = capsys.readouterr().out
    records = [read_run(Path("runs/mine") / f"seed-{seed}") for seed in (3, 0)]
    assert [record.config["seed"] for record in records] == [3, 0]
    clean = [record.evaluations[0]["accuracy"] for record in records]
    low, high = mean_interval(clean)
    for shown in (*clean, sum(clean) / 2, (high - low) / 2):
        assert f"{shown:.1%}" in out
    assert "Report: runs/mine/report.html" in out
    assert Path("runs/mine/report.html").exists()
    assert main([*words, "--resume"]) == 0  # nothing is run again
    assert capsys.readouterr().err.count("already finished") == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--seeds", "0", "1", "0"], "--seeds names 0 more than once"),
        (["--seeds", "-1"], "-1 is no seed; a whole number of at least 0"),
        (["--seeds", "one"], "one is no seed"),
        (["--seeds"], "expected at least one argument"),
        (["--seeds", "0", "--seed", "3"], "--seed 3 and --seeds exclude each other"),
        (["--seeds", "0", "--jobs", "0"], "0 is out of range; a whole number of at least 1"),
        (["--seeds", "0", "--backend", "slurm"], "backend 'slurm' is unknown; choose from 'loky'"),
        (
            ["--seeds", "0", "1", "--data.train_size", "100000"],
            "tangentlab: train_size=100000 is out of range",
        ),
        (["--jobs", "2"], "--jobs 2 is for --seeds"),
        (["--backend", "dask"], "--backend dask is for --seeds"),
        (["--seeds", "0", "--processes", "2"], "processes=2 is for a run by itself"),
    ],
)
def test_bad_seeds(fails: Fails, tmp_path: Path, words: list, message: str) -> None:
    assert message in fails("train", "digits", *TINY, "--out", tmp_path / "runs", *words)
    assert not (tmp_path / "runs").exists()


def test_seeds_do_not_go_into_a_runs_own_folder(fails: Fails, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("name: run\n")
    message = fails("train", "digits", "--out", tmp_path / "run", "--seeds", "0")
    assert "is a run's own folder; give another --out" in message


FAULTS = """
import resource, sys, torch
from tangentlab.cli import main
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def batch():
    return [torch.ones(20 << 18) for _ in range(4)]  # 20 MB each
main()
batch()
before = faults()
for _ in range(10):
    batch()
print(faults() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's")
def test_a_command_keeps_the_memory_of_a_batch_for_the_next(tmp_path: Path) -> None:
    """Ten batches of 20,480 pages; what the environment says holds."""

    def pages(**settings: str) -> int:
        command = [sys.executable, "-c", FAULTS, "report", str(tmp_path / "none")]
        environment = {**os.environ, **settings}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        return int(done.stdout)

    assert pages() < 30_000
    assert pages(MALLOC_MMAP_THRESHOLD_="131072", MALLOC_TRIM_THRESHOLD_="131072") > 150_000
