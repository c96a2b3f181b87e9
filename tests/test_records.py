import errno
import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from tangentlab import records
from tangentlab.errors import CheckpointError, RunFolderError, StorageError
from tangentlab.files import read_tensors, write_tensors
from tangentlab.records import Measurement, Run, environment, read_run


def test_a_run_is_read_as_it_was_written(run_folder: Path) -> None:
    kernel = torch.rand(3, 3)
    with Run.create(run_folder, {"name": "mine", "eps": 0.1}) as run:
        run.write({"step": 1, "epoch": 0.5, "loss": 2.0, "broken": float("nan")})
        run.write(Measurement(step=2, values={"epoch": 1.0, "rank": 3.5}, kernels={"clean/trace": kernel}))
        run.write_evaluations([{"checkpoint": "last", "n": 5}])
        assert read_run(run_folder).state == "running"
        run.write_status(state="finished", step=2)
    record = read_run(run_folder)
    assert record.config == {"schema": 1, "name": "mine", "eps": 0.1}
    assert record.state == "finished"
    assert record.name == "mine"
    assert record.metrics[0] == {"step": 1, "epoch": 0.5, "loss": 2.0, "broken": None}
    assert record.series("rank") == ([1.0], [3.5])
    assert record.series("broken") == ([], [])
    assert record.kernel_steps() == [2]
    assert torch.equal(record.kernels(2)["clean/trace"], kernel)
    assert record.evaluations == [{"checkpoint": "last", "n": 5}]
    assert {"python", "torch", "tangentlab", "commit", "cores"} <= set(record.environment)
    json.loads((run_folder / "metrics.jsonl").read_text().splitlines()[0])  # strict JSON: no NaN


@pytest.mark.parametrize(
    ("program", "named"),
    [("/somewhere/bin/tangentlab", "tangentlab"), ("benchmarks/demo_seeds.py", "benchmarks/demo_seeds.py")],
)
def test_the_command_says_nothing_of_where_it_is_installed(
    monkeypatch: pytest.MonkeyPatch, program: str, named: str
) -> None:
    monkeypatch.setattr("sys.argv", [program, "train", "digits"])
    assert environment()["command"] == f"{named} train digits"


def test_a_foreign_loop_needs_no_configuration(run_folder: Path) -> None:
    with Run.create(run_folder) as run:
        run.write({"step": 7, "loss": 1.0})
    record = read_run(run_folder)
    assert record.axis == "step"
    assert record.series("loss") == ([7], [1.0])
    assert record.name == "run"
    assert record.state == "finished"


def test_a_loop_that_fails_is_not_finished(run_folder: Path) -> None:
    with pytest.raises(ZeroDivisionError), Run.create(run_folder):
        raise ZeroDivisionError
    assert read_run(run_folder).state == "killed"
    with Run.open(run_folder) as run:  # looking at it again does not make it so
        run.write({"step": 1})
    assert read_run(run_folder).state == "killed"


def test_two_writers_never_share_a_folder(run_folder: Path) -> None:
    code = f"from tangentlab.records import Run; Run.open({str(run_folder)!r})"
    with Run.create(run_folder):
        with pytest.raises(RunFolderError, match="in use by another process"):
            Run.open(run_folder)
        other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert "in use by another process" in other.stderr
        with pytest.raises(RunFolderError, match="exists; give another --out, or --resume"):
            Run.create(run_folder)
        assert records.in_use(run_folder)
    assert not records.in_use(run_folder)
    Run.open(run_folder).close()


def test_a_folder_with_other_files_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(RunFolderError, match="exists"):
        Run.create(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]
    with pytest.raises(RunFolderError, match="is a file"):
        Run.create(tmp_path / "thesis.tex")


def test_a_run_killed_while_it_was_created_can_be_created_again(run_folder: Path) -> None:
    run_folder.mkdir()
    (run_folder / "environment.json").write_text("{}")
    (run_folder / ".config.yaml.77.part").write_text("sch")
    with Run.create(run_folder, {"name": "again"}):
        pass
    assert read_run(run_folder).name == "again"


def test_a_killed_run_is_readable_and_says_so(run_folder: Path) -> None:
    code = textwrap.dedent(f"""
        import os, signal
        from tangentlab.records import Run
        run = Run.create({str(run_folder)!r}, {{"name": "k"}})
        run.write({{"step": 1, "loss": 1.0}})
        os.write(run._metrics, b'{{"step": 2, "lo')
        os.kill(os.getpid(), signal.SIGKILL)
    """)
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -signal.SIGKILL
    record = read_run(run_folder)
    assert record.state == "killed"
    assert record.metrics == [{"step": 1, "loss": 1.0}]


