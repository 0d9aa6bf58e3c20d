"""The Q-Former: parameter counts of the paper's sizes, and hidden states equal to transformers' under every mask."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch import nn
from transformers import Blip2QFormerConfig, Blip2QFormerModel

from minblip2 import masks
from minblip2.attention import MultiHeadAttention
from minblip2.qformer import QFormer, QFormerConfig
from minblip2.stage1 import Stage1
from minblip2.stage2 import Stage2
from minblip2.weights import names
from minblip2.weights.checkpoint import load_into

from .parity import TINY, difference, lengths_mask, randomise

SIZES = [TINY, replace(TINY, width=33, heads=11, mlp_width=17, image_width=13, num_queries=5, cross_attention_every=1,
                       layers=2),
         replace(TINY, width=20, heads=5, mlp_width=64, num_queries=1, cross_attention_every=3, layers=4)]


def count(module):
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)


class StubLM(nn.Module):
    """Just wide enough to be frozen."""

    def __init__(self, width):
        super().__init__()
        self.width, self.vocab_size, self.weight = width, 1, nn.Parameter(torch.empty(3))


def test_parameter_counts_of_the_paper():
    with torch.device("meta"):
        stage1 = Stage1()
        assert count(stage1.qformer) == 186_307_387
        assert count(stage1) == 186_705_470
        assert count(Stage1(QFormerConfig(image_width=1024)).qformer) == 182_768_443
        for width, image_width, expected in [(2560, 1408, 107_133_696), (2048, 1408, 106_739_968),
                                             (4096, 1408, 108_314_880), (2560, 1024, 103_593_984)]:
            stage2 = Stage2.from_stage1(Stage1(QFormerConfig(image_width=image_width)), StubLM(width))
            assert count(stage2) == expected


def pair(config, seed):
    theirs = randomise(Blip2QFormerModel(Blip2QFormerConfig(
        hidden_size=config.width, num_hidden_layers=config.layers, num_attention_heads=config.heads,
        intermediate_size=config.mlp_width, encoder_hidden_size=config.image_width, vocab_size=config.vocab_size,
        cross_attention_frequency=config.cross_attention_every, use_qformer_text_input=True)), seed)
    ours = randomise(QFormer(config), seed)
    load_into(ours, theirs.state_dict().items(), names.QFORMER, "transformers",
              optional=("query_tokens", "token_embedding", "position_embedding", "lm_head"))
    return ours.eval(), theirs


@pytest.mark.parametrize("config", SIZES, ids=["every2", "every1", "every3"])
@pytest.mark.parametrize("lengths", [(4,), (3, 6, 1)], ids=["one", "three"])
@pytest.mark.parametrize("name", ["bidirectional", "unimodal", "multimodal_causal"])
def test_hidden_states_equal_transformers(config, lengths, name):
    ours, theirs = pair(config, seed=len(lengths))
    text_mask = lengths_mask(list(lengths))
    ids, image = torch.randint(0, 50, text_mask.shape), torch.randn(len(lengths), 7, config.image_width)
    mask = getattr(masks, name)(config.num_queries, text_mask)
    with torch.no_grad():
        kv, text = ours.project_image(image), ours.embed_text(ids)
        out = ours(kv, ids, mask)
        expected = theirs(query_embeds=torch.cat([ours.query_tokens.expand(len(ids), -1, -1), text], dim=1),
                          query_length=config.num_queries, encoder_hidden_states=image,
                          attention_mask=torch.where(mask, 0.0, -1e9)).last_hidden_state
        alone = theirs(query_embeds=text, query_length=0, attention_mask=torch.where(
            masks.unimodal(0, text_mask), 0.0, -1e9)).last_hidden_state
        cache = ours.new_cache()
        ours(kv, cache=cache)
        cached = ours(text_ids=ids,
                      mask=masks.multimodal_causal(config.num_queries, text_mask)[:, :, config.num_queries:],
                      cache=cache).text
    valid = torch.cat([torch.ones(len(ids), config.num_queries, dtype=torch.bool), text_mask], dim=1)
    assert difference(torch.cat([out.queries, out.text], dim=1)[valid], expected[valid]) < 1e-5
    assert difference(ours(text_ids=ids, mask=masks.unimodal(0, text_mask)).text[text_mask], alone[text_mask]) < 1e-5
    if name == "multimodal_causal":
        assert difference(cached[text_mask], expected[:, config.num_queries:][text_mask]) < 1e-5


def test_fresh_queries_differ_and_read_the_image_differently():
    torch.manual_seed(0)
    model = QFormer(TINY).eval()
    assert 0.01 < model.query_tokens.std() < 0.03
    states = model(model.project_image(torch.randn(1, 6, TINY.image_width))).queries[0]
    distances = torch.cdist(states, states)
    assert distances[~torch.eye(TINY.num_queries, dtype=torch.bool)].min() > 0.1


def test_image_reaches_text_only_through_queries_and_selected_rows_equal_fresh_projection():
    model = randomise(QFormer(TINY))
    image, rows = torch.randn(3, 6, TINY.image_width), torch.tensor([2, 0, 2, 1])
    selected, fresh = model.project_image(image).select(rows), model.project_image(image[rows])
    assert [pair is None for pair in selected] == [False, True, False] and len(selected) == len(fresh)
    for ours, theirs in zip(selected[::2], fresh[::2], strict=True):
        assert difference(ours[0], theirs[0]) < 1e-6 and difference(ours[1], theirs[1]) < 1e-6


def test_text_after_a_text_continues_its_positions():
    """Written word by word on a cache of text alone, as in one pass."""
    model, ids = randomise(QFormer(TINY)), torch.randint(0, 50, (2, 5))
    whole = model(text_ids=ids, mask=masks.causal(torch.ones_like(ids, dtype=torch.bool))).text
    cache = model.new_cache()
    pieces = [model(text_ids=ids[:, i:i + 1], cache=cache, first_position=i).text for i in range(5)]
    assert difference(torch.cat(pieces, dim=1), whole) < 1e-5


def test_nothing_to_read_is_said():
    with pytest.raises(ValueError, match="neither an image nor a text"):
        QFormer(TINY)()


def test_query_branch_is_an_independent_copy_that_reads_alike():
    model = randomise(QFormer(TINY))
    branch, image = model.query_branch(), torch.randn(2, 6, TINY.image_width)
    assert torch.equal(branch(branch.project_image(image)).queries, model(model.project_image(image)).queries)
    assert {p.data_ptr() for p in branch.parameters()}.isdisjoint(p.data_ptr() for p in model.parameters())
    assert not any("text" in name or "token_embedding" in name for name, _ in branch.named_parameters())


def test_dropout_stands_where_berts_does():
    """After the embeddings, in every attention, and after each branch of a block, before its residual sum."""
    assert QFormerConfig().dropout == 0.1
    model, calls, images = QFormer(replace(TINY, dropout=0.25)), Counter(), torch.randn(1, 5, TINY.image_width)
    for name, module in model.named_modules():
        if isinstance(module, nn.Dropout):
            module.register_forward_hook(lambda *_, name=name: calls.update([name]))
    model(model.project_image(images), torch.zeros(1, 3, dtype=torch.long))
    assert calls == {"dropout": 1, "blocks.0.dropout": 4, "blocks.1.dropout": 3, "blocks.2.dropout": 4}
    assert {module.p for module in model.modules() if isinstance(module, nn.Dropout)} == {0.25}
    assert [module.dropout for module in model.modules() if isinstance(module, MultiHeadAttention)] == [0.25] * 5
