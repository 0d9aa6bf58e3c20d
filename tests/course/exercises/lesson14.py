"""Answers to the exercises of lesson 14."""

import statistics

import numpy as np
import torch

from checks.lesson14 import STUDENT, TOO_BOLD

from . import Answers


def by_statistics(base, changed):
    gaps = [changed[seed] - base[seed] for seed in sorted(base.keys() & changed.keys())]
    return statistics.mean(gaps), STUDENT[len(gaps)] * statistics.stdev(gaps) / len(gaps) ** 0.5


def by_numpy(base, changed):
    gaps = np.array([changed[seed] - base[seed] for seed in base if seed in changed])
    return gaps.mean(), STUDENT[len(gaps)] * gaps.std(ddof=1) / np.sqrt(len(gaps))


def by_torch(base, changed):
    both = [seed for seed in changed if seed in base]
    gaps = torch.tensor([changed[seed] - base[seed] for seed in both], dtype=torch.float64)
    return [gaps.mean(), STUDENT[len(both)] * gaps.std() / len(both) ** 0.5]


def by_hand(base, changed):
    n, total, squares = 0, 0.0, 0.0
    for seed, value in changed.items():
        if seed in base:
            n, total = n + 1, total + value - base[seed]
    for seed, value in changed.items():
        if seed in base:
            squares += (value - base[seed] - total / n) ** 2
    return total / n, STUDENT[n] * (squares / (n - 1) / n) ** 0.5


def with_gaps(make):
    """A slip that knows which seeds belong together."""
    return lambda base, changed: make(np.array([changed[seed] - base[seed] for seed in base if seed in changed]))


def half(gaps):
    return STUDENT[len(gaps)] * gaps.std(ddof=1) / len(gaps) ** 0.5


def in_order(base, changed):
    gaps = np.array([two - one for one, two in zip(base.values(), changed.values(), strict=False)])
    return gaps.mean(), half(gaps)


def two_spreads(base, changed):
    both = [seed for seed in base if seed in changed]
    one, two = (np.array([of[seed] for seed in both]) for of in (base, changed))
    return (two - one).mean(), STUDENT[len(both)] * ((one.var(ddof=1) + two.var(ddof=1)) / len(both)) ** 0.5


def all_seeds(base, changed):
    return np.mean(list(changed.values())) - np.mean(list(base.values())), by_numpy(base, changed)[1]


def differing(base, changed):
    names, missing = set(base["settings"]) | set(changed["settings"]), object()
    return {name for name in names if base["settings"].get(name, missing) != changed["settings"].get(name, missing)}


def read(base, changed):
    if len(differing(base, changed)) > 1:
        return "confounded"
    if len(base["values"].keys() & changed["values"].keys()) < 2:
        return "undecided"
    mean, width = by_numpy(base["values"], changed["values"])
    return "undecided" if mean - width <= 0 <= mean + width else "better" if mean > 0 else "worse"


def read_by_words(base, changed):
    one, other = dict(base["settings"]), dict(changed["settings"])
    if len(set(one.items()) ^ set(other.items())) > 2 or len(one.keys() ^ other.keys()) and one != {
            **other, **{key: one[key] for key in one.keys() - other.keys()}} and len(differing(base, changed)) > 1:
        return "confounded"
    try:
        low, high = (sign * by_statistics(base["values"], changed["values"])[1]
                     + by_statistics(base["values"], changed["values"])[0] for sign in (-1, 1))
    except (statistics.StatisticsError, KeyError):
        return "undecided"
    return {(True, False): "better", (False, True): "worse"}.get((low > 0, high < 0), "undecided")


def common(base, changed):
    return [seed for seed in base if seed in changed]


def reading(settings=differing, decide=None, one=False, seeds=common, counted=common):
    """A reading with a slip: in which settings count, what is said of the differences, which seeds are paired, or which
    are counted."""
    def word(base, changed):
        if len(settings(base, changed)) > 1:
            return "confounded"
        values = base["values"], changed["values"]
        if len(counted(*values)) < 2 and not one:
            return "undecided"
        gaps = [values[1][seed] - values[0][seed] for seed in seeds(*values)]
        return "undecided" if one and not gaps else (decide or by_interval)(np.array(gaps))
    return word


def by_interval(gaps):
    width = half(gaps) if len(gaps) > 1 else 0
    return "undecided" if abs(gaps.mean()) <= width else "better" if gaps.mean() > 0 else "worse"


def of_shorter(base, changed):
    return min(base, changed, key=len)


def by_given(base, changed):
    """The interval as it is given, after the seeds of one run were counted."""
    if len(differing(base, changed)) > 1:
        return "confounded"
    if len(base["values"]) < 2:
        return "undecided"
    mean, width = by_statistics(base["values"], changed["values"])
    return "undecided" if abs(mean) <= width else "better" if mean > 0 else "worse"


def uncertain(gaps):
    """An interval by NumPy, which makes nan of too few."""
    width = STUDENT.get(len(gaps), 0) * gaps.std(ddof=1) / len(gaps) ** 0.5 if len(gaps) > 1 else np.nan
    mean = gaps.sum() / max(len(gaps), 1)
    return "undecided" if abs(mean) <= width else "better" if mean > 0 else "worse"


def of_three(base, changed):
    """The mistake to ask for three common seeds."""
    few = len(common(base["values"], changed["values"])) < 3 and len(differing(base, changed)) < 2
    return "undecided" if few else read(base, changed)


