"""The public interface as a researcher uses it: models from folders, images or features, a training of her own."""

import copy
import re
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from PIL import Image

import minblip2 as mb
from minblip2.lm.opt import OPT, OPTConfig

from .parity import difference
from .pictures import smooth
from .tiny_blip2 import official_folder, official_retrieval_folder

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")


def images(n=3):
    return [smooth(40 + 7 * i, 50, seed=i) for i in range(n)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Hub folders of a whole BLIP-2, and of one for retrieval with transformers' model."""
    whole, retrieval = tmp_path_factory.mktemp("blip2-opt-2.7b"), tmp_path_factory.mktemp("blip2-itm-vit-g")
    official_folder("opt", whole)
    return whole, retrieval, official_retrieval_folder(retrieval)


@pytest.fixture(scope="module")
def model(folders):
    return mb.Blip2.from_folder(folders[0], torch.float32, CPU)


@pytest.fixture(scope="module")
def retriever(folders):
    return mb.Retriever.from_folder(folders[1], torch.float32, CPU)


def test_public_names_are_few_and_there():
    assert all(getattr(mb, name) is not None for name in mb.__all__)
    assert {"Blip2", "Retriever", "Stage1", "train_stage1", "UserError"} <= set(mb.__all__) <= set(dir(mb))
    with pytest.raises(AttributeError, match="no attribute 'Nobody'"):
        _ = mb.Nobody


def test_one_image_gives_one_text_and_features_stand_for_images(model):
    several, one = images(), images()[0]
    captions = model.caption(several)
    assert model.caption(one) == captions[0] and isinstance(captions, list)
    features = model.encode_images(several)
    assert model.caption(features) == captions == model.caption(features.numpy()) == model.caption(iter(several))
    assert model.caption(features[0]) == captions[0]


def test_a_question_is_put_as_the_model_was_asked(model):
    several = images()
    framed = [f"Question: {asked} Answer:" for asked in ("what is this?", "a bus?", "who?")]
    answers = model.generate(several, framed, max_length=10, min_length=1, length_penalty=-1.0)
    assert model.ask(several, ["what is this?", "a bus?", "who?"]) == answers == model.ask(several, framed)
    assert model.ask(several[0], "what is this?") == answers[0]
    assert model.ask(several[0], ["what is this?", "a bus?"])[0] == answers[0]
    assert model.ask(several, "what is this?")[0] == answers[0] and len(model.ask(several, "what is this?")) == 3
    assert model.ask(several[:1], ["a bus?"], question="{}") == model.generate(several[:1], ["a bus?"], max_length=10,
                                                                               min_length=1, length_penalty=-1.0)


@pytest.mark.parametrize("count, prompts", [(2, 3), (3, 2), (9, 8), (8, 9), (16, 8)])
def test_images_and_questions_must_be_equally_many(model, count, prompts):
    with pytest.raises(mb.UserError, match="one for each, or one for all"):
        model.ask(images(count), ["who?"] * prompts)


def test_a_draw_takes_one_beam_unless_beams_are_asked_for(model):
    torch.manual_seed(0)
    assert len(model.caption(images(), top_p=0.9)) == 3
    with pytest.raises(mb.UserError, match="beams=1"):
        model.caption(images(), top_p=0.9, beams=3)
    for share in (0.0, 2.0, float("nan")):
        with pytest.raises(mb.UserError, match="top_p is .*: give a share"):
            model.caption(images(), top_p=share)
    unset = dict(top_p=None, temperature=None, beams=None, max_length=None, min_length=None, length_penalty=None)
    assert model.caption(images(), **unset) == model.caption(images())
    assert len(model.ask(images(), "who?", beams=1)) == 3


@torch.no_grad()
def test_similarity_and_matching_equal_transformers(folders, retriever):
    theirs, several, texts = folders[2], images(), ["two dogs", "a red bus in the rain"]
    pixels = torch.stack([retriever.transform(image) for image in several])
    cosine, match = retriever.similarity(several, texts), retriever.match(several, texts)
    assert cosine.shape == match.shape == (3, 2)
    ids, mask = retriever.text_ids(texts)
    for i in range(3):
        for j in range(2):
            text = ids[j:j + 1, mask[j]], mask[j:j + 1, mask[j]].long()
            itc = theirs(pixels[i:i + 1], *text, use_image_text_matching_head=False).logits_per_image
            itm = theirs(pixels[i:i + 1], *text, use_image_text_matching_head=True).logits_per_image
            assert abs(cosine[i, j] - itc[0, 0]) < 1e-5
            assert abs(match[i, j] - itm[0].softmax(dim=0)[1]) < 1e-5


def test_retrieval_ranks_by_match_and_cosine(retriever):
    several = images(6)
    cosine = retriever.similarity(several, ["a red bus"])[:, 0]
    rows = torch.arange(6)
    scores = cosine + retriever.match_logits(several, ["a red bus"], rows, torch.zeros_like(rows))
    assert retriever.retrieve("a red bus", several, k=6).tolist() == scores.argsort(descending=True).tolist()
    two = cosine.topk(2).indices
    ranked, others = two[scores[two].argsort(descending=True)], cosine.topk(5).indices[2:]
    assert retriever.retrieve("a red bus", several, k=5, top=2).tolist() == [*ranked.tolist(), *others.tolist()]


def test_only_the_best_are_matched(retriever, monkeypatch):
    matched = []
    monkeypatch.setattr("minblip2.weights.retriever.pair_logits",
                        lambda *inputs: matched.append(len(inputs[-1])) or torch.zeros(len(inputs[-1]), 2))
    retriever.retrieve("a red bus", images(8), k=3, top=4)
    assert matched == [4]


def test_maps_are_of_the_grid_and_follow_the_text(retriever):
    maps = retriever.attention_maps(images()[0], ["two dogs", "a red bus"])
    assert maps.shape == (2, 2, 2) and (maps >= 0).all() and difference(maps[0], maps[1]) > 1e-3


def test_a_text_without_words_is_refused(retriever):
    with pytest.raises(mb.UserError, match="no word"):
        retriever.similarity(images(1), ["...", "a bus"])
    with pytest.raises(mb.UserError, match="top is 0: let ITM rank 1 or more"):
        retriever.retrieve("a bus", images(), top=0)


def test_an_empty_question_is_refused(model):
    for questions in ("", ["a bus?", " "], []):
        with pytest.raises(mb.UserError, match="question"):
            model.ask(images(2), questions)


def test_pixels_and_features_of_another_encoder_are_refused(model, retriever):
    pixels = torch.stack([model.transform(image) for image in images()])
    for wrong in (pixels, pixels[0], torch.randn(3, 5, 23), torch.randn(24), torch.zeros(2, 5, 24, dtype=torch.long)):
        for call in (model.caption, lambda given: retriever.similarity(given, ["a bus"])):
            with pytest.raises(mb.UserError, match="no frozen features"):
                call(wrong)


def test_as_many_rows_as_are_asked_for_are_retrieved(retriever):
    features = torch.randn(9, 5, 24)
    assert len(retriever.retrieve("a bus", features, k=7, top=2)) == 7
    with pytest.raises(mb.UserError, match="over one image, not 2"):
        retriever.attention_maps(features[:2], ["a bus"])


def test_a_text_is_never_longer_than_there_are_positions(model, retriever, monkeypatch):
    """Whether its length is asked for or left to the default."""
    long = next(text for n in range(60) if len(model.tokenizer.encode_prompt(text := "two dogs " * n)) > 30)
    with pytest.raises(mb.UserError, match="shorten the prompt"):
        model.generate(images(1), long)  # 64 positions, 4 of them for queries
    monkeypatch.setattr(retriever, "tokenizer", mb.Tokenizer.from_texts(["a"]))
    monkeypatch.setattr(retriever, "writes", True)
    captions = retriever.caption(images(), min_length=28)  # 24 positions
    assert len(captions) == 3 and retriever.caption(images()[0], min_length=28) == captions[0]
    with pytest.raises(mb.UserError, match="positions for 24 ids, not for 25"):
        retriever.caption(images(), max_length=25)
    monkeypatch.setattr(retriever, "beams", 3)
    assert len(retriever.caption(images(), top_p=0.9)) == 3, "drawing takes one beam"


@pytest.mark.parametrize("none", [[], iter([]), torch.zeros(0, 5, 24)])
def test_no_image_at_all_is_refused(retriever, none):
    with pytest.raises(mb.UserError, match="there is no image"):
        retriever.similarity(none, ["a bus"])


def test_weights_for_retrieval_write_no_captions(retriever):
    with pytest.raises(mb.UserError, match="holds no LM head to write captions with"):
        retriever.caption(images())


@pytest.mark.parametrize("nothing", [None, 3])
def test_what_is_no_image_is_refused(model, nothing):
    with pytest.raises(mb.UserError, match=f"{type(nothing).__name__} is no Pillow image"):
        model.caption(nothing)


def test_features_of_another_precision_are_kept_apart(retriever, tmp_path):
    images(1)[0].save(tmp_path / "a.png")
    kept = [replace(retriever, precision=precision).cached_features([tmp_path / "a.png"], tmp_path / "cache")
            for precision in ("float32", "bfloat16", "float32")]
    assert len(list((tmp_path / "cache").glob("*.npy"))) == 2
    assert (kept[0] == kept[2]).all() and not (kept[0] == kept[1]).all()
    other = replace(retriever, vit=copy.deepcopy(retriever.vit))
    other.cached_features([tmp_path / "a.png"], tmp_path / "cache")
    assert len(list((tmp_path / "cache").glob("*.npy"))) == 2
    other.vit.config = replace(other.vit.config, activation="relu")
    other.cached_features([tmp_path / "a.png"], tmp_path / "cache")
    assert len(list((tmp_path / "cache").glob("*.npy"))) == 3, "the same weights, another encoder"


def test_kept_features_are_those_that_an_encoder_of_ones_own_makes_now(retriever, tmp_path):
    """Its weights do not tell which of its layers it gives."""
    class Own(torch.nn.Module):
        def __init__(self, scale):
            super().__init__()
            self.weight, self.scale = torch.nn.Parameter(torch.ones(1)), scale

        def forward(self, pixels):
            return self.weight * self.scale * pixels[:, :, :2].flatten(2)

    images(1)[0].save(tmp_path / "a.png")
    for scale in (1, 1):
        replace(retriever, vit=Own(scale)).cached_features([tmp_path / "a.png"], tmp_path / "cache")
    with pytest.raises(mb.UserError, match="a.png than this encoder makes now: has its code changed"):
        replace(retriever, vit=Own(2)).cached_features([tmp_path / "a.png"], tmp_path / "cache")


def test_a_text_for_retrieval_is_cut_to_the_positions_that_there_are(retriever):
    long = replace(retriever, max_length=99).text_ids(["two dogs and " * 30])[0]
    assert long.shape[1] == retriever.stage1.qformer.config.max_positions


def test_a_generator_that_draws_nothing_is_refused(model):
    generator = torch.Generator().manual_seed(0)
    with pytest.raises(mb.UserError, match="a generator is for drawing"):
        model.caption(images(1), generator=generator)
    assert len(model.caption(images(1), generator=generator, top_p=0.9)) == 1


def test_models_of_your_own_need_no_config(model, retriever, monkeypatch):
    features, expected = retriever.encode_images(images(1)), retriever.attention_maps(images(1), ["a bus"])
    monkeypatch.delattr(retriever.vit, "config")
    monkeypatch.delattr(model.stage2.lm, "config")
    assert torch.equal(retriever.attention_maps(features, ["a bus"]), expected)
    model.require_positions(["a bus"], 1_000_000)  # nobody knows how many there are


def test_features_of_your_own_train_a_stage_1_and_start_a_stage_2(tmp_path):
    words = mb.Tokenizer.from_texts(["a red bus", "two dogs", "a dog in the rain"])
    torch.manual_seed(0)
    stage1 = mb.Stage1.for_features(12, words, width=24, layers=2, heads=2, mlp_width=32, num_queries=3,
                                    max_positions=16, dropout=0.0)
    features = torch.randn(6, 1, 12) + 0.1 * torch.randn(6, 5, 12)
    captions = [["a red bus", "a bus"], "two dogs", "a dog", "a dog in the rain", "dogs", "rain"]
    config = mb.TrainConfig(steps=60, batch_size=4, learning_rate=3e-3, warmup=5, precision="float32")
    log = mb.train_stage1(stage1, features, captions, config)
    assert len(log) == 60 and log[-1]["loss"] < 0.8 * log[0]["loss"] and not stage1.training
    kept = mb.train_stage1(stage1, features, captions, mb.TrainConfig(steps=2, batch_size=4), tmp_path / "run")
    assert len(kept) == 2 and (tmp_path / "run" / "model.safetensors").exists()
    with pytest.raises(mb.UserError, match="6 images and captions of 5"):
        mb.train_stage1(stage1, features, captions[:5], config)
    with pytest.raises(mb.UserError, match=r"captions\[5\] has '!', which holds no word"):
        mb.train_stage1(stage1, features, [*captions[:5], ["rain", "!"]], config)
    lm = OPT(OPTConfig(vocab_size=len(words), width=24, layers=1, heads=2, mlp_width=32, max_positions=32))
    stage2, untrained = mb.Stage2.from_stage1(stage1, lm), [p.clone() for p in lm.parameters()]
    log = mb.train_stage2(stage2, features, captions, config, words, prompt="a")
    assert log[-1]["loss"] < 0.97 * log[0]["loss"], "though nobody has trained this language model"
    assert all(torch.equal(one, other) for one, other in zip(lm.parameters(), untrained, strict=True)), "frozen"
    with pytest.raises(mb.UserError, match="this stage 2 reads"):
        mb.train_stage2(stage2, features[:, :, :5], captions, config, words)
    again = mb.train_stage1(stage1, features, captions, mb.TrainConfig(steps=2, batch_size=4), tmp_path / "run")
    assert again == kept, "a finished run is not trained again"
    for images, texts in ((features, captions[::-1]), (features + 1, captions)):
        with pytest.raises(mb.UserError, match="other settings"):
            mb.train_stage1(stage1, images, texts, mb.TrainConfig(steps=2, batch_size=4), tmp_path / "run")
    half = mb.TrainConfig(steps=1, batch_size=4, precision="float32")
    assert len(mb.train_stage1(stage1, features.bfloat16(), [" ".join(["dogs"] * 40)] * 6, half)) == 1
    for images in (features[:, 0], features[:, :, :5]):
        with pytest.raises(mb.UserError, match=r"this stage 1 reads \(n v 12\)"):
            mb.train_stage1(stage1, images, captions, config)
    with pytest.raises(mb.UserError, match="for_features"):
        mb.train_stage1(mb.Stage1(stage1.qformer.config), features, captions, config)


@pytest.mark.parametrize("has_dec", [False, True])
def test_a_bert_that_was_grown_by_dec_is_not_grown_again(tmp_path, has_dec):
    words = mb.Tokenizer.from_texts(["a red bus"])
    if has_dec:  # as LAVIS does to its BERT
        words.backend.add_special_tokens(["[DEC]"])
    config = transformers.BertConfig(vocab_size=words.backend.get_vocab_size(), hidden_size=24, num_hidden_layers=1,
                                     num_attention_heads=2, intermediate_size=32)
    transformers.BertModel(config).save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text(words.backend.to_str(), encoding="utf-8")
    words = mb.Tokenizer.from_folder(tmp_path)
    stage1 = mb.Stage1.for_features(12, words, bert=tmp_path)
    assert stage1.qformer.dec_id == stage1.tokenizer.dec_id == len(words) - 1
    with pytest.raises(mb.UserError, match="has its layers: leave layers out, or bert"):
        mb.Stage1.for_features(12, words, bert=tmp_path, layers=2)


def test_training_on_features_asks_before_it_begins(tmp_path):
    words = mb.Tokenizer.from_texts(["a red bus", "two dogs"])
    sizes = dict(width=24, layers=1, heads=2, mlp_width=32, num_queries=3, max_positions=16)
    features, captions, config = torch.randn(4, 5, 12), ["a red bus", "two dogs"] * 2, mb.TrainConfig(2, batch_size=2)
    stage1 = mb.Stage1.for_features(12, words, **sizes)

    def new_lm(seed, **changed):
        torch.manual_seed(seed)
        return OPT(OPTConfig(**dict(vocab_size=len(words), width=24, layers=1, heads=2, mlp_width=32) | changed))

    def stage2(lm, **asked):
        return mb.train_stage2(mb.Stage2.from_stage1(stage1, lm), features, captions, config, words, **asked)

    log = stage2(new_lm(0), folder=tmp_path)
    assert stage2(new_lm(0), folder=tmp_path) == log
    with pytest.raises(mb.UserError, match="other settings"):
        stage2(new_lm(1), folder=tmp_path)
    for smoothing, again in ((0.1, True), (0.3, False)):
        other = mb.Stage1(mb.QFormerConfig(image_width=12, vocab_size=len(words), **sizes), label_smoothing=smoothing)
        with nullcontext() if again else pytest.raises(mb.UserError, match="other settings"):
            mb.train_stage1(other, features, captions, config, tmp_path / "first", tokenizer=words)
    with pytest.raises(mb.UserError, match="0 pairs"):
        mb.train_stage2(mb.Stage2.from_stage1(stage1, new_lm(0)), features[:0], [], config, words)
    with pytest.raises(mb.UserError, match="has 6 positions, but 3 queries"):
        stage2(new_lm(0, max_positions=6))
    with pytest.raises(mb.UserError, match="and the model knows 4 ids: take both"):
        stage2(new_lm(0, vocab_size=4))
    for asked in (dict(max_length=2), dict(prompt="two dogs", max_length=4)):
        with pytest.raises(mb.UserError, match="no word of a caption is left"):
            stage2(new_lm(0), **asked)
    with pytest.raises(mb.UserError, match="and the model knows 4 ids: take both"):
        mb.train_stage1(mb.Stage1(mb.QFormerConfig(image_width=12, vocab_size=4, **sizes)), features, captions, config,
                        tokenizer=words)
    spoiled = features.clone()
    spoiled[0, 2, 3] = torch.nan
    for images in (features.log(), spoiled):
        with pytest.raises(mb.UserError, match=r"features\[0\] are not finite"):
            mb.train_stage1(stage1, images, captions, config)
    with pytest.raises(mb.UserError, match="checkpoint_every is 0"):
        mb.TrainConfig(2, checkpoint_every=0)


def test_the_lines_of_the_readme_run(folders, parts, tmp_path, monkeypatch):
    """As they stand there, on small folders under the names that they have there."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (code,) = [block for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "Retriever" in block]
    for name, folder in (("blip2-opt-2.7b", folders[0]), ("blip2-itm-vit-g", folders[1]),
                         ("bert", parts / "all-MiniLM-L6-v2"), ("lm", parts / "SmolLM2-135M-Instruct")):
        (tmp_path / name).symlink_to(folder, target_is_directory=True)
    (tmp_path / "pictures").mkdir()
    for i, image in enumerate(images()):
        image.save(tmp_path / "pictures" / f"{i}.png")
    monkeypatch.chdir(tmp_path)
    names = {"Image": Image, "features": torch.randn(8, 5, 768), "captions": ["a red bus", "two dogs"] * 4,
             "encoder": torch.nn.Conv2d(3, 768, 14)}
    short = mb.TrainConfig(steps=2, batch_size=4)
    monkeypatch.setattr(mb, "TrainConfig", lambda **settings: short, raising=False)
    exec(compile(code, "README.md", "exec"), names)
    assert names["scores"].shape == (3, 2) and len(names["log"]) == 2 and names["maps"].shape[0] == 2
    assert isinstance(names["stage2"], mb.Stage2) and names["model"].stage2 is names["stage2"]
    assert len(names["model"].caption(names["features"])) == 8
