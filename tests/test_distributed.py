"""Two processes and more against one with the whole batch: losses, gradients, negatives, the loop, and its end."""

import functools
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from minblip2 import UserError
from minblip2.data.batches import PairBatches
from minblip2.data.scene_dataset import write_scenes
from minblip2.stage1 import Stage1
from minblip2.stage2 import Stage2
from minblip2.training import distributed
from minblip2.training.loop import read_log
from tests import spread_batch as one
from tests.parity import difference

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()) or sys.platform == "win32",
                                reason="this PyTorch has no gloo, through which processes on a CPU talk")


def torchrun(processes, *words):
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}",
            "-m", *map(str, words)]


def environment(**settings):
    return os.environ | {"OMP_NUM_THREADS": "1", **settings}


def succeed(command):
    """Run a command that must succeed; where it does not, what it said is what is told."""
    run = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, encoding="utf-8",
                         errors="replace", timeout=300)
    if run.returncode:
        pytest.fail(f"{command} ended with {run.returncode}:\n{run.stderr[-3000:]}", pytrace=False)
    return run


# --- one batch --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=[2, 3])
def found(request, tmp_path_factory):
    """What so many processes found, each for its part of the batch."""
    file = tmp_path_factory.mktemp("spread") / "found.pt"
    succeed(torchrun(request.param, "tests.spread_batch", file))
    return torch.load(file)


@functools.cache
def expected(name):
    """Losses and gradients of one process with the whole batch."""
    model, step = {"stage1": (one.stage1(), one.stage1_step), "stage2": (one.stage2(), one.stage2_step),
                   "given": (one.stage1(), functools.partial(one.stage1_step, negatives=GIVEN))}[name]
    return step(model, one.whole_batch()), one.gradients(model)


GIVEN = torch.tensor([3, 2, 6, 0, 1, 2, 5]), torch.tensor([2, 0, 4, 5, 6, 3, 1])


@pytest.mark.parametrize("name", ["stage1", "given", "stage2"])
def test_every_process_has_the_loss_of_the_whole_batch(found, name):
    for values, _ in found[name]:
        for key, value in expected(name)[0].items():
            assert difference(value, values[key]) <= 1e-5, key


@pytest.mark.parametrize("name", ["stage1", "given", "stage2"])
def test_every_gradient_is_that_of_one_process(found, name):
    for _, gradients in found[name]:
        theirs = expected(name)[1]
        assert gradients.keys() == theirs.keys()
        scale = max(gradient.abs().max() for gradient in theirs.values())
        for key, gradient in theirs.items():
            # key biases have no gradient but for rounding: compared with the largest there is
            small = gradient.abs().max() < 1e-6 * scale
            assert (gradients[key] - gradient).abs().max() <= 1e-5 * (scale if small else gradient.abs().max()), key


def test_the_negatives_are_drawn_over_the_whole_batch(found):
    """Other draws give another ITM; so equality above means equal draws, from all parts."""
    model = one.stage1()
    torch.manual_seed(1)
    other = model(*one.whole_batch()).itm
    assert abs(other - expected("stage1")[0]["itm"]) > 1e-3
    assert abs(found["stage1"][0][0]["itm"] - expected("stage1")[0]["itm"]) < 1e-5


def test_without_image_ids_every_image_is_its_own(found):
    model = one.stage1()
    one.stage1_step(model, [*one.whole_batch()[:3], None])
    assert difference(found["no ids"]["temperature"], model.temperature.grad) <= 1e-5


def test_features_of_your_own_are_shared_out(found):
    assert found["own features"] == pytest.approx(one.on_own_features(), rel=1e-5)


@pytest.mark.parametrize("kind", [Stage1, Stage2])
def test_a_forward_of_ones_own_is_not_left_out_in_silence(monkeypatch, kind):
    own = type("Own", (kind,), {"forward": lambda self, *inputs: kind.forward(self, *inputs)})
    model = own.__new__(own)
    assert distributed.over_processes(model) is model
    monkeypatch.setattr(distributed, "rank_and_size", lambda: (0, 2))
    with pytest.raises(UserError, match=f"Own has a forward of its own.*override parts of {kind.__name__}"):
        distributed.over_processes(model)


def test_only_what_is_trained_is_synchronised(found):
    numbers, trained = found["synchronised"]
    assert numbers == trained


def test_only_the_chosen_rows_travel(found):
    wanted, everywhere = found["fetched"]
    image, held = one.whole_batch()[0], everywhere[0][2]
    assert torch.equal(torch.cat([got for got, _, _ in everywhere]), image[wanted])
    holder = torch.repeat_interleave(torch.tensor(held))[wanted]
    assert [sent for _, sent, _ in everywhere] == holder.bincount(minlength=len(held)).tolist()


# --- which part of it -------------------------------------------------------------------------------------------------


