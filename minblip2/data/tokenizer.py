"""Text to ids and back: a thin class over the `tokenizers` library, for the Q-Former and every language model."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import tokenizers
import torch
from tokenizers.models import BPE, WordPiece
from tokenizers.normalizers import BertNormalizer
from torch import Tensor

from .. import UserError
from .files import read_json, write_json


class Tokenizer:
    """Encodes a text as [start] words [end].

    For the Q-Former start is [CLS], end is [SEP] and `dec_id`, one more id at the end of the vocabulary, is [DEC],
    which takes the place of [CLS] when the task is to generate (paper §3.2). A language model has its own start and
    end. A prompt is closed by `prompt_end`: nothing, but for an encoder, which reads it as a text of its own.
    """

    def __init__(self, backend: tokenizers.Tokenizer, bos_ids: Sequence[int], eos_id: int, pad: int,
                 dec_id: int | None = None, prompt_end: Sequence[int] = ()):
        self.backend, self.bos_ids, self.eos_id, self.pad_id, self.dec_id = backend, list(bos_ids), eos_id, pad, dec_id
        self.prompt_end = list(prompt_end)
        self.backend.no_padding()
        self.backend.no_truncation()

    def __len__(self) -> int:
        """Size of the vocabulary, [DEC] included."""
        return max(self.backend.get_vocab_size(), 1 + (self.dec_id or 0))

    @classmethod
    def bert(cls, backend: tokenizers.Tokenizer) -> Tokenizer:
        """A BERT tokenizer grown by [DEC], unless it has one, as the Q-Former reads."""
        start, end, pad, dec = (backend.token_to_id(token) for token in ("[CLS]", "[SEP]", "[PAD]", "[DEC]"))
        if None in (start, end, pad):
            raise UserError("the tokenizer lacks [CLS], [SEP] or [PAD]: give the folder of a BERT model")
        size = backend.get_vocab_size()
        return cls(backend, [start], end, pad, dec_id=dec if dec == size - 1 else size)  # it is always the last id

    @classmethod
    def from_texts(cls, texts: Iterable[str]) -> Tokenizer:
        """A BERT tokenizer whose vocabulary is every word of `texts` (lower-cased), for small embedded languages."""
        normaliser, splitter = BertNormalizer(lowercase=True), tokenizers.pre_tokenizers.BertPreTokenizer()
        found = sorted({word for text in texts
                        for word, _ in splitter.pre_tokenize_str(normaliser.normalize_str(text))})
        vocabulary = {token: i for i, token in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *found])}
        return cls.bert(word_pieces(WordPiece(vocabulary, unk_token="[UNK]"), normaliser))

    @classmethod
    def from_folder(cls, folder: str | Path) -> Tokenizer:
        """Read a hub folder's tokenizer; start, end and padding come from the configuration files beside it.

        In a BLIP-2 texts begin with a start token only if its tokenizer writes one, and end with the language model's
        end; with OPT that is the end of a line (LAVIS `Blip2OPT`), for OPT's own end is what its texts start with.
        Raises UserError when the file is missing or unreadable, or when no end token is named, or several in a BLIP-2.
        """
        folder = Path(folder)
        backend = read_backend(folder)
        settings: dict = {}
        for name in ("config.json", "tokenizer_config.json", "generation_config.json"):
            if (folder / name).exists():
                settings |= {k: v for k, v in read_json(folder / name).items() if v is not None}
        is_bert = settings.get("model_type") == "bert" or str(settings.get("tokenizer_class")).startswith("Bert")
        if backend.token_to_id("[CLS]") is not None and (is_bert or "eos_token" not in settings):  # BERT names no end
            return cls.bert(backend)

        text = settings.pop("text_config", {})
        text = text if isinstance(text, dict) else {}
        whole = bool(text) or settings.get("model_type") == "blip-2"
        kind = text.get("model_type", "opt") if whole else settings.get("model_type")  # OPT is what transformers takes
        settings = {k: v for k, v in text.items() if v is not None} | settings

        def special(name: str, settings: dict = settings) -> int | None:
            token = settings.get(f"{name}_token", settings.get(f"{name}_token_id"))
            token = token.get("content") if isinstance(token, dict) else token
            token = token[0] if isinstance(token, list) and token else token  # Llama 3 has several: first a text's
            token = backend.token_to_id(token) if isinstance(token, str) else token
            return token if isinstance(token, int) and not isinstance(token, bool) and token >= 0 else None

        end, begin = special("eos"), special("bos")
        if end is None:
            raise UserError(f"{folder} names no eos_token that its tokenizer has: add it to tokenizer_config.json")
        pad = special("pad")
        if not (folder / "tokenizer.json").exists():  # which would tell that these are no words
            backend.add_special_tokens([token for i in {end, begin, pad} - {None} if (token := backend.id_to_token(i))])
        if isinstance(ends := text.get("eos_token_id"), list) and len(ends) > 1:
            raise UserError(f"{folder} ends texts with any of the ids {ends}, and one is read here: leave one "
                            "eos_token_id in text_config of its config.json")
        prompt_end, bos_ids = [end] if kind == "t5" else [], [] if begin is None else [begin]
        written = settings.get("add_bos_token") is True or backend.encode("").ids[:1] == bos_ids
        if kind == "t5" or (whole and kind != "opt" and not written):  # T5 reads none, though its files may name one
            bos_ids = []
        line_end = backend.encode("\n", add_special_tokens=False).ids if whole and kind == "opt" else []
        stated = special("eos", text)
        end = stated if stated is not None else line_end[-1] if line_end else end
        return cls(backend, bos_ids, end, end if pad is None else pad, prompt_end=prompt_end)

    def save(self, path: str | Path) -> None:
        """Write everything to one JSON file, read back by `load`."""
        write_json(Path(path), dict(backend=json.loads(self.backend.to_str()), bos_ids=self.bos_ids, eos_id=self.eos_id,
                                    pad=self.pad_id, dec_id=self.dec_id, prompt_end=self.prompt_end))

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """Read what `save` wrote. Raises UserError for a file that is absent or anything else."""
        state = read_json(Path(path))
        try:
            return cls(tokenizers.Tokenizer.from_str(json.dumps(state.pop("backend"))), **state)
        except Exception as error:  # the library raises bare Exception for a malformed state
            raise UserError(f"{path} is not a saved tokenizer ({error!r}): save it again") from None

    def token_ids(self, text: str) -> list[int]:
        """The ids of the text alone."""
        return self.backend.encode(text, add_special_tokens=False).ids

    def encode(self, text: str, prompt: str = "", max_length: int = 32) -> list[int]:
        """[start] prompt text [end], at most `max_length` ids; a long text loses its last words, never its end."""
        inner = self.token_ids(prompt) + self.token_ids(gap_behind(prompt) + text)
        return [*self.bos_ids, *inner][: max_length - 1] + [self.eos_id]

    def encode_prompt(self, prompt: str) -> list[int]:
        """[start] prompt: what stands before a text that a language model is to write."""
        return [*self.bos_ids, *self.token_ids(prompt), *self.prompt_end]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids up to the first end token; special tokens are left out."""
        ids = [int(i) for i in ids]
        ids = ids[: ids.index(self.eos_id)] if self.eos_id in ids else ids
        return self.backend.decode([i for i in ids if i != self.dec_id], skip_special_tokens=True).strip()

    def pad(self, rows: Sequence[Sequence[int]], side: str = "right") -> tuple[Tensor, Tensor]:
        """Lists of ids as one rectangle: ids (b t) and mask (b t), True where there is a token."""
        length = max(len(row) for row in rows)
        ids, mask = torch.full((len(rows), length), self.pad_id), torch.zeros(len(rows), length, dtype=torch.bool)
        for i, row in enumerate(rows):
            place = slice(0, len(row)) if side == "right" else slice(length - len(row), length)
            ids[i, place], mask[i, place] = torch.tensor(row), True
        return ids, mask


