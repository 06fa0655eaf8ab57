"""The tables of a study as text: what was chosen, what it measured over the seeds, and its tests against the reference.

They are made of rows alone, one of each baseline and method (`runs.methods.rows`).
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lvlmrec.evaluation.shown import (
    DIFFERENCE,
    ONE_TARGET,
    P_HOLM,
    P_SEEDS,
    P_USERS,
    SEEDS_COMPARED,
    SEVERAL_TARGETS,
)
from lvlmrec.report.comparison import table

NONE = "-"
BY_SLICE = "by target and length of history, with how many users"
WHY_NONE = "p over seeds: - with fewer than two seeds, or where all of them differ alike"


def to_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """All columns of `rows`, empty where a row has none."""
    head = list(dict.fromkeys(key for row in rows for key in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, head, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def blocks(rows: Sequence[Mapping[str, Any]], reference: str) -> list[tuple[str, list[str], list[list[str]]]]:
    """Title, head and body of the five tables that people read."""
    methods = [row for row in rows if "trials" in row]
    head = ["method", "chosen on validation", "trials", "seeds", "parameters", "s / epoch", "status"]
    keys = ["setting", "trials", "seeds", "parameters", "seconds_per_epoch", "status"]
    formats: list[Callable[[Any], str]] = [str, str, str, lambda n: f"{n:,}", lambda s: f"{s:.2f}", str]
    settings = [[r["method"], *(_cell(r[k], f) for k, f in zip(keys, formats, strict=True))] for r in methods]
    shown = SEVERAL_TARGETS if any(f"test {SEVERAL_TARGETS.sliced}" in row for row in rows) else ONE_TARGET
    measured = [f"validation {metric}" for metric in shown.validation] + [f"test {metric}" for metric in shown.test]
    results = [[row["method"], *(_spread(row, name) for name in measured)] for row in rows]
    compared = [
        [
            row["method"],
            str(row[SEEDS_COMPARED]),
            *(_cell(row.get(f"{kind} {metric}"), form) for metric in shown.tested for kind, form in KINDS.items()),
        ]
        for row in methods
        if SEEDS_COMPARED in row
    ]
    kinds = [f"{metric.upper()} {kind}" for metric in shown.tested for kind in KINDS]
    sliced = shown.sliced.upper()
    return [
        ("Settings", head, settings),
        ("Mean ± standard deviation over seeds", ["method", *map(_headed, measured)], results),
        (f"Test, against {reference} ({WHY_NONE})", ["method", "seeds", *kinds], compared),
        (f"Validation {sliced} {BY_SLICE}", *_sliced(rows, f"validation {shown.sliced}")),
        (f"Test {sliced} {BY_SLICE}", *_sliced(rows, shown.sliced)),
    ]


def _sliced(rows: Sequence[Mapping[str, Any]], metric: str) -> tuple[list[str], list[list[str]]]:
    """Head and body; the body is empty while nothing is measured."""
    begin = f"{metric} of "
    parts = list(dict.fromkeys(key for row in rows for key in row if key.startswith(begin)))
    measured = [row for row in rows if any(part in row for part in parts)]
    body = [
        [row["method"], *(_cell(row.get(part), lambda value: f"{value:.4f}") for part in parts)] for row in measured
    ]
    return ["method", *(part.removeprefix(begin) for part in parts)], body


KINDS: dict[str, Callable[[Any], str]] = {
    DIFFERENCE: lambda value: f"{value:+.4f}",
    P_SEEDS: lambda value: f"{value:.2g}",
    P_HOLM: lambda value: f"{value:.2g}",
    P_USERS: lambda value: f"{value:.2g}",
}


def to_text(rows: Sequence[Mapping[str, Any]], reference: str) -> str:
    return "\n\n".join(f"{title}\n\n{table(head, body)}" for title, head, body in blocks(rows, reference)) + "\n"


def to_markdown(rows: Sequence[Mapping[str, Any]], reference: str) -> str:
    parts = []
    for title, head, body in blocks(rows, reference):
        lines = [head, ["---", *["---:"] * (len(head) - 1)], *body]
        parts.append(f"### {title}\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines))
    return "\n\n".join(parts) + "\n"


def _headed(name: str) -> str:
    part, metric = name.split()
    return f"{part} {metric.upper()}"


def _cell(value: Any, shown: Callable[[Any], str]) -> str:
    return NONE if value is None else shown(value)


def _spread(row: Mapping[str, Any], name: str) -> str:
    mean, deviation = row[name], row[f"{name} sd"]
    return _cell(mean, lambda m: f"{m:.4f}") + ("" if deviation is None else f" ± {deviation:.4f}")
