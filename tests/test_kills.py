"""Killed or stopped at random moments, whatever was begun comes to the same end, and leaves nothing lying about.

The cache is killed in test_road, one step after the other in test_train, a download in test_download. KILLS: how often.
"""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from minblip2.data.scene_dataset import write_scenes
from minblip2.training.shipping import SHIPPED

from .pictures import smooth

ROOT = Path(__file__).resolve().parents[1]
KILLS = int(os.environ.get("KILLS", 3))
pytestmark = pytest.mark.skipif(os.name == "nt", reason="signals are POSIX's")


def kill_again_and_again(words, seconds, seed, **environment):
    """Start a command KILLS times, and kill (SIGKILL) or stop it (SIGINT) in turn at random moments; then let it end.

    A command that ends by itself is none the worse for it. Returns what the last one has said.
    """
    moments, settings = random.Random(seed), os.environ | {"PYTHONPATH": str(ROOT), **environment}
    command = [sys.executable, "-m", *map(str, words)]
    for turn in range(KILLS):
        process = subprocess.Popen(command, cwd=ROOT, env=settings, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                   text=True, encoding="utf-8", start_new_session=True)
        time.sleep(moments.uniform(1.0, seconds))
        os.killpg(process.pid, signal.SIGINT if turn % 2 else signal.SIGKILL)
        _, said = process.communicate(timeout=120)
        if turn % 2 and process.returncode != 0:
            assert process.returncode in (130, -signal.SIGINT) and "Traceback" not in said, said
            # before its first line, and after its last, Python itself ends a process that is stopped, and says nothing
            assert process.returncode != 130 or "minblip2: stopped; the same command goes on" in said, said
    done = subprocess.run(command, cwd=ROOT, env=settings, capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    return done.stdout


def litter(folder):
    return [path for path in folder.rglob("*") if path.suffix in (".part", ".partial", ".pt")]


def test_train(tmp_path):
    data = tmp_path / "data"
    write_scenes(data, train=40, val=12, test=12, progress=False)
    words = ("tests.spread_command", "train", "--data", data, "--out")
    subprocess.run([sys.executable, "-m", *map(str, words), tmp_path / "whole"], check=True, cwd=ROOT,
                   capture_output=True)
    kill_again_and_again([*words, tmp_path / "killed"], 14, seed=1, SPREAD_PAUSE="0.1")
    for part in ("vit", "lm", "stage1", "stage2"):
        one, other = (load_file(tmp_path / run / part / "model.safetensors") for run in ("whole", "killed"))
        assert one.keys() == other.keys() and all((one[name] == other[name]).all() for name in one), part
    assert litter(tmp_path) == []
    names = [sorted(path.relative_to(tmp_path / run).as_posix() for path in (tmp_path / run).rglob("*"))
             for run in ("whole", "killed")]
    assert names[0] == names[1]


def test_caption(tmp_path):
    (tmp_path / "pictures").mkdir()
    for i in range(60):
        smooth(64, 64, i).resize((1600, 1200)).save(tmp_path / "pictures" / f"{i:02}.png")
    words = ("minblip2", "caption", "--run", SHIPPED, tmp_path / "pictures", "--csv")
    subprocess.run([sys.executable, "-m", *map(str, words), tmp_path / "whole.csv"], check=True, cwd=ROOT,
                   capture_output=True)
    kill_again_and_again([*words, tmp_path / "killed.csv"], 8, seed=2)
    assert (tmp_path / "whole.csv").read_text() == (tmp_path / "killed.csv").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["killed.csv", "pictures", "whole.csv"]
