"""The tokenizer against transformers', on real captions; round trips, truncation, padding and broken files."""

import json
import re

import pytest
import tokenizers
import torch
from tokenizers.processors import TemplateProcessing
from transformers import BertTokenizerFast

from minblip2 import UserError
from minblip2.data.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def captions(photos):
    annotations = json.loads((photos / "annotations" / "captions_val.json").read_text(encoding="utf-8"))["annotations"]
    return [annotation["caption"] for annotation in annotations]


@pytest.fixture(scope="module")
def bert(parts):
    return Tokenizer.from_folder(parts / "all-MiniLM-L6-v2")


@pytest.fixture
def small():
    return Tokenizer.from_texts(["a red circle, left of a blue square.", "two green stars"])


def test_ids_equal_transformers_on_real_captions(bert, parts, captions):
    theirs = BertTokenizerFast.from_pretrained(parts / "all-MiniLM-L6-v2")
    odd = ["", "Café — naïve, 東京!", "it's 3,000 km...", "  spaces\tand\nlines  ",
           "supercalifragilisticexpialidocious"]
    for text in captions + odd:
        assert bert.encode(text, max_length=512) == theirs(text)["input_ids"], text
        assert bert.encode(text, max_length=8) == theirs(text, truncation=True, max_length=8)["input_ids"], text
    assert len(captions) > 2000


def test_round_trip_of_real_captions(bert, captions):
    for text in captions[:300]:
        letters = re.sub(r"\s", "", text.lower())
        assert re.sub(r"\s", "", bert.decode(bert.encode(text, max_length=512))) == letters


def test_dec_is_the_last_id(bert, small):
    assert (bert.bos_ids, bert.eos_id, bert.pad_id, bert.dec_id, len(bert)) == ([101], 102, 0, 30522, 30523)
    assert small.dec_id == len(small) - 1 and small.backend.id_to_token(small.dec_id) is None
    words = small.token_ids("a red star")
    assert small.decode([small.dec_id, *words, small.eos_id, 5, 6]) == small.decode(words)


def test_words_reads_every_word_and_round_trips(small):
    text = "two red circle , left of a blue square . stars"
    ids = small.token_ids(text)
    assert small.backend.token_to_id("[UNK]") not in ids and len(ids) == len(text.split())
    assert re.sub(r"\s", "", small.decode(small.encode(text))) == re.sub(r"\s", "", text)
    assert small.token_ids("purple") == [small.backend.token_to_id("[UNK]")]


def test_words_of_any_language_are_read(small):
    texts = ["Un café à la plage, naïve!", "a snake_case thing", "한국어 문장", "犬が走る"]
    read = Tokenizer.from_texts(texts)
    for text in texts:
        assert read.backend.token_to_id("[UNK]") not in read.token_ids(text) and small.token_ids(text), text


def test_a_folder_with_cls_is_bert_unless_it_names_an_end(small, tmp_path):
    """As `Blip2.save` writes a language model's tokenizer that knows [CLS], and as BERT's own folders are."""
    (tmp_path / "tokenizer.json").write_text(small.backend.to_str(), encoding="utf-8")
    (tmp_path / "config.json").write_text('{"text_config": {"model_type": "opt"}}')
    assert Tokenizer.from_folder(tmp_path).dec_id == small.dec_id
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "[SEP]", "bos_token": "[SEP]"}')
    read = Tokenizer.from_folder(tmp_path)
    assert (read.bos_ids, read.eos_id, read.dec_id) == ([small.eos_id], small.eos_id, None), "it has no line end"


