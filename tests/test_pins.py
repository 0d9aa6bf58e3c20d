"""constraints.txt is what uv compiles, and can be installed wherever it is promised. Nothing is installed here."""

import importlib.util
import os
import re

import pytest

from . import pins

TEXT = pins.PINS.read_text(encoding="utf-8")
LINES = [line for line in TEXT.splitlines() if line and line[0] != "#"]
# The corners; MINBLIP2_PINS=all resolves every Python on every system, as `python -m tests.pins` does once a week.
CORNERS = [("3.11.0", "Linux"), ("3.14", "macOS 14"), ("3.10", "Windows")]
ALL = [(python, platform) for platform in pins.PLATFORMS for python in pins.PYTHONS]


@pytest.fixture
def resolver():
    """uv, and an index to ask; or skip."""
    if importlib.util.find_spec("uv") is None:
        pytest.skip("uv is not installed: it comes with the extra test")


def or_skip(good, output):
    """Skip where there is no network."""
    if not good and re.search(r"dns error|Could not connect|error sending request|Request failed|timed out", output):
        pytest.skip(f"the package index does not answer: {output.splitlines()[0]}")
    assert good, output


def test_pins_are_exact_and_whole():
    assert all(line.split(";")[0].count("==") == 1 and "+" not in line and "@" not in line for line in LINES), LINES
    assert "torch==2.13.0" in LINES, "one PyTorch for every Python and system"
    names = {re.split("==", line)[0] for line in LINES}
    wanted = re.findall(r'"([\w.-]+)>=', (pins.ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert {name.lower().replace("_", "-") for name in wanted if name != "setuptools"} <= names


@pytest.mark.parametrize("python, version", [("3.10", (3, 10, 0)), ("3.11.2", (3, 11, 2)), ("3.14", (3, 14, 0))])
@pytest.mark.parametrize("system", ["linux", "darwin", "win32"])
def test_each_package_has_one_pin_on_each_python_and_system(python, version, system):
    markers = pytest.importorskip("packaging.markers", reason="packaging reads the markers")
    full = ".".join(map(str, version))
    machine = {"linux": "x86_64", "darwin": "arm64", "win32": "AMD64"}[system]
    here = {"python_version": ".".join(full.split(".")[:2]), "python_full_version": full, "sys_platform": system,
            "platform_machine": machine, "implementation_name": "cpython", "platform_python_implementation": "CPython",
            "platform_system": {"linux": "Linux", "darwin": "Darwin", "win32": "Windows"}[system],
            "os_name": "nt" if system == "win32" else "posix"}
    found = [line.split("==")[0] for line in LINES
             if ";" not in line or markers.Marker(line.partition(";")[2].strip()).evaluate(here)]
    assert len(found) == len(set(found)) > 120 and {"torch", "numpy", "soupsieve", "jupyterlab"} <= set(found)


@pytest.mark.parametrize("python, platform", ALL if os.environ.get("MINBLIP2_PINS") == "all" else CORNERS)
def test_the_pins_can_be_installed(resolver, python, platform):
    good, output = pins.resolved(python, platform)
    or_skip(good, output)
    assert 'name = "torch"' in output and 'version = "2.13.0"' in output


def test_pins_that_do_not_fit_are_noticed(resolver, monkeypatch, tmp_path):
    broken = tmp_path / "constraints.txt"
    broken.write_text("soupsieve==4.1.2\nbeautifulsoup4==4.15.0\n", encoding="utf-8")  # wants Python 3.11.5
    monkeypatch.setattr(pins, "PINS", broken)
    good, output = pins.resolved("3.11.2", "Linux")
    or_skip(good or "soupsieve" in output, output)
    assert not good and "3.11.5" in output


def test_what_is_fetched_is_told():
    """What `make` says before it fetches, for each system and with and without a GPU."""
    import json

    from minblip2.course import setup_size

    sizes = json.loads(pins.SIZES.read_text(encoding="utf-8"))
    assert set(sizes) == set(pins.PLATFORMS) and all(0.1 < size < 10 for size in sizes.values())
    linux = setup_size.sentence("Linux", "", False, sizes)
    assert f"{sizes['Linux']:.1f} GB" in linux and "TORCH=cpu" in linux
    for system, has_gpu in (("Linux", True), ("Darwin", False)):
        assert "TORCH=cpu" not in setup_size.sentence(system, "", has_gpu, sizes)
    asked = setup_size.sentence("Linux", "cpu", False, sizes)
    assert "GB" not in asked and "PyTorch for the CPU" in asked
    assert "GB" not in setup_size.sentence("Linux", "", False, {}), "nothing is made up"
