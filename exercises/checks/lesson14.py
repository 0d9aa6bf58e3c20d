"""Checks of lesson 14: the interval of a difference, reading a row, and what a table does not say."""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable
from itertools import combinations

from . import a_number, exercise, expect, letters_of, same_numbers, slip_of

STUDENT = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365}  # 97.5 % quantile, n values
Values = dict[int, float]

# --- the interval of a difference -------------------------------------------------------------------------------------


def gaps(base: Values, changed: Values) -> list[float]:
    """The differences within each seed that both have."""
    return [changed[seed] - base[seed] for seed in base if seed in changed]


def half_of(some: list[float]) -> float:
    """Half the width of the interval of a mean."""
    return STUDENT[len(some)] * statistics.stdev(some) / len(some) ** 0.5


def right_difference(base: Values, changed: Values) -> tuple[float, float]:
    """The mean difference within a seed, and half its interval."""
    some = gaps(base, changed)
    return statistics.mean(some), half_of(some)


def by_order(base: Values, changed: Values) -> tuple[float, float]:
    """A slip: the first value of one against the first of the other."""
    some = [two - one for one, two in zip(base.values(), changed.values(), strict=False)]
    return statistics.mean(some), half_of(some)


def unpaired(base: Values, changed: Values) -> tuple[float, float]:
    """A slip: two spreads that are added, as if the seeds had nothing in common."""
    both = [seed for seed in base if seed in changed]
    spread = sum(statistics.variance([of[seed] for seed in both]) for of in (base, changed)) ** 0.5
    return statistics.mean(gaps(base, changed)), STUDENT[len(both)] * spread / len(both) ** 0.5


def with_half(change: Callable[[list[float]], float]) -> Callable[[Values, Values], tuple[float, float]]:
    """A slip in the interval only."""
    return lambda base, changed: (statistics.mean(gaps(base, changed)), change(gaps(base, changed)))


DIFFERENCE_SLIPS: dict[str, Callable[[Values, Values], tuple[float, float]]] = {
    "you subtract the changed run from the base: what is asked for is changed minus base, positive where the change "
    "helps.":
        lambda base, changed: (-right_difference(base, changed)[0], right_difference(base, changed)[1]),
    "values are paired in the order in which they stand: which of them belong to one seed?": by_order,
    "seeds take part that only one of the two has: a good seed on one side would pass for the change.":
        lambda base, changed: (statistics.mean(changed.values()) - statistics.mean(base.values()),
                               right_difference(base, changed)[1]),
    "the two spreads are added, as if seeds had nothing in common: how far do the *differences* spread?": unpaired,
    "1.96 is for many values. With so few, their own spread is uncertain, too: what does STUDENT say?":
        with_half(lambda some: 1.96 * statistics.stdev(some) / len(some) ** 0.5),
    "the spread is divided by n, and not by n - 1: that is for values whose true mean is known.":
        with_half(lambda some: STUDENT[len(some)] * statistics.pstdev(some) / len(some) ** 0.5),
    "that is how far single seeds spread. A mean of n values spreads less: by which factor?":
        with_half(lambda some: STUDENT[len(some)] * statistics.stdev(some)),
    "the spread is divided by n: the spread of a mean falls with the square root of n.":
        with_half(lambda some: STUDENT[len(some)] * statistics.stdev(some) / len(some)),
    "that is the whole width of the interval; the exercise asks for half of it, what stands behind ±.":
        with_half(lambda some: 2 * half_of(some)),
    "that is the standard error: which multiple of it makes an interval of 95 %?":
        with_half(lambda some: statistics.stdev(some) / len(some) ** 0.5),
    "the variance stands where the standard deviation belongs.":
        with_half(lambda some: STUDENT[len(some)] * statistics.variance(some) / len(some) ** 0.5),
}


def drawn_runs(common: int, sign: int) -> tuple[Values, Values]:
    """Two kinds of run, the second better or worse by `sign`: seeds matter more than the change, each has seeds of its
    own, in another order."""
    seeds = random.sample(range(20), common + 3)
    luck = {seed: random.uniform(40, 80) for seed in seeds}
    change = sign * random.uniform(2, 8)
    base = {seed: luck[seed] + random.uniform(-1, 1) for seed in seeds[:common + 1]}
    changed = {seed: luck[seed] + change + random.uniform(-2, 2) for seed in seeds[:common] + seeds[common + 1:]}
    order = list(changed)
    while list(base)[:common] == order[:common]:
        random.shuffle(order)
    return base, {seed: changed[seed] for seed in order}


