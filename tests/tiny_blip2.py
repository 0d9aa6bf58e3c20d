"""transformers' settings of whole BLIP-2 models that are small, and odd in every size."""

from transformers import Blip2Config, Blip2QFormerConfig, Blip2VisionConfig, LlamaConfig, OPTConfig, T5Config

IMAGE, END = 39, 2  # ids: the one that stands for an image in transformers, and the one that ends a text
VISIONS = [dict(hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=3, image_size=28),
           dict(hidden_size=20, intermediate_size=33, num_hidden_layers=3, num_attention_heads=2, image_size=42,
             layer_norm_eps=1e-3)]
QFORMERS = [dict(hidden_size=18, num_hidden_layers=3, num_attention_heads=3, intermediate_size=30,
                 max_position_embeddings=24),
            dict(hidden_size=32, num_hidden_layers=4, num_attention_heads=2, intermediate_size=21,
                 cross_attention_frequency=3, max_position_embeddings=32)]
LMS = {
    "opt": lambda: OPTConfig(vocab_size=40, hidden_size=24, word_embed_proj_dim=24, num_hidden_layers=2,
                             num_attention_heads=3, ffn_dim=48, max_position_embeddings=64, eos_token_id=END,
                             bos_token_id=2, pad_token_id=1),
    "t5": lambda: T5Config(vocab_size=40, d_model=24, d_kv=5, d_ff=28, num_layers=2, num_heads=3, dense_act_fn="gelu",
                           relative_attention_num_buckets=8, feed_forward_proj="gated-gelu", tie_word_embeddings=False,
                           decoder_start_token_id=0, eos_token_id=END),
    "t5 1.0": lambda: T5Config(vocab_size=40, d_model=16, d_kv=4, d_ff=28, num_layers=2, num_decoder_layers=1,
                               num_heads=2, decoder_start_token_id=0, eos_token_id=END),
    "llama": lambda: LlamaConfig(vocab_size=40, hidden_size=24, intermediate_size=28, num_hidden_layers=2,
                                 num_attention_heads=4, num_key_value_heads=2, eos_token_id=END),
}


def blip2_config(lm, size):
    """A BLIP-2 with this kind of language model, in the first or the second size."""
    return Blip2Config(vision_config=Blip2VisionConfig(**VISIONS[size], patch_size=14),
                       qformer_config=Blip2QFormerConfig(**QFORMERS[size], vocab_size=50),
                       text_config=LMS[lm](), num_query_tokens=4 + size, image_token_index=IMAGE)
