"""minBLIP-2: BLIP-2 (arXiv 2301.12597) from scratch, small enough to read in one sitting.

The files at the top of the package are the paper: attention, masks, vit, lm/, qformer, stage1, stage2, generation. What
serves it stands in rooms: data, weights, training, evaluation, commands, course. The names below are the public
interface.
"""

from __future__ import annotations

from importlib import import_module

__version__ = "0.2.0"

# name -> the file that defines it, or, for Stage1, the one that teaches it to start from a BERT; loaded when first used
_HOMES = {
    "Blip2": "weights.blip2", "Retriever": "weights.retriever",
    "Stage1": "weights.official", "Stage2": "stage2", "QFormer": "qformer", "QFormerConfig": "qformer", "ViT": "vit",
    "Tokenizer": "data.tokenizer", "Transform": "data.transforms", "PairBatches": "data.batches",
    "load_vit": "weights.pretrained", "load_lm": "weights.pretrained", "load_stage1": "weights.official",
    "train": "training.loop", "TrainConfig": "training.loop",
    "train_stage1": "training.stages", "train_stage2": "training.stages",
}
__all__ = ["UserError", *_HOMES]


class UserError(ValueError):
    """Something the user gave cannot be used; the message is one sentence that names it and says what to do."""


def __getattr__(name: str) -> object:
    """A public name, from its file; so `import minblip2` alone stays quick."""
    if name in _HOMES:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """The public names and what a module always has."""
    return sorted({*globals(), *__all__})
