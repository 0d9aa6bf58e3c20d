"""A BLIP-2 of ours, written as the model hub has it, so that transformers' `Blip2ForConditionalGeneration` loads it."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn

from .. import UserError
from ..data.files import write_beside, write_json
from ..lm.llama import LlamaConfig
from ..lm.opt import OPTConfig
from ..lm.t5 import T5Config
from ..stage2 import Stage2
from ..vit import EVA_G, ViT
from . import names
from .checkpoint import HubConfig, export_tensors, open_files, shards
from .keymap import KeyMap
from .pretrained import rename_settings


def settings(config: Any, key_map: KeyMap) -> dict[str, Any]:
    """Our sizes under their names."""
    return {theirs: getattr(config, ours) for theirs, ours in key_map.settings.items()}


def lm_settings(lm: nn.Module) -> tuple[dict[str, Any], KeyMap]:
    """What `config.json` says of a language model, and its tensors' names. Raises UserError for one of another kind."""
    match config := getattr(lm, "config", None):
        case OPTConfig():
            if lm.width != config.width:
                raise UserError("transformers' BLIP-2 has no projection to an OPT-350m: its words are narrower than it")
            return settings(config, names.OPT) | dict(model_type="opt", word_embed_proj_dim=lm.width), names.OPT
        case LlamaConfig():
            theirs = settings(config, names.LLAMA)
            rope = dict(rope_type="default", rope_theta=theirs.pop("rope_theta"))
            return theirs | dict(model_type="llama", rope_parameters=rope), names.LLAMA
        case T5Config():
            kind = ("gated-" if config.gated else "") + config.activation.replace("gelu_new", "gelu")
            theirs = settings(config, names.T5_GATED) | dict(
                model_type="t5", num_decoder_layers=len(lm.decoder.blocks), feed_forward_proj=kind,
                dense_act_fn=config.activation, is_gated_act=config.gated, scale_decoder_outputs=config.scaled,
                tie_word_embeddings=config.scaled, decoder_start_token_id=config.decoder_start_id,
                is_encoder_decoder=True)
            return theirs, names.T5_GATED if config.gated else names.T5_PLAIN
    raise UserError(f"{type(lm).__name__} has no layout on the hub that is known here: use OPT, Llama or T5")


def save_pretrained(folder: str | Path, vit: ViT, stage2: Stage2, image_token: int, **tokens: int) -> None:
    """Write a BLIP-2 as a hub folder.

    `image_token` is the id that stands for an image there and must be none that a text contains; `tokens` are further
    ids for the language model's settings, such as eos_token_id=2. Raises UserError for an image encoder that
    transformers' BLIP-2 cannot express, which knows EVA's kind only.
    """
    text, key_map = lm_settings(stage2.lm)
    if not 0 <= image_token < stage2.lm.vocab_size:
        raise UserError(f"the image token {image_token} is not among the {stage2.lm.vocab_size} ids of the language "
                        "model: name one that no text contains")
    config = stage2.qformer.config
    vision = settings(vit.config, names.EVA) | dict(model_type="blip_2_vision_model", qkv_bias=True)
    if replace(EVA_G, **rename_settings(HubConfig(vision), names.EVA)) != vit.config:
        raise UserError("transformers' BLIP-2 knows image encoders of EVA's kind only: class token, one patch "
                        "convolution with bias, no final norm, no layer scale")
    hub = dict(architectures=["Blip2ForConditionalGeneration"], model_type="blip-2",
               num_query_tokens=config.num_queries,
               image_token_index=image_token, tie_word_embeddings=False, vision_config=vision,
               qformer_config=settings(config, names.QFORMER) | dict(model_type="blip_2_qformer",
                                                                     attention_probs_dropout_prob=config.dropout),
               text_config=text | tokens)
    tensors = export_tensors(nn.ModuleDict(dict(vit=vit, stage2=stage2)), names.blip2(key_map))
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    write_beside(folder / "model.safetensors", lambda path: save_file(tensors, path, {"format": "pt"}))
    write_json(folder / "config.json", hub)


def save_trained(folder: str | Path, source: str | Path, trained: dict[str, Tensor]) -> None:
    """Write a hub folder anew in which some tensors, by their names there, have been trained.

    All others are copied as they are, in their own precision and one file at a time, and so are the settings, the
    tokenizer and the preprocessing. Raises UserError when `source` lacks one of the tensors.
    """
    folder, source, index, left = Path(folder), Path(source), {}, set(trained)
    folder.mkdir(parents=True, exist_ok=True)
    files = shards(source)
    for path in files:
        checkpoint = open_files(str(source), [path])
        tensors = {name: trained.get(name, tensor).detach().cpu().clone().contiguous()
                   for name, tensor in checkpoint.tensors}
        name = f"{path.stem.replace('pytorch_model', 'model')}.safetensors"
        write_beside(folder / name, lambda partial, tensors=tensors: save_file(tensors, partial, {"format": "pt"}))
        index |= dict.fromkeys(tensors, name)
        left -= tensors.keys()
    if left:
        raise UserError(f"{source} lacks {min(left)} (tensors in all: {len(left)}), which was trained: fetch it again")
    if len(files) > 1:
        write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": index})
    for path in source.iterdir():
        if path.suffix in (".json", ".txt", ".model", ".jinja") and not path.name.endswith(".index.json"):
            write_beside(folder / path.name, lambda partial, path=path: shutil.copyfile(path, partial))
