"""Claim: test is below validation because its targets are rarer in training, not because what was learned has aged.

    python benchmarks/target_popularity.py CHECKPOINT [CHECKPOINT ...] [--save]

HR@10 of each checkpoint by how often a user's target occurs in training, on validation and on test; and what test
would give if its targets were as popular as those of validation: its HR@10 of each part, weighted with validation's
users. The last line of stdout is a JSON object.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import numpy as np
import torch
from record import markdown_table, save

from lvlmrec.data.split import Holdout
from lvlmrec.evaluation.metrics import per_user
from lvlmrec.runs import experiment, loop
from lvlmrec.runs.checkpoint import load_checkpoint

METRIC = "hr@10"
FIRST = (0, 1, 4, 11, 31)  # the smallest training count of each part
NAMES = ("never", "1 to 3", "4 to 10", "11 to 30", "over 30")
PARTS = ("validation", "test")
CPU = torch.device("cpu")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", nargs="+")
    parser.add_argument("--save", action="store_true", help="write a dated result under benchmarks/results")
    arguments = parser.parse_args()
    results = {uri.rstrip("/").rsplit("/", 1)[-1]: measure(uri) for uri in arguments.checkpoints}
    head = ["checkpoint", "part", *NAMES, "all", "test with validation's targets"]
    users = {part: next(iter(results.values()))[part]["users"] for part in PARTS}
    rows = [["users", part, *(f"{n:,}" for n in numbers), f"{sum(numbers):,}", ""] for part, numbers in users.items()]
    for name, result in results.items():
        for part in PARTS:
            again = f"{result['reweighted']:.4f}" if part == "test" else ""
            rows.append([name, part, *(f"{hit:.4f}" for hit in (*result[part]["hits"], result[part]["all"])), again])
    text = markdown_table(head, rows)
    print(text)
    if arguments.save:
        print(save("target_popularity", __doc__ or "", text))
    print(json.dumps(results))


def measure(uri: str) -> dict[str, Any]:
    """`validation` and `test`, each with the users and the HR@10 of every part, and test `reweighted`."""
    checkpoint = load_checkpoint(uri, {})
    split, _ = experiment.load_split(checkpoint.config.dataset)
    model = checkpoint.model.eval()
    catalogue = loop.encode_catalogue(model, len(checkpoint.item_ids), checkpoint.features, CPU)
    counts = split.train_counts()

    def of(holdout: Holdout) -> dict[str, Any]:
        hits = per_user(loop.rank_holdout(model, catalogue, holdout), METRIC)
        part = np.searchsorted(FIRST, counts[holdout.targets], side="right") - 1
        inside = [hits[part == number] for number in range(len(FIRST))]
        return {
            "users": [len(values) for values in inside],
            "hits": [float(values.mean()) if len(values) else float("nan") for values in inside],
            "all": float(hits.mean()),
        }

    validation, test = of(split.validation()), of(split.test())
    reweighted = float(np.average(test["hits"], weights=validation["users"]))
    return {"validation": validation, "test": test, "reweighted": reweighted}


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