def read_backend(folder: Path) -> tokenizers.Tokenizer:
    """What cuts the texts of a hub folder: its tokenizer.json, or the words (and merges) that older folders hold alone.

    Raises UserError when there is none of them, or it cannot be read.
    """
    source, words, bytes_of = (folder / name for name in ("tokenizer.json", "vocab.txt", "vocab.json"))
    merges, settings = folder / "merges.txt", folder / "tokenizer_config.json"
    try:
        if source.exists():
            return tokenizers.Tokenizer.from_str(source.read_text(encoding="utf-8-sig"))
        if bytes_of.exists() and merges.exists():  # OPT's
            backend = tokenizers.Tokenizer(BPE.from_file(str(source := bytes_of), str(merges)))
            backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
            backend.decoder = tokenizers.decoders.ByteLevel()
            return backend
        if words.exists():  # BERT's
            model, given = ({k: v for k, v in (read_json(path) if path.exists() else {}).items() if v is not None}
                            for path in (folder / "config.json", settings))
            kind = given.get("tokenizer_class", model.get("tokenizer_class", "BertTokenizer"))
            if kind not in ("BertTokenizer", "BertTokenizerFast"):
                raise UserError(f"{folder} has no tokenizer.json, and {kind} does not cut texts as BERT's does: take a "
                                "model with a tokenizer.json")
            return word_pieces(WordPiece.from_file(str(source := words), unk_token="[UNK]"), BertNormalizer(
                lowercase=given.get("do_lower_case", True), strip_accents=given.get("strip_accents"),
                handle_chinese_chars=given.get("tokenize_chinese_chars", True)))
    except UserError:
        raise
    except Exception as error:  # the library raises bare Exception for a malformed file
        raise UserError(f"{source} is not a tokenizer file ({error}): fetch it again") from None
    raise UserError(f"{folder} has no tokenizer.json: download the model's tokenizer files as well")


def word_pieces(vocabulary: WordPiece, normaliser: BertNormalizer) -> tokenizers.Tokenizer:
    """BERT's way to cut texts, with these words and pieces of words."""
    backend = tokenizers.Tokenizer(vocabulary)
    backend.normalizer, backend.pre_tokenizer = normaliser, tokenizers.pre_tokenizers.BertPreTokenizer()
    backend.decoder = tokenizers.decoders.WordPiece()
    special = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")  # named, so that decoding leaves them out
    backend.add_special_tokens([token for token in special if backend.token_to_id(token) is not None])
    return backend


def require_known(rows: Iterable[Sequence[int]], vocab_size: int) -> None:
    """Raise UserError where texts have an id that a model with embeddings for `vocab_size` ids does not know."""
    largest = max((i for row in rows for i in row), default=0)
    if largest >= vocab_size:
        raise UserError(f"the tokenizer makes the id {largest} and the model knows {vocab_size:,} ids: take both from "
                        "the same model folder")


def gap_behind(prompt: str) -> str:
    """The blank between a prompt and the text that goes on from it, unless the prompt ends with one, or a new line."""
    return " " if prompt and not prompt[-1].isspace() else ""


def normalize_caption(caption: str) -> str:
    """A caption as BLIP-2 trains on it: lower case, without . ! " ( ) * # : ; ~ (LAVIS `blip_caption`)."""
    return re.sub(r"\s+", " ", re.sub(r"[.!\"()*#:;~]", " ", caption.lower())).strip()
