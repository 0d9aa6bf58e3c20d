"""Your own bridge: what you wrote in the exercises, put in the place of the module's parts, trained, and captioning.

`collect` reads the pieces out of the notebooks of a folder (reading.py) and lets each one's check judge it; what is not
done yet is lent by the solutions. `OwnStage1` and `OwnStage2` are the module's two stages with the pieces in them: read
their `forward` to see all of yours at work. What no exercise asks for (embeddings, norms, feed-forwards, the LM head,
decoding) stays the module's, and so do the names of all weights: a trained one can be loaded into the module.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL.Image import Image
from torch import Tensor, nn

from checks import DONE, GRADED, OPEN, ROOT, SIGNS, WRONG, Exercise, Unwritten, is_stub, stopped
from minblip2 import UserError, masks
from minblip2.course import figures, viz
from minblip2.course.lesson import RUN
from minblip2.data.batches import Batch
from minblip2.data.coco import CocoCaptions
from minblip2.data.scene_captions import judge, write_captions
from minblip2.data.scenes import Scene, draw_scenes
from minblip2.qformer import ImageKV, QFormer, QFormerBlock, QFormerConfig, QFormerOutput
from minblip2.stage1 import Stage1, Stage1Output
from minblip2.stage2 import Stage2, Stage2Output
from minblip2.training.bridge import Bridge
from minblip2.training.recipes import SCENES, default_data
from minblip2.training.stages import prompt_and_target
from reading import NotThere, answer_in

SLOTS = {  # lesson -> its exercises whose answers are put in, by the names of their checks
    "01": ("attention", "cross_attention"), "02": ("bidirectional", "unimodal", "multimodal_causal"),
    "05": ("run_block", "fresh_queries"), "06": ("similarity", "itc_loss"),
    "07": ("sample_negatives", "match_triple", "match_logits"),
    "08": ("decoder_ids", "next_words", "itg_loss", "until_end"), "09": ("rate", "recall", "freeze"),
    "10": ("sequence", "labels", "shifted_loss", "lm_logits"),
}
NOT_YET = "None of the pieces is yours so far: solve some exercises of lessons 01 to 10, and save their notebooks."

# --- whose pieces they are --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Piece:
    """An answer to an exercise, whose it is, what the check says of the learner's, and the code that made it."""

    exercise: Exercise
    answer: Any
    yours: bool
    status: str
    message: str
    source: str = ""
    space: dict[str, Any] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()


class Pieces:
    """The answers by the names of their checks, as attributes: `pieces.unimodal(queries, text_mask)`."""

    def __init__(self, pieces: Sequence[Piece]):
        self.all = {piece.exercise.__name__: piece for piece in pieces}

    def __getattr__(self, name: str) -> Any:
        try:
            return vars(self)["all"][name].answer
        except KeyError:
            raise AttributeError(f"there is no piece {name}") from None

    def __deepcopy__(self, memo: dict) -> Pieces:
        return self  # functions, not weights: a copy of a model shares them

    @property
    def yours(self) -> int:
        """How many of them are the learner's."""
        return sum(piece.yours for piece in self.all.values())

    def sources(self, *lessons: str) -> tuple[str, ...]:
        """The code of the pieces of some lessons: where it is the same, so is what is trained with it."""
        return tuple(piece.source for piece in self.all.values() if piece.exercise.number[:2] in lessons)

    def table(self) -> str:
        """A line for each piece, how many are the learner's, and what of the notebooks was left out."""
        lines = []
        for piece in self.all.values():
            output = "yours" if piece.yours else f"{piece.status}; the solution's is put in"
            lines.append(f"{SIGNS[piece.status]} {piece.exercise.name}: {output}")
            lines += [f"  {piece.message}"] if piece.message else []
        notes = dict.fromkeys(note for piece in self.all.values() for note in piece.left_out)
        return "\n".join([*lines, f"{self.yours} of {len(self.all)} pieces are yours", *notes])


