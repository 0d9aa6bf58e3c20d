"""Where the test material lies; a test that needs absent material is skipped with the reason, but fails in CI."""

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SHARED = Path(os.environ.get("MINBLIP2_SHARED", ROOT.parent / "shared"))


def pytest_configure(config):
    """Hide CUDA GPUs from all tests but those of `test_cuda.py`: what is promised to the bit is promised on a CPU."""
    if not all(Path(str(word).partition("::")[0]).name == "test_cuda.py" for word in config.args):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def absent(reason):
    """Skip; but in CI with the shared folder nothing may be absent, so there it is a failure."""
    if os.environ.get("CI") and SHARED.is_dir():
        pytest.fail(reason)
    pytest.skip(reason)


def shared(name):
    """A folder of the shared test data, or skip."""
    folder = SHARED / "data" / name
    if not folder.is_dir():
        absent(f"no {folder}: set MINBLIP2_SHARED to the folder that holds data/{name}")
    return folder


@pytest.fixture(scope="session")
def photos():
    """3,000 real photographs, 224x224 pixels, five captions each, in COCO layout."""
    return shared("photos")


@pytest.fixture(scope="session")
def coco_mini():
    """A real excerpt of COCO 2017 in the official layout, with boxes."""
    return shared("coco_mini")


@pytest.fixture(scope="session")
def parts():
    """Real DINOv2-small, all-MiniLM-L6-v2 and SmolLM2-135M-Instruct as hub folders."""
    folder = Path(os.environ.get("MINBLIP2_PARTS", Path.home() / ".cache" / "minblip2" / "parts"))
    if (folder / "dinov2-small").is_dir():
        return folder
    absent(f"no real models in {folder}: make them with tools/real_parts.py OUT and set MINBLIP2_PARTS to OUT")
