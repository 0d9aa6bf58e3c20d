"""The pins: python -m tests.pins [--write] compiles constraints.txt with uv, and weighs what an installation fetches.

Nothing is installed. Without --write all that is promised is resolved: every Python on every platform.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from minblip2.data.files import write_beside, write_json
from minblip2.data.progress import forgiving_output

ROOT = Path(__file__).resolve().parents[1]
PINS, SIZES = ROOT / "constraints.txt", ROOT / "benchmarks" / "results" / "fetched.json"
PYTHONS = ("3.10", "3.11.0", "3.11.2", "3.12", "3.13", "3.14")  # Debian 12 has 3.11.2
PLATFORMS = {"Linux": "linux", "macOS 14": "aarch64-apple-darwin", "Windows": "windows"}
HEAD = '''# The exact releases that the tests run on, of all that the extras course, test, parts and site install:
#     pip install -e ".[course,test]" -c constraints.txt
# Compiled, not typed: python -m tests.pins --write
'''


def uv(*words: object, **environment: str) -> subprocess.CompletedProcess:
    """Run uv's resolver on pyproject.toml: it reads descriptions of packages and fetches none of them."""
    command = [sys.executable, "-m", "uv", "pip", "compile", "pyproject.toml", "--no-annotate", "--no-header",
               "--quiet"]
    return subprocess.run([*command, *map(str, words)], cwd=ROOT, capture_output=True, text=True, encoding="utf-8",
                          env=os.environ | environment)


def extras(*names: str) -> list[str]:
    """What to say for these extras."""
    return [word for name in names for word in ("--extra", name)]


def compiled(before: str) -> str:
    """The pins for all Pythons and platforms; those of `before` stay where they still fit. Raises ValueError."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "constraints.txt"
        out.write_text(before, encoding="utf-8")  # uv keeps what it finds in the file it writes
        done = uv("--universal", "--python-version", PYTHONS[0], *extras("course", "test", "parts", "site"), "-o", out)
        if done.returncode:
            raise ValueError(done.stderr)
        return HEAD + out.read_text(encoding="utf-8")


def resolved(python: str, platform: str) -> tuple[bool, str]:
    """Whether the pins can be installed from wheels, and what uv says where not, else what would be installed."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "pylock.toml"
        done = uv("-c", PINS, "--python-version", python, "--python-platform", PLATFORMS[platform], "--only-binary",
                  ":all:", *extras("course", "test", "parts", "site"), "--format", "pylock.toml", "-o", out,
                  MACOSX_DEPLOYMENT_TARGET="14.0")
        return (False, done.stderr) if done.returncode else (True, out.read_text(encoding="utf-8"))


def gigabytes(python: str, platform: str) -> float:
    """What an installation of the extras course and test fetches, from the sizes in the index. Raises ValueError."""
    import tomllib

    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "pylock.toml"
        done = uv("-c", PINS, "--python-version", python, "--python-platform", PLATFORMS[platform], "--only-binary",
                  ":all:", *extras("course", "test"), "--format", "pylock.toml", "-o", out,
                  MACOSX_DEPLOYMENT_TARGET="14.0")
        if done.returncode:
            raise ValueError(done.stderr)
        packages = tomllib.loads(out.read_text(encoding="utf-8"))["packages"]
    # of a package's wheels one is fetched; where several fit, they differ little
    return sum(max((wheel["size"] for wheel in one.get("wheels", ())), default=0) for one in packages) / 1e9


def main() -> int:
    """Compile and weigh, or resolve everything; 1 when a Python on a platform has no solution."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write constraints.txt, and the sizes for the README")
    parser.add_argument("--upgrade", action="store_true", help="to the newest releases, instead of the pinned ones")
    args = parser.parse_args()
    forgiving_output()
    if args.write:
        pins = compiled("" if args.upgrade else PINS.read_text(encoding="utf-8"))
        write_beside(PINS, lambda partial: partial.write_text(pins, encoding="utf-8"))
        write_json(SIZES, {name: round(gigabytes("3.12", name), 1) for name in PLATFORMS})
        print(f"{PINS.name} and {SIZES.relative_to(ROOT)} are written")
        return 0
    failed = 0
    for platform in PLATFORMS:
        for python in PYTHONS:
            good, output = resolved(python, platform)
            print(f"{platform}, Python {python}: {'resolved' if good else output}", flush=True)
            failed += not good
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
