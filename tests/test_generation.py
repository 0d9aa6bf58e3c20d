"""Greedy, beam and nucleus decoding against transformers' generate, and alone against in a batch."""

import pytest
import torch

from minblip2 import UserError
from minblip2.attention import KVCache
from minblip2.generation import generate, process_logits, top_p_filter

from .batches import END
from .pairs import PAIRS, prompts, write


@pytest.fixture(scope="module", params=PAIRS)
def pair(request):
    ours, theirs = PAIRS[request.param](seed=3)
    louder = {"opt": 3.0, "llama": 1.5, "t5": 2.0}[request.param]
    with torch.no_grad():  # now and then the end is the likeliest word, so texts of many lengths appear
        for table in ((ours.token_embedding, theirs.get_input_embeddings()) if theirs.config.tie_word_embeddings and
                      not hasattr(ours, "encoder") else (ours.lm_head, theirs.get_output_embeddings())):
            table.weight[END] *= louder
    return ours, theirs


def expected(theirs, embeds, mask, **settings):
    ids = theirs.generate(inputs_embeds=embeds, attention_mask=mask.long(), do_sample=False, eos_token_id=END,
                          pad_token_id=END, bos_token_id=None, early_stopping=False, **settings)
    return ids[:, 1:] if theirs.config.is_encoder_decoder else ids  # without the id that a decoder begins with


@pytest.mark.parametrize("repetition_penalty", [1.0, 1.5])
@pytest.mark.parametrize("min_length", [0, 4])
@pytest.mark.parametrize("seed", [0, 1])
def test_greedy_equals_transformers(pair, repetition_penalty, min_length, seed):
    embeds, mask = prompts(pair[0], seed=seed)
    ours = write(pair[0], embeds, mask, max_length=12, min_length=min_length, repetition_penalty=repetition_penalty)
    theirs = expected(pair[1], embeds, mask, max_new_tokens=12, min_new_tokens=min_length,
                      repetition_penalty=repetition_penalty)
    assert ours.tolist() == theirs.tolist()


@pytest.mark.parametrize("beams", [3, 5])
@pytest.mark.parametrize("length_penalty", [-1.0, 0.0, 1.0])
@pytest.mark.parametrize("min_length, repetition_penalty", [(0, 1.0), (4, 1.0), (0, 1.5)])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_beam_search_equals_transformers(pair, beams, length_penalty, min_length, repetition_penalty, seed):
    embeds, mask = prompts(pair[0], seed=seed)
    ours = write(pair[0], embeds, mask, beams=beams, max_length=9, min_length=min_length, length_penalty=length_penalty,
                 repetition_penalty=repetition_penalty)
    theirs = expected(pair[1], embeds, mask, num_beams=beams, max_new_tokens=9, min_new_tokens=min_length,
                      length_penalty=length_penalty, repetition_penalty=repetition_penalty)
    n = max(ours.shape[1], theirs.shape[1])
    ours, theirs = ([row + [END] * (n - len(row)) for row in ids.tolist()] for ids in (ours, theirs))
    assert ours == theirs


def test_the_models_of_these_tests_write_texts_of_several_lengths(pair):
    """Or the tests above would prove little."""
    texts = [row.tolist() for seed in range(3) for row in write(pair[0], *prompts(pair[0], seed=seed), max_length=9)]
    lengths = {row.index(END) if END in row else len(row) for row in texts}
    assert len(lengths) >= 3 and len({tuple(row) for row in texts}) >= 8, lengths


@pytest.mark.parametrize("beams", [1, 3])
def test_batch_equals_one_by_one_and_is_filled_with_end(pair, beams):
    embeds, mask = prompts(pair[0])
    together = write(pair[0], embeds, mask, beams=beams, max_length=9)
    for i, row in enumerate(together.tolist()):
        alone = write(pair[0], embeds[i:i + 1, mask[i]], mask[i:i + 1, mask[i]], beams=beams, max_length=9)[0].tolist()
        assert row == alone + [END] * (len(row) - len(alone))
        assert END not in row or set(row[row.index(END):]) == {END}


def test_one_beam_is_greedy_and_the_length_is_bounded(pair):
    embeds, mask = prompts(pair[0])
    greedy = write(pair[0], embeds, mask, max_length=9)
    assert torch.equal(write(pair[0], embeds, mask, beams=1, max_length=9), greedy)
    assert torch.equal(write(pair[0], embeds, mask, top_p=1e-6, max_length=9), greedy)
    assert write(pair[0], embeds, mask, beams=3, max_length=1).shape == (5, 1)
    long = write(pair[0], embeds, mask, max_length=6, min_length=6)
    assert long.shape == (5, 6) and (long != END).all()


