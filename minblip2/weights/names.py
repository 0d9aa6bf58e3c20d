"""What other people call our settings and tensors: one table for each kind of model, which keymap.py reads."""

from __future__ import annotations

from .keymap import Fused, KeyMap, Table, within

CONSTANT = "a constant"
TIED, SHARED = COPIES = "tied to the word embeddings", "the same as shared"
COUNTS = {"hidden_size": "width", "num_hidden_layers": "layers", "num_attention_heads": "heads"}

# --- image encoders ---------------------------------------------------------------------------------------------------

DINOV2 = KeyMap(
    {**COUNTS, "image_size": "image_size", "patch_size": "patch_size", "layer_norm_eps": "eps"},
    {"embeddings.cls_token": "class_token",
     "embeddings.position_embeddings": "position_embedding",
     "embeddings.patch_embeddings.projection": "patches",
     "layernorm": "norm",
     **within("encoder.layer.{i}.", "blocks.{i}.", {
         "norm1": "attention_norm",
         "attention.attention.query": "attention.query",
         "attention.attention.key": "attention.key",
         "attention.attention.value": "attention.value",
         "attention.output.dense": "attention.out",
         "layer_scale1.lambda1": "attention_scale",
         "norm2": "mlp_norm",
         "mlp.fc1": "mlp.up",
         "mlp.fc2": "mlp.down",
         "layer_scale2.lambda1": "mlp_scale"})},
    {"embeddings.mask_token": "used only while DINOv2 itself was trained"}, only={"qkv_bias": True})

EMBEDDINGS = {"embeddings.class_embedding": "class_token", "embeddings.patch_embedding": "patches"}
MLP = {"layer_norm1": "attention_norm", "layer_norm2": "mlp_norm", "mlp.fc1": "mlp.up", "mlp.fc2": "mlp.down"}

CLIP = KeyMap(
    {**DINOV2.settings, "intermediate_size": "mlp_width", "hidden_act": "activation"},
    {**EMBEDDINGS,
     "embeddings.position_embedding.weight": "position_embedding",
     "pre_layrnorm": "embedding_norm",  # so spelt in the files
     **within("encoder.layers.{i}.", "blocks.{i}.", {
         **MLP,
         "self_attn.q_proj": "attention.query",
         "self_attn.k_proj": "attention.key",
         "self_attn.v_proj": "attention.value",
         "self_attn.out_proj": "attention.out"})},
    {"embeddings.position_ids": CONSTANT,
     "post_layernorm": "BLIP-2 takes the second-to-last block, without a final norm",
     "text_model": "BLIP-2 uses CLIP's images only",
     "text_projection": "BLIP-2 uses CLIP's images only",
     "visual_projection": "BLIP-2 takes all visual tokens, not CLIP's one vector",
     "logit_scale": "CLIP's own loss is not used"},
    prefix="vision_model.")

EVA = KeyMap(
    CLIP.settings,
    {**EMBEDDINGS,
     "embeddings.position_embedding": "position_embedding",
     **within("encoder.layers.{i}.", "blocks.{i}.", {
         **MLP,
         "self_attn.qkv": Fused(("attention.query", "attention.key", "attention.value")),
         "self_attn.projection": "attention.out"})},
    dict.fromkeys(("post_layernorm", "query_tokens", "qformer", "embeddings.word_embeddings",
                   "embeddings.position_embeddings", "embeddings.position_ids", "vision_projection", "text_projection",
                   "itm_head", "cls", "temp", "language_projection", "language_model"), "not the image encoder's"),
    prefix="vision_model.", only={"qkv_bias": True})

# --- BERT and the Q-Former --------------------------------------------------------------------------------------------


def qformer_blocks(inner: str) -> Table:
    """The Q-Former's blocks, named after BERT's; `inner` is what a file calls the inside of an attention."""
    block = {}
    for theirs, ours in (("attention", "self"), ("crossattention", "cross")):
        block |= {f"{theirs}.{inner}.{part}": f"{ours}_attention.{part}" for part in ("query", "key", "value")}
        block |= {f"{theirs}.output.dense": f"{ours}_attention.out", f"{theirs}.output.LayerNorm": f"{ours}_norm"}
    for ending, ours in (("", "text"), ("_query", "query")):
        block |= {f"intermediate{ending}.dense": f"{ours}_mlp.up", f"output{ending}.dense": f"{ours}_mlp.down",
                  f"output{ending}.LayerNorm": f"{ours}_norm"}
    return within("encoder.layer.{i}.", "blocks.{i}.", block)


