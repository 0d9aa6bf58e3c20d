"""BLIP-2 as published: stage 1 and the whole, from the hub's folders or LAVIS's files; and the start from BERT."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import UserError
from ..data.tokenizer import Tokenizer
from ..qformer import LMHead, QFormer, QFormerConfig
from ..stage1 import Stage1
from ..stage2 import Stage2
from ..vit import ViT
from . import names
from .checkpoint import Checkpoint, HubConfig, load_into, open_hub, open_lavis, read_config, section, setting
from .keymap import KeyMap, translate
from .pretrained import empty_lm, empty_vit, eva, rename_settings, with_defaults, wrong_kind


class ForRetrieval(UserError):
    """These weights match texts with pictures, and write none."""


def is_retrieval(checkpoint: Checkpoint) -> bool:
    """Whether a BLIP-2's weights are those of `Blip2ForImageTextRetrieval`, which matches texts and writes none."""
    return any(name.startswith("itm_head.") for name in checkpoint.shapes)


def bert_sizes(source: object, hub: HubConfig, dec_id: int | None = None, **changes) -> QFormerConfig:
    """The Q-Former configuration that fits a BERT with these settings.

    Its vocabulary is grown by [DEC], unless `dec_id`, the tokenizer's, shows that it has been grown before.
    """
    if hub.get("model_type") != "bert":
        raise wrong_kind(source, hub.get("model_type"), "a Q-Former starts from a bert")
    kinds = hub.get("hidden_act", "gelu"), hub.get("position_embedding_type", "absolute")
    if kinds != ("gelu", "absolute"):
        raise UserError(f"{source} is a BERT with {kinds[0]} and {kinds[1]} positions: take one with gelu and absolute")
    known = setting(hub, "vocab_size")
    grown = known if dec_id == known - 1 else known + 1
    return QFormerConfig(**{**rename_settings(hub, names.BERT), "vocab_size": grown} | changes)


def init_from_bert(qformer: QFormer, folder: str | Path) -> QFormer:
    """Start a Q-Former from BERT, in place: shared self-attention, text, and both feed-forwards from BERT's one.

    Queries, cross-attention and the row of [DEC] keep their fresh values, and so does the LM head where the folder has
    none (sentence encoders do not). Source: LAVIS `Blip2Base.init_Qformer` and `Blip2Qformer.__init__`.
    """
    load_into(qformer, open_hub(folder).tensors, names.BERT, str(folder), optional=fresh_beside_bert(qformer))
    return qformer


def fresh_beside_bert(qformer: QFormer) -> tuple[str, ...]:
    """What a Q-Former has that a BERT has not, or not always: the beginnings of its names."""
    cross = (f"blocks.{i}.cross_{part}" for i in range(len(qformer.blocks)) for part in ("attention", "norm"))
    return ("query_tokens", "lm_head", *cross)


def stage1_sizes(source: object, shapes: Mapping[str, tuple[int, ...]], heads: int | None) -> tuple[QFormerConfig, int]:
    """The sizes of a Q-Former, and of the space it shares with texts, from the shapes of its tensors (our names).

    Without `heads`, each is taken to be 64 wide, as BERT's are.
    """
    def size(name: str, axis: int) -> int:
        if name not in shapes:
            raise UserError(f"{source} lacks the weights of {name}: it holds no stage 1")
        if axis >= len(shapes[name]):
            raise UserError(f"{source}: {name} has the shape {shapes[name]}, which no stage 1 has: fetch it again")
        return shapes[name][axis]

    width = size("qformer.query_tokens", 2)
    layers = sum(f"qformer.blocks.{i}.self_norm.weight" in shapes for i in range(len(shapes)))
    reading = [i for i in range(layers) if f"qformer.blocks.{i}.cross_norm.weight" in shapes]
    config = QFormerConfig(
        width=width, layers=layers, heads=heads or width // 64, num_queries=size("qformer.query_tokens", 1),
        mlp_width=size("qformer.blocks.0.query_mlp.up.weight", 0),
        image_width=size("qformer.blocks.0.cross_attention.key.weight", 1),
        cross_attention_every=reading[1] if len(reading) > 1 else layers,
        vocab_size=size("qformer.token_embedding.weight", 0),
        max_positions=size("qformer.position_embedding.weight", 0))
    if not config.heads or width % config.heads:
        raise UserError(f"{source} does not say how many attention heads share its width of {width}: give heads=")
    return config, size("vision_projection.weight", 0)


def qformer_settings(hub: HubConfig) -> dict[str, Any]:
    """The settings of a BLIP-2's Q-Former, as `QFormerConfig` calls them; one rate of dropout stands for both."""
    return rename_settings(with_defaults(section(hub, "qformer_config"), names.QFORMER, QFormerConfig()), names.QFORMER)


