"""Stage 1 against plain Python loops, and the properties that make its three losses what they are."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from minblip2 import UserError, masks, reference
from minblip2.data.batches import Batch
from minblip2.stage1 import Stage1
from minblip2.training.stages import stage1_losses
from minblip2.vit import ViT, ViTConfig

from .batches import SEP
from .batches import stage1_batch as batch
from .parity import TINY, difference, note, randomise


@pytest.fixture
def model():
    return randomise(Stage1(TINY, embed_dim=16))


@pytest.mark.parametrize("image_ids", [None, [7, 8, 7, 9], [5, 5, 6, 5]], ids=str)
@pytest.mark.parametrize("seed", [0, 1])
def test_losses_equal_plain_loops(image_ids, seed):
    model = randomise(Stage1(TINY, embed_dim=16), seed).double()
    with torch.no_grad():
        model.temperature.fill_(0.3)
        image, ids, mask = batch(seed=seed, pad_to=9)
        negatives = torch.tensor([1, 2, 3, 0]), torch.tensor([2, 3, 1, 1])
        which = None if image_ids is None else torch.tensor(image_ids)
        out = model(image.double(), ids, mask, which, negatives)
        texts = [row[:n].tolist() for row, n in zip(ids, mask.sum(dim=1), strict=True)]
        expected = reference.stage1_losses(model, image.double(), texts, image_ids or [0, 1, 2, 3],
                                           [draw.tolist() for draw in negatives])
    for ours, theirs in zip((out.itc, out.itm, out.itg), expected, strict=True):
        assert note(abs(ours.item() - theirs) / max(1, abs(theirs))) <= 1e-6
    assert out.loss.item() == pytest.approx(sum(expected), abs=3e-6)
    assert out.itm_labels.tolist() == [1] * 4 + [0] * 8 and out.word_logits.shape == (int(mask.sum()) - 4, 50)


def test_negatives_never_share_the_image_and_follow_the_softmax(model):
    image_ids = torch.tensor([0, 0, 1, 2, 1])
    same = image_ids[:, None] == image_ids
    itc_logits = torch.randn(5, 5, generator=torch.Generator().manual_seed(0)) * 1.5
    torch.manual_seed(0)
    draws = [model.sample_negatives(itc_logits, same) for _ in range(8000)]
    for side, logits in ((0, itc_logits.T), (1, itc_logits)):
        counts = torch.stack([F.one_hot(draw[side], 5) for draw in draws]).float().mean(0)
        assert (counts[same] == 0).all()
        expected = torch.where(same, -math.inf, logits).softmax(dim=1)
        assert (counts - expected).abs().max() < 5 * 0.5 / 8000**0.5


@pytest.mark.parametrize("image_ids", [[3], [4, 4, 4]], ids=str)
def test_a_batch_without_a_negative_says_so(model, image_ids):
    image, ids, mask = batch((4, 3, 5)[: len(image_ids)])
    with pytest.raises(UserError, match="one image only"):
        model(image, ids, mask, torch.tensor(image_ids))
    with pytest.raises(UserError, match="one image only"):
        Stage1(TINY)(image[:1], ids[:1], mask[:1])


def test_batch_of_one_with_given_negatives(model):
    image, ids, mask = batch((4,))
    out = model(image, ids, mask, negatives=(torch.tensor([0]), torch.tensor([0])))
    assert out.itc_logits.shape == (1, 1) and out.itc.item() == 0 and out.loss.isfinite()


def test_a_fresh_model_starts_where_arithmetic_says():
    torch.manual_seed(0)
    image, ids, mask = batch((6,) * 8)
    with torch.no_grad():
        out = Stage1(TINY, embed_dim=16).eval()(image, ids, mask)
    assert abs(out.itc - math.log(8)) < 0.1
    # the head has read nothing yet: as good as any constant, and 0.6365 is the least that a constant can reach at 1 : 2
    constant = F.cross_entropy(out.itm_logits.mean(0).expand(24, 2), out.itm_labels)
    assert abs(out.itm - constant) < 0.02 and out.itm > 0.6365 - 0.01
    assert abs(out.itg - math.log(TINY.vocab_size)) < 0.1


def test_one_batch_is_learned_by_heart():
    torch.manual_seed(0)
    model, inputs = Stage1(TINY, embed_dim=16), batch()
    negatives = torch.tensor([1, 2, 3, 0]), torch.tensor([2, 3, 0, 1])
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    first = model(*inputs, negatives=negatives)
    for _ in range(200):
        out = model(*inputs, negatives=negatives)
        optimiser.zero_grad()
        out.loss.backward()
        optimiser.step()
    # label smoothing leaves a floor under itc and itg
    assert out.itm < 0.1 * first.itm and out.itc < 0.5 * first.itc and out.itg < 0.5 * first.itg


def test_temperature_divides_and_nothing_else(model):
    inputs, negatives = batch(), (torch.tensor([1, 2, 3, 0]), torch.tensor([2, 3, 0, 1]))
    with torch.no_grad():
        model.temperature.fill_(0.5)
        half = model(*inputs, negatives=negatives)
        model.temperature.fill_(1.0)
        one = model(*inputs, negatives=negatives)
    assert one.itc_logits.abs().max() <= 1 and difference(half.itc_logits, 2 * one.itc_logits) < 1e-6
    assert torch.equal(half.itm, one.itm) and torch.equal(half.itg, one.itg)


def test_gradient_reaches_every_parameter_that_should_have_one(model):
    image, ids, mask = batch()
    model(image, ids, mask, negatives=(torch.tensor([1, 2, 3, 0]), torch.tensor([2, 3, 0, 1]))).loss.backward()
    without = {name for name, p in model.named_parameters() if p.grad is None or p.grad.abs().max() < 1e-9}
    # adding the same number to every score of a row changes no softmax: key biases cannot learn, in the original either
    assert {name for name in without if not name.endswith("attention.key.bias")} == set()
    assert model.temperature.grad.abs() > 0
    assert model.qformer.token_embedding.weight.grad[model.qformer.dec_id].abs().max() > 0


def test_caption_equals_writing_without_a_cache(model):
    image, text = batch()[0], torch.full((4, 1), TINY.vocab_size - 1)
    with torch.no_grad():
        model.qformer.lm_head.bias[SEP] += 1.0  # so that some captions end early
        ours, kv = model.caption(image, eos_id=SEP, max_length=9), model.image_kv(image)
        for _ in range(9):
            mask = masks.multimodal_causal(TINY.num_queries, torch.ones_like(text, dtype=torch.bool))
            word = model.qformer.lm_logits(model.qformer(kv, text, mask).text[:, -1]).argmax(1, keepdim=True)
            text = torch.cat([text, torch.where((text == SEP).any(1, keepdim=True), SEP, word)], dim=1)
    assert ours.tolist() == text[:, 1:].tolist()
    assert len({(row == SEP).sum().item() for row in ours}) > 1


def test_beam_captions_of_a_batch_are_those_of_each_image(model):
    image = batch()[0]
    together = model.caption(image, eos_id=SEP, max_length=8, beams=3)
    for i in range(4):
        alone = model.caption(image[i:i + 1], eos_id=SEP, max_length=8, beams=3)[0]
        assert together[i].tolist() == alone.tolist() + [SEP] * (together.shape[1] - len(alone))


def test_features_that_are_no_numbers_give_a_loss_that_is_none(model):
    """`train` reports such a loss with its images; drawing negatives must not stop before it can."""
    image, ids, mask = batch()
    image[1, 0, 0] = torch.nan
    assert model(image, ids, mask).loss.isnan()


def test_maps_need_no_parameter_that_learns(model):
    image, ids, mask = batch()
    learning = model.match_map(image, ids, mask)
    frozen = model.requires_grad_(False).match_map(image, ids, mask)
    assert torch.equal(learning, frozen) and learning.shape == (4, 6) and (learning > 0).any()


def test_a_fresh_models_first_values():
    """LAVIS: ln_vision is a plain LayerNorm (eps 1e-5), labels are smoothed by 0.1, the temperature begins at 0.07."""
    stage1 = Stage1(TINY)
    assert stage1.vision_norm.eps == 1e-5 and stage1.label_smoothing == 0.1
    assert stage1.temperature.item() == pytest.approx(0.07)
    assert all((layer.bias == 0).all() for layer in stage1.qformer.modules() if isinstance(layer, nn.Linear))
    torch.manual_seed(0)
    vit = ViT(ViTConfig(width=48, layers=1, heads=2, mlp_width=8))
    assert all(0.015 < table.std() < 0.025 for table in (vit.class_token, vit.position_embedding))
    assert all((scale == 1).all() for scale in (vit.blocks[0].attention_scale, vit.blocks[0].mlp_scale))


def test_torch_compile_computes_the_same():
    model, negatives = randomise(Stage1(TINY, embed_dim=16)), (torch.tensor([1, 2, 0]), torch.tensor([2, 0, 1]))
    inputs = [part[:3] for part in batch()]
    compiled = torch.compile(model, backend="eager")(*inputs, negatives=negatives)
    assert torch.allclose(compiled.loss, model(*inputs, negatives=negatives).loss, atol=1e-5)


def test_what_a_subclass_adds_to_the_loss_is_trained():
    class Own(Stage1):
        def forward(self, *inputs):
            out = super().forward(*inputs)
            return out._replace(loss=out.loss + 100)

    model = randomise(Own(TINY, embed_dim=16))
    image, ids, mask = batch()
    given = Batch(image, ids, mask, torch.arange(len(image)))
    torch.manual_seed(0)
    values = stage1_losses(model, given, loss_weights=(0.5, 1.0, 2.0))
    right = 0.5 * values["itc"] + values["itm"] + 2 * values["itg"] + 100
    assert values["loss"].item() == pytest.approx(right.item(), rel=1e-5)


def test_negatives_are_drawn_from_the_logits_of_itc(monkeypatch):
    """Divided by the temperature, as in LAVIS."""
    model, seen, draw = randomise(Stage1(TINY, embed_dim=16)), [], Stage1.sample_negatives
    monkeypatch.setattr(model, "sample_negatives", lambda *args: seen.append(args[0]) or draw(model, *args))
    assert torch.equal(model(*batch()).itc_logits, seen[0])


def test_maps_are_of_the_logit_match():
    model, (image, ids, mask) = randomise(Stage1(TINY, embed_dim=16)), batch()
    with torch.no_grad():
        whole = model.match_map(image, ids, mask)
        model.itm_head.weight[0].zero_()  # "no match" has no say in it
        assert torch.equal(model.match_map(image, ids, mask), whole) and (whole >= 0).all()


@pytest.mark.parametrize("dtype", [torch.long, torch.uint8, torch.float32])
def test_a_mask_of_ones_and_zeros_counts_as_a_boolean_one(dtype):
    """As tokenizers return them; a float mask would be added to the scores."""
    model, (image, ids, mask) = randomise(Stage1(TINY, embed_dim=16)), batch()
    negatives = torch.tensor([1, 2, 3, 0]), torch.tensor([3, 0, 1, 2])
    right, other = (model(image, ids, one, negatives=negatives) for one in (mask, mask.to(dtype)))
    assert right.loss == other.loss
    assert torch.equal(model.match_map(image, ids, mask), model.match_map(image, ids, mask.to(dtype)))
