"""How much should matching count when candidates are ranked again? python -m benchmarks.ranking runs/laptop

Recall at 1 and 10, both ways, for each weight of `Retriever.rerank` and for LAVIS's sum, on a split that is neither
trained on nor reported; two captions of each picture are searched. Writes benchmarks/results/ranking.json.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from benchmarks.provenance import RESULTS, commit
from minblip2.data.coco import CocoCaptions
from minblip2.data.entry import run_command
from minblip2.data.files import write_json
from minblip2.evaluation import metrics
from minblip2.evaluation.retrieval import TOP
from minblip2.training.bridge import load_bridge
from minblip2.training.records import recorded_data

WEIGHTS = (None, 0.0, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0)  # None: as LAVIS ranks
EACH = 2  # captions of a picture


def main() -> int:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--split", default="tune")
    args = parser.parse_args()
    bridge, data = load_bridge(args.run), CocoCaptions(recorded_data(args.run), args.split)
    features = torch.from_numpy(np.array(bridge.features(data, args.run / "cache")))
    texts = [(row, text) for row, record in enumerate(data.images) for text in record.captions[:EACH]]
    captions, image_of_text = [text for _, text in texts], torch.tensor([row for row, _ in texts])
    retriever, rows = bridge.retriever, {weight: {"weight": weight} for weight in WEIGHTS}
    cosine = retriever.similarity(features, captions)
    for side, dim in (("i2t", 1), ("t2i", 0)):
        pairs = retriever.candidates(cosine, TOP, dim)
        logits = retriever.pair_logits(features, captions, *pairs)
        for weight, row in rows.items():
            scores = replace(retriever, match_weight=weight).reranked(cosine, pairs, logits)
            row |= {key: value for key, value in metrics.retrieval(scores, image_of_text).items()
                    if key in (f"{side}_r1", f"{side}_r10")}
    for row in rows.values():
        print(row)
    write_json(RESULTS / "ranking.json", dict(split=args.split, pictures=len(data), captions=len(captions),
                                              rows=list(rows.values()), commit=commit()))
    return 0


if __name__ == "__main__":
    raise SystemExit(run_command("benchmarks.ranking", main))
