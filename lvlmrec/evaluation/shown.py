"""Which metrics the tables of a study show, and what the columns of its tests are called."""

from __future__ import annotations

from typing import NamedTuple

from lvlmrec.evaluation.significance import LEFT_OUT


class Shown(NamedTuple):
    """The metrics that the tables have; `tested`: against the reference; `sliced`: by parts of the users."""

    validation: tuple[str, ...]
    test: tuple[str, ...]
    tested: tuple[str, ...]
    sliced: str


ONE_TARGET = Shown(("hr@10", "ndcg@10"), ("hr@10", "ndcg@10", "hr@20", "ndcg@20"), ("hr@10", "ndcg@10"), "hr@10")
SEVERAL_TARGETS = Shown(
    ("recall@20", "ndcg@20"),
    ("recall@10", "ndcg@10", "map@10", "recall@20", "ndcg@20", "map@20"),
    ("recall@20", "ndcg@20"),
    "recall@20",
)
DIFFERENCE, SEEDS_COMPARED = "difference", "seeds compared"
P_SEEDS, P_HOLM, P_USERS = "p over seeds", "Holm p over seeds", f"p_users ({LEFT_OUT})"


def shown_for(several_targets: bool) -> Shown:
    """The metrics for a dataset whose users have one test item each, or several."""
    return SEVERAL_TARGETS if several_targets else ONE_TARGET
