"""What a notebook needs where nothing is set up (Colab, Kaggle): python minblip2/course/start.py [WORDS FOR PIP]

Installs what the course needs and is missing or too old, and leaves PyTorch as it is. Uses only the standard library.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PYTORCH = "torch"  # comes with the machine, in the build that fits its GPU


def requirements(pyproject: str) -> list[tuple[str, str]]:
    """Name and lowest release of everything that the package depends on, from the text of pyproject.toml."""
    listed = re.search(r"^dependencies = \[(.*?)^\]", pyproject, re.MULTILINE | re.DOTALL)[1]
    return re.findall(r'"([\w.-]+)>=([\d.]+)"', listed)


def numbers(release: str) -> tuple[int, ...]:
    """The numbers with which a release begins: (2, 11, 0) of 2.11.0+cu128."""
    return tuple(int(part) for part in re.match(r"[\d.]*", release)[0].split(".") if part)


def installed(name: str) -> str | None:
    """The release of a package that is there, or None."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def missing(wanted: list[tuple[str, str]]) -> list[str]:
    """What is not there, or too old, as pip is told of it."""
    return [f"{name}>={lowest}" for name, lowest in wanted
            if (there := installed(name)) is None or numbers(there) < numbers(lowest)]


def pip_command(lacking: list[str], pinned: Path) -> list[str]:
    """How pip installs what is lacking while all that `pinned` names stays as it is."""
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    return [*pip, "-c", str(pinned), *lacking]


def main() -> int:
    """Install what is missing; 2 when PyTorch is."""
    sys.stdout.reconfigure(errors="replace")
    lacking = missing(requirements((ROOT / "pyproject.toml").read_text(encoding="utf-8")))
    if any(one.startswith(f"{PYTORCH}>=") for one in lacking):
        print(f"The course needs PyTorch ({', '.join(one for one in lacking if one.startswith(PYTORCH))}), and this "
              "machine has none or an older one: install the build that fits it, then run this cell again.")
        return 2
    if not lacking:
        return 0
    print(f"installing {', '.join(lacking)}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        pinned = Path(folder) / "pinned.txt"
        pinned.write_text(f"{PYTORCH}=={installed(PYTORCH)}\n", encoding="utf-8")
        return subprocess.run([*pip_command(lacking, pinned), *sys.argv[1:]]).returncode


if __name__ == "__main__":
    sys.exit(main())
