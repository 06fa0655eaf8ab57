"""The tables of one evaluation: a run beside the baselines, by slice, and beyond accuracy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lvlmrec.report.comparison import table, verdict

BEYOND = ("coverage", "gini", "novelty", "popularity")


def evaluation(result: Mapping[str, Any]) -> str:
    """Plain text of what the evaluate job gives; `-` where a number does not apply."""
    name = result["checkpoint"].rsplit("/", 1)[-1]
    runs = {**result["baselines"], name: result}
    ks = sorted({int(metric.partition("@")[2]) for metric in result["test"]})
    parts = [_overall(runs, name), _by_slice(runs, ks[0]), _beyond(runs, ks)]
    for other, tests in result.get("against", {}).items():
        lines = [verdict(part, test) for part, test in tests.items()]
        parts.append("\n  ".join([f"against {'/'.join(other.split('/')[-2:])}, the same users:", *lines]))
    return "\n\n".join(parts)


def _overall(runs: Mapping[str, Any], name: str) -> str:
    metrics = list(runs[name]["test"])
    selected_by = "recall@20" if "recall@20" in runs[name]["validation"] else "hr@10"
    body = []
    for run, result in runs.items():
        learned = [f"{result['parameters']:,}", str(result["trials"])] if run == name else ["-", "-"]
        validated = result["validation"].get(selected_by)
        numbers = [validated, *(result["test"][metric] for metric in metrics)]
        body.append([run, *learned, *("-" if number is None else f"{number:.4f}" for number in numbers)])
    head = [
        "test",
        "parameters",
        "trials",
        f"validation {selected_by.upper()}",
        *(metric.upper() for metric in metrics),
    ]
    return table(head, body)


def _by_slice(runs: Mapping[str, Any], k: int) -> str:
    slices = next(iter(runs.values()))["slices"]
    head = [f"NDCG@{k} of", "users", *runs]
    rows = []
    for part, first in slices.items():
        values = [run["slices"][part].get(f"ndcg@{k}") for run in runs.values()]
        rows.append([part, f"{first['users']:,}", *("-" if value is None else f"{value:.4f}" for value in values)])
    return table(head, rows)


def _beyond(runs: Mapping[str, Any], ks: Sequence[int]) -> str:
    metrics = [f"{measure}@{k}" for k in ks for measure in BEYOND]
    rows = [
        [run, *(f"{result['beyond_accuracy'][metric]:.{_digits(metric)}f}" for metric in metrics)]
        for run, result in runs.items()
    ]
    chosen = next(iter(runs.values()))["beyond_accuracy"]["target_popularity"]
    return f"{table(['lists', *metrics], rows)}\nmean popularity of what the users chose: {chosen:.1f}"


def _digits(metric: str) -> int:
    return {"coverage": 4, "gini": 4, "novelty": 2}.get(metric.partition("@")[0], 1)
