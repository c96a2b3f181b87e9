"""tangentlab's kernel engine beside its peers: the same networks and images, one process a measurement.

    python benchmarks/kernels/peers.py .peers                                    # once
    python benchmarks/kernels/compare.py run results/kernels/compare.json        # --cases conv3 ...
    python benchmarks/kernels/compare.py scaling results/kernels/scaling.json    # time against n, P and C
    python benchmarks/kernels/compare.py probe results/kernels/probe.json        # its share of an epoch
    python benchmarks/kernels/compare.py table results/kernels/*.json            # Markdown
    python benchmarks/kernels/compare.py plot results/kernels/scaling.json results/kernels/scaling.svg

Engines take turns, round after round, so that their ratios are from the same minutes. An engine that cannot
is a row with its reason. What is repeated less: failures, and what took longer than --patience.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import present
from cases import SWEEPS, Case, chosen

HERE = Path(__file__).parent
SCHEMA = 1
# engine -> (environment under --peers, or None for this one; script)
ENGINES: dict[str, tuple[str | None, str]] = {
    "ours": (None, "torch_engines.py"),
    "ours-bf16": (None, "torch_engines.py"),
    "torch.func": (None, "torch_engines.py"),
    "torch.func-by-class": (None, "torch_engines.py"),
    "nngeometry": ("torch", "torch_engines.py"),
    "backpack": ("torch", "torch_engines.py"),
    "curvlinops": ("torch", "torch_engines.py"),
    "neural-tangents": ("jax", "jax_engines.py"),
    "neural-tangents-structured": ("jax", "jax_engines.py"),
}
GB = 10**9


def main() -> None:
    options = parse()
    if options.command == "table":
        print("\n\n".join(present.table(json.loads(path.read_text())) for path in options.files))
    elif options.command == "plot":
        present.plot(json.loads(options.file.read_text()), options.out)
    else:
        Bench(options).run()


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("run", "scaling", "probe"):
        command = commands.add_parser(name)
        command.add_argument("out", type=Path)
        command.add_argument("--rounds", type=int, default=3)
        command.add_argument("--threads", type=int, default=2)
        command.add_argument("--calls", type=int, default=5, help="timed calls a process, at most")
        command.add_argument("--seconds", type=float, default=10.0, help="no call is begun later than this")
        command.add_argument("--memory-limit", type=float, default=20.0, help="GB; more ends the process")
        command.add_argument("--time-limit", type=float, default=900.0, help="seconds of a process")
        command.add_argument("--patience", type=float, default=300.0, help="longer is not repeated")
        if name == "probe":
            command.add_argument("--widths", type=int, nargs="+", default=[16, 64])
            command.add_argument(
                "--sketches", type=int, nargs="+", default=[0, 64], help="features; 0: exact"
            )
            continue
        few = ["ours", "torch.func"]
        command.add_argument(
            "--engines", nargs="+", choices=ENGINES, default=list(ENGINES) if name == "run" else few
        )
        command.add_argument("--n", type=int, help="another number of images, for a quick look")
        command.add_argument("--scratch", type=Path, help="weights and references; default: beside OUT")
        command.add_argument("--peers", type=Path, default=Path(".peers"))
        if name == "run":
            command.add_argument("--cases", nargs="+", default=[], help="of case or network; default all")
        else:
            command.add_argument("--sweeps", nargs="+", choices=("n", "P", "C"), default=["n", "P", "C"])
    commands.add_parser("table").add_argument("files", type=Path, nargs="+")
    plotting = commands.add_parser("plot")
    plotting.add_argument("file", type=Path)
    plotting.add_argument("out", type=Path)
    return parser.parse_args()


class Bench:
    """One file of measurements, written again after each."""

    def __init__(self, options: argparse.Namespace) -> None:
        from tangentlab.records import environment

        self.options, self.out = options, options.out
        if hasattr(os, "sched_setaffinity"):  # inherited; what counts processors itself (XLA) sees it
            os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.threads])
        # Once, before the file that it goes to is touched: the commit would look changed.
        self.data: dict[str, Any] = {
            "schema": SCHEMA,
            "command": options.command,
            "environment": {**environment(), "processor": processor(), "threads": options.threads},
            "versions": {},
            "cases": {},
            "peaks": [],
            "rows": [],
        }
        self.out.parent.mkdir(parents=True, exist_ok=True)

    def run(self) -> None:
        """Every round of every case and engine."""
        cases: list[Case] = []
        if self.options.command == "run":
            cases = [self.resized(case) for case in chosen(self.options.cases)]
        elif self.options.command == "scaling":
            cases = [self.resized(case) for case in SWEEPS if case.sweep in self.options.sweeps]
        prepared = {case.name: self.prepare(case) for case in cases}
        for turn in range(self.options.rounds):
            if self.options.command == "run":
                self.data["peaks"].append(self.spawn(sys.executable, "machine.py", {}, limited=False))
                self.save()
            for case in cases:
                for engine in self.options.engines:
                    if not case.engines or engine in case.engines:
                        self.measure(case, engine, prepared[case.name], turn)
            for row in self.probes() if self.options.command == "probe" else ():
                spec = {**row, "calls": min(self.options.calls, 3)}
                self.add({"round": turn, **row, **self.spawn(sys.executable, "probe_share.py", spec)})

    def probes(self) -> list[dict[str, int]]:
        """Widths, and features of the sketch, 0 for exact kernels."""
        return [{"width": w, "sketch": s} for w in self.options.widths for s in self.options.sketches]

    def resized(self, case: Case) -> Case:
        return case if self.options.n is None else replace(case, n=min(case.n, self.options.n))

    def prepare(self, case: Case) -> dict[str, Any]:
        """Weights, images and the reference kernel on disk, named after the code that makes them."""
        scratch = self.options.scratch or self.out.with_suffix(".scratch")
        scratch.mkdir(parents=True, exist_ok=True)
        (scratch / ".gitignore").write_text("*\n")
        code = b"".join((HERE / name).read_bytes() for name in ("cases.py", "reference.py"))
        stem = f"{case.problem}-{hashlib.sha256(code).hexdigest()[:8]}"
        spec = {
            "case": case.as_dict(),
            "problem": str(scratch / f"{stem}.npz"),
            "reference": "" if case.sweep else str(scratch / f"{stem}-{case.kind}.npz"),
        }
        print("preparing", case.name, flush=True)
        found = self.spawn(sys.executable, "reference.py", spec, limited=False)
        if found["status"] != "ok":
            raise SystemExit(f"{case.name} could not be prepared: {found['reason']}")
        self.data["cases"][case.name] = {**case.as_dict(), "parameters": found["parameters"]}
        return spec

    def measure(self, case: Case, engine: str, spec: dict[str, Any], turn: int) -> None:
        """One row: measured, or with the reason why not; nothing that earlier rounds make pointless."""
        earlier = [r for r in self.data["rows"] if (r["case"], r["engine"]) == (case.name, engine)]
        if any(r["status"] != "ok" or r["process_seconds"] > self.options.patience for r in earlier):
            return
        found = {"status": "skipped", "reason": self.beyond(case, engine)}
        if not found["reason"]:
            environment, script = ENGINES[engine]
            python = self.options.peers / environment / "bin/python" if environment else sys.executable
            more = {"engine": engine, "calls": self.options.calls, "seconds": self.options.seconds}
            found = self.spawn(str(python), script, {**spec, **more})
            self.data["versions"].update(found.pop("versions", {}))
        self.add({"case": case.name, "engine": engine, "round": turn, **found})

    def beyond(self, case: Case, engine: str) -> str:
        """Why a case is out of an engine's depth, before it is tried; else empty."""
        environment = ENGINES[engine][0]
        if environment and not (self.options.peers / environment / "bin/python").exists():
            return f"no environment {self.options.peers / environment}; run peers.py"
        if engine == "curvlinops" and case.network != "conv3":
            return "all columns of JJᵀ, one vector product each: the small network only"
        if engine == "torch.func-by-class" and case.kind == "full":
            return "no kernel between classes"
        rows = {"torch.func": case.classes, "neural-tangents": case.classes, "torch.func-by-class": 1}.get(
            engine
        )
        size = 4 * (rows or 0) * case.n * int(self.data["cases"][case.name]["parameters"]) / GB
        return f"the Jacobian alone takes {size:.0f} GB" if size > self.options.memory_limit else ""

    def spawn(self, python: str, script: str, spec: dict[str, Any], limited: bool = True) -> dict[str, Any]:
        """Run a script of this folder in a process of its own, watch it, and read its answer."""
        count = str(self.options.threads)
        environment = os.environ | dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), count)
        environment |= {"TF_CPP_MIN_LOG_LEVEL": "3", "JAX_PLATFORMS": "cpu"}
        started = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            answer, said = Path(folder) / "answer.json", Path(folder) / "stderr"
            words = json.dumps({**spec, "threads": self.options.threads, "answer": str(answer)})
            with said.open("wb") as stderr:
                process = subprocess.Popen(
                    [python, str(HERE / script), words],
                    stdout=subprocess.DEVNULL,
                    stderr=stderr,
                    env=environment,
                )
                try:
                    reason = self.watch(process, started) if limited else ""
                    if not reason:
                        process.wait()
                finally:
                    process.kill()
                    process.wait()
            found: dict[str, Any] = {"status": "stopped", "reason": reason}
            if not reason:
                last = (said.read_text(errors="replace").strip().splitlines() or [""])[-1][:300]
                found = {"status": "failed", "reason": f"exit code {process.returncode}; {last}"}
                if answer.exists():
                    found = json.loads(answer.read_text())
        return {**found, "process_seconds": time.monotonic() - started}

    def watch(self, process: subprocess.Popen[bytes], started: float) -> str:
        """Wait for the end; the reason where a limit came first."""
        while process.poll() is None:
            if resident(process.pid) > self.options.memory_limit * GB:
                return f"more than {self.options.memory_limit:g} GB of memory"
            if time.monotonic() - started > self.options.time_limit:
                return f"longer than {self.options.time_limit:g} s"
            time.sleep(0.1)
        return ""

    def add(self, row: dict[str, Any]) -> None:
        self.data["rows"].append(row)
        print(json.dumps(row), flush=True)
        self.save()

    def save(self) -> None:
        self.out.write_text(json.dumps(self.data, indent=1) + "\n")


def resident(pid: int) -> int:
    """Bytes of memory that a process holds; 0 once it is gone."""
    try:
        pages = Path(f"/proc/{pid}/statm").read_text().split()[1]
    except (OSError, IndexError):
        return 0
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


def processor() -> str:
    """The processor's name, as Linux tells it."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")


if __name__ == "__main__":
    main()
