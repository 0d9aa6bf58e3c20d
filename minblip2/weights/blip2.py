"""A whole BLIP-2: give it images, and it writes captions and answers questions, as the original does."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import tokenizers
import torch
from tokenizers.processors import TemplateProcessing
from torch import Tensor

from .. import UserError
from ..data.files import write_beside
from ..data.tokenizer import Tokenizer, require_known
from ..data.transforms import Transform
from ..device import autocast, best_device, compute_dtype
from ..lm.packed import PackedLinears
from ..stage2 import Stage2
from .checkpoint import read_config, require_folder
from .export import save_pretrained
from .official import load_blip2
from .reader import CAPTION, ImageReader, Images, completed, is_single

# LAVIS `Blip2OPT.predict_answers`, with the length penalty of the paper (§4.1): short ones win
ANSWER = dict(max_length=10, min_length=1, length_penalty=-1.0)
BEAMS = 5
IMAGE = "<image>"  # stands for an image in transformers' texts, and never in ours
FILES = (("tokenizer.json", "vocab.json"), ("preprocessor_config.json", "processor_config.json"))


def require_positions(stage2: Stage2, prompt: int, text: int) -> None:
    """Raise UserError where so many ids go beyond the positions that the language model has learned."""
    config = getattr(stage2.lm, "config", None)  # a language model of somebody's own may have none
    most = getattr(config, "max_positions", None)  # nor has one whose positions are only relative
    queries = stage2.qformer.config.num_queries
    if most is not None and queries + prompt + text > most:
        raise UserError(f"the language model has {most} positions, but {queries} queries, {prompt} ids of prompt and "
                        f"{text} of text are {queries + prompt + text}: shorten the prompt, or ask for a smaller "
                        "max_length")


@dataclass(kw_only=True)
class Blip2(ImageReader):
    """Frozen image encoder, bridge and frozen language model; images are given as `ImageReader` says.

    `prompt` stands before every caption, `question` is how a question is put to the language model. `packed` takes the
    frozen matrices a second time into memory, in the order in which a CPU writes fastest.
    """

    stage2: Stage2
    tokenizer: Tokenizer
    prompt: str = ""
    question: str = "Question: {} Answer:"
    beams: int = BEAMS
    packed: bool = False

    @classmethod
    def from_folder(cls, folder: str | Path, dtype: torch.dtype | None = None,
                    device: torch.device | None = None) -> Blip2:
        """Load a `Blip2ForConditionalGeneration` with its tokenizer and preprocessing files, in evaluation mode.

        Without `dtype`, the frozen parts are in bfloat16 where the device computes in it, else in float32.
        Raises UserError when a file is missing or belongs to something else.
        """
        require_folder(folder)
        read_config(folder)  # what this is no folder of is said first
        absent = [" or ".join(names) for names in FILES if not any((Path(folder) / name).exists() for name in names)]
        if absent and any((Path(folder) / name).exists() for name in ("trainer_state.json", "training_args.bin")):
            raise UserError(f"{folder} is a checkpoint of transformers' Trainer, which lacks {' and '.join(absent)}: "
                            "copy them from the folder of the model that training started from")
        device = device or best_device()
        tokenizer, transform = Tokenizer.from_folder(folder), Transform.from_folder(folder)  # fail before the long part
        vit, stage2 = load_blip2(folder, dtype or compute_dtype(device))
        question = "Question: {} Short answer:" if tokenizer.prompt_end else "Question: {} Answer:"  # as in LAVIS
        return cls(vit=vit.to(device).eval(), transform=transform, stage2=stage2.to(device).eval(), tokenizer=tokenizer,
                   question=question)

    def generate(self, images: Images, prompts: str | Sequence[str], batch_size: int = 8, **decoding) -> list[str]:
        """What the language model writes after each image and its prompt, one for all or one for each.

        See `generation.generate` for the ways of decoding. Drawing (`top_p`, `temperature`) takes one beam, as asked
        for or not. Raises UserError when images and prompts are not equally many.
        """
        decoding = completed(decoding, beams=self.beams, max_length=CAPTION["max_length"])
        prompts = prompts if (one_for_all := isinstance(prompts, str)) else list(prompts)
        rest = iter([prompts] if one_for_all else prompts)
        self.stage2.eval()
        self.require_positions([prompts] if one_for_all else prompts, decoding["max_length"])
        texts: list[str] = []
        for features in self.chunks(images, batch_size):
            given = [prompts] * len(features) if one_for_all else list(islice(rest, len(features)))
            if len(given) < len(features):
                raise UserError(f"there are more images than the {len(texts) + len(given)} prompts: give one for each, "
                                "or one for all")
            texts += [self.tokenizer.decode(row) for row in self.write(features, *self.prompt_ids(given), **decoding)]
        if not one_for_all and (left := len(list(rest))):
            raise UserError(f"there are {len(texts) + left} prompts for {len(texts)} images: give one for each, or one "
                            "for all")
        return texts

    def prompt_ids(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """The prompts' ids and mask (b s), as the language model is given them."""
        rows = [self.tokenizer.encode_prompt(prompt) for prompt in prompts]
        require_known([*rows, [self.tokenizer.eos_id]], self.stage2.lm.vocab_size)
        ids, mask = self.tokenizer.pad(rows)
        return ids.to(self.device), mask.to(self.device)

    def write(self, features: Tensor, ids: Tensor, mask: Tensor, **decoding) -> Tensor:
        """The ids (b t) that the language model writes after features (b v e) and prompts, ids and mask (b s)."""
        with autocast(self.device, self.precision), PackedLinears() if self.packed else nullcontext():
            return self.stage2.generate(features, ids, mask, self.tokenizer.eos_id, **decoding)

    def require_positions(self, prompts: Sequence[str], max_length: int) -> None:
        """Raise UserError where prompt and text go beyond the positions that the language model has learned."""
        longest = max((len(self.tokenizer.encode_prompt(prompt)) for prompt in prompts), default=0)
        require_positions(self.stage2, longest, max_length)

    def caption(self, images: Images, prompt: str | None = None, **decoding) -> str | list[str]:
        """A caption for each image, or for the one; it goes on from `prompt`, for example "a photo of"."""
        captions = self.generate(images, self.prompt if prompt is None else prompt, **completed(decoding, **CAPTION))
        return captions[0] if is_single(images) else captions

    def put(self, asked: str, question: str | None = None) -> str:
        """A question as it is put to the language model; see `ask`. Raises UserError for an empty one."""
        if not asked.strip():
            raise UserError("write a question: there is none")
        before, _, after = (self.question if question is None else question).partition("{}")
        return asked if before and asked.startswith(before) else before + asked.strip() + after

    def ask(self, images: Images, questions: str | Sequence[str], question: str | None = None,
            **decoding) -> str | list[str]:
        """An answer for each image and question: one question for all images, one image for all questions, or as many.

        `question` is how they are put to the language model; one that is put so already is taken as it stands. One
        image and one question give one answer, everything else a list. Raises UserError when there is no question, or
        images and questions are not equally many.
        """
        one = isinstance(questions, str)
        prompts = self.put(questions, question) if one else [self.put(asked, question) for asked in questions]
        if prompts == []:
            raise UserError("there is no question: ask at least one")
        if is_single(images) and not one:
            images = self.encode_images(images).expand(len(prompts), -1, -1)
        answers = self.generate(images, prompts, **completed(decoding, **ANSWER))
        return answers[0] if one and is_single(images) else answers

    def save(self, folder: str | Path, image_token: int | None = None) -> None:
        """Write a hub folder that `from_folder` reads, and whose model transformers loads. See `save_pretrained`.

        `image_token` is an id that no text contains; without one it is the tokenizer's <image>, or the first id beyond
        the tokenizer. `prompt` and `question` are not kept. Raises UserError also for a transform that cuts images:
        BLIP-2's preprocessing takes them whole.
        """
        if self.transform.mode != "square":
            raise UserError("BLIP-2's preprocessing resizes images to a square: use Transform(mode='square')")
        folder, tokenizer, backend = Path(folder), self.tokenizer, self.tokenizer.backend
        spare = (image_token, backend.token_to_id(IMAGE), len(tokenizer))
        ids = dict(eos_token_id=tokenizer.eos_id, pad_token_id=tokenizer.pad_id)
        ids |= dict(bos_token_id=tokenizer.bos_ids[0]) if tokenizer.bos_ids else {}
        save_pretrained(folder, self.vit, self.stage2, next(i for i in spare if i is not None), **ids)
        names = {name.replace("_id", ""): backend.id_to_token(i) for name, i in ids.items()}
        if tokenizer.bos_ids and backend.encode("").ids[:1] != tokenizer.bos_ids:  # so that others begin texts as we do
            backend = tokenizers.Tokenizer.from_str(backend.to_str())
            backend.post_processor = TemplateProcessing(single=f"{names['bos_token']} $A", special_tokens=[
                (names["bos_token"], tokenizer.bos_ids[0])])
        square = dict(height=self.transform.size, width=self.transform.size)
        files = {"tokenizer.json": backend.to_str(), "tokenizer_config.json": json.dumps(names),
                 "preprocessor_config.json": json.dumps(dict(
                     image_processor_type="BlipImageProcessor", size=square, resample=3,
                     image_mean=self.transform.mean, image_std=self.transform.std))}
        (folder / "processor_config.json").unlink(missing_ok=True)  # of what was here before; it would be read first
        for name, text in files.items():
            write_beside(folder / name, lambda path, text=text: path.write_text(text, encoding="utf-8"))
