"""Blocks that forget have the same loss and the same gradients, and keep less."""

import pytest
import torch

from minblip2.stage1 import Stage1
from minblip2.stage2 import Stage2
from minblip2.training.loop import checkpoint_blocks

from .batches import END
from .batches import stage2_batch as batch
from .pairs import PAIRS
from .parity import TINY, difference, randomise


@pytest.fixture(params=PAIRS)
def stage2(request):
    torch.manual_seed(0)
    return Stage2.from_stage1(randomise(Stage1(TINY, embed_dim=16)), PAIRS[request.param](seed=3)[0])


def kept(model, inputs):
    """Loss, gradients, and how many numbers autograd keeps for them."""
    model.zero_grad()
    seen = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: seen.append(tensor.numel()) or tensor, lambda x: x):
        loss = model(*inputs).loss
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}, sum(seen)


def test_same_loss_and_gradients_with_less_kept(stage2):
    inputs = batch(prompts=(2, 0, 3))
    plain_loss, plain, plain_kept = kept(stage2, inputs)
    checkpoint_blocks(stage2)
    loss, gradients, few = kept(stage2, inputs)
    assert difference(loss, plain_loss) < 1e-6 and gradients.keys() == plain.keys()
    assert all(difference(gradients[name], plain[name]) < 1e-5 for name in plain if not name.endswith("key.bias"))
    assert few < plain_kept


def test_what_is_written_stays_the_same(stage2):
    image, prompt_ids, prompt_mask, *_ = batch(prompts=(2, 0, 3))
    before = stage2.generate(image, prompt_ids, prompt_mask, eos_id=END, max_length=6, beams=2)
    checkpoint_blocks(stage2)
    assert torch.equal(stage2.generate(image, prompt_ids, prompt_mask, eos_id=END, max_length=6, beams=2), before)