def load_stage1(source: str | Path, heads: int | None = None) -> Stage1:
    """Stage 1 from a hub folder of `Blip2ForImageTextRetrieval`, or from a LAVIS checkpoint (.pth).

    Sizes are read from the tensors. A LAVIS file does not tell the number of attention `heads`; without it each is
    taken to be 64 wide. A hub folder holds neither the LM head, which starts afresh, nor the temperature.
    """
    if Path(source).is_dir():
        hub, checkpoint, key_map = read_config(source), open_hub(source), names.STAGE1
        if hub.get("model_type") != "blip-2":
            raise wrong_kind(source, hub.get("model_type"), "stage 1 is read from a blip-2 or a LAVIS .pth file")
        if not is_retrieval(checkpoint):
            raise UserError(f"{source} holds a BLIP-2 that writes texts, without the heads that match them with "
                            "pictures: use it with `caption --model` or `ask --model`, or give one for retrieval")
        said, absent = qformer_settings(hub), ("qformer.lm_head", "temperature")
        heads, unsized = heads or said["heads"], {name: said[name] for name in ("eps", "dropout")}
        norm_eps = eva(source, hub)[0].eps
    else:
        checkpoint, key_map, absent = open_lavis(source), names.LAVIS_STAGE1, ()
        unsized, norm_eps = {}, nn.LayerNorm(1).eps
    shapes = {ours: shape for name, shape in checkpoint.shapes.items() for ours in translate(name, key_map.tensors)}
    config, embed_dim = stage1_sizes(source, shapes, heads)
    with torch.device("meta"):
        stage1 = Stage1(replace(config, **unsized), embed_dim)
    stage1.vision_norm.eps = norm_eps
    if absent:
        # What a file for retrieval leaves out has its value before training.
        stage1.qformer.lm_head = LMHead(config).apply(stage1.qformer.initialise)
        stage1.temperature = nn.Parameter(torch.tensor(Stage1.TEMPERATURE))
    load_into(stage1, checkpoint.tensors, key_map, str(source), optional=absent)
    return stage1.eval()


def empty_blip2(folder: str | Path, checkpoint: Checkpoint, dtype: torch.dtype) -> tuple[ViT, Stage2, KeyMap]:
    """A BLIP-2 of the sizes of a hub folder that still waits for its weights, and how they are called.

    Raises UserError for a folder with another kind of model, and for weights that are for retrieval.
    """
    hub = read_config(folder)
    if hub.get("model_type") != "blip-2":
        raise wrong_kind(folder, hub.get("model_type"), "give the folder of a blip-2")
    if is_retrieval(checkpoint):
        raise ForRetrieval(f"{folder} holds a BLIP-2 for retrieval, which has no language model to write with: use it "
                        "with `retrieve --model` or `attend --model`, or give one with a language model")
    config, _ = eva(folder, hub)
    text = HubConfig({"model_type": "opt"} | section(hub, "text_config"))
    lm, key_map = empty_lm(folder, text, "language_model.lm_head.weight" in checkpoint.shapes, dtype)
    vit = empty_vit(config, dtype)
    queries = setting(HubConfig({"num_query_tokens": QFormerConfig().num_queries} | hub), "num_query_tokens")
    with torch.device("meta"):
        qformer = QFormer(QFormerConfig(**qformer_settings(hub) | dict(image_width=vit.width), num_queries=queries))
        stage2 = Stage2(nn.LayerNorm(vit.width, eps=config.eps), qformer, lm)
    return vit, stage2, names.blip2(key_map)


def load_blip2(folder: str | Path, dtype: torch.dtype = torch.float32) -> tuple[ViT, Stage2]:
    """BLIP-2 from a hub folder of `Blip2ForConditionalGeneration`, with OPT, T5 or a Llama.

    `dtype` is that of the two frozen parts; the bridge between them stays in float32, as in transformers.
    """
    read_config(folder)  # what this is no folder of is said before weights are looked for
    checkpoint = open_hub(folder)
    vit, stage2, key_map = empty_blip2(folder, checkpoint, dtype)
    load_into(nn.ModuleDict(dict(vit=vit, stage2=stage2)), checkpoint.tensors, key_map, str(folder))
    return vit.requires_grad_(False).eval(), stage2.eval()


def for_features(cls: type[Stage1], image_width: int, tokenizer: Tokenizer, bert: str | Path | None = None,
                 embed_dim: int = 256, **sizes) -> Stage1:
    """A fresh stage 1 for frozen features (b v image_width) and texts of `tokenizer`, which it remembers.

    With `bert`, a hub folder, it has BERT's sizes and starts from BERT's weights, as the paper's does. `sizes` are
    fields of `QFormerConfig`. Raises UserError when the folder holds no BERT, or one with another tokenizer, and for
    sizes beside `bert` that it has already.
    """
    if bert is None:
        config = QFormerConfig(**{"image_width": image_width, "vocab_size": len(tokenizer)} | sizes)
    else:
        if taken := sorted(sizes.keys() & {*names.BERT.settings.values(), "vocab_size"}):
            raise UserError(f"a Q-Former that starts from {bert} has its {taken[0]}: leave {taken[0]} out, or bert")
        config = bert_sizes(bert, read_config(bert), tokenizer.dec_id, image_width=image_width, **sizes)
        if config.vocab_size != len(tokenizer):
            raise UserError(f"{bert} has {config.vocab_size} ids, [DEC] included, and the tokenizer {len(tokenizer)}: "
                            "take Tokenizer.from_folder of the same folder")
    stage1 = cls(config, embed_dim)
    if bert is not None:
        init_from_bert(stage1.qformer, bert)
    stage1.tokenizer = tokenizer
    return stage1


# Here and not in stage1.py: to read a BERT is this room's work, and the paper's files import no room.
Stage1.for_features = classmethod(for_features)
