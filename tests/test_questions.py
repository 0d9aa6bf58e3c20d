"""Questions about scenes: right and certain answers, rows that tell what they ask, and how answers are judged."""

import random
import re
from collections import Counter
from itertools import islice
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from minblip2 import UserError, masks
from minblip2.data.scene_captions import FRAMES, OPPOSITE, keywords, parse, write_caption, write_captions
from minblip2.data.scene_questions import KINDS, ask_all, one_of_each, told
from minblip2.data.scenes import HELD_OUT, SEEN, Scene, Thing, imagine
from minblip2.evaluation import asking
from minblip2.lm.opt import OPT, OPTConfig
from minblip2.training import experts, texts
from minblip2.training.binding import LOOK_BACK, LookBack
from minblip2.training.loop import TrainConfig


def thing(colour, shape, size, row, column):
    return Thing(colour, shape, size, (21 * column + 5, 21 * row + 5, 12, 12))


THREE = Scene((thing("red", "star", "small", 0, 0), thing("blue", "star", "large", 1, 2),
               thing("red", "ring", "large", 2, 1)), "grey")


def scenes(count, name):
    return [imagine(random.Random(f"{name} {index}")) for index in range(count)]


def asked_of(scene, times=60):
    """Text -> the answers that it was given, over many draws."""
    found = {}
    for seed in range(times):
        for question in ask_all(scene, random.Random(seed)):
            found.setdefault((question.kind, question.text), set()).add(question.answer)
    return found


def test_every_question_of_a_scene_and_its_answer():
    found = asked_of(THREE)
    certain = {key: next(iter(answers)) for key, answers in found.items() if len(answers) == 1}
    assert len(certain) == len(found), "no question is answered in two ways"
    open_ones = {key: answer for key, answer in certain.items() if key[0] not in ("exists", "yes/no")}
    assert open_ones == {
        ("count", "how many things are there"): "three",
        ("background", "what colour is the background"): "grey",
        ("shape", "what shape is the blue thing"): "star",  # two things are red
        ("colour", "what colour is the ring"): "red",  # two things are stars, and none is the star
        ("where", "where is the ring"): "bottom middle",
        ("size", "what size is the ring"): "large"}
    exists = {text.removeprefix("is there a "): answer for (kind, text), answer in certain.items() if kind == "exists"}
    assert exists == dict(star="yes", ring="yes", circle="no", square="no", triangle="no", cross="no")
    claims = {text.removeprefix("is the ring "): answer for (kind, text), answer in certain.items() if kind == "yes/no"}
    assert claims["red"] == "yes" and claims["blue"] == "no" and [*claims.values()].count("yes") == 1


def test_relations_compare_rows_and_columns():
    two = Scene((thing("red", "star", "small", 0, 0), thing("blue", "ring", "large", 1, 0)), "grey")
    found = {text: answers for (kind, text), answers in asked_of(two).items() if kind == "relation"}
    assert found == {"is the star above the ring": {"yes"}, "is the star below the ring": {"no"},
                     "is the ring above the star": {"no"}, "is the ring below the star": {"yes"}}
    for scene in scenes(200, "forwards"):
        for question in ask_all(scene, random.Random(0), forwards=1.0):
            assert question.kind != "relation" or re.search("left of|above", question.text)


def test_half_of_what_is_claimed_is_true():
    counts = Counter((question.kind, question.answer) for index, scene in enumerate(scenes(1500, "half"))
                     for question in ask_all(scene, random.Random(index)))
    for kind in ("exists", "yes/no", "relation"):
        assert set(answer for k, answer in counts if k == kind) == {"yes", "no"}
        assert counts[kind, "yes"] / (counts[kind, "yes"] + counts[kind, "no"]) == pytest.approx(0.5, abs=0.04)


def test_one_of_each_kind_and_no_thing_that_is_not_alone():
    kinds = Counter()
    for index, scene in enumerate(scenes(300, "one")):
        questions = one_of_each(scene, random.Random(index))
        assert len({question.kind for question in questions}) == len(questions)
        kinds.update(question.kind for question in questions)
        for question in ask_all(scene, random.Random(index)):
            for shape in re.findall(r"\bthe (circle|square|triangle|star|cross|ring)\b", question.text):
                assert sum(thing.shape == shape for thing in scene.things) == 1
    assert set(kinds) == set(KINDS) and kinds["count"] == 300 > kinds["relation"] > 150


