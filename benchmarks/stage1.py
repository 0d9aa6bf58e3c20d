"""A step of stage 1, forward and backward, ours against others': python -m benchmarks.stage1 [--batch 8 16]

`PlainStage1` computes the same losses without a saving: keys and values again for each pass, an image copied for each
pair, text padded to 32, the vocabulary at every position, attention step by step. "official recipe" is LAVIS's, which
has one of our savings, the cached queries. "transformers" composes the same passes from its `Blip2QFormerModel`, which
has no cache. `--forms` chooses what is compared (see `forms`), down to each saving alone. Each round takes another
batch, the same for all: captions of COCO's lengths in batches of similar length, as training makes them, or with
`--draw random` at random.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.timing import OURS, case, difference, gradient_difference, interleave, keep, options, same, work
from minblip2 import masks
from minblip2.attention import MultiHeadAttention, capture_attention
from minblip2.data.batches import PairBatches
from minblip2.data.entry import run_command
from minblip2.qformer import QFormerConfig
from minblip2.stage1 import Stage1

SAVINGS = {"image_once": "image K/V projected once", "trim": "text no longer than the longest",
           "cached": "ITG on cached queries", "supervised": "LM head where supervised", "fused": "fused attention"}
OFFICIAL, THEIRS, TRIMMED = "official recipe", "transformers", "transformers, text trimmed"
SIZES = {"base": (QFormerConfig(dropout=0.0), 257),
         "laptop": (QFormerConfig(width=384, layers=6, mlp_width=1536, num_queries=16, image_width=384,
                                  dropout=0.0), 257),
         "tiny": (QFormerConfig(width=64, layers=4, heads=4, mlp_width=256, num_queries=8, image_width=64,
                                vocab_size=200, dropout=0.0), 65)}
PADDED = 32  # tokens, as in LAVIS
# so many of 400 COCO 2017 captions have this many bert-base-uncased tokens, [CLS] and [SEP] included
CAPTION_LENGTHS = {9: 2, 10: 7, 11: 47, 12: 77, 13: 63, 14: 72, 15: 50, 16: 32, 17: 19, 18: 7, 19: 9, 20: 5, 21: 1,
                   22: 2, 23: 2, 24: 3, 28: 1, 32: 1}


class Features(NamedTuple):
    """Normalised image features (b v e) where `Stage1` holds keys and values: each pass projects them anew."""

    states: Tensor

    def select(self, rows: Tensor) -> Features:
        """Those of the images `rows` (n)."""
        return Features(self.states[rows])


class PlainStage1(Stage1):
    """`Stage1` with only the `savings` that are named (keys of SAVINGS): same losses, more work."""

    def __init__(self, *args, savings: tuple[str, ...] = (), **settings):
        super().__init__(*args, **settings)
        self.savings = frozenset(savings)

    def forward(self, image_features, text_ids, text_mask, image_ids=None, negatives=None):
        """As in `Stage1`; without the fused kernel, attention computes its weights and keeps them for the gradient."""
        if "trim" not in self.savings:
            more = max(PADDED - text_ids.shape[1], 0)
            text_ids, text_mask = F.pad(text_ids, (0, more)), F.pad(text_mask, (0, more), value=False)
        explicit = () if "fused" in self.savings else (
            layer for layer in self.modules() if isinstance(layer, MultiHeadAttention))
        with capture_attention(*explicit):
            output = super().forward(image_features, text_ids, text_mask, image_ids, negatives)
        self.image = None  # or a copy of the model would hold this step's graph
        return output

    def projected(self, image):
        """Keys and values of what `image_kv` gave."""
        return self.qformer.project_image(image.states) if isinstance(image, Features) else image

    def image_kv(self, image_features):
        """Keys and values, or features that are to be projected later, again and again."""
        normalised = Features(self.vision_norm(image_features))
        return self.projected(normalised) if "image_once" in self.savings else normalised

    def embed_image(self, image_kv, cache=None):
        """As in `Stage1`; ITG's own pass over the queries takes the same images."""
        self.image = image_kv
        return super().embed_image(self.projected(image_kv), cache)

    def itm_logits(self, image_kv, text_ids, text_mask):
        """As in `Stage1`; wrong images are projected again with the pairs."""
        return super().itm_logits(self.projected(image_kv), text_ids, text_mask)

    def itg_loss(self, text_ids, text_mask, cache):
        """Run the queries a second time, together with the text; logits at every position, most of them ignored."""
        if {"cached", "supervised"} <= self.savings:
            return super().itg_loss(text_ids, text_mask, cache)
        num_queries = self.qformer.config.num_queries
        decoder_ids = torch.cat([torch.full_like(text_ids[:, :1], self.qformer.dec_id), text_ids[:, 1:]], dim=1)
        mask = masks.multimodal_causal(num_queries, text_mask)
        if "cached" in self.savings:
            states = self.qformer(text_ids=decoder_ids, mask=mask[:, :, num_queries:], cache=cache).text[:, :-1]
        else:
            states = self.qformer(self.projected(self.image), decoder_ids, mask).text[:, :-1]
        supervised, labels = text_mask[:, 1:], text_ids[:, 1:]
        if "supervised" in self.savings:
            logits, labels = self.qformer.lm_logits(states[supervised]).float(), labels[supervised]
            return F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing), logits
        logits, labels = self.qformer.lm_logits(states).float(), labels.masked_fill(~supervised, -100)
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), label_smoothing=self.label_smoothing)
        return loss, logits[supervised]