def notebook_of(folder: Path, lesson: str) -> tuple[Path | None, tuple[str, ...]]:
    """The notebook of a lesson in a folder, and a sentence about each other one that lies there, such as a -Copy1."""
    plain = next(path.name for path in (ROOT / "solutions").glob(f"{lesson}_*.ipynb"))
    others = sorted((path for path in folder.glob(f"{lesson}_*.ipynb") if path.name != plain), key=lambda one: one.name)
    if (folder / plain).exists():
        return folder / plain, tuple(f"{other.name} is not read: {plain} is there" for other in others)
    if GRADED and folder.parent != ROOT:  # nbgrader has a folder for each assignment, side by side
        beside = next(folder.parent.glob(f"*/{plain}"), None)
        if beside:
            return beside, ()
    if len(others) == 1:
        return others[0], (f"{others[0].name} is read, since there is no {plain}",)
    return None, tuple(f"{other.name} is not read: which of {len(others)} counts? Name it {plain}" for other in others)


def judged(exercise: Exercise, folder: Path) -> Piece:
    """What a folder's notebook answers to an exercise, as its check sees it; there may be nothing."""
    lesson = exercise.number[:2]
    notebook, notes = notebook_of(folder, lesson)
    try:
        if notebook is None:
            raise NotThere(f"there is no notebook of lesson {lesson} in {folder.name}/")
        answer = answer_in(notebook, exercise.__name__, exercise.number)
    except NotThere as nothing:
        return Piece(exercise, None, False, OPEN, f"{nothing}.", left_out=notes)
    except (Exception, SystemExit) as error:  # they are the learner's lines
        if isinstance(error, NotImplementedError) and is_stub(error):
            return Piece(exercise, None, False, OPEN, "", left_out=notes)
        return Piece(exercise, None, False, WRONG, f"{notebook.name} stopped with {stopped(error)}", left_out=notes)
    verdict = exercise.verdict(answer.value)
    return Piece(exercise, answer.value, verdict.status == DONE, verdict.status, verdict.message, answer.source,
                 answer.space, (*notes, *answer.left_out))


def here() -> Path:
    """Where the running notebook lies, if others of the course do so, too; else exercises/."""
    return Path.cwd() if any(any(Path.cwd().glob(f"{lesson}_*.ipynb")) for lesson in SLOTS) else ROOT / "exercises"


def collect(folder: Path | None = None, lender: Path = ROOT / "solutions") -> Pieces:
    """Read the pieces out of a folder's notebooks and say whose they are; by default those beside the running one.

    A piece that its check does not let pass is lent by the `lender`. Raises UserError where that has none either.
    """
    pieces = []
    for lesson, names in SLOTS.items():
        for name in names:
            exercise = getattr(import_module(f"checks.lesson{lesson}"), name)
            piece = judged(exercise, folder or here())
            if not piece.yours:
                lent = judged(exercise, lender)
                if not lent.yours:
                    raise UserError(f"{exercise.name} is {piece.status}, and {lender.name}/ has none to lend: do it "
                                    "first, or restore the solutions")
                piece = replace(lent, yours=False, status=piece.status, message=piece.message, left_out=piece.left_out)
            pieces.append(piece)
    made = Pieces(pieces)
    print(made.table())
    return made


# --- the module with the pieces in it ---------------------------------------------------------------------------------


def called_as_pytorchs(attention: Callable) -> Callable:
    """The learner's attention behind the signature of `F.scaled_dot_product_attention`."""
    def fused(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **settings: Any) -> Tensor:
        return attention(query, key, value, attn_mask)
    return fused


class OwnBlock(QFormerBlock):
    """A block of the Q-Former whose attention is the learner's, as is the order in which the parts run."""

    def __init__(self, config: QFormerConfig, has_cross_attention: bool, pieces: Pieces):
        super().__init__(config, has_cross_attention)
        # 01.4 leans on a `fused` that is given there, which is PyTorch's; here it leans on 01.2.
        pieces.all["cross_attention"].space["fused"] = called_as_pytorchs(pieces.attention)

        class SelfAttention(pieces.cross_attention):
            """A layer that reads another sequence reads its own as well."""

            def forward(self, x: Tensor, mask: Tensor) -> Tensor:
                return super().forward(x, x, mask)

        self.self_attention = SelfAttention(config.width, config.heads, config.width)
        if has_cross_attention:
            self.cross_attention = pieces.cross_attention(config.width, config.heads, config.image_width)
        self.pieces = pieces

    def forward(self, x: Tensor, num_queries: int, image: tuple[Tensor, Tensor] | None, mask: Tensor,
                cache: None = None) -> Tensor:
        """Transform x (b s e); `image` holds features (b v image_width), not keys and values."""
        return self.pieces.run_block(self, x, num_queries, None if image is None else image[0], mask)


