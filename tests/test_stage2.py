"""Stage 2 against transformers' losses, and frozen means frozen."""

import hashlib

import pytest
import torch
import torch.nn.functional as F

from minblip2 import UserError
from minblip2.stage1 import Stage1
from minblip2.stage2 import Stage2, split_prefix

from .batches import END
from .batches import stage2_batch as batch
from .pairs import PAIRS
from .parity import TINY, difference, randomise


@pytest.fixture(params=PAIRS)
def pair(request):
    ours, theirs = PAIRS[request.param](seed=3)
    stage2 = Stage2.from_stage1(randomise(Stage1(TINY, embed_dim=16)), ours)
    torch.nn.init.normal_(stage2.projection.weight, std=0.3)
    return stage2, theirs


def their_logits(theirs, given, attention_mask, ids, mask):
    """What transformers' forward predicts for each word of texts (b t) after `given` embeddings (b k e)."""
    words = theirs.get_input_embeddings()
    if theirs.config.is_encoder_decoder:
        return theirs(inputs_embeds=given, attention_mask=attention_mask.long(),
                      decoder_input_ids=theirs._shift_right(ids),
                      decoder_attention_mask=F.pad(mask, (1, 0), value=True)[:, :-1].long()).logits
    before = int(attention_mask.shape[1])
    attention_mask = torch.cat([attention_mask, mask], dim=1)
    places = attention_mask.long().cumsum(dim=1)  # transformers' Llama counts padding unless told not to
    logits = theirs(inputs_embeds=torch.cat([given, words(ids)], dim=1), attention_mask=attention_mask.long(),
                    position_ids=(places - 1).clamp(min=0)).logits
    newest = places[:, :before].argmax(dim=1)  # what stands last before the text
    first = logits[torch.arange(len(ids)), newest]
    return torch.cat([first[:, None], logits[:, before:-1]], dim=1)


def checksum(module):
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode() + tensor.numpy().tobytes())
    return digest.hexdigest()


@pytest.mark.parametrize("side", ["left", "right"])  # transformers' T5 takes padding between tokens for distance
@pytest.mark.parametrize("lengths, prompts", [((5, 2, 7), (0, 0, 0)), ((5, 2, 7), (1, 1, 1)), ((4, 6, 1), (3, 0, 5)),
                                              ((4,), (2,)), ((1,), (0,))], ids=str)
def test_logits_and_loss_equal_transformers(pair, lengths, prompts, side):
    stage2, theirs = pair
    side = "right" if theirs.config.is_encoder_decoder else side
    image, prompt_ids, prompt_mask, ids, mask = batch(lengths, prompts, side)
    given = torch.cat([stage2.soft_prompt(image), theirs.get_input_embeddings()(prompt_ids)], dim=1)
    attention_mask = torch.cat([torch.ones(len(ids), TINY.num_queries, dtype=torch.bool), prompt_mask], dim=1)
    expected = their_logits(theirs, given, attention_mask, ids, mask)
    loss = F.cross_entropy(expected[mask], ids[mask])
    out = stage2(image, prompt_ids, prompt_mask, ids, mask)
    assert difference(out.word_logits, expected[mask]) < 1e-5 and difference(out.loss, loss) < 1e-5
    ours, reference = (torch.autograd.grad(value, stage2.qformer.query_tokens)[0] for value in (out.loss, loss))
    assert difference(ours, reference) < 1e-4 and reference.abs().max() > 0


def test_the_language_models_loss_is_transformers_own(pair):
    """With one text of full length, what transformers computes from labels is the same number."""
    (stage2, theirs), (image, prompt_ids, prompt_mask, ids, mask) = pair, batch((6, 6), (2, 2))
    given = torch.cat([stage2.soft_prompt(image), theirs.get_input_embeddings()(prompt_ids)], dim=1)
    if theirs.config.is_encoder_decoder:
        expected = theirs(inputs_embeds=given, labels=ids).loss
    else:
        embeds = torch.cat([given, theirs.get_input_embeddings()(ids)], dim=1)
        expected = theirs(inputs_embeds=embeds, labels=F.pad(ids, (given.shape[1], 0), value=-100)).loss
    assert difference(stage2(image, prompt_ids, prompt_mask, ids, mask).loss, expected) < 1e-5


def test_the_language_model_stays_frozen_while_the_bridge_learns(pair):
    stage2, inputs = pair[0], batch(prompts=(2, 0, 1))
    before, bridge = checksum(stage2.lm), checksum(stage2.qformer)
    assert stage2.train() is stage2 and stage2.qformer.training and not stage2.lm.training
    assert not any(module.training for module in stage2.lm.modules())
    optimiser = torch.optim.AdamW((p for p in stage2.parameters() if p.requires_grad), lr=1e-2, weight_decay=0.1)
    first = stage2(*inputs).loss
    for _ in range(15):
        loss = stage2(*inputs).loss
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


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_and_other_rows_change_nothing(pair, side):
    stage2, (image, prompt_ids, prompt_mask, ids, mask) = pair[0], batch(prompts=(2, 0, 4), side=side)
    together = stage2(image, prompt_ids, prompt_mask, ids, mask).word_logits
    alone = [stage2(image[i:i + 1], prompt_ids[i:i + 1, prompt_mask[i]], prompt_mask[i:i + 1, prompt_mask[i]],
                    ids[i:i + 1, mask[i]], mask[i:i + 1, mask[i]]).word_logits for i in range(3)]
    assert difference(together, torch.cat(alone)) < 1e-5