@exercise("14.1", "lesson 14, section 1, 'When do two numbers differ?'")
def difference(difference_of: Callable[[Values, Values], tuple[float, float]]) -> None:
    """The mean difference within a seed, and half the width of its 95 % interval."""
    output, right, games = [], [], []
    for common, sign in ((3, 1), (2, -1), (5, -1), (4, 1), (6, -1)):
        while True:  # until every slip shows as itself; with 2 or 4 values some are one, as 2 / sqrt(4) is
            base, changed = drawn_runs(common, sign)
            results = [right_difference(base, changed), *(slip(base, changed) for slip in DIFFERENCE_SLIPS.values())]
            if common in (2, 4) or all(not same_numbers(one, other, 0.01) for one, other in combinations(results, 2)):
                break
        before = dict(base), dict(changed)
        pair = difference_of(base, changed)
        expect((base, changed) == before, "your function changed the runs that it was given.")
        expect(pair is not None, "the result is None: does every way through your function end in a return?")
        expect(hasattr(pair, "__len__") and len(pair) == 2, f"your function gives {pair!r}; the exercise asks for two "
               "numbers: the mean difference, and half the width of its interval.")
        output.append(tuple(a_number(one, what) for one, what in zip(pair, ("the mean difference", "half the width"),
                                                                     strict=True)))
        right.append(right_difference(base, changed))
        games.append((base, changed))
    if all(map(same_numbers, output, right)):
        return
    slip = slip_of(output, right, {why: [slip(*game) for game in games] for why, slip in DIFFERENCE_SLIPS.items()})
    expect(not slip, slip)
    means = all(same_numbers(one[:1], other[:1]) for one, other in zip(output, right, strict=True))
    halves = all(same_numbers(one[1:], other[1:]) for one, other in zip(output, right, strict=True))
    expect(not means, "the mean difference is right, its interval is not: which spread, of how many values, times "
           "what?")
    expect(not halves, "the interval is right, the mean difference is not: what is subtracted from what, over which "
           "seeds?")
    number = next(number for number in range(len(output)) if not same_numbers(output[number], right[number]))
    base, changed = games[number]
    expect(False, f"of the base {rounded(base)} and the changed run {rounded(changed)} you make "
           f"{output[number][0]:.2f} ± {output[number][1]:.2f}. Take a seed that both have: how far does it move?")


def rounded(values: Values) -> Values:
    """Values as one prints them."""
    return {seed: round(value, 1) for seed, value in values.items()}


# --- reading a row ----------------------------------------------------------------------------------------------------

Run = dict[str, dict]
WORDS = ("confounded", "undecided", "better", "worse")
FEW = ("one seed", "one common", "disjoint")  # kinds of rows with fewer than two common seeds


def changes(base: Run, changed: Run) -> list[str]:
    """The settings in which two runs differ, also those that only one of them has."""
    one, other = base["settings"], changed["settings"]
    return [name for name in {**one, **other} if one.get(name, "absent") != other.get(name, "absent")]


def right_reading(base: Run, changed: Run) -> str:
    """What one may say of a row."""
    if len(changes(base, changed)) > 1:
        return "confounded"
    some = gaps(base["values"], changed["values"])
    if len(some) < 2 or abs(statistics.mean(some)) <= half_of(some):
        return "undecided"
    return "better" if statistics.mean(some) > 0 else "worse"


def by_sign(base: Run, changed: Run) -> str:
    """A slip: whatever the mean says."""
    if len(changes(base, changed)) > 1:
        return "confounded"
    return "better" if statistics.mean(gaps(base["values"], changed["values"])) > 0 else "worse"


def one_sign(base: Run, changed: Run) -> str:
    """A slip: all seeds on one side are enough."""
    said, some = right_reading(base, changed), gaps(base["values"], changed["values"])
    if said != "undecided" or not (all(gap > 0 for gap in some) or all(gap < 0 for gap in some)):
        return said
    return "better" if some[0] > 0 else "worse"


def unseen_settings(base: Run, changed: Run) -> str:
    """A slip: settings are not looked at."""
    return right_reading({**base, "settings": {}}, {**changed, "settings": {}})


def known_to_both(base: Run, changed: Run) -> str:
    """A slip: settings that only one of the runs has are not looked at."""
    both = base["settings"].keys() & changed["settings"].keys()
    return right_reading(*({**run, "settings": {name: run["settings"][name] for name in both}}
                           for run in (base, changed)))


def interval_first(base: Run, changed: Run) -> str:
    """A slip: a row without a clear difference is called undecided, though nothing could be concluded anyway."""
    return "undecided" if unseen_settings(base, changed) == "undecided" else right_reading(base, changed)