class OwnQFormer(QFormer):
    """The module's embeddings and LM head around blocks of the learner's, which project the picture each for itself."""

    def __init__(self, config: QFormerConfig, pieces: Pieces):
        super().__init__(config)
        self.blocks = nn.ModuleList(OwnBlock(config, i % config.cross_attention_every == 0, pieces)
                                    for i in range(config.layers))
        self.blocks.apply(self.initialise)
        self.query_tokens = pieces.fresh_queries(config.num_queries, config.width, config.init_std)

    def project_image(self, image_features: Tensor) -> ImageKV:
        """Features (b v image_width) as they are, for each block that reads: the learner's layer projects them."""
        return ImageKV(None if block.cross_attention is None else (image_features, image_features)
                       for block in self.blocks)

    def query_branch(self) -> OwnQFormer:
        """A copy for stage 2. It keeps its text side: the learner's block may call it for a text of no words."""
        return copy.deepcopy(self)


class OwnStage1(Stage1):
    """Stage 1 of the learner's pieces. Nothing is cached: one pass for each loss, as the paper draws it."""

    def __init__(self, config: QFormerConfig, embed_dim: int, pieces: Pieces):
        super().__init__(config, embed_dim)
        self.qformer, self.pieces = OwnQFormer(config, pieces), pieces

    def run(self, image_kv: ImageKV, text_ids: Tensor, text_mask: Tensor, mask_of: Callable) -> QFormerOutput:
        """Queries and text in one sequence, under one of the three masks."""
        return self.qformer(image_kv, text_ids, mask_of(self.qformer.config.num_queries, text_mask))

    def forward(self, image_features: Tensor, text_ids: Tensor, text_mask: Tensor, image_ids: Tensor | None = None,
                negatives: tuple[Tensor, Tensor] | None = None) -> Stage1Output:
        """ITC + ITM + ITG, of the shapes of `Stage1.forward`; read it beside the figure of lesson 06."""
        mine, kv, queries = self.pieces, self.image_kv(image_features), self.qformer.config.num_queries
        image_ids = torch.arange(len(image_features)) if image_ids is None else image_ids
        same_image = rearrange(image_ids, "b -> b 1") == rearrange(image_ids, "n -> 1 n")

        apart = self.run(kv, text_ids, text_mask, mine.unimodal)
        image_embeds = F.normalize(self.vision_projection(apart.queries), dim=-1)
        text_embeds = F.normalize(self.text_projection(apart.text[:, 0]), dim=-1)
        cosine = mine.similarity(image_embeds, text_embeds)
        itc = mine.itc_loss(cosine, same_image, self.temperature, self.label_smoothing)

        itc_logits = cosine / self.temperature
        wrong = mine.sample_negatives(itc_logits.detach(), same_image) if negatives is None else negatives
        images, texts, match_labels = mine.match_triple(*wrong)
        fused = self.run(kv.select(images), text_ids[texts], text_mask[texts], mine.bidirectional)
        match_logits = mine.match_logits(torch.cat(fused, dim=1), queries, self.itm_head)
        itm = F.cross_entropy(match_logits, match_labels)

        asked = mine.next_words(text_ids, text_mask)
        output = self.run(kv, mine.decoder_ids(text_ids, self.qformer.dec_id), text_mask, mine.multimodal_causal).text
        words = self.qformer.lm_logits(output)
        itg = mine.itg_loss(words, asked, self.label_smoothing)
        loss, words = itc + itm + itg, words[asked != -100]
        return Stage1Output(loss, itc, itm, itg, itc_logits, match_logits, match_labels, words, self.temperature)


