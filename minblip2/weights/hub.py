"""The hub's models that recipes build on and commands load, each pinned to one revision. Nothing here needs PyTorch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .. import UserError


@dataclass(frozen=True)
class HubModel:
    """A model on the hub: repository, commit, licence, and of its config.json what it is built from."""

    repository: str
    revision: str
    licence: str
    config: Mapping[str, Any] = field(default_factory=dict, hash=False)

    @property
    def folder(self) -> str:
        """The name of its folder below --parts."""
        return self.repository.rpartition("/")[2]


def _opt(size: str, revision: str, width: int, layers: int, heads: int) -> HubModel:
    return HubModel(f"facebook/opt-{size}", revision, "OPT-175B licence, for research only", dict(
        model_type="opt", vocab_size=50272, hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads,
        ffn_dim=4 * width, max_position_embeddings=2048, word_embed_proj_dim=width))


def _bert(width: int, layers: int) -> dict[str, Any]:
    return dict(model_type="bert", vocab_size=30522, hidden_size=width, num_hidden_layers=layers,
                num_attention_heads=12, intermediate_size=4 * width, max_position_embeddings=512, layer_norm_eps=1e-12)


MODELS = {model.folder: model for model in (
    HubModel("facebook/dinov2-small", "ed25f3a31f01632728cabb09d1542f84ab7b0056", "Apache 2.0", dict(
        model_type="dinov2", hidden_size=384, num_hidden_layers=12, num_attention_heads=6, mlp_ratio=4, image_size=518,
        patch_size=14, layer_norm_eps=1e-6)),
    HubModel("openai/clip-vit-large-patch14", "32bd64288804d66eefd0ccbe215aa642df71cc41", "MIT (OpenAI's CLIP)", dict(
        model_type="clip", vision_config=dict(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16,
                                              intermediate_size=4096, image_size=224, patch_size=14))),
    HubModel("sentence-transformers/all-MiniLM-L6-v2", "c9745ed1d9f207416be6d2e6f8de32d1f16199bf", "Apache 2.0",
             _bert(384, 6)),
    HubModel("google-bert/bert-base-uncased", "86b5e0934494bd15c9632b12f734a8a67f723594", "Apache 2.0", _bert(768, 12)),
    HubModel("HuggingFaceTB/SmolLM2-135M-Instruct", "12fd25f77366fa6b3b4b768ec3050bf629380bac", "Apache 2.0", dict(
        model_type="llama", vocab_size=49152, hidden_size=576, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, intermediate_size=1536, rms_norm_eps=1e-5, tie_word_embeddings=True)),
    _opt("125m", "27dcfa74d334bc871f3234de431e71c6eeba5dd6", 768, 12, 12),
    _opt("1.3b", "3f5c25d0bc631cb57ac65913f76e22c2dfb61d62", 2048, 24, 32),
    HubModel("Salesforce/blip2-opt-2.7b", "59a1ef6c1e5117b3f65523d1c6066825bcf315e3", "MIT"),
    HubModel("Salesforce/blip2-flan-t5-xl", "0eb0d3b46c14c1f8c7680bca2693baafdb90bb28", "MIT"),
    HubModel("Salesforce/blip2-itm-vit-g", "d3788a04efa0f9e897305f5b9d9dedeaa3afb99d", "MIT"),  # stage 1, to retrieve
)}

RECIPE_MODELS = {
    "laptop": {"encoder": "dinov2-small", "bert": "all-MiniLM-L6-v2", "lm": "SmolLM2-135M-Instruct"},
    "gpu": {"encoder": "clip-vit-large-patch14", "bert": "bert-base-uncased", "lm": "opt-1.3b"},
}


def find_models(names: list[str]) -> list[HubModel]:
    """The models of these names, which may be of models or of recipes. Raises UserError listing what there is."""
    found: dict[str, HubModel] = {}
    for name in names:
        wanted = RECIPE_MODELS.get(name, {"": name}).values()
        if strange := [model for model in wanted if model not in MODELS]:
            raise UserError(f"there are no weights {strange[0]!r}: choose a recipe ({', '.join(RECIPE_MODELS)}) or "
                            f"among {', '.join(MODELS)}")
        found |= {model: MODELS[model] for model in wanted}
    return list(found.values())