READING_SLIPS: dict[str, Callable[[Run, Run], str]] = {
    "only the mean decides for you. How far would it move with other seeds?": by_sign,
    "seeds that all move one way convince you: does the interval exclude zero?": one_sign,
    "settings are not looked at: if two things changed, which of them was it?": unseen_settings,
    "a setting that only one of the two runs has is a change as well.": known_to_both,
    "you look at the interval first: where two things changed, the row says nothing about either, whatever it says.":
        interval_first,
    "better and worse are exchanged: what is measured is the percentage that is right.": lambda base, changed: {
        "better": "worse", "worse": "better"}.get(right_reading(base, changed), right_reading(base, changed)),
    "a setting that only one of the two runs has is one change, as any other: by itself it confounds nothing.":
        lambda base, changed: "confounded" if base["settings"].keys() != changed["settings"].keys()
        else right_reading(base, changed),
    "a setting that only the base has is a change as well.": lambda base, changed: right_reading({**base, "settings": {
        name: value for name, value in base["settings"].items() if name in changed["settings"]}}, changed),
    "where nothing was changed nothing is confounded: more than one setting has to differ.": lambda base, changed:
        right_reading(base, changed) if changes(base, changed) else "confounded",
    "any change of settings is called confounded: one change is what an ablation is.": lambda base, changed:
        "confounded" if changes(base, changed) else right_reading(base, changed),
}


def drawn_row(kind: str) -> tuple[Run, Run]:
    """Two runs of a kind: a word of WORDS, or "one sign", "one seed", "two, undecided",
    "new setting" (besides a change), "only a new setting", "two new settings", and "partly common", "one common" and
    "disjoint", where each run has seeds of its own."""
    settings = {"stage 1 steps": 600, "stage 2 steps": 600, "queries": 16, "negatives": "hard"}
    other = dict(settings)
    name = random.choice(list(settings))
    if "only" not in kind and "two new" not in kind:
        other[name] = "random" if name == "negatives" else settings[name] // 2
    if kind in ("confounded", "two, undecided"):
        second = random.choice([one for one in settings if one != name])
        other[second] = "random" if second == "negatives" else settings[second] * 2
    if "new setting" in kind:
        other["patches"] = "mlp"
    if kind == "setting gone":
        settings["patches"] = "mlp"
    if kind == "nothing":
        other = dict(settings)
    if kind == "two new settings":
        other["warm-up"] = 50
    n = {"one seed": 1, "one sign": 3, "one common": 1, "disjoint": 0}.get(kind, random.randint(3, 6))
    own = 2 if kind in ("partly common", "one common", "disjoint") else 0  # seeds that only one of them has, in each
    drawn, sign = random.sample(range(10, 40), n + 2 * own), random.choice((-1, 1))  # no count is a seed
    seeds = drawn[:n]
    luck = [random.uniform(40, 80) for _ in seeds]
    if kind == "one sign":
        moved = [sign * size for size in (random.uniform(0.3, 1), random.uniform(2, 3), random.uniform(8, 12))]
    elif kind in ("undecided", "two, undecided"):
        moved = [sign * random.uniform(1, 4) * (-1) ** number for number in range(n)]
    else:
        sign = {"better": 1, "worse": -1}.get(kind, sign)
        moved = [sign * random.uniform(4, 5) for _ in seeds]
    values = dict(zip(seeds, luck, strict=True))
    others = {seed: value + move for (seed, value), move in zip(values.items(), moved, strict=True)}
    values |= {seed: 60 + random.uniform(-1, 1) for seed in drawn[n:n + own]}  # and the other way, as if it were clear
    others |= {seed: 60 - 25 * sign + random.uniform(-1, 1) for seed in drawn[n + own:]}
    order = random.sample(list(others), n + own)
    return ({"settings": settings, "values": dict(random.sample(list(values.items()), n + own) if own else values)},
            {"settings": other, "values": {seed: others[seed] for seed in order}})


def read_by(reading_of: Callable[[Run, Run], str], base: Run, changed: Run) -> str:
    """What the learner says of a row; raises Wrong where seeds that only one run has are what stops it."""
    one, other = base["values"], changed["values"]
    try:
        return reading_of(base, changed)
    except (LookupError, ArithmeticError, ValueError) as error:
        lonely = isinstance(error, KeyError) and error.args and error.args[0] in one.keys() ^ other.keys()
        expect(not lonely, f"your function looks for seed {error.args[0] if error.args else ''} in both runs, and only "
               "one of them has it: a difference is one between values of a seed that both have.")
        expect(len(gaps(one, other)) > 1, f"{seeds_said(base, changed)} and your function stops with "
               f"{type(error).__name__}: {' '.join(str(error).split())}. What can be said of fewer than two "
               "differences, and which seeds have to be counted to know?")
        raise


