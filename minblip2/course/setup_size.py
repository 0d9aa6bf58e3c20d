"""What setting up will fetch, said before it does: python minblip2/course/setup_size.py [BACKEND]

Only the standard library is there yet. The sizes are those that `python -m tests.pins --write` added up.
"""

import json
import platform
import shutil
import sys
from pathlib import Path

SIZES = Path(__file__).resolve().parents[2] / "benchmarks" / "results" / "fetched.json"
SYSTEMS = {"Linux": "Linux", "Darwin": "macOS 14", "Windows": "Windows"}


def sentence(system: str, backend: str, has_gpu: bool, sizes: dict) -> str:
    """What to say on this system; `backend`: the build of PyTorch that was asked for, or "" for the usual one."""
    begun = "setup: install the pinned packages into .venv (once; minutes"
    if backend or SYSTEMS.get(system) not in sizes:
        return f"{begun}{', with PyTorch for the ' + backend.upper() if backend else ''})"
    size = sizes[SYSTEMS[system]]
    hint = ("\nsetup: most of that is for NVIDIA GPUs, and none was found here. To fetch a fraction of it stop this "
            "with Ctrl-C and add TORCH=cpu to the command.")
    return f"{begun}, {size:.1f} GB to fetch){hint if system == 'Linux' and not has_gpu else ''}"


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")
    known = json.loads(SIZES.read_text(encoding="utf-8")) if SIZES.exists() else {}
    print(sentence(platform.system(), "".join(sys.argv[1:]), bool(shutil.which("nvidia-smi")), known), flush=True)
