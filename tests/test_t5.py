"""T5 against transformers' T5ForConditionalGeneration on random weights: every variant, padding, with a cache."""

import pytest
import torch

from minblip2 import masks
from minblip2.lm.t5 import T5, RelativePositionBias, T5Config

from .pairs import T5_SIZES, t5_pair
from .parity import difference, lengths_mask


@pytest.mark.parametrize("sizes", T5_SIZES.values(), ids=T5_SIZES)
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("lengths, side", [((30, 30), "right"), ((3, 8, 1), "right"), ((3, 8, 1), "left"),
                                           ((1,), "right")], ids=str)
@torch.no_grad()
def test_equals_transformers(sizes, seed, lengths, side):
    ours, theirs = t5_pair(sizes, seed)
    generator = torch.Generator().manual_seed(5)
    given, mask = lengths_mask([*lengths], side), lengths_mask([n + 2 for n in reversed(lengths)])
    embeds = torch.randn(*given.shape, ours.width, generator=generator)
    ids = torch.randint(0, ours.vocab_size, mask.shape, generator=generator)
    ids[:, 0] = 0
    expected = theirs(inputs_embeds=embeds, attention_mask=given.long(), decoder_input_ids=ids,
                      decoder_attention_mask=mask.long(), output_hidden_states=True)
    places = masks.token_positions(given)
    encoded = ours.encoder(embeds, masks.bidirectional(0, given), places, places)
    assert difference(encoded[given], expected.encoder_last_hidden_state[given]) < 1e-5

    cache = ours.new_cache()
    first, attention_mask = ours.prefill(embeds, given, cache)
    whole = masks.causal(mask)
    pieces, half = [first[:, None]], 1 + ids.shape[1] // 2
    for rows in (slice(1, half), *(slice(i, i + 1) for i in range(half, ids.shape[1]))):
        seen = whole[:, :, rows, :rows.stop]
        pieces.append(ours(ours.embed(ids[:, rows]), seen, masks.token_positions(mask)[:, rows], cache))
    states = torch.cat(pieces, dim=1)
    assert attention_mask.tolist() == [[True]] * len(lengths)
    assert difference(states[mask], expected.decoder_hidden_states[-1][mask]) < 1e-5
    assert difference(ours.lm_logits(states)[mask], expected.logits[mask]) < 1e-5


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize("buckets, max_distance", [(32, 128), (8, 20), (6, 9)])
def test_every_distance_falls_into_the_group_that_transformers_says(bidirectional, buckets, max_distance):
    from transformers.models.t5.modeling_t5 import T5Attention

    ahead = torch.arange(-300, 301)
    ours = RelativePositionBias(T5Config(buckets=buckets, max_distance=max_distance), bidirectional).bucket(ahead)
    assert torch.equal(ours, T5Attention._relative_position_bucket(ahead, bidirectional, buckets, max_distance))


def test_sizes_of_flan_t5_xl():
    with torch.device("meta"):
        xl = T5(T5Config(width=2048, layers=24, heads=32, mlp_width=5120, activation="gelu", gated=True, tied=False,
                         scaled=False))
    assert sum(p.numel() for p in xl.parameters()) == 2_783_959_040 + 32128 * 2048  # and its own head
