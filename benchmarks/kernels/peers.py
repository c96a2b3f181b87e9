"""Make the environments of the engines beside ours: python benchmarks/kernels/peers.py .peers

FOLDER/torch holds this project (editable) with nngeometry, BackPACK and curvlinops; FOLDER/jax holds
neural-tangents, whose pins fit nothing else. 1.4 and 2.7 GB on disk; an existing environment is completed.
"""

from __future__ import annotations

import subprocess
import sys
import venv
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


def main() -> None:
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    (folder / ".gitignore").write_text("*\n")
    constraints = ["-c", str(ROOT / "constraints-cpu.txt")]
    subprocess.run([sys.executable, str(ROOT / "install.py"), str(folder / "torch")], check=True)
    install(folder / "torch", [*constraints, "-r", str(HERE / "peers-torch.txt")])
    if not (folder / "jax").exists():
        venv.create(folder / "jax", with_pip=True)
    install(folder / "jax", ["-r", str(HERE / "peers-jax.txt")])


def install(environment: Path, arguments: list[str]) -> None:
    """pip install into an environment."""
    subprocess.run(
        [str(environment / "bin/python"), "-m", "pip", "install", "--quiet", *arguments], check=True
    )


if __name__ == "__main__":
    main()