@pytest.mark.parametrize("text, facts", [
    ("a picture of a red star, a blue star and a red ring", set()),
    ("we see a red star left of a blue star, with a red ring on a grey background", {"background"}),
    ("on a grey background there is top left a red star and middle right a large blue star",
     {"background", ("position", 0), ("position", 1), ("size", 1)}),
    ("star small red top left, ring red, grey, blue star middle right",
     {"background", ("size", 0), ("position", 0), ("position", 1)}),
])
def test_what_a_text_tells(text, facts):
    assert told([text], THREE) == facts


def test_what_captions_tell_is_what_the_parser_finds_in_them():
    for index, scene in enumerate(scenes(400, "told")):
        rng = random.Random(index)
        for kind in FRAMES:
            if kind == "relation" and len(scene.things) < 2:
                continue
            text = write_caption(scene, kind, rng)
            facts, claims = told([text], scene), parse(text)
            assert ("background" in facts) == bool(claims.backgrounds), text
            for name, claimed in (("position", claims.positions), ("size", claims.sizes)):
                assert sum(fact[0] == name for fact in facts if fact != "background") == len(claimed), text


def test_captions_never_ask():
    words = {word for index, scene in enumerate(scenes(300, "captions"))
             for caption in write_captions(scene, random.Random(index)) for word in caption.split()}
    assert not words & {"question", "answer", "what", "how", "yes", "no", "is?"}


@pytest.fixture(scope="module")
def tokenizer():
    return texts.lm_tokenizer()


def test_questions_are_read_as_people_write_them(tokenizer):
    assert (tokenizer.token_ids("Question: What colour is the star? Answer:")
            == tokenizer.token_ids("question what colour is the star answer"))
    known = tokenizer.backend.get_vocab()
    for scene in scenes(300, "words"):
        rng = random.Random(0)
        said = [keywords(scene, rng), *write_captions(scene, rng)]
        said += [f"{question.text} {question.answer}" for question in ask_all(scene, rng)]
        assert {word for text in said for word in re.findall(r"\w+|,", text)} <= known.keys()


def rows_of(tokenizer, number, count=48):
    """(words, weights) of the rows of a batch."""
    source = texts.SceneTexts(tokenizer, count, seed=5, steps=1000)
    batch = next(source.iterate(number))
    assert (batch.weights[~batch.mask] == 0).all() and (batch.weights[:, 0] == 0).all()
    for ids, weights, mask in zip(batch.ids, batch.weights, batch.mask, strict=True):
        yield [tokenizer.backend.id_to_token(i) for i in ids[mask].tolist()], weights[mask].tolist()


def test_nonsense_is_supervised_where_it_can_be_copied(tokenizer):
    for words, weights in rows_of(tokenizer, 0):
        first_end = words.index(texts.END, 1)
        source = words[1:first_end]
        assert sum(weights[: first_end + 2]) == 0 and set(weights) == {0.0, 1.0}
        for at in (at for at, weight in enumerate(weights) if weight):
            assert words[at] == source[source.index(words[at - 1]) + 1], "what followed before follows again"


def test_nonsense_comes_again_after_its_phase_now_and_then(tokenizer):
    """So that copying is not forgotten: 3 % of 384 rows are 11.5 on average, and these rows are always the same."""
    rows = [words for number in (250, 300, 500, 990) for words, _ in rows_of(tokenizer, number, 96)]
    assert 4 <= sum("question" not in words for words in rows) <= 20


@pytest.mark.parametrize("number", [250, 300, 500, 990])
def test_a_row_asks_what_its_texts_have_told(tokenizer, number):
    """Against a second statement: the answers are looked up in the captions and keywords that stand before."""
    asked, blind = 0, 0
    for words, weights in rows_of(tokenizer, number, 96):
        if "question" not in words:
            continue  # a row of nonsense
        row = " ".join(words).split(f" {texts.END}")
        row[0] = row[0].removeprefix(f"{texts.END} ")
        for at, text in enumerate(part.strip() for part in row):
            if match := re.fullmatch(r"question what (?:shape|colour) is the (\w+)(?: thing)? answer (\w+)", text):
                key, answer = match.groups()
                before = " , ".join(part for part in row[:at] if "question" not in part)
                clauses = [set(clause.split()) for clause in re.split(r",| and | with |left of|right of|above|below",
                                                                      before)]
                asked += 1
                blind += not (key == "background" and answer in before.split()
                              or any({key, answer} <= clause for clause in clauses))
            elif number < 320:
                assert "question" not in text, "binding comes first"
        answers = re.findall(r"answer (.+?) \[SEP\]", " ".join(words))
        assert len(answers) == texts.ASKED
        assert " ".join(answers).split() == [word for word, weight in zip(words, weights, strict=True)
                                             if weight == texts.ANSWER]
    assert asked > 100 and blind / asked < 0.15, "only rows that tell nothing first ask blindly"