def test_an_opt_ends_a_text_as_its_folder_says_and_else_with_a_line(tmp_path):
    """BLIP-2's own folders name the line end, too; one that `Blip2.save` wrote names the end that was trained."""
    words = tokenizers.ByteLevelBPETokenizer()
    words.train_from_iterator(["a dog"], vocab_size=300, special_tokens=["<s>", "</s>"])
    words.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</s>", "bos_token": "</s>"}')
    named = words.token_to_id("</s>")
    for stated, end in (({}, "Ċ"), ({"eos_token_id": None}, "Ċ"), ({"eos_token_id": named}, "</s>"),
                        ({"eos_token_id": [named]}, "</s>")):  # a list, as some files have
        (tmp_path / "config.json").write_text(json.dumps({"text_config": {"model_type": "opt"} | stated}))
        assert Tokenizer.from_folder(tmp_path).eos_id == words.token_to_id(end)
    several = {"text_config": {"model_type": "opt", "eos_token_id": [named, 7]}}
    (tmp_path / "config.json").write_text(json.dumps(several))
    with pytest.raises(UserError, match="leave one eos_token_id"):
        Tokenizer.from_folder(tmp_path)


@pytest.mark.parametrize("max_length", [2, 3, 5, 12])
def test_truncation_keeps_start_and_end(small, max_length):
    ids = small.encode("a blue square", prompt="two green stars", max_length=max_length)
    assert len(ids) == min(max_length, 8) and ids[:1] == small.bos_ids and ids[-1] == small.eos_id
    assert small.encode_prompt("two green stars") == small.encode("", prompt="two green stars")[:-1]
    assert ids[:-1] == [*small.bos_ids, *small.token_ids("two green stars a blue square")][: max_length - 1]


def test_padding_on_either_side(small):
    rows = [[5, 6, 7], [], [8]]
    for side, ids, mask in [("right", [[5, 6, 7], [0, 0, 0], [8, 0, 0]], [[1, 1, 1], [0, 0, 0], [1, 0, 0]]),
                            ("left", [[5, 6, 7], [0, 0, 0], [0, 0, 8]], [[1, 1, 1], [0, 0, 0], [0, 0, 1]])]:
        ours = small.pad(rows, side)
        assert ours[0].tolist() == ids and ours[1].int().tolist() == mask
        assert ours[0].dtype == torch.long and ours[1].dtype == torch.bool
    assert small.pad([[], []])[0].shape == (2, 0)


def test_save_and_load(small, bert, tmp_path):
    for_an_encoder = Tokenizer(small.backend, [], small.eos_id, small.pad_id, prompt_end=[small.eos_id])
    for tokenizer in (small, bert, for_an_encoder):
        tokenizer.save(tmp_path / "tokenizer.json")
        again = Tokenizer.load(tmp_path / "tokenizer.json")
        assert len(again) == len(tokenizer) and vars(again).keys() == vars(tokenizer).keys()
        for name in ("bos_ids", "eos_id", "pad_id", "dec_id", "prompt_end"):
            assert getattr(again, name) == getattr(tokenizer, name)
        assert again.encode("Two green stars!") == tokenizer.encode("Two green stars!")


@pytest.mark.parametrize("content, names", [(None, "cannot be read"), ("{", "is not JSON"), ("[]", "holds a list"),
                                            ("{}", "KeyError"), ('{"backend": 3}', "not a saved tokenizer"),
                                            (b"\xff\xfe", "is not JSON")])
def test_what_save_did_not_write_is_refused(tmp_path, content, names):
    path = tmp_path / "tokenizer.json"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=f"tokenizer.json .*{names}") as error:
        Tokenizer.load(path)
    assert "\n" not in str(error.value)


def test_a_save_that_fails_keeps_the_old_file(small, tmp_path, monkeypatch):
    path = tmp_path / "tokenizer.json"
    small.save(path)
    before = path.read_bytes()
    monkeypatch.setattr("pathlib.Path.write_text", lambda self, *_, **__: self.write_bytes(b"{") and 1 / 0)
    with pytest.raises(ZeroDivisionError):
        small.save(path)
    assert path.read_bytes() == before


def test_language_model_folder(parts):
    lm = Tokenizer.from_folder(parts / "SmolLM2-135M-Instruct")
    assert lm.dec_id is None and lm.eos_id == 2 and len(lm) == 49152
    assert lm.decode(lm.encode("A dog — naïve, 東京!")) == "A dog — naïve, 東京!"
    settings = json.loads((parts / "SmolLM2-135M-Instruct" / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert lm.backend.token_to_id(settings["eos_token"]) == lm.eos_id


def folder(path, **files):
    """A hub folder with a two-word tokenizer and these JSON files."""
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "é": 1, "<end>": 2}, unk_token="a"))
    backend.save(str(path / "tokenizer.json"))
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
        (path / f"{name}.json").write_text(text, encoding="utf-8")
    return path


