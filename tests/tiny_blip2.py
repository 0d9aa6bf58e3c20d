"""Whole BLIP-2 models of transformers that are small, and odd in every size; as settings, and as folders of the hub."""

import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    BertTokenizerFast,
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2ForImageTextRetrieval,
    Blip2Processor,
    Blip2QFormerConfig,
    Blip2VisionConfig,
    LlamaConfig,
    OPTConfig,
    PreTrainedTokenizerFast,
    T5Config,
)
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

from .parity import randomise

TEXTS = ["a photo of two dogs\n", "Question: what is the dog doing? Short answer:", "a red bus in the rain\n"] * 2
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
                           decoder_start_token_id=0, eos_token_id=END, bos_token_id=1),  # as the hub's has it
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


def tokenizer(lm):
    """A small tokenizer of the kind that the language model has, as transformers holds it."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    specials = ["<s>", "<pad>", "</s>"] if lm == "opt" else ["<pad>", "</s>"]
    backend.train_from_iterator(TEXTS, trainers.BpeTrainer(
        vocab_size=120, special_tokens=[*specials, "<image>"], initial_alphabet=["Ċ"]))
    end = ("</s>", backend.token_to_id("</s>"))
    backend.post_processor = processors.TemplateProcessing(
        single="</s> $A" if lm == "opt" else "$A </s>", special_tokens=[end])
    bos = dict(bos_token="</s>") if lm == "opt" else {}
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", pad_token="<pad>", **bos,
                                   padding_side="left" if lm == "opt" else "right")


def official_folder(lm, folder):
    """A small BLIP-2 with tokenizer and preprocessing in a folder: transformers' model and processor."""
    words = tokenizer(lm)
    settings = blip2_config(lm, 1)
    settings.image_token_index = words.convert_tokens_to_ids("<image>")
    text = settings.text_config
    text.vocab_size = len(words) + 3  # padded, as on the hub
    text.eos_token_id = words.convert_tokens_to_ids("Ċ") if lm == "opt" else 1
    settings.vision_config.image_size = 42
    model = randomise(Blip2ForConditionalGeneration(settings), 3)
    with torch.no_grad():
        end = model.get_output_embeddings().weight[text.eos_token_id]
        end.mul_(1.4 if lm == "opt" else 2.0)  # now and then a text ends before its greatest length
    processor = Blip2Processor(BlipImageProcessorPil(size=dict(height=42, width=42)), words, num_query_tokens=5)
    model.save_pretrained(folder)
    processor.image_processor.save_pretrained(folder)
    words.save_pretrained(folder)
    return model, processor


def official_retrieval_folder(folder):
    """A small BLIP-2 for retrieval in a folder, with a BERT tokenizer and preprocessing: transformers' model."""
    words = sorted({word for text in TEXTS for word in text.lower().replace(":", " ").replace("?", " ").split()})
    vocabulary = {token: i for i, token in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words])}
    settings = blip2_config("opt", 0)
    settings.qformer_config.use_qformer_text_input = True
    settings.qformer_config.vocab_size = len(vocabulary) + 1  # [DEC]
    model = randomise(Blip2ForImageTextRetrieval(settings), 5)
    model.config.image_token_index = None  # texts come without placeholders
    model.save_pretrained(folder)
    side = settings.vision_config.image_size
    BlipImageProcessorPil(size=dict(height=side, width=side)).save_pretrained(folder)
    BertTokenizerFast(vocab=vocabulary).save_pretrained(folder)
    return model
