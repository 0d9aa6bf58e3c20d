"""Other people's checkpoints into our modules: configuration, names and shapes of the model hub's folders.

Each table maps their parameter names to ours; `{i}` stands for a layer's number, and a name without `.weight` or
`.bias` for both. Every tensor of a file is used or listed as ignored with the reason; anything else is an error.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from . import UserError
from .llama import Llama, LlamaConfig
from .opt import OPT
from .qformer import QFormer, QFormerConfig
from .vit import ViT, ViTConfig

Table = Mapping[str, str | tuple[str, ...]]

DINOV2: Table = {
    "embeddings.cls_token": "class_token",
    "embeddings.position_embeddings": "positions",
    "embeddings.patch_embeddings.projection": "patches",
    "encoder.layer.{i}.norm1": "blocks.{i}.attention_norm",
    "encoder.layer.{i}.attention.attention.query": "blocks.{i}.attention.query",
    "encoder.layer.{i}.attention.attention.key": "blocks.{i}.attention.key",
    "encoder.layer.{i}.attention.attention.value": "blocks.{i}.attention.value",
    "encoder.layer.{i}.attention.output.dense": "blocks.{i}.attention.out",
    "encoder.layer.{i}.layer_scale1.lambda1": "blocks.{i}.attention_scale",
    "encoder.layer.{i}.norm2": "blocks.{i}.mlp_norm",
    "encoder.layer.{i}.mlp.fc1": "blocks.{i}.mlp.up",
    "encoder.layer.{i}.mlp.fc2": "blocks.{i}.mlp.down",
    "encoder.layer.{i}.layer_scale2.lambda1": "blocks.{i}.mlp_scale",
    "layernorm": "norm",
}
DINOV2_IGNORED = {"embeddings.mask_token": "used only while DINOv2 itself was trained"}

BERT: Table = {
    "embeddings.word_embeddings.weight": "words.weight",
    "embeddings.position_embeddings.weight": "positions.weight",
    "embeddings.LayerNorm": "norm",
    "encoder.layer.{i}.attention.self.query": "blocks.{i}.self_attention.query",
    "encoder.layer.{i}.attention.self.key": "blocks.{i}.self_attention.key",
    "encoder.layer.{i}.attention.self.value": "blocks.{i}.self_attention.value",
    "encoder.layer.{i}.attention.output.dense": "blocks.{i}.self_attention.out",
    "encoder.layer.{i}.attention.output.LayerNorm": "blocks.{i}.self_norm",
    # one feed-forward becomes two: queries start from a copy of the text's
    "encoder.layer.{i}.intermediate.dense": ("blocks.{i}.text_mlp.up", "blocks.{i}.query_mlp.up"),
    "encoder.layer.{i}.output.dense": ("blocks.{i}.text_mlp.down", "blocks.{i}.query_mlp.down"),
    "encoder.layer.{i}.output.LayerNorm": ("blocks.{i}.text_norm", "blocks.{i}.query_norm"),
    "cls.predictions.transform.dense": "lm_head.dense",
    "cls.predictions.transform.LayerNorm": "lm_head.norm",
    "cls.predictions.bias": "lm_head.bias",
}
BERT_IGNORED = {
    "embeddings.token_type_embeddings.weight": "the Q-Former has no token types (as in LAVIS)",
    "embeddings.position_ids": "a constant",
    "pooler": "the Q-Former has no pooler",
    "cls.predictions.decoder": "tied to the word embeddings",
    "cls.seq_relationship": "next-sentence prediction is not used",
}

LLAMA: Table = {
    "model.embed_tokens.weight": "tokens.weight",
    "model.layers.{i}.input_layernorm.weight": "blocks.{i}.attention_norm.weight",
    "model.layers.{i}.self_attn.q_proj.weight": "blocks.{i}.attention.query.weight",
    "model.layers.{i}.self_attn.k_proj.weight": "blocks.{i}.attention.key.weight",
    "model.layers.{i}.self_attn.v_proj.weight": "blocks.{i}.attention.value.weight",
    "model.layers.{i}.self_attn.o_proj.weight": "blocks.{i}.attention.out.weight",
    "model.layers.{i}.post_attention_layernorm.weight": "blocks.{i}.mlp_norm.weight",
    "model.layers.{i}.mlp.gate_proj.weight": "blocks.{i}.mlp.gate.weight",
    "model.layers.{i}.mlp.up_proj.weight": "blocks.{i}.mlp.up.weight",
    "model.layers.{i}.mlp.down_proj.weight": "blocks.{i}.mlp.down.weight",
    "model.norm.weight": "norm.weight",
    "lm_head.weight": "unembed.weight",
}


class HubConfig(dict):
    """A model's settings; reading one that is not there raises a UserError that names it."""

    def __missing__(self, key: str):
        raise UserError(f"this model's config.json lacks {key!r}: fetch it again")


