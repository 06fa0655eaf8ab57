"""Tables of results, as they are printed."""

from lvlmrec.report.comparison import comparison, table, verdict
from lvlmrec.report.evaluation import evaluation


def test_a_table_is_as_wide_as_its_widest_cells() -> None:
    assert table(["run", "HR"], [["a", "0.1"], ["longer", "0.25"]]).splitlines() == [
        "run       HR",
        "------  ----",
        "a        0.1",
        "longer  0.25",
    ]


def test_the_comparison_has_a_row_for_each_run_and_a_dash_for_an_empty_slice() -> None:
    full = {"users": 10, "hr@10": 0.5, "ndcg@10": 0.25}
    rows = {
        "ids": {"overall": full, "warm": full, "cold": {"users": 0}},
        "dff": {"overall": full | {"hr@10": 0.75}, "warm": full, "cold": {"users": 0}},
    }
    head, _, ids, dff = comparison(rows).splitlines()
    for name in ("HR@10 overall (10)", "NDCG@10 warm (10)", "HR@10 cold (0)"):
        assert name in head
    assert ids.split() == ["ids", "0.5000", "0.2500", "0.5000", "0.2500", "-", "-"]
    assert dff.split() == ["dff", "0.7500", "0.2500", "0.5000", "0.2500", "-", "-"]


def test_a_verdict_says_that_one_run_of_each_leaves_the_seeds_out() -> None:
    test = {"metric": "ndcg@10", "difference": -0.01234, "p_seeds": None, "p_users": 0.0421, "users": 9}
    line = verdict("cold", test | {"better": 1, "worse": 3, "equal": 5})
    assert line == (
        "cold (9 users): NDCG@10 -0.0123, no p over seeds (one run of each), p_users = 0.042 (seeds left out), "
        "better for 1, worse for 3, equal for 5"
    )


def test_a_verdict_tells_holms_p_value_when_it_is_another() -> None:
    test = {"metric": "hr@10", "difference": 0.1, "p_users": 0.01, "users": 9, "better": 1, "worse": 0, "equal": 8}
    assert "p_users = 0.01 (Holm 0.03) (seeds left out), better" in verdict("all", test | {"p_users_holm": 0.03})
    assert "p_users = 0.01 (seeds left out), better" in verdict("all", test | {"p_users_holm": 0.01})


def test_the_tables_of_an_evaluation_have_a_dash_for_what_is_not_there() -> None:
    measured = {
        "test": {"hr@5": 0.5, "ndcg@5": 0.25, "mrr@5": 0.125},
        "slices": {"overall": {"users": 8, "ndcg@5": 0.25}, "cold": {"users": 0}},
        "beyond_accuracy": {
            "target_popularity": 3.25,
            "coverage@5": 0.5,
            "gini@5": 0.75,
            "novelty@5": 8.126,
            "popularity@5": 1234.56,
        },
        "validation": {},
    }
    run = {"checkpoint": "/w/checkpoints/mine", "parameters": 12345, "trials": 16, "baselines": {"markov": measured}}
    assert evaluation({**measured, **run}).splitlines() == [
        "test    parameters  trials  validation HR@10    HR@5  NDCG@5   MRR@5",
        "------  ----------  ------  ----------------  ------  ------  ------",
        "markov           -       -                 -  0.5000  0.2500  0.1250",
        "mine        12,345      16                 -  0.5000  0.2500  0.1250",
        "",
        "NDCG@5 of  users  markov    mine",
        "---------  -----  ------  ------",
        "overall        8  0.2500  0.2500",
        "cold           0       -       -",
        "",
        "lists   coverage@5  gini@5  novelty@5  popularity@5",
        "------  ----------  ------  ---------  ------------",
        "markov      0.5000  0.7500       8.13        1234.6",
        "mine        0.5000  0.7500       8.13        1234.6",
        "mean popularity of what the users chose: 3.2",
    ]