def test_batches_are_a_function_of_seed_and_number(tokenizer):
    source = texts.SceneTexts(tokenizer, 4, seed=1, steps=10)
    forwards = source.iterate()
    batches = [next(forwards) for _ in range(10)]
    again = next(texts.SceneTexts(tokenizer, 4, seed=1, steps=10).iterate(7))
    assert torch.equal(again.ids, batches[7].ids) and torch.equal(again.weights, batches[7].weights)
    other = next(texts.SceneTexts(tokenizer, 4, seed=2, steps=10).iterate(7))
    assert not torch.equal(other.ids[:, :20], again.ids[:, :20])


def test_the_lm_has_read_of_pairs_that_no_captioned_picture_shows():
    pairs = {(thing.colour, thing.shape) for scene in scenes(400, "pairs") for thing in scene.things}
    assert pairs == {*SEEN, *HELD_OUT}


@pytest.fixture
def small_lm(tokenizer):
    torch.manual_seed(0)
    return OPT(OPTConfig(vocab_size=len(tokenizer), width=32, layers=2, heads=4, mlp_width=64, max_positions=256))


def test_words_count_as_their_weights_say(small_lm, tokenizer):
    batch = next(texts.SceneTexts(tokenizer, 6, seed=1, steps=10).iterate(9))
    hidden = small_lm(small_lm.embed(batch.ids), masks.causal(batch.mask), masks.token_positions(batch.mask))
    log_p = small_lm.lm_logits(hidden).log_softmax(dim=-1).detach()
    total = count = 0.0
    for row in range(6):
        for at in range(1, int(batch.mask[row].sum())):
            weight = float(batch.weights[row, at])
            total -= weight * float(log_p[row, at - 1, batch.ids[row, at]])
            count += weight
    assert experts.word_loss(small_lm, batch)["loss"].item() == pytest.approx(total / count, rel=1e-4)
    plain = experts.TextBatch(batch.ids, batch.mask)
    ones = experts.TextBatch(batch.ids, batch.mask, batch.mask.float())
    assert torch.equal(experts.word_loss(small_lm, plain)["loss"], experts.word_loss(small_lm, ones)["loss"])


