"""Make a virtual environment and install tangentlab into it: python3 install.py FOLDER [--dev].

On Linux without an NVIDIA GPU, PyTorch's CPU index is used where it answers: its wheel is 200 MB, the one
with CUDA several gigabytes. Uses the standard library alone.
"""

import platform
import shutil
import subprocess
import sys
import urllib.request
import venv
from pathlib import Path

CPU_INDEX = "https://download.pytorch.org/whl/cpu"
ROOT = Path(__file__).parent


def wants_cpu_index() -> bool:
    """Whether the CPU index spares a CUDA download, and answers."""
    if platform.system() != "Linux" or shutil.which("nvidia-smi"):
        return False
    try:
        with urllib.request.urlopen(f"{CPU_INDEX}/torch/", timeout=10):
            return True
    except OSError:
        return False


def main() -> None:
    if sys.version_info < (3, 11):
        sys.exit(
            f"install.py: Python {platform.python_version()} is too old; make PYTHON=python3.11 (or newer)"
        )
    folder = Path(sys.argv[1])
    development = "--dev" in sys.argv[2:]
    python = folder / ("Scripts" if platform.system() == "Windows" else "bin") / "python"
    if not python.exists():
        venv.create(folder, with_pip=True)
    size = "380 MB to download, 1.7 GB on disk" if development else "290 MB to download, 1.4 GB on disk"
    say(f"Installing into .venv: {size}; one to five minutes, most of it PyTorch.")
    command = [str(python), "-m", "pip", "install", "--quiet", "-c", str(ROOT / "constraints-cpu.txt")]
    if wants_cpu_index():
        command += ["--extra-index-url", CPU_INDEX]
    target = f"{ROOT}[dev]" if development else str(ROOT)
    sys.exit(subprocess.run([*command, "-e", target], check=False).returncode)


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