BERT_EMBEDDINGS: Table = {
    "embeddings.word_embeddings.weight": "token_embedding.weight",
    "embeddings.position_embeddings.weight": "position_embedding.weight",
    "embeddings.LayerNorm": "norm",
}
BERT_HEAD: Table = {
    "cls.predictions.transform.dense": "lm_head.dense",
    "cls.predictions.transform.LayerNorm": "lm_head.norm",
    "cls.predictions.bias": "lm_head.bias",
}
BERT = KeyMap(
    {**COUNTS, "intermediate_size": "mlp_width", "max_position_embeddings": "max_positions", "layer_norm_eps": "eps"},
    # BERT reads no image, and its one feed-forward becomes two: queries start from a copy of the text's
    {**BERT_EMBEDDINGS, **BERT_HEAD, **{theirs: (ours, ours.replace("text_", "query_")) if "text_" in ours else ours
                                        for theirs, ours in qformer_blocks("self").items()
                                        if "cross" not in theirs and "_query" not in theirs}},
    {"embeddings.token_type_embeddings.weight": "the Q-Former has no token types (as in LAVIS)",
     "embeddings.position_ids": CONSTANT,
     "pooler": "the Q-Former has no pooler",
     "cls.predictions.decoder": TIED,
     "cls.seq_relationship": "next-sentence prediction is not used"},
    prefix="bert.", only={"is_decoder": False, "tie_word_embeddings": True},
    grown=("token_embedding.weight", "lm_head.bias"))  # by [DEC]

QFORMER = KeyMap({**BERT.settings, "cross_attention_frequency": "cross_attention_every",
                  "encoder_hidden_size": "image_width", "hidden_dropout_prob": "dropout"},
                 {"layernorm": "norm", **qformer_blocks("attention")},
                 only={"hidden_act": "gelu", "position_embedding_type": "absolute"})

# --- stage 1: transformers' Blip2ForImageTextRetrieval, and LAVIS's own files -----------------------------------------

STAGE1 = KeyMap(
    {},
    {"query_tokens": "qformer.query_tokens",
     "vision_model.post_layernorm": "vision_norm",
     "embeddings.word_embeddings.weight": "qformer.token_embedding.weight",
     "embeddings.position_embeddings.weight": "qformer.position_embedding.weight",
     **within("qformer.", "qformer.", QFORMER.tensors),
     "vision_projection": "vision_projection",
     "text_projection": "text_projection",
     "itm_head": "itm_head"},
    {"vision_model": "the frozen image encoder: `load_vit` reads it", "embeddings.position_ids": CONSTANT,
     "cls": "retrieval writes no texts", "temp": "ranking needs none"})

LAVIS_STAGE1 = KeyMap(
    {},
    {"query_tokens": "qformer.query_tokens",
     "ln_vision": "vision_norm",
     **within("Qformer.bert.", "qformer.", {**BERT_EMBEDDINGS, **qformer_blocks("self")}),
     **within("Qformer.", "qformer.", BERT_HEAD),
     "vision_proj": "vision_projection",
     "text_proj": "text_projection",
     "itm_head": "itm_head",
     "temp": "temperature"},
    {"visual_encoder": "the frozen image encoder",
     "Qformer.bert.embeddings.position_ids": CONSTANT,
     "Qformer.cls.predictions.decoder": TIED})

# --- language models --------------------------------------------------------------------------------------------------

PROJECTIONS = {"self_attn.q_proj": "attention.query", "self_attn.k_proj": "attention.key",
               "self_attn.v_proj": "attention.value"}

OPT = KeyMap(
    {**COUNTS, "vocab_size": "vocab_size", "ffn_dim": "mlp_width", "max_position_embeddings": "max_positions",
     "do_layer_norm_before": "pre_norm", "word_embed_proj_dim": "embed_dim"},
    within("decoder.", "", {
        "embed_tokens.weight": "token_embedding.weight",
        "embed_positions.weight": "position_embedding.weight",
        "project_in.weight": "project_in.weight",
        "project_out.weight": "project_out.weight",
        "final_layer_norm": "norm",
        **within("layers.{i}.", "blocks.{i}.", {
            **PROJECTIONS,
            "self_attn.out_proj": "attention.out",
            "self_attn_layer_norm": "attention_norm",
            "fc1": "mlp.up",
            "fc2": "mlp.down",
            "final_layer_norm": "mlp_norm"})}),
    {"lm_head": TIED},
    prefix="model.", only={"enable_bias": True, "layer_norm_elementwise_affine": True})

