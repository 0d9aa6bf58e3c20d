"""transformers' models with our weights in them: what the benchmarks compare with.

transformers has no loss for stage 1; `ComposedStage1` puts its `Blip2QFormerModel` into our heads and losses, one call
for each pass. For stage 2 it has everything, and `blip2` gives it image features in place of pictures, as we have them.
"""

from __future__ import annotations

import tempfile
from dataclasses import replace

import torch
from torch import Tensor, nn
from transformers import Blip2ForConditionalGeneration, Blip2QFormerConfig, Blip2QFormerModel

from minblip2.qformer import QFormer, QFormerOutput
from minblip2.stage2 import Stage2
from minblip2.vit import EVA_G, ViT
from minblip2.weights import names
from minblip2.weights.checkpoint import export_tensors
from minblip2.weights.export import save_pretrained, settings


def qformer(ours: QFormer) -> Blip2QFormerModel:
    """transformers' Q-Former on the very tensors of ours: the weights are shared, the gradients are not."""
    sizes = settings(ours.config, names.QFORMER) | dict(use_qformer_text_input=True, hidden_dropout_prob=0.0,
                                                        attention_probs_dropout_prob=0.0)
    with torch.device("meta"):
        theirs = Blip2QFormerModel(Blip2QFormerConfig(**sizes))
    parts = nn.ModuleDict(dict(norm=ours.norm, blocks=ours.blocks))
    theirs.load_state_dict(export_tensors(parts, names.QFORMER), assign=True)
    return theirs.requires_grad_().eval()


class TheirQFormer(nn.Module):
    """`Blip2QFormerModel` behind the names of our `QFormer`; embeddings and LM head, which it lacks, are ours.

    It takes image features where ours takes keys and values, and projects them in every call.
    """

    def __init__(self, ours: QFormer):
        super().__init__()
        self.config, self.dec_id, self.model = ours.config, ours.dec_id, qformer(ours)
        self.query_tokens, self.token_embedding, self.position_embedding, self.lm_head = (
            ours.query_tokens, ours.token_embedding, ours.position_embedding, ours.lm_head)

    embed_text, lm_logits, new_cache = QFormer.embed_text, QFormer.lm_logits, QFormer.new_cache

    @property
    def blocks(self) -> nn.ModuleList:
        """The layers, one for each of ours."""
        return self.model.encoder.layer

    def project_image(self, image_features: Tensor) -> Tensor:
        """The features as they are: each call of the model projects them."""
        return image_features

    def forward(self, image_kv: Tensor | None = None, text_ids: Tensor | None = None, mask: Tensor | None = None,
                cache: None = None) -> QFormerOutput:
        """As ours, but without a cache, which stays empty; image features (b v image_width) for keys and values."""
        parts = [] if image_kv is None else [self.query_tokens.expand(len(image_kv), -1, -1)]
        parts += [] if text_ids is None else [self.embed_text(text_ids)]
        num_queries = self.config.num_queries if image_kv is not None else 0
        states = torch.cat(parts, dim=1)
        added = None if mask is None else states.new_zeros(mask.shape).masked_fill(
            ~mask, torch.finfo(states.dtype).min)
        states = self.model(states, query_length=num_queries, attention_mask=added,
                            encoder_hidden_states=image_kv).last_hidden_state
        return QFormerOutput(states[:, :num_queries], states[:, num_queries:])


class Features(nn.Module):
    """In the place of an image encoder: what it is given are features (b v e), of which it computes the last norm."""

    def __init__(self, norm: nn.LayerNorm):
        super().__init__()
        self.post_layernorm = norm

    def forward(self, pixel_values: Tensor, **_):
        """Normalised features."""
        seen = self.post_layernorm(pixel_values)
        return _Output((seen,))


class _Output(tuple):
    """As much of transformers' output as BLIP-2 reads."""

    last_hidden_state = property(lambda self: self[0])
    pooler_output = hidden_states = attentions = None


def blip2(stage2: Stage2, image_token: int, **tokens: int) -> Blip2ForConditionalGeneration:
    """transformers' BLIP-2 with the weights of a stage 2, for image features in place of pictures.

    All but its language model can be trained. `image_token` and `tokens` are those of `export.save_pretrained`.
    """
    width = stage2.qformer.config.image_width
    vit = ViT(replace(EVA_G, image_size=14, width=width, layers=1, heads=1, mlp_width=1))
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(folder, vit, stage2, image_token, **tokens)
        theirs = Blip2ForConditionalGeneration.from_pretrained(folder)
    norm = theirs.vision_model.post_layernorm
    norm.eps = stage2.vision_norm.eps
    theirs.vision_model = Features(norm)
    theirs.language_model.requires_grad_(False)
    return theirs.eval()


def their_batch(image_features: Tensor, image_token: int, queries: int, prompt_ids: Tensor,
                prompt_mask: Tensor) -> dict:
    """What transformers' BLIP-2 is given: features, and ids in which `queries` image tokens stand before the prompt."""
    places = torch.full((len(image_features), queries), image_token)
    return dict(pixel_values=image_features, input_ids=torch.cat([places, prompt_ids], dim=1),
                attention_mask=torch.cat([torch.ones_like(places), prompt_mask.long()], dim=1))