def test_a_full_disk_takes_nothing_back(run_folder: Path) -> None:
    """A file-size limit makes the kernel refuse writes half-way, as a full disk does."""
    code = textwrap.dedent(f"""
        import resource, signal
        from tangentlab.errors import StorageError
        from tangentlab.files import write_atomic
        from tangentlab.records import Run
        run = Run.create({str(run_folder)!r}, {{"name": "k"}})
        write_atomic(run.folder / "checkpoints" / "last", b"good")
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
        for step in range(100):
            try:
                run.write({{"step": step, "text": "x" * 90}})
            except StorageError as error:
                print(step, error)
                break
        try:
            write_atomic(run.folder / "checkpoints" / "last", b"y" * 9000)
        except StorageError as error:
            print(error)
    """)
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.count("cannot write") == 2
    assert os.strerror(errno.EFBIG) in out
    record = read_run(run_folder)
    assert len(record.metrics) == int(out.split()[0])
    assert (run_folder / "metrics.jsonl").read_bytes().endswith(b"\n")
    assert (run_folder / "checkpoints" / "last").read_bytes() == b"good"
    assert not list(run_folder.rglob("*.part"))


def test_a_real_full_disk(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("no right to mount a small file system")
    try:
        with Run.create(disk / "run") as run:
            run.write({"step": 1})
            with pytest.raises(StorageError, match="No space left on device"):
                run.write(Measurement(2, {}, {"k": torch.zeros(400, 400)}))
            run.write({"step": 3})
        assert [line["step"] for line in read_run(disk / "run").metrics] == [1, 3]
        assert read_run(disk / "run").kernel_steps() == []
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_rewinding_drops_what_came_after_a_checkpoint(run_folder: Path) -> None:
    with Run.create(run_folder) as run:
        run.write(Measurement(1, {}, {"k": torch.zeros(1)}))
        size = run.metrics_size()
        run.write(Measurement(2, {}, {"k": torch.zeros(1)}))
        run.rewind(size=size, step=1)
        run.write({"step": 2, "again": True})
        with pytest.raises(RunFolderError, match="shorter than its checkpoint remembers"):
            run.rewind(size=10**6, step=1)
    record = read_run(run_folder)
    assert [line["step"] for line in record.metrics] == [1, 2]
    assert record.kernel_steps() == [1]


def test_tensors_come_back_bit_for_bit_and_tied_ones_too(tmp_path: Path) -> None:
    shared = torch.randn(4, 3)
    tensors = {"a": shared, "b": shared, "c": torch.tensor([float("nan"), -0.0]), "n": torch.tensor(5)}
    write_tensors(tmp_path / "t.safetensors", tensors, {"step": 3, "rate": 0.1 + 0.2})
    found, metadata = read_tensors(tmp_path / "t.safetensors")
    assert metadata == {"step": 3, "rate": 0.1 + 0.2}
    for name, tensor in tensors.items():
        assert found[name].numpy().tobytes() == tensor.numpy().tobytes()


@pytest.mark.parametrize("content", [b"", b"junk", b"\x08\x00\x00\x00\x00\x00\x00\x00{}      "])
def test_an_unreadable_checkpoint_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "last.safetensors"
    with pytest.raises(CheckpointError, match="does not exist"):
        read_tensors(path)
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_tensors(path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.yaml", "a: [1", "config.yaml cannot be read"),
        ("config.yaml", "schema: 99", "has schema 99; this version reads 1"),
        ("config.yaml", "- 1", "has schema None"),
        ("metrics.jsonl", "5\n", "a line is no JSON object"),
        ("metrics.jsonl", '{"step": 1}\n{"st\n{"step": 3}\n', "metrics.jsonl cannot be read"),
    ],
)
def test_a_damaged_run_folder_is_named(run_folder: Path, name: str, content: str, message: str) -> None:
    Run.create(run_folder).close()
    (run_folder / name).write_text(content)
    with pytest.raises(RunFolderError, match=message):
        read_run(run_folder)


def test_what_only_describes_a_run_may_be_damaged(run_folder: Path) -> None:
    with Run.create(run_folder) as run:
        run.write({"step": 1})
    for name in ("status.json", "environment.json"):
        (run_folder / name).write_text("{")
    (run_folder / "kernels").mkdir()
    (run_folder / "kernels" / "².safetensors").write_text("")
    record = read_run(run_folder)
    assert "status.json cannot be read" in record.status["message"]
    assert record.kernel_steps() == []
    assert record.metrics == [{"step": 1}]


def test_a_closed_run_is_not_written_to(run_folder: Path, tmp_path: Path) -> None:
    run = Run.create(run_folder)
    run.close()
    with open(tmp_path / "other", "w") as other:  # takes the number of the file that was closed
        with pytest.raises(RunFolderError, match="was closed"):
            run.write({"step": 1})
        other.flush()
        assert os.fstat(other.fileno()).st_size == 0


def test_yaml_cannot_execute_code(run_folder: Path, tmp_path: Path) -> None:
    Run.create(run_folder).close()
    (run_folder / "config.yaml").write_text(f"!!python/object/apply:os.mkdir ['{tmp_path}/owned']")
    with pytest.raises(RunFolderError, match="cannot be read"):
        read_run(run_folder)
    assert not (tmp_path / "owned").exists()


def test_what_is_no_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="is not a folder"):
        read_run(tmp_path / "absent")
    with pytest.raises(RunFolderError, match="holds no config.yaml"):
        read_run(tmp_path)
    with pytest.raises(RunFolderError, match="holds no config.yaml"):
        Run.open(tmp_path)


def test_a_record_needs_a_step(run_folder: Path) -> None:
    with Run.create(run_folder) as run, pytest.raises(RunFolderError, match="needs a 'step'; it has 'loss'"):
        run.write({"loss": 1.0})
