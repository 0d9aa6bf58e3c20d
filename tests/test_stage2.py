"""Stage 2 against transformers' losses, and frozen means frozen."""

import hashlib

import pytest
import torch

from minblip2 import UserError
from minblip2.stage1 import Stage1
from minblip2.stage2 import Stage2

from .parity import TINY, difference, lengths_mask, randomise
from .test_llama import llama_pair
from .test_opt import opt_pair

Q, END = TINY.queries, 2


@pytest.fixture(params=["opt", "llama"])
def pair(request):
    ours, theirs = (opt_pair if request.param == "opt" else llama_pair)(seed=3)
    stage2 = Stage2.from_stage1(randomise(Stage1(TINY, shared_width=16)), ours)
    torch.nn.init.normal_(stage2.projection.weight, std=0.3)
    return stage2, theirs


def batch(lengths=(5, 2, 7), side="right", seed=0):
    generator = torch.Generator().manual_seed(seed)
    mask = lengths_mask([*lengths], side)
    return (sum(torch.randn(len(lengths), n, TINY.image_width, generator=generator) for n in (1, 6)),
            torch.randint(3, 40, mask.shape, generator=generator), mask)


def checksum(module):
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode() + tensor.numpy().tobytes())
    return digest.hexdigest()


@pytest.mark.parametrize("prompt_length", [0, 1])
@pytest.mark.parametrize("lengths", [(5, 2, 7), (4,)], ids=str)
def test_loss_equals_transformers(pair, prompt_length, lengths):
    (stage2, theirs), (image, ids, mask) = pair, batch(lengths)
    soft = stage2.soft_prompt(image)
    embeds = torch.cat([soft, theirs.get_input_embeddings()(ids)], dim=1)
    visible = torch.cat([torch.ones(len(ids), Q, dtype=torch.bool), mask], dim=1)
    labels = torch.cat([torch.full((len(ids), Q), -100), ids.masked_fill(~mask, -100)], dim=1)
    labels[:, Q:Q + prompt_length] = -100
    expected = theirs(inputs_embeds=embeds, attention_mask=visible.long(), labels=labels).loss
    out = stage2(image, ids, mask, prompt_length)
    assert difference(out.loss, expected) < 1e-5
    assert out.word_logits.shape == (int((labels != -100).sum()), stage2.lm.vocabulary)
    ours, reference = (torch.autograd.grad(loss, stage2.qformer.query_tokens)[0] for loss in (out.loss, expected))
    assert difference(ours, reference) < 1e-4 and reference.abs().max() > 0


def test_the_language_model_stays_frozen_while_the_bridge_learns(pair):
    stage2, (image, ids, mask) = pair[0], batch()
    before, bridge = checksum(stage2.lm), checksum(stage2.qformer)
    assert stage2.train() is stage2 and stage2.qformer.training and not stage2.lm.training
    assert not any(module.training for module in stage2.lm.modules())
    optimiser = torch.optim.AdamW((p for p in stage2.parameters() if p.requires_grad), lr=1e-2, weight_decay=0.1)
    first = stage2(image, ids, mask).loss
    for _ in range(15):
        loss = stage2(image, ids, mask).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert loss < 0.9 * first and checksum(stage2.qformer) != bridge
    assert checksum(stage2.lm) == before and all(p.grad is None for p in stage2.lm.parameters())
    trained = {id(p) for group in optimiser.param_groups for p in group["params"]}
    assert trained.isdisjoint(id(p) for p in stage2.lm.parameters())
    without = [name for name, p in stage2.named_parameters() if p.requires_grad and p.grad is None]
    assert without == [] and stage2.qformer.query_tokens.grad.abs().amax(dim=-1).min() > 0
    assert stage2.eval().training is False and not stage2.lm.training


def test_stage1_is_copied_not_shared(pair):
    stage1 = randomise(Stage1(TINY))
    stage2 = Stage2.from_stage1(stage1, pair[0].lm)
    assert torch.equal(stage2.vision_norm.weight, stage1.vision_norm.weight)
    with torch.no_grad():
        stage2.vision_norm.weight.zero_()
        stage2.qformer.query_tokens.zero_()
    assert stage1.vision_norm.weight.abs().min() > 0 and stage1.qformer.query_tokens.abs().max() > 0


def test_padding_and_other_rows_change_nothing(pair):
    stage2, (image, ids, mask) = pair[0], batch()
    together = stage2(image, ids, mask).word_logits
    alone = [stage2(image[i:i + 1], ids[i:i + 1, :n], mask[i:i + 1, :n]).word_logits for i, n in enumerate((5, 2, 7))]
    assert difference(together, torch.cat(alone)) < 1e-5


def test_a_tokenizer_larger_than_the_model_is_refused(pair):
    norm, qformer, lm = pair[0].vision_norm, randomise(Stage1(TINY)).qformer, pair[0].lm
    with pytest.raises(UserError, match=f"{lm.vocabulary + 1} ids.*{lm.vocabulary}"):
        Stage2(norm, qformer, lm, vocabulary_needed=lm.vocabulary + 1)
    Stage2(norm, qformer, lm, vocabulary_needed=lm.vocabulary)


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("lengths", [(3, 1, 5), (3, 0, 5), (0, 0, 0)], ids=str)
def test_generation_with_prompts_of_different_lengths_equals_one_by_one_and_transformers(pair, beams, lengths, side):
    (stage2, theirs), (image, ids, mask) = pair, batch(lengths, side)
    together = stage2.generate(image, ids, mask, end=END, max_length=8, beams=beams)
    for i, n in enumerate(lengths):
        own, row = ids[i:i + 1, mask[i]], together[i].tolist()
        alone = stage2.generate(image[i:i + 1], own, mask[i:i + 1, mask[i]], end=END, max_length=8, beams=beams)
        embeds = torch.cat([stage2.soft_prompt(image[i:i + 1]), theirs.get_input_embeddings()(own)], dim=1)
        expected = theirs.generate(inputs_embeds=embeds, attention_mask=torch.ones(1, Q + n, dtype=torch.long),
                                   num_beams=beams, do_sample=False, max_new_tokens=8, eos_token_id=END,
                                   pad_token_id=END)
        for other in (alone[0].tolist(), expected[0].tolist()):
            length = max(len(row), len(other))
            assert row + [END] * (length - len(row)) == other + [END] * (length - len(other))


def test_calibrated_prompts_spread_like_words_around_their_mean(pair):
    stage2, _ = pair
    image = batch(lengths=(5,) * 12)[0]
    stage2.eval().calibrate(image)
    soft, words = stage2.soft_prompt(image), stage2.lm.embed(torch.arange(stage2.lm.vocabulary))
    assert torch.allclose((soft - soft.mean(dim=0)).std(), words.std(), rtol=1e-4)
    assert torch.allclose(soft.mean(dim=(0, 1)), words.mean(dim=0), atol=1e-4)
    once = soft.clone()
    stage2.calibrate(image)
    assert torch.allclose(stage2.soft_prompt(image), once, atol=1e-4), "what is calibrated stays as it is"
