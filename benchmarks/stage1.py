"""What each exact saving of stage 1 is worth: python -m benchmarks.stage1 [--size base|laptop|tiny] [--batch 8]

`PlainStage1` computes the same losses without a saving: as LAVIS does (keys and values again for each pass, text padded
to 32, the vocabulary at every position), or without the cached queries that LAVIS does use.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from minblip2 import masks
from minblip2.attention import KVCache
from minblip2.files import write_json
from minblip2.qformer import QFormerConfig
from minblip2.stage1 import Stage1

SAVINGS = {"image_once": "image K/V projected once", "trim": "text trimmed", "cached": "ITG on cached queries",
           "supervised": "LM head where supervised"}
SIZES = {"base": (QFormerConfig(dropout=0.0), 257),
         "laptop": (QFormerConfig(width=384, layers=6, mlp_width=1536, queries=16, image_width=384, dropout=0.0), 257),
         "tiny": (QFormerConfig(width=64, layers=4, heads=4, mlp_width=256, queries=8, image_width=64, vocabulary=200,
                                dropout=0.0), 65)}
PADDED = 32  # tokens, as in LAVIS
# so many of 400 COCO 2017 captions have this many bert-base-uncased tokens, [CLS] and [SEP] included
CAPTION_LENGTHS = {9: 2, 10: 7, 11: 47, 12: 77, 13: 63, 14: 72, 15: 50, 16: 32, 17: 19, 18: 7, 19: 9, 20: 5, 21: 1,
                   22: 2, 23: 2, 24: 3, 28: 1, 32: 1}


class Features(NamedTuple):
    """Normalised image features (b v e) where `Stage1` holds keys and values: they are projected by each pass anew."""

    states: Tensor

    def select(self, rows: Tensor) -> Features:
        """Those of the images `rows` (n)."""
        return Features(self.states[rows])


class PlainStage1(Stage1):
    """`Stage1` with only the `savings` that are named (keys of SAVINGS): same losses, more work."""

    def __init__(self, *args, savings: tuple[str, ...] = (), **settings):
        super().__init__(*args, **settings)
        self.savings = frozenset(savings)

    def ready(self, image):
        """Keys and values of what `image_kv` gave."""
        return self.qformer.project_image(image.states) if isinstance(image, Features) else image

    def image_kv(self, image):
        """Normalised features only, unless they may be projected once."""
        return super().image_kv(image) if "image_once" in self.savings else Features(self.vision_norm(image))

    def embed_image(self, image, cache=None):
        """As in `Stage1`."""
        return super().embed_image(self.ready(image), cache)

    def match(self, image, text_ids, text_mask):
        """As in `Stage1`; wrong images are projected again with the pairs."""
        return super().match(self.ready(image), text_ids, text_mask)

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


def example(config: QFormerConfig, visual: int, batch: int, seed: int = 0):
    """Random features and captions of COCO's lengths: image (b v e), ids and mask (b t), negatives (b) and (b)."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.tensor([float(n) for n in CAPTION_LENGTHS.values()])
    lengths = torch.tensor([*CAPTION_LENGTHS])[torch.multinomial(weights, batch, replacement=True, generator=generator)]
    mask = torch.arange(int(lengths.max())) < lengths[:, None]
    ids = torch.randint(1, config.vocabulary - 1, mask.shape, generator=generator).masked_fill(~mask, 0)
    content = torch.randn(batch, 1, config.image_width, generator=generator)  # without it all images look alike
    image = content + torch.randn(batch, visual, config.image_width, generator=generator)
    other = (torch.arange(batch) + 1) % batch
    return image, ids, mask, (other, other)


def forms() -> dict[str, tuple[str, ...]]:
    """Name of each form of stage 1, and its savings."""
    return {"plain": ()} | {text: (key,) for key, text in SAVINGS.items()} | {"all together": tuple(SAVINGS)}


def measure(size: str, batch: int, repeats: int) -> dict[str, dict[str, list[float]]]:
    """Seconds of forward and backward of each form, interleaved so that a slow moment of the machine hits all alike.

    "wall" is what one waits for; "cpu" is what the process used, which other people's jobs disturb far less.
    """
    config, visual = SIZES[size]
    torch.manual_seed(0)
    model = PlainStage1(config)
    image, ids, mask, negatives = example(config, visual, batch)
    seconds: dict[str, dict[str, list[float]]] = {clock: {name: [] for name in forms()} for clock in ("wall", "cpu")}
    for repeat in range(repeats + 1):  # the first round warms up
        for name, savings in forms().items():
            model.savings = frozenset(savings)
            model.zero_grad()
            wall, cpu = time.perf_counter(), time.process_time()
            model(image, ids, mask, negatives=negatives).loss.backward()
            if repeat:
                seconds["wall"][name].append(time.perf_counter() - wall)
                seconds["cpu"][name].append(time.process_time() - cpu)
    return seconds


def main() -> None:
    """Measure, print a table, and write runs/benchmarks/stage1_SIZE.json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="laptop")
    parser.add_argument("--batch", type=int, default=8, help="image-text pairs")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    seconds = measure(options.size, options.batch, options.repeats)
    median = {clock: {name: statistics.median(times) for name, times in each.items()}
              for clock, each in seconds.items()}
    print(f"{options.size}, batch {options.batch}, {options.threads} thread(s), median of {options.repeats}")
    for name in forms():
        print(f"{name:26}", *(f"{clock} {times[name] * 1000:8.1f} ms {times['plain'] / times[name]:5.2f}x  "
                              for clock, times in median.items()))
    path = Path("runs/benchmarks") / f"stage1_{options.size}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, vars(options) | {"torch": torch.__version__, "seconds": seconds, "median": median})
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
