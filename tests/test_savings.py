"""Each saving of stage 1 is exact: same losses and same gradients as the plain form without it."""

import pytest
import torch

from benchmarks.stage1 import PADDED, SAVINGS, SIZES, PlainStage1, example
from minblip2.stage1 import Stage1

from .parity import difference, randomise

CONFIG, VISUAL = SIZES["tiny"]


def run(model):
    image, ids, mask, negatives = example(CONFIG, VISUAL, batch=5, seed=1)
    image = image.requires_grad_()
    with torch.no_grad():
        model.temperature.fill_(0.05)  # or the similarities differ too little for a gradient above rounding
    out = model(image, ids, mask, negatives=negatives)
    out.loss.backward()
    return out, {name: p.grad for name, p in model.named_parameters()} | {"image": image.grad}


@pytest.mark.parametrize("savings", [(), *((key,) for key in SAVINGS), tuple(SAVINGS)],
                         ids=lambda savings: "+".join(savings) or "none")
def test_same_losses_and_gradients(savings):
    ours, ours_gradient = run(randomise(Stage1(CONFIG, embed_dim=16)))
    plain, plain_gradient = run(randomise(PlainStage1(CONFIG, embed_dim=16, savings=savings)))
    for name in ("loss", "itc", "itm", "itg", "itc_logits", "itm_logits", "word_logits"):
        assert difference(getattr(ours, name), getattr(plain, name)) < 1e-5, name
    scale = max(gradient.abs().max() for gradient in plain_gradient.values())
    for name, gradient in plain_gradient.items():
        if name.endswith("attention.key.bias"):  # zero in theory, rounding in practice: judged on the scale of all
            assert (ours_gradient[name] - gradient).abs().max() < 1e-5 * scale
        else:
            assert gradient.abs().max() > 0 and difference(ours_gradient[name], gradient) < 1e-5, name


def test_the_plain_form_really_does_more(monkeypatch):
    """Count the work: projections, text length, vocabulary rows and query passes differ as the names say."""
    def work(savings):
        model, seen = randomise(PlainStage1(CONFIG, embed_dim=16, savings=savings)), []
        layer, projected = model.qformer.cross_attentions[0], []
        original = layer.project
        monkeypatch.setattr(layer, "project", lambda context: projected.append(len(context)) or original(context))
        model.qformer.lm_head.register_forward_pre_hook(lambda _, args: seen.append(args[0].numel() // CONFIG.width))
        model.qformer.token_embedding.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
        run(model)
        return projected, seen
    assert work(tuple(SAVINGS))[0] == [5] and work(())[0] == [5, 5, 15] and work(("cached",))[0] == [5, 15]
    mask = example(CONFIG, VISUAL, batch=5, seed=1)[2]
    longest, words = mask.shape[1], int(mask.sum()) - 5
    assert longest < PADDED
    # texts of contrast and of generation, words that meet the vocabulary, texts of matching
    assert work(())[1] == [PADDED] * 2 + [5 * (PADDED - 1)] + [PADDED]
    assert work(tuple(SAVINGS))[1] == [longest] * 2 + [words] + [longest]