class LogitsFromEmbeds(nn.Module):
    """A language model on embeddings (b s e), of which `attention_mask` (b s) are not padding: logits (b s n).

    It is what 10.4 lets the gradient through.
    """

    def __init__(self, lm: nn.Module, attention_mask: Tensor):
        super().__init__()
        self.lm, self.mask, self.positions = lm, masks.causal(attention_mask), masks.token_positions(attention_mask)

    def forward(self, embeds: Tensor) -> Tensor:
        """(b s e) -> (b s n)."""
        return self.lm.lm_logits(self.lm(embeds, self.mask, self.positions))


class OwnStage2(Stage2):
    """Stage 2 of the learner's pieces, after stage 1. Writing is the module's: it reads the same soft prompt."""

    def __init__(self, stage1: OwnStage1, lm: nn.Module):
        super().__init__(stage1.vision_norm, stage1.qformer, lm)
        self.lm, self.pieces = stage1.pieces.freeze(self.lm), stage1.pieces

    def queries(self, image_features: Tensor) -> Tensor:
        """What the Q-Former reads off features (b v image_width): (b q e)."""
        kv, queries = self.qformer.project_image(self.vision_norm(image_features)), self.qformer.config.num_queries
        nobody = torch.empty(len(image_features), 0, dtype=torch.bool)
        return self.qformer(kv, mask=self.pieces.bidirectional(queries, nobody)).queries

    def soft_prompt(self, image_features: Tensor) -> Tensor:
        """Features (b v image_width) as tokens (b q e) of the language model's width."""
        return self.projection(self.queries(image_features))

    def forward(self, image_features: Tensor, prompt_ids: Tensor, prompt_mask: Tensor, text_ids: Tensor,
                text_mask: Tensor) -> Stage2Output:
        """Loss of texts (b t) after [image ; prompt], of the shapes of `Stage2.forward`."""
        mine, seen = self.pieces, self.queries(image_features)
        embeds = mine.sequence(seen, self.projection, self.lm.embed(prompt_ids), self.lm.embed(text_ids))
        attention_mask = F.pad(torch.cat([prompt_mask, text_mask], dim=1), (seen.shape[1], 0), value=True)
        targets = mine.labels(seen.shape[1], prompt_ids, prompt_mask, text_ids, text_mask)
        logits = mine.lm_logits(LogitsFromEmbeds(self.lm, attention_mask), embeds)
        return Stage2Output(mine.shifted_loss(logits, targets), logits[:, :-1][targets[:, 1:] != -100])


# --- the world in which it learns -------------------------------------------------------------------------------------

EXAM = 200  # pictures, drawn for this alone
# half of the course's blocks, each of which reads: minutes, not a quarter hour
SIZES = dict(layers=2, cross_attention_every=1)


@cache
def exam() -> tuple[list[Image], list[Scene], list[str]]:
    """The pictures on which a bridge is judged, what is in them, and a caption of each that tells much."""
    drawn = list(draw_scenes(EXAM, "exam of the own bridge"))
    output = [max(write_captions(scene, rng), key=len) for rng, _, scene in drawn]
    return [image for _, image, _ in drawn], [scene for _, _, scene in drawn], output


class World:
    """Drawn scenes, and the two frozen experts that the course has trained; what is not there yet is made first."""

    def __init__(self) -> None:
        self.data = CocoCaptions(default_data(SCENES, RUN, None), "train")
        self.backbones = SCENES.build(SCENES, self.data.root, None, RUN)
        self.backbones.qformer = replace(self.backbones.qformer, **SIZES)
        self.bridge = Bridge(SCENES, self.backbones, SCENES.new_stage1(self.backbones), device=torch.device("cpu"))
        self.features = self.bridge.features(self.data, RUN / "cache")

    def batches(self, for_lm: bool) -> Iterator[Batch]:
        """Batches of pictures and captions without end, in the ids of the Q-Former or of the language model."""
        pairs = self.bridge.stage2_pairs if for_lm else self.bridge.stage1_pairs
        return pairs(self.data, [self.features]).iterate()

    @torch.no_grad()
    def encode_images(self, images: Sequence[Image]) -> Tensor:
        """Frozen features (b v e) of pictures."""
        return self.backbones.encoder(torch.stack([self.backbones.transform(image) for image in images]))


@cache
def world() -> World:
    """The one world."""
    return World()