def test_readers_tell_the_tokens_before(small_lm):
    """States that hold a token before as it is can be read; states that hold another cannot."""
    model, vocabulary = LookBack(small_lm), small_lm.vocab_size
    ids = torch.randint(4, vocabulary, (3, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.arange(12) < torch.tensor([[12], [9], [4]])
    code = torch.randn(vocabulary, 32, generator=torch.Generator().manual_seed(1))
    before = model.readers[1]
    with torch.no_grad():
        for reader in model.readers:
            reader.weight.zero_()
            reader.bias.zero_()
        chance = float(model(ids, torch.zeros(3, 12, 32), mask))
        before.weight.copy_(4 * code)
        states = torch.zeros(3, 12, 32)
        states[:, 2:] = code[ids[:, :-2]]
        told_two_before = float(model(ids, states, mask))
        told_this = float(model(ids, code[ids], mask))
    assert chance == pytest.approx(LOOK_BACK * np.log(vocabulary), rel=1e-5)
    assert told_two_before == pytest.approx((LOOK_BACK - 1) * np.log(vocabulary), abs=0.01) and told_this > chance


def test_readers_see_every_word_that_decides_a_relation(tokenizer):
    """Told what it knows of the scene, the answer hangs on the words of the question from its relation on."""
    words = {relation: tokenizer.token_ids(f"is the star {relation} the circle answer") for relation in OPPOSITE}
    for relation, ids in words.items():
        decisive = next(at for at, token in enumerate(ids) if token != words[OPPOSITE[relation]][at])
        assert len(ids) - 1 - decisive <= LOOK_BACK


def test_without_readers_only_the_words_count(small_lm, tokenizer):
    batch = next(texts.SceneTexts(tokenizer, 4, seed=1, steps=10).iterate(9))
    losses = experts.text_losses(LookBack(small_lm, look_back=0), batch)
    assert losses["look_back"] == 0 and torch.equal(losses["loss"], losses["words"])


def test_a_language_model_with_other_readers_is_not_taken_for_this_one(tmp_path):
    config = TrainConfig(steps=1, batch_size=2)
    first, _ = experts.train_lm(tmp_path, config)
    again, _ = experts.train_lm(tmp_path, config)
    assert torch.equal(first.token_embedding.weight, again.token_embedding.weight)
    with pytest.raises(UserError, match="other settings"):
        experts.train_lm(tmp_path, config, look_back=LOOK_BACK - 1)


class Answerer(SimpleNamespace):
    """Answers as `answers[number of the scene]` says; features hold that number."""

    question = "Question: {} Answer:"

    def ask(self, features, questions, **_):
        return [self.answers[int(row)][text] for row, text in zip(features[:, 0, 0], questions, strict=True)]


def test_answers_are_counted_for_each_kind_beside_their_controls(monkeypatch, tokenizer):
    truths = scenes(120, "judged")
    right = [{question.text: question.answer for seed in range(200) for question in ask_all(scene, random.Random(seed))}
             for scene in truths]

    class Knows(dict):
        """What is asked of another scene's picture is answered for that scene where it can be."""

        def __missing__(self, text):
            return "no such thing"

    features = torch.arange(120.0)[:, None, None].expand(120, 2, 3)
    blip2 = Answerer(answers=[Knows(known) for known in right], tokenizer=tokenizer)
    told_prompts = []

    class Reader(Answerer):
        def generate(self, features, prompts, **_):
            told_prompts.extend(prompts)
            return [self.truth[int(row)][prompt.split("Question: ")[1].removesuffix(" Answer:")]
                    for row, prompt in zip(features[:, 0, 0], prompts, strict=True)]

    silent = Reader(answers=[Knows() for _ in truths], truth=right)
    monkeypatch.setattr(asking, "without_picture", lambda whole: silent)
    results = asking.evaluate_questions(blip2, features, truths)
    assert set(results) == {f"ask_{kind}_{column}" for kind in KINDS for column in asking.COLUMNS}
    for kind in KINDS:
        assert [results[f"ask_{kind}_{column}"] for column in ("own", "seen", "unseen", "none", "told")] == [
            100, 100, 100, 0, 100], kind
        assert results[f"ask_{kind}_another"] < 75, "another scene has other answers"
    commonest = Counter(len(scene.things) for scene in truths).most_common(1)[0][1]
    assert results["ask_count_guess"] == pytest.approx(100 * commonest / 120)
    same = np.mean([len(truths[row].things) == len(truths[(row + 2) % 120].things) for row in range(120)])
    assert results["ask_count_another"] == pytest.approx(100 * same)
    assert all(prompt.count(texts.END) == 3 for prompt in told_prompts), "three captions are told first"
    blip2.answers = [Knows() if scene.unseen else known for scene, known in zip(truths, blip2.answers, strict=True)]
    results = asking.evaluate_questions(blip2, features, truths)
    assert all((results[f"ask_{kind}_seen"], results[f"ask_{kind}_unseen"]) == (100, 0) for kind in KINDS)


def test_each_epoch_has_an_order_of_its_own():
    one, two = np.split(np.concatenate(list(islice(experts.draws(10, 5, seed=0, start=0), 4))), 2)
    assert sorted(one) == sorted(two) == list(range(10)) and one.tolist() != two.tolist()


def test_told_in_text_tells_everything(tokenizer):
    blip2 = SimpleNamespace(tokenizer=tokenizer)
    for index, scene in enumerate(scenes(100, "story")):
        story = asking.tell(blip2, scene, random.Random(index))
        facts = told(story.split(texts.END), scene)
        assert facts == {"background", *((name, i) for name in ("position", "size") for i in range(len(scene.things)))}
        assert tokenizer.token_ids(story).count(tokenizer.eos_id) == 3


def test_a_table_has_a_row_for_each_kind_that_was_asked():
    found = [{"ask_count_own": 90.0, "ask_count_none": 30.0}, {"ask_count_own": 92.0}]
    header, row = asking.questions_table(found, lambda values: f"{sum(values):.0f}/{len(values)}")
    assert len(header) == len(row) == 1 + len(asking.COLUMNS) and row[:2] == ["count", "182/2"]
    assert row[1 + [*asking.COLUMNS].index("none")] == "30/1" and asking.questions_table([{"images": 1}], str) == []
