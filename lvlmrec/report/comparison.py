"""One table of several evaluations: overall, warm and cold, each run against a reference run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

SLICES = ("overall", "warm", "cold")
METRICS = ("hr@10", "ndcg@10")


def comparison(rows: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    """A plain-text table: a row per run, HR@10 and NDCG@10 of each slice. `rows[run][slice]` holds the metrics."""
    users = {name: int(next(iter(rows.values()))[name]["users"]) for name in SLICES}
    head = ["test", *(f"{metric.upper()} {name} ({users[name]})" for name in SLICES for metric in METRICS)]
    body = [
        [run, *(_number(slices[name].get(metric)) for name in SLICES for metric in METRICS)]
        for run, slices in rows.items()
    ]
    return table(head, body)


def table(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """Columns as wide as their widest cell; the first column to the left, the others to the right."""
    widths = [max(len(row[i]) for row in [head, *body]) for i in range(len(head))]
    lines = []
    for row in [head, ["-" * width for width in widths], *body]:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def verdict(name: str, test: Mapping[str, Any]) -> str:
    """One line of a paired test: the difference, its p values, and for how many users each run is better."""
    p_values = f"p = {test['p_value']:.2g}"
    if test.get("p_holm", test["p_value"]) != test["p_value"]:
        p_values += f" (Holm {test['p_holm']:.2g})"
    return (
        f"{name} ({test['users']} users): {test['metric'].upper()} {test['difference']:+.4f}, "
        f"{p_values}, better for {test['better']}, worse for {test['worse']}, equal for {test['equal']}"
    )


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
