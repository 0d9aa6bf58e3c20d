"""The tables of names: read forwards and backwards, and as a table to print."""

import re

import pytest

from minblip2.weights import names
from minblip2.weights.keymap import Fused, spell_out, translate

from . import parity_table

ALL = {"dinov2": names.DINOV2, "clip": names.CLIP, "eva": names.EVA, "bert": names.BERT, "qformer": names.QFORMER,
       "stage 1": names.STAGE1, "lavis": names.LAVIS_STAGE1, "opt": names.OPT, "llama": names.LLAMA,
       "t5": names.T5_GATED, "t5 1.0": names.T5_PLAIN, "blip2": names.blip2(names.OPT)}


@pytest.mark.parametrize("naming", ALL.values(), ids=ALL)
def test_each_name_of_theirs_means_one_thing_and_is_found_again(naming):
    for theirs, ours in spell_out(naming.tensors, layers=3):
        assert translate(theirs, naming.tensors) == ours
        assert theirs not in naming.ignored
    ours = [one for _, targets in spell_out(naming.tensors, layers=3) for one in targets]
    assert len(ours) == len(set(ours)), "two of their tensors would fill the same one of ours"


def test_layers_and_endings_are_kept():
    fused = translate("encoder.layers.17.self_attn.qkv.bias", names.EVA.tensors)
    assert fused == tuple(f"blocks.17.attention.{part}.bias" for part in ("query", "key", "value"))
    assert isinstance(fused, Fused)
    copies = translate("encoder.layer.3.output.dense.weight", names.BERT.tensors)
    assert copies == ("blocks.3.text_mlp.down.weight", "blocks.3.query_mlp.down.weight")
    assert not isinstance(copies, Fused)
    assert translate("encoder.layers.x.self_attn.qkv.bias", names.EVA.tensors) == ()
    assert translate("layers.1.fc1.weight.more", names.OPT.tensors) == ()


@pytest.mark.parametrize("naming", ALL.values(), ids=ALL)
def test_the_key_map_prints_as_a_table(naming):
    rows = naming.rows()
    assert len(rows) == len(naming.tensors) + len(naming.ignored)
    assert all(re.fullmatch(r"`[^|`]+`", theirs) and re.fullmatch(r"`[^|]+`|left aside: [^|]+", ours)
               for theirs, ours in rows), rows


def test_the_table_of_equal_numbers_shows_what_failed_or_was_not_measured():
    opt, llama = (f"tests/test_{name}.py::test_equals_transformers[heads3]" for name in ("opt", "llama"))
    made = parity_table.table([opt, "tests/test_generation.py::test_greedy_equals_transformers[a]"], [llama],
                              {opt: [1e-7, 3e-7]})
    rows = {line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:-1]] for line in made.splitlines()}
    assert rows["OPT, norm before each branch, logits with and without cache"] == ["1", "3e-07", "1e-5"]
    assert rows["Llama, logits with and without cache"] == ["0", "1 not passed", "1e-5"]
    assert rows["ids written by OPT, Llama and T5: greedy and beams"] == ["1", "identical", "identical"]
    assert rows["EVA (BLIP-2's ViT), hidden states"] == ["0", "not measured", "1e-5"]
