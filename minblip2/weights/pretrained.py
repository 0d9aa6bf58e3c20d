"""The frozen parts as their authors published them, in the model hub's folders: image encoders and language models."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import UserError
from ..attention import ACTIVATIONS
from ..lm.llama import Llama, LlamaConfig
from ..lm.opt import OPT, OPTConfig
from ..lm.t5 import T5, T5Config
from ..vit import CLIP_L, EVA_G, ViT, ViTConfig
from . import names
from .checkpoint import HubConfig, load_into, open_hub, read_config, section, setting
from .keymap import KeyMap


def rename_settings(hub: HubConfig, key_map: KeyMap) -> dict[str, Any]:
    """Their settings under our names. Raises UserError for one that is not there, or not what it should be."""
    found = {ours: setting(hub, theirs) for theirs, ours in key_map.settings.items()}
    check_only(hub, key_map.only)
    width, heads = (hub.get(name) for name in ("hidden_size", "num_attention_heads"))
    if width and heads and width % heads:
        raise UserError(f"this model's config.json has num_attention_heads = {heads}, which does not divide its "
                        f"hidden_size = {width}: fetch it again")
    return found


def check_only(hub: Mapping[str, Any], only: Mapping[str, Any]) -> None:
    """Raises UserError for a setting that would be ignored otherwise: this kind of model is read in one form of it."""
    for name, value in only.items():
        if hub.get(name) not in (None, value):
            raise UserError(f"this model's config.json has {name} = {hub[name]!r}, and only {value!r} can be read: use "
                            "a model of the usual form")


def with_defaults(part: Mapping[str, Any], key_map: KeyMap, usual: Any) -> HubConfig:
    """The settings of a part of a model, with the `usual` ones: files leave out what transformers takes as known."""
    given = {key: value for key, value in part.items() if value is not None}
    return HubConfig({theirs: getattr(usual, ours) for theirs, ours in key_map.settings.items()} | given)


def wrong_kind(source: object, kind: Any, wanted: str) -> UserError:
    """The error that a folder holds another kind of model."""
    return UserError(f"{source} holds a {kind!r} model; {wanted}")


# --- image encoders ---------------------------------------------------------------------------------------------------


def vision_of(hub: HubConfig) -> HubConfig:
    """The settings of the image encoder: those of the part, or of a model that is nothing else."""
    part = next((name for name in ("vision_config_dict", "vision_config") if hub.get(name)), None)  # older CLIPs: first
    return HubConfig(section(hub, part)) if part else hub


def dinov2(source: object, hub: HubConfig) -> tuple[ViTConfig, KeyMap]:
    """DINOv2, all blocks and the final norm (transformers `Dinov2Model`)."""
    if hub.get("use_swiglu_ffn") or hub.get("hidden_act", "gelu") != "gelu":
        raise UserError(f"{source} is a DINOv2 with gated feed-forwards (giant), or not with GELU: use small, base or "
                        "large")
    mlp_width = int(setting(hub, "hidden_size") * setting(hub, "mlp_ratio"))
    return ViTConfig(**rename_settings(hub, names.DINOV2), mlp_width=mlp_width), names.DINOV2


def clip(source: object, hub: HubConfig) -> tuple[ViTConfig, KeyMap]:
    """The image side of CLIP as BLIP-2 takes it: without the last block and the final norm (`CLIPVisionModel`)."""
    base = replace(CLIP_L, width=768, layers=12, heads=12, mlp_width=3072, patch_size=32)
    config = replace(CLIP_L, **rename_settings(with_defaults(vision_of(hub), names.CLIP, base), names.CLIP))
    last = f"encoder.layers.{config.layers - 1}"
    ignored = {**names.CLIP.ignored, last: "BLIP-2 takes the second-to-last block"}
    return replace(config, layers=config.layers - 1), replace(names.CLIP, ignored=ignored)


def eva(source: object, hub: HubConfig) -> tuple[ViTConfig, KeyMap]:
    """BLIP-2's own encoder, out of a whole BLIP-2 (transformers `Blip2VisionModel`); its last norm is the bridge's."""
    config = with_defaults(vision_of(hub), names.EVA, EVA_G)
    return replace(EVA_G, **rename_settings(config, names.EVA)), names.EVA


ENCODERS = {"dinov2": dinov2, "clip": clip, "clip_vision_model": clip, "blip-2": eva, "blip_2_vision_model": eva}


def load_vit(folder: str | Path, dtype: torch.dtype = torch.float32) -> ViT:
    """A frozen image encoder from a hub folder: CLIP, DINOv2, or the EVA of a BLIP-2, as BLIP-2 uses each of them."""
    vit, key_map = empty_encoder(folder, read_config(folder), dtype)
    load_into(vit, open_hub(folder).tensors, key_map, str(folder))
    return vit.requires_grad_(False).eval()


def empty_encoder(source: object, hub: HubConfig, dtype: torch.dtype) -> tuple[ViT, KeyMap]:
    """An image encoder that still waits for its weights, and how they are called."""
    kind = hub.get("model_type")
    if not isinstance(kind, str) or kind not in ENCODERS:
        raise wrong_kind(source, kind, f"the image encoder must be one of {', '.join(ENCODERS)}")
    config, key_map = ENCODERS[kind](source, hub)
    return empty_vit(config, dtype), key_map


def empty_vit(config: ViTConfig, dtype: torch.dtype) -> ViT:
    """A vision transformer of these sizes without memory."""
    check_activation(config.activation)
    with torch.device("meta"):
        return ViT(config).to(dtype)


def check_activation(name: str) -> None:
    """Raises UserError naming those there are."""
    if name not in ACTIVATIONS:
        raise UserError(f"the activation {name!r} is unknown: there are {', '.join(ACTIVATIONS)}")


# --- language models --------------------------------------------------------------------------------------------------


def build_opt(hub: HubConfig, own_head: bool) -> tuple[OPT, KeyMap]:
    """OPT of any size (transformers `OPTForCausalLM`)."""
    if hub.get("activation_function", "relu") != "relu" or hub.get("_remove_final_layer_norm"):
        raise UserError("this OPT has another activation than ReLU or lacks its final norm: use one of Meta's own")
    if not hub.get("tie_word_embeddings", True):
        raise UserError("this OPT has a head of its own (tie_word_embeddings = false), which is not read here: use one "
                        "that is tied, as Meta's are")
    return OPT(OPTConfig(**rename_settings(hub, names.OPT))), names.OPT


def build_llama(hub: HubConfig, own_head: bool) -> tuple[Llama, KeyMap]:
    """A language model of the Llama family (transformers `LlamaForCausalLM`)."""
    if hub.get("hidden_act", "silu") != "silu":
        raise UserError(f"this Llama's activation is {hub['hidden_act']!r}, not SiLU: use a plain one")
    rope = section(hub, "rope_scaling") or section(hub, "rope_parameters")
    if rope.get("rope_type", rope.get("type", "default")) != "default":
        raise UserError(f"this Llama scales its rotary positions ({rope}), which is not supported: use a plain one")
    usual = {"num_key_value_heads": hub["num_attention_heads"], "tie_word_embeddings": False, "rope_theta": 10_000.0}
    given = {name: value for name, value in hub.items() if value is not None or name not in usual}
    own_theta = {"rope_theta": rope["rope_theta"]} if rope.get("rope_theta") else {}  # it counts before the other one
    hub = HubConfig(usual | given | own_theta)
    found = rename_settings(hub, names.LLAMA)
    check_only(hub, {"head_dim": hub["hidden_size"] // hub["num_attention_heads"]})
    if hub["num_attention_heads"] % hub["num_key_value_heads"]:
        raise UserError("this model's config.json has a num_key_value_heads that does not divide num_attention_heads: "
                        "fetch it again")
    return Llama(LlamaConfig(**found)), names.LLAMA


def build_t5(hub: HubConfig, own_head: bool) -> tuple[T5, KeyMap]:
    """T5, T5 1.1 or FlanT5 (transformers `T5ForConditionalGeneration`); its head is its own if the file has one."""
    hub = HubConfig({"num_decoder_layers": None, "relative_attention_max_distance": T5Config().max_distance,
                     "feed_forward_proj": "relu"} | hub)
    kind = setting(hub, "feed_forward_proj")  # "gated-gelu" has always meant the approximation
    plain = "gelu_new" if kind == "gated-gelu" else kind.removeprefix("gated-")
    activation = setting(hub, "dense_act_fn") if hub.get("dense_act_fn") else plain
    check_activation(activation)
    gated = kind.startswith("gated-")
    # Newer files say whether the head is scaled; in older ones it is scaled where it is tied.
    scaled = bool(hub.get("scale_decoder_outputs", hub.get("tie_word_embeddings", True)))
    start = setting(hub, "decoder_start_token_id") if hub.get("decoder_start_token_id") else 0
    config = T5Config(**rename_settings(hub, names.T5_GATED), activation=activation, gated=gated, tied=not own_head,
                      scaled=scaled, decoder_start_id=start)
    return T5(config), names.T5_GATED if gated else names.T5_PLAIN


LANGUAGE_MODELS = {"opt": build_opt, "llama": build_llama, "t5": build_t5}
USUAL = {"opt": (names.OPT, OPTConfig()), "t5": (names.T5_GATED, T5Config())}  # what transformers takes as known


def empty_lm(source: object, hub: HubConfig, own_head: bool, dtype: torch.dtype) -> tuple[nn.Module, KeyMap]:
    """A language model that still waits for its weights, and how they are called."""
    kind = hub.get("model_type")
    if not isinstance(kind, str) or kind not in LANGUAGE_MODELS:
        raise wrong_kind(source, kind, f"the language model must be one of {', '.join(LANGUAGE_MODELS)}")
    if kind in USUAL:
        hub = with_defaults(hub, *USUAL[kind])
    if kind == "t5" and dtype == torch.float16:  # the sums of its feed-forwards do not fit
        raise UserError(f"{source} holds a T5, which overflows in float16: take --dtype bfloat16 or float32")
    with torch.device("meta"):
        lm, key_map = LANGUAGE_MODELS[kind](hub, own_head)
        return lm.to(dtype), key_map


def load_lm(folder: str | Path, dtype: torch.dtype = torch.float32) -> OPT | Llama | T5:
    """A frozen language model from a hub folder: OPT, the Llama family, or T5."""
    checkpoint = open_hub(folder)
    lm, key_map = empty_lm(folder, read_config(folder), "lm_head.weight" in checkpoint.shapes, dtype)
    load_into(lm, checkpoint.tensors, key_map, str(folder))
    return lm.requires_grad_(False).eval()
