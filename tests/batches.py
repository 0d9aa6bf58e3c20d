"""Batches for the two stages of tiny models: images, and texts that are padded."""

import torch
import torch.nn.functional as F

from .parity import TINY, lengths_mask

CLS, SEP, PAD = 1, 2, 0  # ids of the Q-Former's texts
END = 2  # the id that ends a language model's text


def stage1_batch(lengths=(5, 7, 3, 6), seed=0, pad_to=None):
    """Stage 1: image (b 7 width), ids and mask (b t), padded to `pad_to` if need be."""
    generator = torch.Generator().manual_seed(seed)
    mask = lengths_mask([*lengths])
    ids = torch.randint(3, TINY.vocab_size - 1, mask.shape, generator=generator).masked_fill(~mask, PAD)
    ids[:, 0], ids[torch.arange(len(ids)), mask.sum(1) - 1] = CLS, SEP
    more = max((pad_to or 0) - ids.shape[1], 0)
    image = sum(torch.randn(len(lengths), n, TINY.image_width, generator=generator) for n in (1, 6))
    return image, F.pad(ids, (0, more)), F.pad(mask, (0, more), value=False)


def texts(lengths, side="right", seed=0):
    """Random ids and mask (b t) for a language model, padded on a side."""
    generator = torch.Generator().manual_seed(seed)
    mask = lengths_mask([*lengths], side)
    return torch.randint(3, 40, mask.shape, generator=generator), mask


def stage2_batch(lengths=(5, 2, 7), prompts=(0, 0, 0), side="right", seed=0):
    """Stage 2: image (b 7 width), ids and mask of prompts, ids and mask of targets."""
    generator = torch.Generator().manual_seed(seed)
    image = sum(torch.randn(len(lengths), n, TINY.image_width, generator=generator) for n in (1, 6))
    return image, *texts(prompts[:len(lengths)], side, seed + 1), *texts(lengths, seed=seed + 2)