LOSSES: dict[str, list[float]] = {}  # of each stage of the bridge that was made last
KEPT: dict[tuple, tuple[nn.Module, list[float]]] = {}  # what was trained, by all that it depends on
_rehearsing = False


@contextmanager
def rehearsal() -> Iterator[None]:
    """Inside, nothing is trained and nothing is said: the whole way in seconds, to see whether it can be gone."""
    global _rehearsing
    _rehearsing = True
    try:
        yield
    finally:
        _rehearsing = False


def check_plan(steps: Any, peak: Any) -> None:
    """Raises UserError unless these are a number of steps and a rate: before minutes are spent, not after."""
    if isinstance(steps, bool) or not isinstance(steps, int | np.integer) or steps < 1:
        raise UserError(f"steps is {steps!r}: a whole number of them is asked for, 1 or more")
    if isinstance(peak, bool) or not isinstance(peak, int | float | np.floating) or not 0 < peak < 1:
        raise UserError(f"peak is {peak!r}: the highest learning rate is asked for, a number between 0 and 1")


def learn(model: nn.Module, loss_of: Callable[[Batch], Tensor], batches: Iterator[Batch], steps: int, peak: float,
          rate: Callable, name: str, fresh: str = "") -> None:
    """Train in place, at the learner's rate; what is `fresh` among trained parts learns ten times as fast.

    Says how it goes. Every step has its seed, so that a run can be repeated.
    """
    weights = [(part, weight) for part, weight in model.named_parameters() if weight.requires_grad]
    new = [weight for part, weight in weights if fresh and part.startswith(fresh)]
    old = [weight for part, weight in weights if not (fresh and part.startswith(fresh))]
    optimiser = torch.optim.AdamW([{"params": old, "lr_scale": 1}, {"params": new, "lr_scale": 10}], betas=(0.9, 0.98))
    model.train()
    started, paid = time.perf_counter(), []
    for step in range(steps):
        torch.manual_seed(step)
        for group in optimiser.param_groups:
            group["lr"] = group["lr_scale"] * rate(step, steps, steps // 20, peak, 0.02)
        loss = loss_of(next(batches))
        if not loss.isfinite():
            raise UserError(f"the loss of {name} is {loss.item()} at step {step + 1}: lower the peak rate {peak:g}")
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        paid.append(loss.item())
        if step + 1 in (steps // 4, steps // 2, 3 * steps // 4, steps):
            print(f"{name}, step {step + 1} of {steps}: loss {np.mean(paid[-20:]):.2f}, "
                  f"{time.perf_counter() - started:.0f} s", flush=True)
    LOSSES[name] = paid
    model.eval()


def once(key: tuple, name: str, train: Callable[[], nn.Module]) -> nn.Module:
    """What `train` makes, or a copy of what it has made before from the same code, steps and rate."""
    if key in KEPT:
        print(f"{name}: trained before, by the same code, for as many steps, at this rate; it is taken as it was")
    else:
        model = train()
        KEPT[key] = copy.deepcopy(model), LOSSES[name]
    model, LOSSES[name] = copy.deepcopy(KEPT[key][0]), KEPT[key][1]
    model.key = key
    return model


def train_stage1(pieces: Pieces, steps: int, peak: float) -> OwnStage1:
    """A Q-Former of the learner's pieces, trained on her losses. Raises Unwritten where no piece is hers."""
    if not isinstance(pieces, Pieces):
        raise UserError(f"train_stage1 takes the pieces that own.collect gives, not a {type(pieces).__name__}")
    if not pieces.yours:
        raise Unwritten(NOT_YET)
    check_plan(steps, peak)
    torch.manual_seed(0)
    model = OwnStage1(world().backbones.qformer, SCENES.embed_dim, pieces)
    if _rehearsing:
        return model.eval()

    def loss_of(batch: Batch) -> Tensor:
        out = model(batch.image_features, batch.text_ids, batch.text_mask, batch.image_ids)
        return sum(weight * part for weight, part in zip(SCENES.loss_weights, (out.itc, out.itm, out.itg), strict=True))

    def train() -> OwnStage1:
        learn(model, loss_of, world().batches(for_lm=False), steps, peak, pieces.rate, "stage 1")
        return model

    made = once(("stage 1", id(world()), steps, peak, pieces.sources("01", "02", "05", "06", "07", "08", "09")),
                "stage 1", train)
    made.pieces = pieces  # what was kept has those of its day, and stage 2 takes others of them
    found = recall_of(made)
    print(f"stage 1: {found:.0%} of {EXAM} unseen pictures find their own caption first; blindly {1 / EXAM:.1%} would")
    return made


@torch.no_grad()
def recall_of(model: OwnStage1) -> float:
    """Recall@1 on the exam, by the learner's similarity and recall."""
    images, _, captions = exam()
    seen = model.qformer(model.image_kv(world().encode_images(images)), mask=masks.bidirectional(
        model.qformer.config.num_queries, torch.empty(len(images), 0, dtype=torch.bool))).queries
    ids, mask = world().bridge.retriever.text_ids(captions)
    said = model.qformer(text_ids=ids, mask=masks.unimodal(0, mask)).text[:, 0]
    cosine = model.pieces.similarity(F.normalize(model.vision_projection(seen), dim=-1),
                                     F.normalize(model.text_projection(said), dim=-1))
    return model.pieces.recall(cosine, torch.arange(len(captions)), 1)


def train_stage2(stage1: OwnStage1, steps: int, peak: float) -> OwnStage2:
    """What stage 1 has learned in front of the frozen language model, trained on the learner's loss."""
    if not isinstance(stage1, OwnStage1):
        raise UserError(f"train_stage2 takes what own.train_stage1 gives, not a {type(stage1).__name__}")
    check_plan(steps, peak)
    torch.manual_seed(0)
    model = OwnStage2(copy.deepcopy(stage1), copy.deepcopy(world().backbones.lm))
    if _rehearsing:
        return model.eval()

    def loss_of(batch: Batch) -> Tensor:
        return model(batch.image_features, *prompt_and_target(batch, world().backbones.lm_tokenizer, "")).loss

    def train() -> OwnStage2:
        model.match_embedding_scale(torch.from_numpy(np.array(world().features[:256], dtype=np.float32)))
        learn(model, loss_of, world().batches(for_lm=True), steps, peak, stage1.pieces.rate, "stage 2",
              fresh="projection")
        return model

    return once(("stage 2", getattr(stage1, "key", id(stage1)), steps, peak, stage1.pieces.sources("02", "09", "10")),
                "stage 2", train)


TRAINED: list[Callable[[Sequence[Image]], list[str]]] = []  # the last captioner that was made, for `show`


def captioner(model: OwnStage2) -> Callable[[Sequence[Image]], list[str]]:
    """What gives a caption for each picture, written by the frozen language model, one likeliest word after another."""
    if not isinstance(model, OwnStage2):
        raise UserError(f"captioner takes what own.train_stage2 gives, not a {type(model).__name__}")
    tokenizer = world().backbones.lm_tokenizer

    def caption(images: Sequence[Image]) -> list[str]:
        given = torch.tensor([tokenizer.encode_prompt("")]).expand(len(images), -1)
        ids = model.generate(world().encode_images(images), given, torch.ones_like(given, dtype=torch.bool),
                             tokenizer.eos_id)
        return [tokenizer.decode(torch.tensor(row)) for row in model.pieces.until_end(ids, tokenizer.eos_id)]

    if not _rehearsing:
        TRAINED[:] = [caption]
    return caption


def show(count: int = 8) -> None:
    """What the bridge that was trained last says of some pictures of the exam, as a figure."""
    if not TRAINED:
        print("○ not done yet: there is no bridge that could say anything")
        return
    images, scenes, _ = exam()
    output = TRAINED[0](images[:count])
    right = [bool(judge(caption, scene)["things"]) for caption, scene in zip(output, scenes[:count], strict=True)]
    sheet = figures.caption_sheet(images[:count], [{"right" if good else "wrong": caption}
                                                   for caption, good in zip(output, right, strict=True)])
    viz.show(sheet, f"{count} drawn scenes with the captions of your own bridge, {sum(right)} of them right about "
                    f"every thing in the picture; the first says: {output[0]}")
