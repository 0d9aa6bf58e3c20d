"""The table of equal numbers, measured now: python -m tests.parity_table [--write]

Runs every test that compares ours with the originals and lists the largest difference that each has seen. With --write
the table also goes into docs/RESULTS.md, between its markers. Needs the test material; without it the rows say so.
"""

from __future__ import annotations

import re
import sys

import pytest

from minblip2.course.lesson import ROOT
from minblip2.course.markers import asked_to_write, put
from minblip2.data.progress import forgiving_output
from minblip2.evaluation.tables import markdown

SAME = "identical"
ROWS = [  # what is compared, the tests that do, what they allow
    ("DINOv2, hidden states", r"test_vit.*equals_transformers\[.*dinov2", "1e-5"),
    ("CLIP, hidden states before the last block", r"test_vit.*equals_transformers\[.*clip", "1e-5"),
    ("EVA (BLIP-2's ViT), hidden states", r"test_vit.*equals_transformers\[.*eva", "1e-5"),
    ("Q-Former under the bi-directional mask", r"test_qformer.*hidden_states.*bidirectional", "1e-5"),
    ("Q-Former under the uni-modal mask", r"test_qformer.*hidden_states.*unimodal", "1e-5"),
    ("Q-Former under the multimodal causal mask", r"test_qformer.*hidden_states.*multimodal", "1e-5"),
    ("OPT, norm before each branch, logits with and without cache", r"test_opt.*equals_transformers\[.*heads", "1e-5"),
    ("OPT-350m's kind, norm after each branch", r"test_opt.*equals_transformers\[.*350m", "1e-5"),
    ("Llama, logits with and without cache", r"test_llama.*equals_transformers", "1e-5"),
    ("T5, encoder and decoder states and logits", r"test_t5.*equals_transformers", "1e-5"),
    ("stage 2: logits, loss and gradient of the queries", r"test_stage2.*logits_and_loss|transformers_own", "1e-4"),
    ("BLIP-2 with OPT from a hub folder, logits", r"test_blip2.py.*logits_equal.*opt", "1e-4"),
    ("BLIP-2 with T5 from a hub folder, logits", r"test_blip2.py.*logits_equal.*t5", "1e-4"),
    ("BLIP-2 with Llama from a hub folder, logits", r"test_blip2.py.*logits_equal.*llama", "1e-4"),
    ("ITC, ITM and their sum, from a hub folder", r"test_blip2.py.*itc_and_itm", "1e-5"),
    ("stage-1 losses against plain loops", r"test_stage1.*plain_loops", "1e-6"),
    ("stage 1 from a LAVIS file against the same from the hub's", r"test_blip2.py.*lavis_file_gives", SAME),
    ("ids written by OPT, Llama and T5: greedy and beams", r"test_generation.*(search|greedy)_equals", SAME),
    ("ids written by a whole BLIP-2", r"test_blip2.py.*what_is_written", SAME),
    ("captions and answers, from picture to text", r"test_blip2_folder.*captions_and_answers", SAME),
    ("save, load in transformers, save there, load here, save", r"test_blip2.py.*bit_identical", SAME),
    ("preprocessed photographs", r"test_blip2_folder.*pixels", "1e-6"),
    ("real DINOv2-small, features", r"test_pretrained.*dinov2_small", "1e-5"),
    ("real MiniLM, text states in the Q-Former", r"test_pretrained.*minilm", "1e-5"),
    ("real SmolLM2-135M, logits and 30 greedy tokens", r"test_pretrained.*smollm2", "1e-4"),
    ("peak memory of loading 1.5 GB, as a multiple of it", r"test_memory", "1.3"),
]
FILES = ("vit", "qformer", "opt", "llama", "t5", "stage2", "blip2", "stage1", "generation", "blip2_folder",
         "pretrained", "memory")


class Outcomes:
    """A pytest plugin that remembers how each test ended."""

    def __init__(self):
        self.passed: list[str] = []
        self.others: list[str] = []

    def pytest_runtest_logreport(self, report):
        """Called by pytest for each phase of each test."""
        if report.when == "call" and report.passed:
            self.passed.append(report.nodeid)
        elif not report.passed:
            self.others.append(report.nodeid)


def table(passed: list[str], others: list[str], measured: dict[str, list[float]]) -> str:
    """The rows in Markdown: how many cases passed, the largest difference among them, what is allowed."""
    lines = [("ours against the originals", "cases", "largest difference", "allowed")]
    for label, tests, allowed in ROWS:
        cases = [name for name in passed if re.search(tests, name)]
        missed = [name for name in others if re.search(tests, name)]
        values = [value for name in cases for value in measured.get(name, ())]
        seen = SAME if allowed == SAME else f"{max(values):.2g}" if values else ""
        if missed or not cases:
            seen = f"{len(missed)} not passed" if missed else "not measured"
        lines.append((label, str(len(cases)), seen, allowed))
    return markdown(*lines)


def main() -> int:
    """Measure, print, and with --write put the table into docs/RESULTS.md; pytest's exit code."""
    writes, outcomes = asked_to_write(__doc__), Outcomes()
    files = [str(ROOT / "tests" / f"test_{name}.py") for name in FILES]
    code = pytest.main(["-q", "-p", "no:cacheprovider", *files], plugins=[outcomes])
    from tests.parity import MEASURED  # now: pytest rewrites the module when it first imports it

    made = table(outcomes.passed, outcomes.others, MEASURED)
    print(made)
    if writes:
        put(made, "parity")
    return int(code)


if __name__ == "__main__":
    forgiving_output()
    sys.exit(main())
