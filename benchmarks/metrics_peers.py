"""Claim: HR, Recall, NDCG and MRR are those of ranx on random rankings with ties, of one target and of several.

    pip install ranx    # in an environment that has lvlmrec; not one of its dependencies
    python benchmarks/metrics_peers.py [--users 2000] [--save]

ranx (https://github.com/AmenRa/ranx) knows neither histories nor a rule for ties. It is given the candidates alone, and
a target's score is lowered by half the distance between two levels, so that it stands behind the items it ties with.
The last line of stdout is a JSON object.
"""

from __future__ import annotations

import argparse
import json
from importlib.metadata import version

import numpy as np
from record import fenced, save

from lvlmrec.evaluation.metrics import metrics
from lvlmrec.evaluation.ranking import rank_from_scores
from lvlmrec.report.comparison import table

KS = (1, 5, 10, 20)
PEER_NAMES = {"hr": "hit_rate", "recall": "recall", "ndcg": "ndcg", "mrr": "mrr"}
NUM_ITEMS = 300


def rankings(users: int, fineness: int, num_targets: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Whole scores [U, I + 1], histories [U, 10] and 1 to `num_targets` targets [U, T] outside them.

    Scores are exponential times `fineness`, rounded down: at 0 all are equal, at 1 few are high and nearly all tied.
    """
    rng = np.random.default_rng((users, fineness, num_targets))
    scores = np.floor(fineness * rng.exponential(size=(users, NUM_ITEMS + 1))).astype(np.float32)
    shuffled = rng.permuted(np.tile(np.arange(1, NUM_ITEMS + 1), (users, 1)), axis=1)
    histories, targets = shuffled[:, :10].copy(), shuffled[:, 10 : 10 + num_targets].copy()
    targets[:, 1:][rng.random(targets[:, 1:].shape) < 0.5] = 0
    better = np.floor(4 * fineness * rng.exponential(size=targets.shape))  # so that no metric is near 0
    scores[np.arange(users)[:, None], targets] += better
    return scores, histories, targets


def of_ranx(scores: np.ndarray, histories: np.ndarray, targets: np.ndarray) -> dict[str, float]:
    """The same metrics by ranx."""
    from ranx import Qrels, Run, evaluate

    relevant, given = {}, {}
    for user, (row, history, wanted) in enumerate(zip(scores, histories, targets, strict=True)):
        items = set(range(1, NUM_ITEMS + 1)) - set(history.tolist())
        own = {item for item in wanted.tolist() if item}
        relevant[str(user)] = {str(item): 1 for item in own}
        given[str(user)] = {str(item): float(row[item]) - 0.5 * (item in own) for item in items}
    names = {f"{ours}@{k}": f"{theirs}@{k}" for k in KS for ours, theirs in PEER_NAMES.items()}
    found = evaluate(Qrels(relevant), Run(given), list(names.values()))
    return {ours: float(found[theirs]) for ours, theirs in names.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--users", type=int, default=2000)
    parser.add_argument("--save", action="store_true", help="write a dated result under benchmarks/results")
    arguments = parser.parse_args()
    rows, differences = [], {}
    for num_targets in (1, 8):
        for fineness in (0, 1, 10, 100_000):
            scores, histories, targets = rankings(arguments.users, fineness, num_targets)
            distinct = np.mean([len(np.unique(row)) for row in scores])
            theirs = of_ranx(scores, histories, targets)
            users, columns = np.nonzero(targets)
            ranks = rank_from_scores(scores[users], targets[users, columns], histories[users])
            sets = metrics(ranks, KS, users)
            compared = {"sets": {name: value for name, value in sets.items() if name.partition("@")[0] in PEER_NAMES}}
            if num_targets == 1:
                compared["single targets"] = metrics(ranks, KS)
            for way, values in compared.items():
                largest = max(abs(values[name] - theirs[name]) for name in values)
                name = f"up to {num_targets} targets, fineness {fineness:,}, {way}"
                differences[name] = largest
                shown = [f"{result['ndcg@10']:.6f}" for result in (values, theirs)]
                rows.append([name, f"{distinct:.0f}", str(len(values)), *shown, f"{largest:.1e}"])
    head = [
        "rankings",
        "distinct scores of 301",
        "metrics",
        "NDCG@10 here",
        "NDCG@10 ranx",
        "largest difference of all",
    ]
    text = f"{table(head, rows)}\n\nranx {version('ranx')}; {arguments.users} users, {NUM_ITEMS} items, K {KS}"
    print(text)
    if arguments.save:
        print(save("metrics_peers", __doc__ or "", fenced(text)))
    print(json.dumps({"largest_difference": differences}))


if __name__ == "__main__":
    main()
