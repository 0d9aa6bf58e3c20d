"""A whole BLIP-2 from a hub folder: give it pictures, and it writes captions and answers as the original does."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from .. import UserError
from ..data.files import write_beside
from ..data.tokenizer import Tokenizer
from ..data.transforms import Transform
from ..device import best_device, compute_dtype
from ..stage2 import Stage2
from ..vit import ViT
from .export import save_pretrained
from .official import load_blip2

# LAVIS `Blip2OPT.generate` and `predict_answers`; answers with the length penalty of the paper (§4.2): short ones win
CAPTION = dict(beams=5, max_length=30, min_length=1)
ANSWER = dict(beams=5, max_length=10, min_length=1, length_penalty=-1.0)
IMAGE = "<image>"  # stands for an image in transformers' texts, and never in ours


@dataclass
class Blip2:
    """Frozen image encoder, bridge and frozen language model, with what turns pictures and texts into tensors."""

    vit: ViT
    stage2: Stage2
    transform: Transform
    tokenizer: Tokenizer

    @classmethod
    def from_folder(cls, folder: str | Path, dtype: torch.dtype | None = None,
                    device: torch.device | None = None) -> Blip2:
        """Load a `Blip2ForConditionalGeneration` with its tokenizer and preprocessing files.

        Without `dtype`, the frozen parts are in bfloat16 where the device computes in it, else in float32.
        """
        if not Path(folder).is_dir():
            raise UserError(f"there is no folder {folder}: fetch a model with `python data/download.py weights NAME`")
        device = device or best_device()
        dtype = dtype or compute_dtype(device)
        tokenizer, transform = Tokenizer.from_folder(folder), Transform.from_folder(folder)  # fail before the long part
        vit, stage2 = load_blip2(folder, dtype)
        return cls(vit.to(device), stage2.to(device), transform, tokenizer)

    @torch.no_grad()
    def look(self, pictures: Iterable[Image.Image]) -> Tensor:
        """Frozen features (b v e) of pictures of any size."""
        pixels = torch.stack([self.transform(picture) for picture in pictures])
        return self.vit(pixels.to(self.vit.positions))

    def write(self, pictures: Sequence[Image.Image], prompts: Sequence[str], batch_size: int = 8,
              **decoding) -> list[str]:
        """What the language model writes after each picture and prompt; see `generation.generate`."""
        texts = []
        for i in range(0, len(pictures), batch_size):
            image = self.look(pictures[i : i + batch_size])
            rows = [self.tokenizer.encode_prompt(prompt) for prompt in prompts[i : i + batch_size]]
            ids, mask = (given.to(image.device) for given in self.tokenizer.pad(rows))
            written = self.stage2.generate(image, ids, mask, end=self.tokenizer.end, **decoding)
            texts += [self.tokenizer.decode(row) for row in written]
        return texts

    def caption(self, pictures: Sequence[Image.Image], prompt: str = "", **decoding) -> list[str]:
        """A caption for each picture; it goes on from `prompt`, for example "a photo of"."""
        return self.write(pictures, [prompt] * len(pictures), **CAPTION | decoding)

    def ask(self, pictures: Sequence[Image.Image], questions: Sequence[str], **decoding) -> list[str]:
        """An answer for each picture and question, put as "Question: ... Answer:" (to a T5: "... Short answer:")."""
        return self.write(pictures, questions, **ANSWER | decoding)

    def save(self, folder: str | Path) -> None:
        """Write a hub folder that `from_folder` reads, and whose model transformers loads. See `save_pretrained`.

        Raises UserError also for a transform that cuts pictures: BLIP-2's preprocessing takes them whole.
        """
        if self.transform.mode != "square":
            raise UserError("BLIP-2's preprocessing resizes pictures to a square: use Transform(mode='square')")
        folder, tokenizer, backend = Path(folder), self.tokenizer, self.tokenizer.backend
        image_token = backend.token_to_id(IMAGE)
        ids = dict(eos_token_id=tokenizer.end, pad_token_id=tokenizer.pad_id)
        ids |= dict(bos_token_id=tokenizer.start[0]) if tokenizer.start else {}
        save_pretrained(folder, self.vit, self.stage2, len(tokenizer) if image_token is None else image_token, **ids)
        names = {name.replace("_id", ""): backend.id_to_token(i) for name, i in ids.items()}
        square = dict(height=self.transform.size, width=self.transform.size)
        files = {"tokenizer.json": backend.to_str(), "tokenizer_config.json": json.dumps(names),
                 "preprocessor_config.json": json.dumps(dict(
                     image_processor_type="BlipImageProcessor", size=square, resample=3,
                     image_mean=self.transform.mean, image_std=self.transform.std))}
        for name, text in files.items():
            write_beside(folder / name, lambda path, text=text: path.write_text(text, encoding="utf-8"))