def with_means(base, changed):
    """The mistake to compare the means of all seeds, with the interval of those that both have."""
    said = read(base, changed)
    if said not in ("better", "worse"):
        return said
    return "better" if np.mean([*changed["values"].values()]) > np.mean([*base["values"].values()]) else "worse"


def by_mean(gaps):
    return "better" if gaps.mean() > 0 else "worse"


def by_signs(gaps):
    return "better" if (gaps > 0).all() else "worse" if (gaps < 0).all() else "undecided"


def shared_settings(base, changed):
    return {name for name in base["settings"] if name in changed["settings"]
            and base["settings"][name] != changed["settings"][name]}


def undecided_first(base, changed):
    return "undecided" if reading(lambda *runs: ())(base, changed) == "undecided" else read(base, changed)


def any_new_setting(base, changed):
    """The mistake to call a row confounded as soon as one of the runs has a setting more."""
    return "confounded" if len(base["settings"]) != len(changed["settings"]) else read(base, changed)


def by_items(base, changed):
    """The mistake to count pairs of name and value, where a new setting counts once and a changed one twice."""
    different = set(base["settings"].items()) ^ set(changed["settings"].items())
    return "confounded" if len(different) > 2 else read({**base, "settings": {}}, {**changed, "settings": {}})


def without_sign(base, changed):
    mean, width = by_hand(base, changed)
    return abs(mean), width


ANSWERS = {
    "difference": Answers(
        [by_statistics, by_numpy, by_torch, by_hand, lambda *runs: tuple(map(np.float32, by_numpy(*runs)))],
        [(without_sign, ""),
         (lambda base, changed: by_numpy(changed, base), "changed minus base"),
         (in_order, "belong to one seed"), (two_spreads, "had nothing in common"), (all_seeds, "only one of the two"),
         (with_gaps(lambda gaps: (gaps.mean(), 1.96 * gaps.std(ddof=1) / len(gaps) ** 0.5)), "1.96"),
         (with_gaps(lambda gaps: (gaps.mean(), STUDENT[len(gaps)] * gaps.std() / len(gaps) ** 0.5)), "n - 1"),
         (with_gaps(lambda gaps: (gaps.mean(), STUDENT[len(gaps)] * gaps.std(ddof=1))), "spreads less"),
         (with_gaps(lambda gaps: (gaps.mean(), STUDENT[len(gaps)] * gaps.std(ddof=1) / len(gaps))), "square root"),
         (with_gaps(lambda gaps: (gaps.mean(), 2 * half(gaps))), "whole width"),
         (with_gaps(lambda gaps: (gaps.mean(), gaps.std(ddof=1) / len(gaps) ** 0.5)), "standard error"),
         (with_gaps(lambda gaps: (gaps.mean(), STUDENT[len(gaps)] * gaps.var(ddof=1) / len(gaps) ** 0.5)), "variance"),
         (with_gaps(lambda gaps: (gaps.mean(), half(gaps) ** 0.5)), "its interval is not"),
         (with_gaps(lambda gaps: (np.median(gaps) + 1, half(gaps))), "the mean difference is not"),
         (with_gaps(lambda gaps: gaps.mean()), "two numbers"), (with_gaps(lambda gaps: (gaps.mean(), "4")), "a str"),
         (lambda base, changed: (0.0, 0.0), "Take a seed")]),
    "read_row": Answers(
        [read, read_by_words, reading()],
        [(any_new_setting, "by itself it confounds nothing"),
         (by_items, ""), (with_means, "May one say that"),
         (reading(seeds=lambda base, changed: base), "only one of them has it"),
         (reading(seeds=lambda base, changed: changed), "only one of them has it"),
         (by_given, "fewer than two differences"), (of_three, "How many differences does an interval need"),
         (reading(counted=lambda base, changed: base, decide=uncertain), "it is not the seeds of one run"),
         (reading(counted=of_shorter, decide=uncertain), "it is not the seeds of one run"),
         (reading(counted=lambda base, changed: changed, decide=uncertain), "it is not the seeds of one run"),
         (reading(counted=lambda base, changed: {**base, **changed}, decide=uncertain), "it is not the seeds of one"),
         (reading(decide=lambda gaps: by_mean(gaps)), "only the mean decides"),
         (reading(decide=by_signs), "all move one way"), (reading(settings=lambda *runs: ()), "which of them was it"),
         (reading(settings=shared_settings), "is a change as well"), (undecided_first, "interval first"),
         (reading(decide=lambda gaps: {"better": "worse", "worse": "better"}.get(by_interval(gaps), "undecided")),
          "exchanged"), (reading(settings=lambda *runs: [*differing(*runs), 1]), "one change is what"),
         (reading(one=True), "with a single seed"), (lambda base, changed: "undecided", "May one say that"),
         (lambda base, changed: True, "one of")]),
    "not_concluded": Answers(
        [lambda: set(TOO_BOLD), lambda: "a, c, e, f, h", lambda: ["A", "C", "E", "F", "H"], lambda: ("acefh",)],
        [(lambda: set("cefh"), "claim a may be concluded, you say"), (lambda: set("aefh"), "claim c"),
         (lambda: set("acfh"), "spends as many steps"), (lambda: set("aceh"), "in how many things"),
         (lambda: set("acef"), "which seeds"), (lambda: set("abcefh"), "claim b may not be"),
         (lambda: set("acdefh"), "claim d may not be"), (lambda: "acefgh", "claim g may not be"),
         (lambda: set(), "claim a"), (lambda: set("abcdefgh"), "claim b"), (lambda: "xyz", "none of the letters"),
         (lambda: 5, "a int"), (lambda: None, "a return")]),
}
