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
from minblip2.attention import KVCache, MultiHeadAttention, record
from minblip2.data.batches import PairBatches
from minblip2.qformer import QFormerConfig
from minblip2.stage1 import Stage1

SAVINGS = {"image_once": "image K/V projected once", "trim": "text trimmed", "cached": "ITG on cached queries",
           "supervised": "LM head where supervised", "folded": "norm folded into K/V", "fused": "fused attention",
           "readers": "an image's texts read it together"}
OFFICIAL, THEIRS, TRIMMED = "official recipe", "transformers", "transformers, text trimmed"
SIZES = {"base": (QFormerConfig(dropout=0.0), 257),
         "laptop": (QFormerConfig(width=384, layers=6, mlp_width=1536, queries=16, image_width=384, dropout=0.0), 257),
         "tiny": (QFormerConfig(width=64, layers=4, heads=4, mlp_width=256, queries=8, image_width=64, vocabulary=200,
                                dropout=0.0), 65)}
PADDED = 32  # tokens, as in LAVIS
# so many of 400 COCO 2017 captions have this many bert-base-uncased tokens, [CLS] and [SEP] included
CAPTION_LENGTHS = {9: 2, 10: 7, 11: 47, 12: 77, 13: 63, 14: 72, 15: 50, 16: 32, 17: 19, 18: 7, 19: 9, 20: 5, 21: 1,
                   22: 2, 23: 2, 24: 3, 28: 1, 32: 1}


class Features(NamedTuple):
    """Image features (b v e) where `Stage1` holds keys and values: they are projected by each pass anew."""

    states: Tensor

    def first(self, n: int) -> Features:
        """The first `n` images."""
        return Features(self.states[:n])

    def select(self, rows: Tensor) -> Features:
        """Those of the images `rows` (n)."""
        return Features(self.states[rows])


class PlainStage1(Stage1):
    """`Stage1` with only the `savings` that are named (keys of SAVINGS): same losses, more work."""

    def __init__(self, *args, savings: tuple[str, ...] = (), **settings):
        super().__init__(*args, **settings)
        self.savings = frozenset(savings)

    def forward(self, *batch, **settings):
        """As in `Stage1`; without the fused kernel, attention computes its weights and keeps them for the gradient."""
        explicit = () if "fused" in self.savings else (
            layer for layer in self.modules() if isinstance(layer, MultiHeadAttention))
        with record(*explicit):
            return super().forward(*batch, **settings)

    def ready(self, image):
        """Keys and values of what `image_kv` gave."""
        if not isinstance(image, Features):
            return image
        if "folded" in self.savings:
            return super().image_kv(image.states)
        return self.qformer.project_image(image.states)

    def image_kv(self, image):
        """Features only, unless they may be projected once; normalised, unless the projections do that."""
        image = Features(image if "folded" in self.savings else self.vision_norm(image))
        return self.ready(image) if "image_once" in self.savings else image

    def embed_image(self, image, cache=None):
        """As in `Stage1`."""
        return super().embed_image(self.ready(image), cache)

    def match(self, image, text_ids, text_mask):
        """As in `Stage1`; wrong images are projected again with the pairs."""
        return super().match(self.ready(image), text_ids, text_mask)

    def match_pairs(self, image, text_ids, text_mask, negatives):
        """All pairs in one batch, which takes a copy of the image for each of them."""
        if "readers" in self.savings:
            return super().match_pairs(image, text_ids, text_mask, negatives)
        own, (wrong_image, wrong_text) = torch.arange(len(text_ids)), negatives
        images, texts = torch.cat([own, wrong_image, own]), torch.cat([own, own, wrong_text])
        labels = (torch.arange(len(texts)) < len(own)).long()
        return self.match(image.select(images), text_ids[texts], text_mask[texts]), labels

    def trim(self, text_ids, text_mask):
        """Pad to 32 tokens instead of cutting."""
        if "trim" in self.savings:
            return super().trim(text_ids, text_mask)
        more = max(PADDED - text_ids.shape[1], 0)
        return F.pad(text_ids, (0, more)), F.pad(text_mask, (0, more), value=False)

    def decode_states(self, image, decoder_ids, text_mask, cache: KVCache):
        """Run the queries a second time, together with the text."""
        if "cached" in self.savings:
            return super().decode_states(image, decoder_ids, text_mask, cache)
        mask = masks.multimodal_causal(self.qformer.config.queries, text_mask)
        return self.qformer(self.ready(image), decoder_ids, mask).text

    def generation_loss(self, states, text_ids, text_mask):
        """Logits at every position, most of them ignored by the loss."""
        if "supervised" in self.savings:
            return super().generation_loss(states, text_ids, text_mask)
        logits = self.qformer.predict(states).float()[:, :-1]
        labels = text_ids[:, 1:].masked_fill(~text_mask[:, 1:], -100)
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), label_smoothing=self.label_smoothing)
        return loss, logits[text_mask[:, 1:]]


def example(config: QFormerConfig, visual: int, batch: int, seed: int = 0, lengths: Tensor | None = None):
    """Random features and captions of COCO's lengths: image (b v e), ids and mask (b t), negatives (b) and (b)."""
    generator = torch.Generator().manual_seed(seed)
    lengths = draw_lengths(batch, generator) if lengths is None else lengths
    mask = torch.arange(int(lengths.max())) < lengths[:, None]
    ids = torch.randint(1, config.vocabulary - 1, mask.shape, generator=generator).masked_fill(~mask, 0)
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
    told = options(__doc__, size="base", batch=[8, 16], forms=["plain", OFFICIAL, THEIRS], draw="similar")
    for batch in told.batch:
        name = f"{told.size}, batch {batch}" + (", captions at random" if told.draw == "random" else "")
        keep("stage1", {name: measure(told.size, batch, told.repeats, told.forms, told.draw != "random")})


if __name__ == "__main__":
    main()
