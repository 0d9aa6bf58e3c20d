"""On a CUDA GPU: the same losses, gradients and texts as on the CPU, the loop's options, and NCCL.

Run them by name where there is one, python -m pytest tests/test_cuda.py: the other tests do not see it.
"""

import copy
import itertools
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from minblip2.data.files import read_json
from minblip2.data.scene_dataset import write_scenes
from minblip2.lm.packed import COPIES
from minblip2.stage1 import Stage1
from minblip2.stage2 import Stage2
from minblip2.training.bridge import load_bridge, train_bridge
from minblip2.training.distributed import DistributedStage1
from minblip2.training.loop import checkpoint_blocks, train
from minblip2.training.recipes import RECIPES
from tests import spread_batch as one
from tests.batches import stage2_batch
from tests.pairs import PAIRS, prompts, write
from tests.parity import TINY, difference, randomise
from tests.short_recipe import SHORT
from tests.tiny_training import CONFIG, Numbers, Toy, toy_losses

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(),
                                reason="no CUDA GPU is in sight: name this file, so that none is hidden")
GPU = torch.device("cuda")


@pytest.fixture(autouse=True)
def full_precision(monkeypatch):
    """The scenes on the GPU, too; products of float32 in float32: the default, which others may have changed."""
    monkeypatch.setenv("MINBLIP2_DEVICE", "cuda")
    torch.set_float32_matmul_precision("highest")


def moved(inputs, device=GPU):
    return [value.to(device) if isinstance(value, torch.Tensor) else value for value in inputs]


def same_gradients(ours, theirs):
    longest = max(gradient.norm() for gradient in theirs.values())
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        scale = longest if name.endswith("key.bias") else gradient.norm()
        assert (ours[name].cpu() - gradient).norm() <= 1e-4 * scale, name


def test_stage_1_is_that_of_the_cpu():
    found = {}
    for device in ("cpu", "cuda"):
        model = one.stage1().to(device)
        negatives = moved((torch.tensor([3, 2, 6, 0, 1, 2, 5]), torch.tensor([2, 0, 4, 5, 6, 3, 1])), device)
        out = model(*moved(one.whole_batch(), device), negatives=negatives)
        out.loss.backward()
        found[device] = out, one.gradients(model)
    for name in ("loss", "itc", "itm", "itg", "itc_logits", "itm_logits", "word_logits"):
        assert difference(getattr(found["cuda"][0], name).cpu(), getattr(found["cpu"][0], name)) < 1e-5, name
    same_gradients(found["cuda"][1], found["cpu"][1])


def test_hard_negatives_are_drawn_from_other_images():
    model, batch = one.stage1().to(GPU), moved(one.whole_batch())
    same = batch[3][:, None] == batch[3]
    for _ in range(20):
        images, texts = model.sample_negatives(torch.randn(7, 7, device=GPU), same)
        rows = torch.arange(7, device=GPU)
        assert images.is_cuda and not same[rows, images].any() and not same[rows, texts].any()


@pytest.mark.parametrize("kind", PAIRS)
@pytest.mark.parametrize("checkpointed", [False, True], ids=["plain", "checkpointed"])
def test_stage_2_is_that_of_the_cpu(kind, checkpointed):
    torch.manual_seed(0)
    cpu = Stage2.from_stage1(randomise(Stage1(TINY, embed_dim=16)), PAIRS[kind](seed=3)[0]).train()
    gpu, inputs, found = copy.deepcopy(cpu).to(GPU), stage2_batch(prompts=(2, 0, 3)), {}
    if checkpointed:
        checkpoint_blocks(gpu)
    for name, model, given in (("cpu", cpu, inputs), ("gpu", gpu, moved(inputs))):
        loss = model(*given).loss
        loss.backward()
        found[name] = loss.detach().cpu(), one.gradients(model)
    assert difference(found["gpu"][0], found["cpu"][0]) < 1e-5
    same_gradients(found["gpu"][1], found["cpu"][1])


@pytest.mark.parametrize("kind", PAIRS)
@pytest.mark.parametrize("settings", [{}, {"beams": 3}, {"beams": 2, "min_length": 4, "repetition_penalty": 1.5}],
                         ids=str)
def test_what_is_written_is_what_the_cpu_writes(kind, settings):
    ours, _ = PAIRS[kind](seed=3)
    embeds, mask = prompts(ours)
    expected = write(ours, embeds, mask, max_length=8, **settings)
    written = write(ours.to(GPU), embeds.to(GPU), mask.to(GPU), max_length=8, **settings)
    assert torch.equal(written.cpu(), expected)


class BreaksOff(Numbers):
    """Thirty batches; then the machine stops."""

    def iterate(self, start=0):
        yield from itertools.islice(super().iterate(start), 30)
        raise KeyboardInterrupt


def test_a_stopped_run_goes_on(tmp_path):
    """Not bit for bit, as on a CPU: a GPU adds up in an order of its own."""
    def go(folder, batches=Numbers()):
        torch.manual_seed(0)
        return [record["loss"] for record in train(Toy(), toy_losses, batches, CONFIG, tmp_path / folder)]

    with pytest.raises(KeyboardInterrupt):
        go("stopped", BreaksOff())
    assert go("stopped") == pytest.approx(go("whole"), rel=1e-3)
    assert read_json(tmp_path / "stopped" / "seconds.json")["from_step"] == 24, "the last checkpoint before 30"


def test_a_compiled_run_is_the_run(tmp_path):
    losses = []
    for compiled in (False, True):
        torch.manual_seed(0)
        records = train(Toy(dropout=0.0), toy_losses, Numbers(), replace(CONFIG, steps=20, compile=compiled),
                        tmp_path / str(compiled))
        losses.append([record["loss"] for record in records])
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The scenes' recipe for a moment, in bfloat16: (folder, bridge)."""
    folder = tmp_path_factory.mktemp("runs")
    write_scenes(folder / "data", train=80, val=24, test=24, progress=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(RECIPES, "scenes", SHORT)
        yield folder / "scenes", train_bridge(SHORT, folder / "data", None, folder / "scenes")


def test_the_road_leads_over_the_gpu(trained):
    folder, bridge = trained
    assert bridge.device.type == "cuda" and all(p.is_cuda for p in bridge.stage2.parameters())
    loaded = load_bridge(folder)
    image = torch.randn(3, 64, bridge.backbones.encoder.width)
    before = len(COPIES)
    assert loaded.blip2.caption(image) == bridge.blip2.caption(image)
    assert len(bridge.retriever.caption(image, beams=2)) == 3
    assert len(COPIES) == before, "packed copies are for CPUs"


def test_a_batch_over_nccl(tmp_path):
    """One process has nobody to ask, but every call goes through NCCL: types, shapes and counts are what it takes."""
    batch, found = moved(one.whole_batch()), []
    dist.init_process_group("nccl", f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        for many in (False, True):
            model = one.stage1().to(GPU)
            torch.manual_seed(0)
            out = (DistributedStage1(model) if many else model)(*batch)
            out.loss.backward()
            found.append((out, one.gradients(model)))
    finally:
        dist.destroy_process_group()
    for name in ("loss", "itc", "itm", "itg", "itc_logits"):
        assert difference(getattr(found[1][0], name), getattr(found[0][0], name)) < 1e-5, name
    same_gradients({name: value.cpu() for name, value in found[1][1].items()},
                   {name: value.cpu() for name, value in found[0][1].items()})