def seeds_said(base: Run, changed: Run) -> str:
    """How many seeds two runs have, and how many of them in common."""
    common = len(gaps(base["values"], changed["values"]))
    return (f"the runs have {len(base['values'])} and {len(changed['values'])} seeds, "
            f"{('none', 'one')[common] if common < 2 else common} in common,")


@exercise("14.2", "lesson 14, sections 1 and 3")
def read_row(reading_of: Callable[[Run, Run], str]) -> None:
    """Confounded, undecided, better or worse."""
    kinds = ("better", "worse", "undecided", "confounded", "one sign", "new setting", "two, undecided", "better",
             "worse", "only a new setting", "two new settings", "partly common", "partly common", "setting gone",
             "nothing", *FEW)
    rows = [drawn_row(kind) for kind in kinds]
    output, right = [], [right_reading(*row) for row in rows]
    for base, changed in rows:
        before = repr((base, changed))
        word = read_by(reading_of, base, changed)
        expect(repr((base, changed)) == before, "your function changed the runs that it was given.")
        expect(isinstance(word, str) and word in WORDS, f"your function gives {word!r}; the exercise asks for one of "
               f"{', '.join(WORDS)}.")
        output.append(word)
    if output == right:
        base = {"settings": {"queries": 16, "clip": None}, "values": {0: 50.0, 1: 51.0, 2: 52.0}}
        other = {"settings": {"queries": 32}, "values": {0: 60.0, 1: 61.5, 2: 62.0}}
        expect(reading_of(base, other) == "confounded", "a setting may be None, and the other run lack it: that is a "
               "difference, too. Which marker can no setting have?")
        expect(reading_of(base, {**base, "settings": {"queries": 32, "clip": None}}) == "undecided", "where every seed "
               "gives the same in both runs the interval is zero itself, and includes zero.")
        two = {"settings": {"queries": 32}, "values": {1: 70.2, 0: 60.0}}
        word = reading_of({"settings": {"queries": 16}, "values": {0: 50.0, 1: 60.0}}, two)
        expect(word == "better", "two common seeds have the differences 10.0 and 10.2, whose interval is 10.1 ± 1.3, "
               f"and you say {word!r}. How many differences does an interval need?")
        return
    many = slice(0, -len(FEW))  # of a single seed no slip knows anything
    slip = slip_of(output[many], right[many], {why: [slip(*row) for row in rows[many]]
                                               for why, slip in READING_SLIPS.items()}, lambda one, two: one == two)
    expect(not slip, slip)
    if output[many] == right[many]:
        place = next(place for place in range(-len(FEW), 0) if output[place] != right[place])
        expect(FEW[place] != "one seed", f"with a single seed you say {output[place]!r}: how far is one seed from the "
               "next?")
        expect(False, f"{seeds_said(*rows[place])} and you say {output[place]!r}: it is not the seeds of one run, or "
               "of each, that have to be counted. How many differences are there?")
    number = next(number for number in range(len(kinds)) if output[number] != right[number])
    base, changed = rows[number]
    differ = sorted(changes(base, changed))
    expect(False, f"a row whose differences are {[round(gap, 1) for gap in gaps(base['values'], changed['values'])]} "
           f"and whose settings differ in {', '.join(differ)} is {output[number]!r} to you. May one say that?")


# --- what a table does not say ----------------------------------------------------------------------------------------

TOO_BOLD = {  # claims that go beyond the table -> the question that shows it
    "a": "the interval of 'without ITM' includes zero. Is that the same as no effect? And is what ITM is for measured "
         "here?",
    "c": "nobody has trained a bridge with 64 queries. How far does a table reach beyond its rows?",
    "e": "stage 1 costs steps as well. Which row spends as many steps in all, without it?",
    "f": "in how many things does the MLP's row differ from the base's? Which row has as many steps, and no stage 1 "
         "either?",
    "h": "which seeds would you report if you had looked at them before?",
}
BORNE_OUT = {  # claims that the table bears out -> where to look
    "b": "that claim says no more than its row: take the three differences within a seed and their interval.",
    "d": "the steps of stage 2 are equal in both rows, and stage 1 is all that differs: that is all that is claimed.",
    "g": "both rows have no stage 1, and differ in the steps of stage 2 alone. How large are the differences?",
}


@exercise("14.3", "lesson 14, sections 1 to 3 and 8")
def not_concluded(claims_of: Callable[[], set[str]]) -> None:
    """The letters of the claims that the table does not bear out."""
    output = letters_of(claims_of(), "abcdefgh")
    for letter in "abcdefgh":
        if letter in TOO_BOLD:
            expect(letter in output, f"claim {letter} may be concluded, you say: {TOO_BOLD[letter]}")
        else:
            expect(letter not in output, f"claim {letter} may not be concluded, you say: {BORNE_OUT[letter]}")