def example(config: QFormerConfig, visual: int, batch: int, seed: int = 0, lengths: Tensor | None = None):
    """Random features and captions of COCO's lengths: image (b v e), ids and mask (b t), negatives (b) and (b)."""
    generator = torch.Generator().manual_seed(seed)
    lengths = draw_lengths(batch, generator) if lengths is None else lengths
    mask = torch.arange(int(lengths.max())) < lengths[:, None]
    ids = torch.randint(1, config.vocab_size - 1, mask.shape, generator=generator).masked_fill(~mask, 0)
    content = torch.randn(batch, 1, config.image_width, generator=generator)  # without it all images look alike
    image = content + torch.randn(batch, visual, config.image_width, generator=generator)
    other = (torch.arange(batch) + 1) % batch
    return image, ids, mask, (other, other)


def draw_lengths(n: int, generator: torch.Generator) -> Tensor:
    """Lengths (n) of captions in tokens, distributed as COCO's."""
    weights = torch.tensor([float(count) for count in CAPTION_LENGTHS.values()])
    return torch.tensor([*CAPTION_LENGTHS])[torch.multinomial(weights, n, replacement=True, generator=generator)]


def similar_lengths(batch: int, seed: int = 0) -> list[Tensor]:
    """The lengths (b) of the captions in each of 64 batches, as `PairBatches` puts an epoch together."""
    lengths = draw_lengths(64 * batch, torch.Generator().manual_seed(seed))
    pairs = range(len(lengths))
    captions = [[1] * n for n in lengths.tolist()]
    epoch = PairBatches([np.zeros((len(pairs), 1, 1))], pairs, captions, pairs, batch, seed, pad_id=0)
    return [lengths[torch.from_numpy(rows)] for rows in epoch.plan(0)]


def forms() -> dict[str, tuple[str, ...]]:
    """Name of each form of stage 1 in our own code, and its savings; `OURS` is what `Stage1` does."""
    return {OURS: tuple(SAVINGS), "plain": (), OFFICIAL: ("cached",)} | {text: (key,) for key, text in SAVINGS.items()
                                                                         if key != "cached"}


def sharing(model: PlainStage1, savings: tuple[str, ...]) -> PlainStage1:
    """A form with other savings on the same weights."""
    with torch.device("meta"):
        made = PlainStage1(model.qformer.config, savings=savings)
    for name, part in model.named_children():
        setattr(made, name, part)
    made.temperature = model.temperature
    return made


def composed(model: PlainStage1, savings: tuple[str, ...] = ()) -> PlainStage1:
    """The same losses on the same weights with transformers' Q-Former in the place of ours."""
    from benchmarks.theirs import TheirQFormer  # here: what needs no transformers runs without it

    made = sharing(model, savings)
    made.qformer = TheirQFormer(model.qformer)
    return made


def losses_and_gradients(model: nn.Module, known: dict[int, str], batch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Three losses and all gradients of a batch, under the names that are `known` of the weights' memory."""
    image, ids, mask, negatives = batch
    out = model(image, ids, mask, negatives=negatives)
    out.loss.backward()
    gradients = {known[parameter.data_ptr()]: parameter.grad for parameter in model.parameters()}
    model.zero_grad()
    return {name: getattr(out, name).detach() for name in ("itc", "itm", "itg")}, gradients


def agreement(models: dict[str, nn.Module], batch) -> dict[str, dict[str, float]]:
    """The largest differences of each form from ours, in loss and in gradient; all share their weights.

    Raises ValueError when they are not the same computation.
    """
    known = {parameter.data_ptr(): name for name, parameter in models[OURS].named_parameters()}
    our_losses, our_gradients = losses_and_gradients(models[OURS], known, batch)
    found = {}
    for form in models.keys() - {OURS}:
        losses, gradients = losses_and_gradients(models[form], known, batch)
        found[form] = {"loss": same("loss", max(difference(our_losses[name], losses[name]) for name in losses)),
                       "gradient": same("gradient", gradient_difference(our_gradients, gradients))}
    return found


def sides(model: PlainStage1, names: list[str]) -> dict[str, PlainStage1]:
    """The models to compare, by name, all on the weights of `model`."""
    made = {THEIRS: lambda: composed(model), TRIMMED: lambda: composed(model, ("trim",))}
    found = {}
    for name in names:
        found[name] = made[name]() if name in made else sharing(model, forms()[name])
    return found


def measure(size: str, batch: int, repeats: int, names: list[str], by_length: bool) -> dict:
    """Compare the forms that are named with ours: first that they compute the same, then the seconds of a step."""
    config, visual = SIZES[size]
    torch.manual_seed(0)
    model = PlainStage1(config, savings=tuple(SAVINGS))
    lengths = similar_lengths(batch) if by_length else [None] * (repeats + 1)
    batches = [example(config, visual, batch, seed, lengths[seed]) for seed in range(repeats + 1)]
    models = {OURS: model} | sides(model, names)
    agrees = agreement(models, batches[0])

    def step(form: PlainStage1):
        def run(turn: int) -> None:
            image, ids, mask, negatives = batches[turn]
            form(image, ids, mask, negatives=negatives).loss.backward()
            form.zero_grad()
        return run

    steps = {name: step(form) for name, form in models.items()}
    longest = [batch[1].shape[1] for batch in batches[1:]]
    return case(interleave(steps, repeats), same=agrees, work=work(steps), longest=longest)


def main() -> None:
    """Measure, print, and keep runs/benchmarks/stage1.json."""
    args = options(__doc__, size=tuple(SIZES), batch=[8, 16], forms=["plain", OFFICIAL, THEIRS],
                   draw=("similar", "random"))
    for batch in args.batch:
        name = f"{args.size}, batch {batch}" + (", captions at random" if args.draw == "random" else "")
        keep("stage1", {name: measure(args.size, batch, args.repeats, args.forms, args.draw != "random")})


if __name__ == "__main__":
    raise SystemExit(run_command("benchmarks.stage1", main))