def read_config(folder: str | Path) -> HubConfig:
    """The `config.json` of a hub folder. Raises UserError when it is missing or not JSON."""
    path = Path(folder) / "config.json"
    try:
        return HubConfig(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise UserError(f"{folder} has no config.json: give the folder of a downloaded model") from None
    except (TypeError, ValueError) as error:  # no object, no JSON, no UTF-8
        raise UserError(f"{path} is not JSON ({error}): fetch it again") from None


def read_tensors(folder: str | Path) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a hub folder's safetensors files, one at a time. Raises UserError when there are none."""
    files = sorted(Path(folder).glob("*.safetensors"))
    if not files:
        raise UserError(f"{folder} has no .safetensors file: fetch the weights in that format")
    for path in files:
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():
                    yield name, file.get_tensor(name)
        except SafetensorError as error:
            raise UserError(f"{path} cannot be read ({error}): fetch it again") from None


def translate(name: str, table: Table) -> list[str]:
    """Our names for one of theirs; none when the table does not know it."""
    for theirs, ours in table.items():
        pattern = re.escape(theirs).replace(r"\{i\}", r"(\d+)") + r"(\.weight|\.bias)?"
        if found := re.fullmatch(pattern, name):
            *layer, ending = found.groups()
            ours = (ours,) if isinstance(ours, str) else ours
            return [target.replace("{i}", layer[0] if layer else "") + (ending or "") for target in ours]
    return []


def fill(module: nn.Module, tensors: Iterator[tuple[str, Tensor]], table: Table, ignored: Mapping[str, str],
         source: str, prefix: str = "", optional: tuple[str, ...] = (), dtype: torch.dtype = torch.float32) -> None:
    """Put translated tensors into `module` in place; what is `optional` keeps its value when the file lacks it.

    A table of embeddings may have more rows here than in the file: the added rows keep their values.
    Raises UserError naming any tensor that is unknown, missing or of the wrong shape.
    """
    wanted = module.state_dict()
    filled: dict[str, Tensor] = {}
    for name, tensor in tensors:
        # the original BERT files still call a LayerNorm's parameters gamma and beta
        name = re.sub("LayerNorm.gamma$", "LayerNorm.weight", re.sub("LayerNorm.beta$", "LayerNorm.bias", name))
        name = name.removeprefix(prefix)
        if any(name == known or name.startswith(known + ".") for known in ignored):
            continue
        targets = translate(name, table)
        if not targets or any(target not in wanted for target in targets):
            raise UserError(f"{source} holds {name}, which this architecture does not have: check its config.json")
        for target in targets:
            here = wanted[target]
            grown = target in ("words.weight", "lm_head.bias") and here.shape[0] == tensor.shape[0] + 1
            if here.shape != tensor.shape and not grown:
                raise UserError(f"{source}: {name} has shape {tuple(tensor.shape)}, needed is {tuple(here.shape)}: "
                                "weights and config.json disagree")
            tensor = tensor.to(dtype)
            filled[target] = torch.cat([tensor, here[-1:].to(dtype)]) if grown else tensor
    missing = [name for name in wanted if name not in filled and not name.startswith(optional or ("\0",))]
    if missing:
        raise UserError(f"{source} lacks the weights of {missing[0]} ({len(missing)} tensors in all): fetch it again")
    # Tensors that two modules share in the file must not be shared here: the feed-forwards grow apart in training.
    module.load_state_dict({name: tensor.clone() for name, tensor in filled.items()}, strict=False, assign=True)
    for parameter in module.parameters():
        parameter.requires_grad_(True)


def load_vit(folder: str | Path, dtype: torch.dtype = torch.float32) -> ViT:
    """A frozen DINOv2 vision transformer from a hub folder (transformers `Dinov2Model`, final norm included)."""
    config = read_config(folder)
    if config.get("model_type") != "dinov2":
        raise UserError(f"{folder} holds a {config.get('model_type')!r} model; the image encoder must be a dinov2")
    if config.get("use_swiglu_ffn"):
        raise UserError(f"{folder} is a DINOv2 with gated feed-forwards (giant): use small, base or large")
    with torch.device("meta"):
        vit = ViT(ViTConfig(
            image_size=config["image_size"], patch_size=config["patch_size"], width=config["hidden_size"],
            layers=config["num_hidden_layers"], heads=config["num_attention_heads"],
            mlp_width=int(config["hidden_size"] * config["mlp_ratio"]), eps=config["layer_norm_eps"]))
    fill(vit, read_tensors(folder), DINOV2, DINOV2_IGNORED, str(folder), dtype=dtype)
    return vit.requires_grad_(False).eval()


def load_lm(folder: str | Path, dtype: torch.dtype = torch.float32) -> OPT | Llama:
    """A frozen language model of the Llama family from a hub folder (transformers `LlamaForCausalLM`)."""
    config = read_config(folder)
    if config.get("model_type") != "llama":
        raise UserError(f"{folder} holds a {config.get('model_type')!r} model; the language model must be a llama")
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if rope.get("rope_type", rope.get("type", "default")) != "default":
        raise UserError(f"{folder} scales its rotary positions ({rope}), which is not supported: use a plain Llama")
    tied = config.get("tie_word_embeddings", False)
    with torch.device("meta"):
        lm = Llama(LlamaConfig(
            vocabulary=config["vocab_size"], width=config["hidden_size"], layers=config["num_hidden_layers"],
            heads=config["num_attention_heads"], mlp_width=config["intermediate_size"],
            kv_heads=config.get("num_key_value_heads", config["num_attention_heads"]), eps=config["rms_norm_eps"],
            rope_theta=rope.get("rope_theta", config.get("rope_theta", 10_000.0)), tied=tied))
    ignored = {"lm_head": "tied to the word embeddings"} if tied else {}
    fill(lm, read_tensors(folder), LLAMA, ignored, str(folder), dtype=dtype)
    return lm.requires_grad_(False).eval()


def bert_sizes(folder: str | Path, **changes) -> QFormerConfig:
    """The Q-Former configuration that fits the BERT in a hub folder, its vocabulary grown by [DEC]."""
    config = read_config(folder)
    if config.get("model_type") != "bert":
        raise UserError(f"{folder} holds a {config.get('model_type')!r} model; a Q-Former starts from a bert")
    sizes = dict(width=config["hidden_size"], layers=config["num_hidden_layers"], heads=config["num_attention_heads"],
                 mlp_width=config["intermediate_size"], vocabulary=config["vocab_size"] + 1,
                 positions=config["max_position_embeddings"], eps=config["layer_norm_eps"])
    return QFormerConfig(**sizes | changes)


def init_from_bert(qformer: QFormer, folder: str | Path) -> QFormer:
    """Start a Q-Former from BERT, in place: shared self-attention, text, and both feed-forwards from BERT's one.

    Queries, cross-attention and the row of [DEC] keep their fresh values, and so does the LM head where the folder has
    none (sentence encoders do not). Source: LAVIS `Blip2Base.init_Qformer` and `Blip2Qformer.__init__`.
    """
    fresh = tuple(f"blocks.{i}.cross_{part}" for i in range(len(qformer.blocks)) for part in ("attention", "norm"))
    fill(qformer, read_tensors(folder), BERT, BERT_IGNORED, str(folder), prefix="bert.",
         optional=("query_tokens", "lm_head", *fresh))
    return qformer
