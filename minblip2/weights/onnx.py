"""A bridge as three ONNX files that run without Python, in a browser for instance: look, write, compare.

What they compute is what `Stage1` and `Stage2` compute, for one image in float32; tests hold both together.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from einops import einsum, reduce, repeat
from torch import Tensor, nn

from .. import UserError, masks
from ..attention import capture_attention
from ..lm.opt import OPT
from ..stage1 import Stage1
from ..stage2 import Stage2
from ..vit import ViT

OPSET = 20


class Look(nn.Module):
    """What the frozen encoder and the query branch make of an image."""

    def __init__(self, vit: ViT, stage2: Stage2):
        super().__init__()
        self.vit, self.stage2 = vit, stage2

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Image features (1 v e), soft prompt (1 q e) and cross-attention (n q v) by reading block, mean over heads.

        pixels (1 c H W), normalised.
        """
        features = self.vit(pixels)
        with capture_attention(*self.stage2.qformer.cross_attentions) as weights:
            soft = self.stage2.soft_prompt(features)
        return features, soft, torch.cat([reduce(layer, "1 h q v -> 1 q v", "mean") for layer in weights])


class Write(nn.Module):
    """The frozen language model's next word after a soft prompt, of whose queries some may be hidden."""

    def __init__(self, stage2: Stage2):
        super().__init__()
        self.lm = stage2.lm

    def forward(self, soft: Tensor, shown: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probabilities (n vocab_size) of the next word, and its attention to the queries (n q), mean over all.

        soft (1 q e), shown (1 q) True = may be attended to, ids (n t): what has been written so far.
        """
        n, q = ids.shape[0], soft.shape[1]
        x = torch.cat([repeat(soft, "1 q e -> n q e", n=n), self.lm.embed(ids)], dim=1)
        seen = torch.cat([repeat(shown, "1 q -> n q", n=n), torch.ones_like(ids, dtype=torch.bool)], dim=1)
        # Hidden queries keep their positions: what is hidden changes, and nothing else.
        positions = repeat(torch.arange(x.shape[1], device=ids.device), "s -> n s", n=n)
        with capture_attention(*(block.attention for block in self.lm.blocks)) as weights:
            hidden = self.lm(x, masks.causal(seen), positions)
        looked = torch.stack([reduce(layer[:, :, -1, :q], "n h q -> n q", "mean") for layer in weights]).mean(dim=0)
        return self.lm.lm_logits(hidden[:, -1]).log_softmax(dim=-1), looked


class Compare(nn.Module):
    """How well a sentence fits an image: contrast for each query, and matching."""

    def __init__(self, stage1: Stage1):
        super().__init__()
        self.stage1 = stage1

    def forward(self, features: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines (q) of the queries with the sentence, and the probability (1) that it matches.

        features (1 v e) from `Look`; ids (1 t): [CLS] ... [SEP].
        """
        image_kv, everything = self.stage1.image_kv(features), torch.ones_like(ids, dtype=torch.bool)
        queries, text = self.stage1.embed_image(image_kv), self.stage1.embed_text(ids, everything)
        match = F.softmax(self.stage1.itm_logits(image_kv, ids, everything), dim=-1)[:, 1]
        return einsum(queries[0], text[0], "q e, e -> q"), match


def export_onnx(vit: ViT, stage1: Stage1, stage2: Stage2, folder: Path) -> dict[str, Path]:
    """Write look.onnx, write.onnx and compare.onnx into a folder; their paths by name. Needs onnx and onnxscript.

    Raises UserError for a language model that is no OPT, and on PyTorch 2.6, whose exporter stops at batch norm.
    """
    if not isinstance(stage2.lm, OPT):
        raise UserError(f"a browser runs a bridge to an OPT, not to a {type(stage2.lm).__name__}: train the scenes'")
    if torch.__version__.startswith("2.6."):
        raise UserError(f"PyTorch {torch.__version__} cannot export the bridge for a browser: install a newer one")
    folder.mkdir(parents=True, exist_ok=True)
    side, width = vit.config.image_size, stage2.lm.width
    q, v = stage2.qformer.config.num_queries, vit.config.grid**2 + vit.config.class_token
    pixels, ids = torch.zeros(1, 3, side, side), torch.ones(2, 3, dtype=torch.long)
    n, t = (torch.export.Dim(name, min=1, max=limit) for name, limit in (("n", 8), ("t", 40)))
    parts = {
        "look": (Look(vit, stage2), dict(pixels=pixels), ["features", "soft", "maps"], None),
        "write": (Write(stage2), dict(soft=torch.zeros(1, q, width), shown=torch.ones(1, q, dtype=torch.bool), ids=ids),
                  ["log_p", "looked"], dict(soft=None, shown=None, ids={0: n, 1: t})),
        "compare": (Compare(stage1), dict(features=torch.zeros(1, v, vit.width), ids=ids[:1]), ["cosines", "match"],
                    dict(features=None, ids={1: t}))}
    paths = {name: folder / f"{name}.onnx" for name in parts}
    for name, (module, inputs, outputs, dynamic) in parts.items():
        torch.onnx.export(module.eval(), tuple(inputs.values()), paths[name], input_names=list(inputs),
                          output_names=outputs, dynamic_shapes=dynamic, dynamo=True, external_data=False,
                          opset_version=OPSET, verbose=False)
    return paths
