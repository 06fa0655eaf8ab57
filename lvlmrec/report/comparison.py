"""One table of several evaluations: overall, warm and cold, each run against a reference run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lvlmrec.evaluation.significance import LEFT_OUT

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
    """One line of a test over users of two single runs: the difference, its p values, for how many each is better."""
    p_users = f"p_users = {test['p_users']:.2g}"
    if test.get("p_users_holm", test["p_users"]) != test["p_users"]:
        p_users += f" (Holm {test['p_users_holm']:.2g})"
    return (
        f"{name} ({test['users']} users): {test['metric'].upper()} {test['difference']:+.4f}, "
        f"no p over seeds (one run of each), {p_users} ({LEFT_OUT}), "
        f"better for {test['better']}, worse for {test['worse']}, equal for {test['equal']}"
    )


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
