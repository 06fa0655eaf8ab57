"""Claim: on the sample, DFF ranks cold items that ids alone cannot, and features of shuffled items do not help.

    python benchmarks/cold_items.py [--seeds 3] [--workspace ./workspace] [--save]

For each seed: SASRec with ids alone, with DFF, and with DFF whose features are dealt to the wrong items (the control),
all with the sample's configuration; the seeds' runs of the three kinds alternate. The features come from the tiny
untrained LVLM of the sample: what is shown is that the road from pixels to cold items works, nothing about models.
The last line of stdout is a JSON object.
"""

from __future__ import annotations

import argparse
import json

import numpy as np
import torch
from record import fenced, save

from lvlmrec import config as configs
from lvlmrec.evaluation.metrics import per_user
from lvlmrec.evaluation.significance import LEFT_OUT, paired_t_test, permutation_test
from lvlmrec.evaluation.slices import by_coldness, slice_metrics
from lvlmrec.jobs import sample
from lvlmrec.report.comparison import table
from lvlmrec.runs import experiment, loop
from lvlmrec.runs.experiment import TrainConfig

KINDS = {
    "ids alone": ["model.item_encoder.name=id"],
    "DFF": ["model.item_encoder.name=dff"],
    "DFF, shuffled features": ["model.item_encoder.name=dff", "feature_control=shuffled"],
}
SLICES = ("overall", "warm", "cold")


def ranks_of(config: TrainConfig) -> tuple[np.ndarray, np.ndarray, dict[str, float]]:
    """Test ranks, coldness of each user's target, and validation metrics of one run, in this process."""
    prepared = experiment.prepare(config)
    cpu = torch.device("cpu")
    state = loop.new_state(config, prepared.data, prepared.features, cpu)
    loop.fit(config, prepared.data, prepared.features, state, lambda metrics, state: None, cpu)
    state.model.load_state_dict(state.best_weights)
    state.model.eval()
    split, _ = experiment.load_split(config.dataset)
    holdout = split.test()
    catalogue = loop.encode_catalogue(state.model, len(prepared.data.item_ids), prepared.features, cpu)
    return loop.rank_holdout(state.model, catalogue, holdout), split.is_cold(holdout.targets), state.progress.best


def run_seed(workspace: str, seed: int) -> tuple[dict[str, dict[str, dict[str, float]]], list[list[str]], list[str]]:
    """All kinds with one seed: their metrics by slice, the rows of the table, the paired tests on cold items."""
    ranks: dict[str, np.ndarray] = {}
    slices: dict[str, dict[str, dict[str, float]]] = {}
    rows = []
    cold = np.zeros(0, dtype=bool)
    for kind, overrides in KINDS.items():
        common = [f"workspace={workspace}", f"seed={seed}"]
        config = configs.load(TrainConfig, [configs.CONF / "train.yaml"], [*common, *overrides])
        sample.ensure(config.workspace, config.dataset.path)
        sample.ensure_features(config)
        ranks[kind], cold, validation = ranks_of(config)
        slices[kind] = slice_metrics(ranks[kind], by_coldness(cold))
        numbers = [f"{slices[kind][name][m]:.4f}" for name in SLICES for m in ("hr@10", "ndcg@10")]
        rows.append([kind, str(seed), f"{validation['hr@10']:.4f}", *numbers])
        print(" ".join(rows[-1]), flush=True)
    tests = []
    for kind in list(KINDS)[1:]:
        hits, twins = (per_user(ranks[name][cold], "hr@10") for name in (kind, "ids alone"))
        test = permutation_test(hits, twins, seed=seed)
        said = f"{test['difference']:+.4f}, p_users = {test['p_users']:.2g} ({LEFT_OUT})"
        tests.append(f"seed {seed}, {kind} against ids alone, cold, HR@10: {said}")
    return slices, rows, tests


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--workspace", default="./workspace")
    parser.add_argument("--save", action="store_true", help="write a dated result under benchmarks/results")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    runs = [run_seed(arguments.workspace, seed) for seed in range(arguments.seeds)]
    head = ["run", "seed", "validation HR@10", *(f"{m} {name}" for name in SLICES for m in ("HR@10", "NDCG@10"))]
    means = {
        kind: {
            name: round(float(np.mean([slices[kind][name]["hr@10"] for slices, _, _ in runs])), 4) for name in SLICES
        }
        for kind in KINDS
    }
    rows = [row for _, rows, _ in runs for row in rows]
    tests = [test for _, _, tests in runs for test in tests]
    if arguments.seeds > 1:
        cold = {kind: [slices[kind]["cold"]["hr@10"] for slices, _, _ in runs] for kind in KINDS}
        for kind in list(KINDS)[1:]:
            p_value = paired_t_test(cold[kind], cold["ids alone"])["p_value"]
            said = "-" if p_value is None else f"{p_value:.2g}"
            tests.append(f"{kind} against ids alone, cold, HR@10: p over seeds = {said}")
    text = "\n".join([table(head, rows), "", *tests, "", f"mean HR@10: {means}"])
    print(f"\n{text}")
    if arguments.save:
        print(save("cold_items", __doc__ or "", fenced(text)))
    print(json.dumps({"hr@10": means}))


if __name__ == "__main__":
    main()