LLAMA = KeyMap(
    {**COUNTS, "vocab_size": "vocab_size", "intermediate_size": "mlp_width", "rms_norm_eps": "eps",
     "num_key_value_heads": "kv_heads", "rope_theta": "rope_theta", "tie_word_embeddings": "tied"},
    {"lm_head.weight": "lm_head.weight",
     **within("model.", "", {
         "embed_tokens.weight": "token_embedding.weight",
         "norm.weight": "norm.weight",
         **within("layers.{i}.", "blocks.{i}.", {
             **PROJECTIONS,
             "self_attn.o_proj": "attention.out",
             "input_layernorm.weight": "attention_norm.weight",
             "post_attention_layernorm.weight": "mlp_norm.weight",
             "mlp.gate_proj": "mlp.gate",
             "mlp.up_proj": "mlp.up",
             "mlp.down_proj": "mlp.down"})})},
    {"lm_head": TIED, **dict.fromkeys(("model.rotary_emb.inv_freq", "model.layers.{i}.self_attn.rotary_emb.inv_freq"),
                                      "a constant, in old files only")},
    only={"attention_bias": False, "mlp_bias": False})


def t5_stack(stack: str, feed_forward: Table, layers: Table) -> Table:
    """The encoder or the decoder of a T5; `layers` says what their numbered layers of a block are."""
    block = {}
    for number, ours in layers.items():
        inner = "SelfAttention" if ours == "attention" else "EncDecAttention"
        parts = feed_forward if ours == "mlp" else {f"{inner}.{theirs}.weight": f"{part}.weight" for theirs, part in
                                                    zip("qkvo", ("query", "key", "value", "out"), strict=True)}
        block |= within(f"layer.{number}.", f"{ours}.", parts)
        block[f"layer.{number}.layer_norm.weight"] = f"{ours.removesuffix('_attention')}_norm.weight"
    return within(f"{stack}.", f"{stack}.", {
        "block.0.layer.0.SelfAttention.relative_attention_bias.weight": "position_bias.buckets.weight",
        "final_layer_norm.weight": "norm.weight",
        **within("block.{i}.", "blocks.{i}.", block)})


def t5(feed_forward: Table) -> KeyMap:
    """A T5 with this kind of feed-forward."""
    feed_forward = within("DenseReluDense.", "", feed_forward)
    return KeyMap(
        {"vocab_size": "vocab_size", "d_model": "width", "num_layers": "layers", "num_decoder_layers": "decoder_layers",
         "num_heads": "heads", "d_kv": "head_width", "d_ff": "mlp_width", "layer_norm_epsilon": "eps",
         "relative_attention_num_buckets": "buckets", "relative_attention_max_distance": "max_distance"},
        {"shared.weight": "token_embedding.weight",
         "lm_head.weight": "lm_head.weight",
         **t5_stack("encoder", feed_forward, {"0": "attention", "1": "mlp"}),
         **t5_stack("decoder", feed_forward, {"0": "attention", "1": "cross_attention", "2": "mlp"})},
        {"encoder.embed_tokens": SHARED,
         "decoder.embed_tokens": SHARED,
         "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias": "in old files only; it was never used"})


T5_GATED = t5({"wi_0": "gate", "wi_1": "up", "wo": "down"})
T5_PLAIN = t5({"wi": "up", "wo": "down"})

# --- the whole: transformers' Blip2ForConditionalGeneration -----------------------------------------------------------


def blip2(lm: KeyMap) -> KeyMap:
    """The whole BLIP-2 as the hub has it, with one of the language models: image encoder `vit`, and `stage2`."""
    return KeyMap(
        {},
        {**within(EVA.prefix, "vit.", EVA.tensors),
         "vision_model.post_layernorm": "stage2.vision_norm",
         "query_tokens": "stage2.qformer.query_tokens",
         **within("qformer.", "stage2.qformer.", QFORMER.tensors),
         "language_projection": "stage2.projection",
         **within(f"language_model.{lm.prefix}", "stage2.lm.", lm.tensors)},
        within("language_model.", "", lm.ignored))
