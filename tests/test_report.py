"""Tables of results, as they are printed."""

from lvlmrec.report.comparison import comparison, table, verdict


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


def test_a_verdict_names_difference_p_value_and_users() -> None:
    test = {"metric": "ndcg@10", "difference": -0.01234, "p_value": 0.0421, "users": 9}
    line = verdict("cold", test | {"better": 1, "worse": 3, "equal": 5})
    assert line == "cold (9 users): NDCG@10 -0.0123, p = 0.042, better for 1, worse for 3, equal for 5"