def test_an_encoder_reads_a_closed_prompt(tmp_path):
    files = {"tokenizer_config": {"eos_token": "<end>", "bos_token": "é"}}
    for kind, ids in (("t5", [0, 2]), ("opt", [1, 0])):  # a T5 reads no start token, though BLIP-2's files name one
        tokenizer = Tokenizer.from_folder(folder(tmp_path, config={"model_type": kind}, **files))
        assert tokenizer.encode_prompt("a") == ids and tokenizer.encode("a") == [*tokenizer.bos_ids, 0, 2]


@pytest.mark.parametrize("writes", [False, True])
def test_in_a_blip2_texts_begin_and_end_as_its_parts_say(tmp_path, writes):
    """The tokenizer says whether there is a start token, the language model where a text ends."""
    words = {"a": 0, "<s>": 1, "<end>": 2, "<turn>": 3}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="a"))
    if writes:
        backend.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    named = {"eos_token": "<end>", "bos_token": "<s>"}
    text = {"model_type": "llama", "eos_token_id": 3, "bos_token_id": 1}
    whole = Tokenizer.from_folder(folder(tmp_path, config={"text_config": text}, tokenizer=backend.to_str(),
                                         tokenizer_config=named))
    assert whole.encode("a") == [1, 0, 3][not writes:] and whole.encode_prompt("a") == [1, 0][not writes:]
    part = Tokenizer.from_folder(folder(tmp_path, config=text, tokenizer=backend.to_str(), tokenizer_config=named))
    assert part.encode("a") == [1, 0, 2], "alone, as the laptop recipe takes it"
    for unsaid in ({"model_type": "blip-2"}, {"model_type": "blip-2", "text_config": {"hidden_size": 8}}):
        opt = Tokenizer.from_folder(folder(tmp_path, config=unsaid, tokenizer=backend.to_str(), tokenizer_config=named))
        assert opt.bos_ids == [1], "an OPT, as transformers takes it"


def test_a_bert_is_known_by_its_kind_and_has_one_dec(tmp_path):
    small = Tokenizer.from_texts(["a dog"])
    for more in ({}, {"eos_token": "[SEP]", "tokenizer_class": "BertTokenizer"}):
        files = dict(tokenizer=small.backend.to_str(), tokenizer_config=more)
        found = Tokenizer.from_folder(folder(tmp_path, config={}, **files))
        assert found.encode("a dog") == small.encode("a dog") and found.dec_id == small.dec_id == len(small) - 1
    small.backend.add_special_tokens(["[DEC]"])
    again = Tokenizer.bert(small.backend)
    assert again.dec_id == small.dec_id == len(again) - 1, "not a second time"
    small.backend.add_special_tokens(["more"])
    assert Tokenizer.bert(small.backend).dec_id == small.dec_id + 2, "the Q-Former takes the last id"


@pytest.mark.parametrize("settings", [{}, dict(do_lower_case=False), dict(strip_accents=False),
                                      dict(tokenize_chinese_chars=None)], ids=str)