@pytest.mark.parametrize("words", [0, 1, 2, 5, 8])
def test_the_prefix_ends_between_the_first_word_and_the_middle(words):
    end, rows = 9, 3000
    text = torch.arange(10, 10 + words).tolist()
    row = torch.tensor([*text, end, 0, 0])
    ids, mask = row.expand(rows, -1), (torch.arange(len(row)) <= words).expand(rows, -1)
    given, given_mask, rest, rest_mask = split_prefix(ids, mask, end, torch.Generator().manual_seed(0))
    cuts = given_mask.sum(dim=1) - 1
    for cut in cuts.unique().tolist():
        i = int((cuts == cut).nonzero()[0])
        assert given[i][given_mask[i]].tolist() == [*text[:cut], end]
        assert rest[i][rest_mask[i]].tolist() == [*text[cut:], end]
    possible = range(1, words // 2 + 1) if words > 1 else [0]
    assert sorted(cuts.unique().tolist()) == list(possible)
    shares = torch.bincount(cuts)[list(possible)] / rows
    assert (shares - 1 / len(possible)).abs().max() < 0.05


def test_a_tokenizer_larger_than_the_model_is_refused(pair):
    norm, qformer, lm = pair[0].vision_norm, randomise(Stage1(TINY)).qformer, pair[0].lm
    with pytest.raises(UserError, match=f"{lm.vocab_size + 1} ids.*{lm.vocab_size}"):
        Stage2(norm, qformer, lm, vocab_needed=lm.vocab_size + 1)
    Stage2(norm, qformer, lm, vocab_needed=lm.vocab_size)


@pytest.mark.parametrize("beams, repetition_penalty", [(1, 1.0), (1, 3.0), (3, 1.0), (3, 3.0)])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("lengths", [(3, 1, 5), (3, 0, 5), (0, 0, 0)], ids=str)
def test_generation_with_prompts_of_different_lengths_equals_one_by_one_and_transformers(
        pair, beams, repetition_penalty, lengths, side):
    (stage2, theirs), (image, ids, mask, *_) = pair, batch((1, 1, 1), lengths, side)
    settings = dict(max_length=8, beams=beams, repetition_penalty=repetition_penalty)
    together = stage2.generate(image, ids, mask, eos_id=END, **settings)
    for i, n in enumerate(lengths):
        own, row = ids[i:i + 1, mask[i]], together[i].tolist()
        alone = stage2.generate(image[i:i + 1], own, mask[i:i + 1, mask[i]], eos_id=END, **settings)
        embeds = torch.cat([stage2.soft_prompt(image[i:i + 1]), theirs.get_input_embeddings()(own)], dim=1)
        whole = torch.ones(1, TINY.num_queries + n, dtype=torch.long)
        expected = theirs.generate(inputs_embeds=embeds, attention_mask=whole, num_beams=beams, do_sample=False,
                                   max_new_tokens=8, eos_token_id=END, pad_token_id=END,
                                   repetition_penalty=repetition_penalty)
        start = int(theirs.config.is_encoder_decoder)  # transformers also returns the id that the decoder began with
        for other in (alone[0].tolist(), expected[0, start:].tolist()):
            length = max(len(row), len(other))
            assert row + [END] * (length - len(row)) == other + [END] * (length - len(other))


def test_calibrated_prompts_spread_like_words_around_their_mean(pair):
    stage2, _ = pair
    image = batch(lengths=(5,) * 12)[0]
    stage2.train().match_embedding_scale(image)  # in evaluation mode, whatever it was in: dropout is no difference
    soft, words = stage2.soft_prompt(image), stage2.lm.embed(torch.arange(stage2.lm.vocab_size))
    assert torch.allclose((soft - soft.mean(dim=0)).std(), words.std(), rtol=1e-4)
    assert torch.allclose(soft.mean(dim=(0, 1)), words.mean(dim=0), atol=1e-4)
    once = soft.clone()
    stage2.match_embedding_scale(image)
    assert torch.allclose(stage2.soft_prompt(image), once, atol=1e-4), "what is calibrated stays as it is"
    with pytest.raises(UserError, match="give several that differ"):
        stage2.match_embedding_scale(image[:1].expand(3, -1, -1))
    assert torch.allclose(stage2.soft_prompt(image), once, atol=1e-4), "what is refused changes nothing"