@pytest.mark.parametrize("top_p, kept", [(0.0, 1), (0.3, 1), (0.5, 1), (0.6, 2), (0.85, 3), (1.0, 4)])
def test_the_nucleus_is_the_smallest_set_that_holds_top_p(top_p, kept):
    probability = torch.tensor([[0.2, 0.51, 0.09, 0.2 + 1e-4], [0.09, 0.2, 0.51, 0.2 + 1e-4]])
    left = top_p_filter(probability.log(), top_p).softmax(dim=1)
    assert ((left > 0).sum(dim=1) == kept).all()
    chosen = probability.masked_fill(left == 0, 0.0)
    assert torch.allclose(left, chosen / chosen.sum(dim=1, keepdim=True), atol=1e-6)


def test_samples_come_from_the_nucleus_with_its_probabilities():
    probability = torch.tensor([0.4, 0.05, 0.3, 0.05, 0.2])
    logits = (probability**2).log().expand(20_000, 5)  # a temperature of 2 restores `probability`
    drawn = generate(None, logits, torch.ones(20_000, 1, dtype=torch.bool), KVCache(1), eos_id=4, max_length=1,
                     top_p=0.85, temperature=2.0, generator=torch.Generator().manual_seed(0))
    share = torch.bincount(drawn[:, 0], minlength=5) / 20_000
    assert share[1] == 0 and share[3] == 0
    assert (share - torch.tensor([0.4, 0, 0.3, 0, 0.2]) / 0.9).abs().max() < 0.015


def test_adjust_penalises_what_was_written_once_and_forbids_an_early_end():
    scores = torch.tensor([[2.0, -2.0, 1.0, 3.0]])
    assert process_logits(scores, torch.tensor([[0, 1, 1]]), END, 0, 2.0).tolist() == [[1.0, -4.0, 1.0, 3.0]]
    assert process_logits(scores, torch.tensor([[0]]), END, 2, 1.0)[0, END] == -torch.inf
    assert torch.equal(process_logits(scores, torch.tensor([[0, 3]]), END, 2, 1.0), scores)


@pytest.mark.parametrize("settings, said", [
    (dict(max_length=0), "max_length=0, .* above 0"), (dict(beams=3, max_length=-1), "max_length=-1"),
    (dict(beams=3, top_p=0.9), "top_p .* 3 beams"), (dict(beams=2, temperature=0.5), "temperature .* 2 beams"),
    (dict(beams=2, temperature=0.5, top_p=0.3), "temperature and top_p"),
    (dict(beams=0), "beams=0"), (dict(beams=-3), "beams=-3"),
    (dict(repetition_penalty=0), "repetition_penalty=0"), (dict(repetition_penalty=-1.5, beams=2), "penalty=-1.5"),
    (dict(temperature=0), "temperature is 0: .* leave it out for greedy"),
    (dict(temperature=-1.0, top_p=0.5), "temperature is -1.0: take more than 0"),
    (dict(temperature=float("nan"), beams=2), "temperature is nan: ")], ids=str)
def test_settings_that_belong_to_no_way_of_decoding_are_refused(settings, said):
    with pytest.raises(UserError, match=said):
        generate(None, torch.zeros(1, 5), torch.ones(1, 1, dtype=torch.bool), KVCache(1), eos_id=4, **settings)


def test_a_temperature_alone_draws_and_a_length_penalty_alone_does_not():
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log().expand(20_000, 4)
    given = None, logits, torch.ones(20_000, 1, dtype=torch.bool), KVCache(1)
    drawn = generate(*given, eos_id=3, max_length=1, temperature=1.0, generator=torch.Generator().manual_seed(0))
    assert (torch.bincount(drawn[:, 0]) / 20_000 - logits[0].exp()).abs().max() < 0.015
    assert (generate(*given, eos_id=3, max_length=1, top_p=None, length_penalty=-1.0) == 0).all()


def test_the_temperature_divides_before_the_nucleus_is_cut_and_the_draw_is_the_generators():
    logits = torch.tensor([0.5, 0.3, 0.2]).log().expand(2000, 3)  # at temperature 4: 0.37, 0.33, 0.30

    def drawn(seed):
        return generate(None, logits, torch.ones(2000, 1, dtype=torch.bool), KVCache(1), eos_id=2, max_length=1,
                        top_p=0.5, temperature=4.0, generator=torch.Generator().manual_seed(seed))

    assert set(drawn(0).flatten().tolist()) == {0, 1}
    assert torch.equal(drawn(0), drawn(0)) and not torch.equal(drawn(0), drawn(1))
