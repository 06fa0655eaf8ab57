"""Claim: SASRec with ids alone on MicroLens-50K, beside popularity, item-kNN and a Markov chain, same evaluation.

    python benchmarks/microlens_50k.py [--workspace ./workspace] [--save] [dotted.key=value ...]

Trains with conf/dataset/microlens_50k.yaml (overrides go to the train job), evaluates once on test. A finished training
is not repeated. The last line of stdout is a JSON object.
"""

from __future__ import annotations

import argparse
import json

from jobs import real_data, run
from record import fenced, save

from lvlmrec.report.comparison import table

METRICS = ("hr@10", "ndcg@10", "hr@20", "ndcg@20")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--workspace", default="./workspace")
    parser.add_argument("--save", action="store_true", help="write a dated result under benchmarks/results")
    arguments = parser.parse_args()
    place = f"workspace={arguments.workspace}"
    dataset = ["conf/dataset/microlens_50k.yaml", f"dataset.path={real_data() / 'microlens_50k'}"]
    trained = run("train", *dataset, place, *arguments.overrides)
    evaluated = run("evaluate", place, f"checkpoint={trained['checkpoint']}")
    runs = {**evaluated["baselines"], "SASRec, ids alone": evaluated}
    rows = [
        [name, *(f"{result[part][metric]:.4f}" for part in ("validation", "test") for metric in METRICS)]
        for name, result in runs.items()
    ]
    head = ["run", *(f"{part} {metric.upper()}" for part in ("validation", "test") for metric in METRICS)]
    cold = evaluated["slices"]["cold"]
    text = (
        f"{table(head, rows)}\n\n{evaluated['users']} users, {trained['catalogue']} items; "
        f"{cold['users']} test targets are cold, HR@10 on them {cold['hr@10']:.4f}\n"
        f"SASRec: best epoch {trained['best_epoch']} of {trained['epochs']}, "
        f"{trained['seconds_per_epoch']:.1f} s each, {trained['parameters']:,} parameters"
    )
    print(text)
    if arguments.save:
        print(save("microlens_50k", __doc__ or "", fenced(text)))
    print(json.dumps({name: result["test"] for name, result in runs.items()}))


if __name__ == "__main__":
    main()