def pairs(batch_size=7, **settings):
    ids = [[1, *range(3, 4 + i % 5), 2] for i in range(40)]
    return PairBatches([np.random.default_rng(0).normal(size=(20, 6, 4)).astype(np.float16)] * 2,
                       [i // 2 for i in range(40)], ids, range(100, 120), batch_size, 0, 0, keep_tokens=4, **settings)


@pytest.mark.parametrize("processes", [2, 3, 7])
def test_the_parts_are_the_batch(processes):
    whole, parts = pairs(), [pairs(rank=rank, processes=processes) for rank in range(processes)]
    for step in (0, 3, 17):
        batch, spread = whole.batch(step), [part.batch(step) for part in parts]
        assert all(len(part.image_features) in (7 // processes, -(-7 // processes)) for part in spread)
        for name in ("image_features", "text_ids", "text_mask", "image_ids"):
            assert torch.equal(torch.cat([getattr(part, name) for part in spread]), getattr(batch, name))


def test_more_processes_than_pairs_are_refused():
    with pytest.raises(UserError, match="a batch of 7 pairs cannot be spread over 8 processes"):
        pairs(processes=8)


# --- the whole command ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_scenes(folder, train=40, val=12, test=12, progress=False)
    return folder


@pytest.fixture(scope="module")
def uninterrupted(data, tmp_path_factory):
    """The folder of a run by one process."""
    out = tmp_path_factory.mktemp("one") / "run"
    succeed([sys.executable, "-m", "tests.spread_command", "train", "--data", data, "--out", out])
    return out


def assert_same_curve(one, other):
    """Equal to rounding. Stage 2 starts by making small differences between images large, and those of rounding too."""
    for stage, keys, allowed in (("stage1", ("loss", "itc", "itm", "itg", "itm_accuracy", "gradient"), 1e-4),
                                 ("stage2", ("loss",), 1e-3)):
        ours, theirs = ([{key: record[key] for key in ("step", "lr", *keys)}
                         for record in read_log(out / stage / "log.jsonl")] for out in (one, other))
        assert len(ours) == len(theirs)
        for record, expected in zip(ours, theirs, strict=True):
            assert record == pytest.approx(expected, rel=allowed), stage


def test_two_processes_train_as_one_does(data, uninterrupted, tmp_path):
    run = succeed(torchrun(2, "tests.spread_command", "train", "--data", data, "--out", tmp_path / "run"))
    assert_same_curve(uninterrupted, tmp_path / "run")
    # one process speaks, one writes
    assert run.stdout.count("kept in") == 1 and run.stderr.count("0/24 [00:00<?, ?step/s]") == 1
    assert not list((tmp_path / "run").rglob("*.part"))


def children(pid):
    """The processes that another has started."""
    listed = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True,
                            encoding="utf-8").stdout.split()
    return [int(child) for child in listed]


def test_one_of_two_is_killed_and_one_goes_on(data, uninterrupted, tmp_path):
    out, log = tmp_path / "run", tmp_path / "run" / "stage1" / "log.jsonl"
    command = ["tests.spread_command", "train", "--data", data, "--out", out]
    with open(tmp_path / "said", "w", encoding="utf-8") as said:
        process = subprocess.Popen(torchrun(2, *command), cwd=ROOT, env=environment(SPREAD_PAUSE="0.1"), stderr=said)
        deadline = time.monotonic() + 60
        while not (log.exists() and log.read_text(encoding="utf-8").count("\n") >= 6):  # behind the first checkpoint
            assert process.poll() is None and time.monotonic() < deadline, (tmp_path / "said").read_text("utf-8")
            time.sleep(0.02)
        os.kill(children(process.pid)[-1], signal.SIGKILL)
        assert process.wait(timeout=60) != 0
    said = (tmp_path / "said").read_text(encoding="utf-8")
    assert "another process of this run has ended" in said or "Signal 9 (SIGKILL)" in said
    assert "SIGKILL" in said and said.count("minblip2: ") <= 1
    assert (out / "stage1" / "checkpoint.pt").exists() and not (out / "stage1" / "model.safetensors").exists()

    succeed([sys.executable, "-m", *map(str, command)])
    assert_same_curve(uninterrupted, out)
    seconds = json.loads((out / "stage1" / "seconds.json").read_text(encoding="utf-8"))
    assert seconds["from_step"] >= 4, "it did not begin anew"


@pytest.mark.parametrize("broken, said", [
    ({"SPREAD_BROKEN": "1"}, "minblip2: something that only this process has met"),
    ({"SPREAD_BROKEN": "0"}, "minblip2: something that only this process has met")], ids=["one", "zero"])
def test_trouble_of_one_process_ends_all_and_is_told_once(data, uninterrupted, tmp_path, broken, said):
    run = subprocess.run(torchrun(2, "tests.spread_command", "train", "--data", data, "--out", tmp_path / "run"),
                         cwd=ROOT, env=environment(**broken), capture_output=True, text=True, timeout=100,
                         encoding="utf-8")
    assert run.returncode != 0 and run.stderr.count(said) == 1 and run.stderr.count("minblip2: ") == 1
    assert "exitcode  : 2" in run.stderr


def test_trouble_before_the_group_is_there(tmp_path):
    run = subprocess.run(torchrun(2, "minblip2", "train", "--recipe", "laptop", "--data", tmp_path),
                         cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=100, encoding="utf-8")
    assert run.returncode != 0 and run.stderr.count("minblip2: ") == 1 and "exitcode  : 2" in run.stderr


def test_the_one_that_is_left_says_what_to_do(tmp_path):
    """Without torchrun, which would be as quick to end it."""
    code = ("import os, torch\nfrom minblip2.training.distributed import DistributedBatch, process_group\n"
            "with process_group(torch.device('cpu')):\n    batch = DistributedBatch(torch.zeros(2, 1))\n    "
            "batch.rows_per_rank\n"
            "    if os.environ['RANK'] == '1':\n        os._exit(1)\n    batch.gather(torch.zeros(2, 1))\n")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    both = [subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stderr=subprocess.PIPE, text=True,
                             env=environment(TORCHELASTIC_RUN_ID="none", RANK=str(rank), WORLD_SIZE="2",
                                             MASTER_ADDR="127.0.0.1", MASTER_PORT=port),
                             encoding="utf-8")
            for rank in (0, 1)]
    said = [process.communicate(timeout=60)[1] for process in both]
    assert "UserError: another process of this run has ended" in said[0] and "last checkpoint" in said[0]