def test_berts_words_alone_are_bert(tmp_path, bert, captions, settings):
    """As its slow tokenizer wrote them, which the folders for retrieval are likely to hold."""
    words = sorted(bert.backend.get_vocab().items(), key=lambda item: item[1])
    (tmp_path / "vocab.txt").write_text("\n".join(word for word, _ in words) + "\n", encoding="utf-8")
    (tmp_path / "added_tokens.json").write_text('{"[DEC]": 30522}')
    named = {"tokenizer_class": "BertTokenizer", "bos_token": "[DEC]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(named | settings))
    ours, theirs = Tokenizer.from_folder(tmp_path), BertTokenizerFast(
        vocab=bert.backend.get_vocab(), **{k: v for k, v in settings.items() if v is not None})
    texts = [*captions[:300], "Déjà VU in 東京, naïve café", "[SEP] in a text"]
    assert [ours.encode(text, max_length=99) for text in texts] == theirs(texts)["input_ids"]
    assert ours.dec_id == 30522 and len(ours) == 30523 and ours.decode(ours.encode("a dog")) == "a dog"


@pytest.mark.parametrize("name", ["config", "tokenizer_config"])
def test_words_that_another_tokenizer_cuts_are_refused(tmp_path, name):
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\nり\n", encoding="utf-8")
    for kind, reads in (("BertTokenizer", True), ("BertJapaneseTokenizer", False)):
        (tmp_path / f"{name}.json").write_text(json.dumps({"model_type": "bert", "tokenizer_class": kind}))
        if reads:
            assert Tokenizer.from_folder(tmp_path).dec_id == 5
    with pytest.raises(UserError, match="BertJapaneseTokenizer does not cut texts as BERT's does"):
        Tokenizer.from_folder(tmp_path)


def test_opts_vocabulary_and_merges_are_gpt2s_form(tmp_path):
    from transformers import GPT2Tokenizer

    text = "a cat on a mat, a cat at a hat: naïve 東京!\n"
    symbols = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    merges = [("a", "t"), ("Ġ", "c"), ("Ġc", "at"), ("Ġ", "a"), ("m", "at")]
    words = ["<s>", "<pad>", "</s>", *symbols, *("".join(pair) for pair in merges)]
    (tmp_path / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}), encoding="utf-8")
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges), encoding="utf-8")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(
        {"bos_token": {"content": "</s>"}, "eos_token": {"content": "</s>"}, "pad_token": {"content": "<pad>"}}),
        encoding="utf-8")
    ours = Tokenizer.from_folder(tmp_path)
    original = GPT2Tokenizer(str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt"))
    assert ours.token_ids(text) == original.encode(text,
                                                   add_special_tokens=False) and len(ours.token_ids(text)) < len(text)
    assert (ours.bos_ids, ours.eos_id, ours.pad_id) == ([2], 2, 1)
    assert ours.encode(text, max_length=99) == [2, *ours.token_ids(text), 2]
    assert ours.decode(ours.token_ids(text)) == text.strip() and ours.decode([1, *ours.token_ids("at")]) == "at"
    (tmp_path / "merges.txt").write_text("#version: 0.2\nx\n", encoding="utf-8")
    with pytest.raises(UserError, match="vocab.json is not a tokenizer file"):
        Tokenizer.from_folder(tmp_path)


@pytest.mark.parametrize("files, end", [
    ({"tokenizer_config": {"eos_token": "<end>"}}, 2), ({"tokenizer_config": {"eos_token": {"content": "é"}}}, 1),
    ({"config": {"eos_token_id": 1}}, 1), ({"config": {"eos_token_id": [2, 1]}}, 2)], ids=str)
def test_the_end_may_be_named_in_several_ways(tmp_path, files, end):
    tokenizer = Tokenizer.from_folder(folder(tmp_path, **files))
    assert (tokenizer.eos_id, tokenizer.pad_id, tokenizer.bos_ids) == (end, end, [])


@pytest.mark.parametrize("spoil, names", [
    (lambda path: (path / "tokenizer.json").unlink(), "no tokenizer.json"),
    (lambda path: (path / "tokenizer.json").write_text("{", encoding="utf-8"),
     "tokenizer.json is not a tokenizer file"),
    (lambda path: (path / "tokenizer.json").write_bytes(b"\xff\xfe\x00"), "tokenizer.json is not a tokenizer file"),
    (lambda path: (path / "tokenizer_config.json").write_text("{", encoding="utf-8"),
     "tokenizer_config.json is not JSON"),
    (lambda path: (path / "tokenizer_config.json").unlink(), "no eos_token")])
def test_broken_folders_are_named(tmp_path, spoil, names):
    spoil(folder(tmp_path, tokenizer_config={"eos_token": "<end>"}))
    with pytest.raises(UserError, match=names) as error:
        Tokenizer.from_folder(tmp_path)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)
