"""Tables and layer curve of a study, from numbers that were worked out by hand."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from matplotlib.image import imread
from scipy.stats import ttest_rel

from lvlmrec import storage
from lvlmrec.errors import InputError
from lvlmrec.evaluation.shown import ONE_TARGET, P_HOLM, P_SEEDS, SEVERAL_TARGETS
from lvlmrec.report import layer_curve
from lvlmrec.report import study as report
from lvlmrec.runs import grid, methods
from lvlmrec.runs.grid import Outcomes, Plan, Step, Trial
from tests.runs.test_grid import study_config

METHODS = {
    "ID": {},
    **{
        f"fusion llm.{k}": {
            "model.item_encoder.name": "fusion",
            "feature_columns": [f"describe/llm.{k}/visual_mean"],
        }
        for k in (4, 0, 2)
    },
    "mean": {"model.item_encoder.name": "mean"},
    "DFF": {"model.item_encoder.name": "dff"},
    "DFF shuffled": {"model.item_encoder.name": "dff", "feature_control": "shuffled"},
}


def write_ranks(uri: str, ranks: list[int]) -> str:
    users = [f"u{n}" for n in range(len(ranks))]
    table = {"user_id": users, "item_id": users, "item_rank": ranks, "cold": [False] * len(ranks)}
    storage.write_table(uri, pa.table(table))
    return uri


def trained(columns: list[str], value: float = 0.5) -> dict[str, Any]:
    validation = {"hr@10": value, "ndcg@10": value / 2}
    slices = {"overall": {"users": 40, "hr@10": value}, "occurs_1_to_3": {"users": 9, "hr@10": value / 4}}
    known = {"parameters": 1234, "seconds_per_epoch": 2.0, "feature_columns": columns}
    return {"validation": validation, "validation_slices": slices, **known}


def evaluated(ranks: str, hr: float) -> dict[str, Any]:
    slices = {"overall": {"users": 40, "hr@10": hr}, "warm": {"users": 40, "hr@10": hr}, "cold": {"users": 0}}
    return {"ranks": ranks, "test": dict.fromkeys(ONE_TARGET.test, hr), "slices": slices, "baselines": {}}


@pytest.fixture
def plan(world: Path, tmp_path: Path) -> Plan:
    return grid.make_plan(study_config(world, tmp_path, METHODS, study__search={"training.lr": [0.01]}))


def whole(plan: Plan, folder: Path) -> Outcomes:
    """Every method hits one user in two more than the one before it, and half a user more with the second seed."""
    outcomes = Outcomes({}, {}, {})
    for place, name in enumerate(plan.methods):
        columns = list(plan.configs[name][0].feature_columns)
        for seed in plan.seeds:
            ranks = [1 if user < 4 + 2 * place + seed else 50 for user in range(40)]
            uri = write_ranks(str(folder / f"{place}-{seed}.parquet"), ranks)
            outcomes.trained[Trial(name, 0, seed)] = trained(columns)
            outcomes.evaluated[Trial(name, 0, seed)] = evaluated(uri, float(np.mean(np.asarray(ranks) == 1)))
    return outcomes


def test_rows_are_means_and_deviations_over_seeds(plan: Plan, tmp_path: Path) -> None:
    rows = methods.rows(methods.collect(plan, whole(plan, tmp_path)), {}, "ID")
    by_name = {row["method"]: row for row in rows}
    assert by_name["ID"]["test hr@10"] == pytest.approx(4.5 / 40)
    assert by_name["ID"]["test hr@10 sd"] == pytest.approx(1 / 40 / np.sqrt(2))
    assert by_name["DFF"]["difference hr@10"] == pytest.approx(10 / 40)
    p_users = by_name["DFF"]["p_users (seeds left out) hr@10"]
    assert p_users == pytest.approx(2**-9, rel=0.5), "10 users, all better: 2 of 2^10"
    assert by_name["DFF"]["p over seeds hr@10"] is None, "the difference is the same for both seeds"
    assert by_name["DFF"]["Holm p over seeds hr@10"] is None
    assert "difference hr@10" not in by_name["ID"]
    assert {row["status"] for row in rows} == {"complete"}
    text = report.to_text(rows, "ID")
    assert "0.1125 ± 0.0177" in text and "+0.2500" in text and "1,234" in text
    assert report.to_markdown(rows, "ID").count("| DFF |") == 5
    *_, (title, head, body) = report.blocks(rows, "ID")
    assert title.startswith("Test HR@10 by target") and head == ["method", "warm (40)"], "nobody's target is cold"
    assert body[0] == ["ID", "0.1125"], "4 and 5 of 40 users"
    assert report.to_csv(rows).splitlines()[0].startswith("method,status,setting")


def test_the_json_result_has_the_numbers_of_the_tables(plan: Plan, tmp_path: Path) -> None:
    outcomes = whole(plan, tmp_path)
    outcomes.evaluated[Trial("DFF", 0, 1)]["test"] = dict.fromkeys(ONE_TARGET.test, 0.9)
    del outcomes.evaluated[Trial("mean", 0, 1)]
    found = methods.collect(plan, outcomes)
    rows = {row["method"]: row for row in methods.rows(found, {}, "ID")}
    made = json.loads(json.dumps(methods.summary(found, "ID")))
    assert list(made) == plan.methods and "against" not in made["ID"]
    for name, row in rows.items():
        for part in ("validation", "test"):
            for metric, value in made[name][part].items():
                assert (value, made[name][f"{part}_sd"][metric]) == (
                    row[f"{part} {metric}"],
                    row[f"{part} {metric} sd"],
                )
        assert set(made[name]["test"]) == set(ONE_TARGET.test)
    against = made["DFF"]["against"]
    assert (against["reference"], against["seeds"]) == ("ID", 2)
    assert against["hr@10"]["p_seeds"] == rows["DFF"]["p over seeds hr@10"] is not None
    assert against["hr@10"]["p_seeds_holm"] == rows["DFF"]["Holm p over seeds hr@10"]
    assert against["ndcg@10"]["p_users"] == rows["DFF"]["p_users (seeds left out) ndcg@10"]
    assert made["mean"]["test_sd"]["hr@10"] is None and made["mean"]["against"]["hr@10"]["p_seeds"] is None
    outcomes = Outcomes({}, {}, {})
    assert methods.summary(methods.collect(plan, outcomes), "ID")["DFF"]["test"] == {}


def test_the_primary_p_value_is_over_the_seeds_that_both_have(plan: Plan, tmp_path: Path) -> None:
    outcomes = whole(plan, tmp_path)
    outcomes.evaluated[Trial("DFF", 0, 1)]["test"] = dict.fromkeys(ONE_TARGET.test, 0.9)
    del outcomes.evaluated[Trial("mean", 0, 1)]
    found = methods.tests(methods.collect(plan, outcomes), "ID")
    p_value = ttest_rel([14 / 40, 0.9], [4 / 40, 5 / 40]).pvalue
    assert found["DFF"]["p over seeds hr@10"] == pytest.approx(p_value)
    assert (found["mean"]["seeds compared"], found["mean"]["p over seeds hr@10"]) == (1, None)
    assert found["mean"]["difference hr@10"] == pytest.approx(8 / 40)


def test_holms_correction_is_over_the_methods_that_have_a_p_value_over_seeds(plan: Plan, tmp_path: Path) -> None:
    """Three of six: the others differ alike with both seeds."""
    outcomes = whole(plan, tmp_path)
    for name, value in (("DFF", 0.9), ("mean", 0.31), ("DFF shuffled", 0.5)):
        outcomes.evaluated[Trial(name, 0, 1)]["test"] = dict.fromkeys(ONE_TARGET.test, value)
    found = methods.tests(methods.collect(plan, outcomes), "ID")
    p_values = {name: row["p over seeds hr@10"] for name, row in found.items() if row["p over seeds hr@10"] is not None}
    assert set(p_values) == {"DFF", "mean", "DFF shuffled"}
    smallest = min(p_values, key=p_values.__getitem__)
    assert found[smallest]["Holm p over seeds hr@10"] == pytest.approx(min(1, 3 * p_values[smallest]))
    for name, row in found.items():
        assert (row["Holm p over seeds hr@10"] is None) == (name not in p_values)
    _, _, (title, head, body), *_ = report.blocks(methods.rows(methods.collect(plan, outcomes), {}, "ID"), "ID")
    shown = {row[0]: dict(zip(head, row, strict=True)) for row in body}
    assert shown["fusion llm.0"]["HR@10 p over seeds"] == shown["fusion llm.0"]["HR@10 Holm p over seeds"] == "-"
    assert "p over seeds: - with fewer than two seeds, or where all of them differ alike" in title
    assert shown["DFF"]["HR@10 p over seeds"] == f"{p_values['DFF']:.2g}"
    assert "HR@10 p_users (seeds left out)" in head


def test_validation_is_shown_by_slice_where_the_runs_have_it(plan: Plan, tmp_path: Path) -> None:
    outcomes = whole(plan, tmp_path)
    rows = methods.rows(methods.collect(plan, outcomes), {}, "ID")
    title, head, body = report.blocks(rows, "ID")[3]
    assert title.startswith("Validation HR@10 by target") and head == ["method", "occurs_1_to_3 (9)"]
    values = {row["method"]: row["validation hr@10"] / 4 for row in rows}
    assert {row[0]: row[1] for row in body} == {name: f"{value:.4f}" for name, value in values.items()}
    earlier = next(trial for trial in outcomes.trained if trial.method == "DFF")
    del outcomes.trained[earlier]["validation_slices"]
    rows = methods.rows(methods.collect(plan, outcomes), {}, "ID")
    assert "DFF" not in {row[0] for row in report.blocks(rows, "ID")[3][2]}


def test_one_seed_has_no_p_value_over_seeds_whatever_the_users_say(plan: Plan, tmp_path: Path) -> None:
    outcomes = whole(plan, tmp_path)
    for trial in [trial for trial in outcomes.evaluated if trial.seed == plan.seeds[1]]:
        del outcomes.evaluated[trial]
    found = methods.tests(methods.collect(plan, outcomes), "ID")
    assert found["DFF"]["p_users (seeds left out) hr@10"] < 0.05
    assert {
        row[f"{kind} {metric}"] for row in found.values() for kind in (P_SEEDS, P_HOLM) for metric in ONE_TARGET.tested
    } == {None}


def write_sets(uri: str, ranks: list[int]) -> str:
    """As `write_ranks`, of 10 users with four targets each."""
    users, items = [f"u{n // 4}" for n in range(40)], [f"i{n}" for n in range(40)]
    table = {"user_id": users, "item_id": items, "item_rank": ranks, "cold": [False] * 40}
    storage.write_table(uri, pa.table(table))
    return uri


def test_of_several_targets_the_tables_show_recall_ndcg_and_map_of_users(world: Path, tmp_path: Path) -> None:
    config = study_config(world, tmp_path, METHODS, study__search={"training.lr": [0.01]}, dataset__split="random")
    plan, outcomes = grid.make_plan(config), Outcomes({}, {}, {})
    for place, name in enumerate(plan.methods):
        for seed in plan.seeds:
            better = 4 + 4 * place + seed  # whole users, and with the second seed one target more
            ranks = [1 + target % 4 if target < better else 50 for target in range(40)]
            uri = write_sets(str(tmp_path / f"{place}-{seed}.parquet"), ranks)
            measured = dict.fromkeys(SEVERAL_TARGETS.test, better / 40)
            slices = {"warm": {"users": 10, "targets": 40, "recall@20": better / 40}}
            validation = dict.fromkeys(("hr@10", *SEVERAL_TARGETS.validation), 0.5)
            outcomes.trained[Trial(name, 0, seed)] = trained([]) | {"validation": validation, "validation_slices": {}}
            outcomes.evaluated[Trial(name, 0, seed)] = {"ranks": uri, "test": measured, "slices": slices}
    found = methods.collect(plan, outcomes)
    rows = methods.rows(found, {}, "ID")
    assert {key for key in rows[0] if key.startswith("test ") and not key.endswith(" sd")} == {
        f"test {name}@{k}" for k in (10, 20) for name in ("recall", "ndcg", "map")
    }
    dff = next(row for row in rows if row["method"] == "DFF")
    assert dff["difference recall@20"] == pytest.approx(5 / 10), "20 targets more: five users of ten"
    assert dff["p_users (seeds left out) recall@20"] == pytest.approx(2**-5, rel=0.3), "2 of the 2^6 signs of six users"
    text = report.to_text(rows, "ID")
    assert "test MAP@20" in text and "Test RECALL@20 by target" in text and "HR@10" not in text
    drawn = layer_curve.figure(found, found[0].shown.tested)
    assert drawn is None or all("RECALL" in a.get_ylabel() or "NDCG" in a.get_ylabel() for a in drawn.axes)


def test_users_are_compared_by_name_not_by_place(tmp_path: Path) -> None:
    first = write_ranks(str(tmp_path / "a.parquet"), [1, 1, 50])
    shuffled = storage.read_table(first).take([2, 0, 1])
    storage.write_table(str(tmp_path / "b.parquet"), shuffled)
    assert methods.compare((first,), (str(tmp_path / "b.parquet"),), "hr@10")["p_users"] == 1
    fewer = write_ranks(str(tmp_path / "c.parquet"), [1, 1])
    with pytest.raises(InputError, match="its users and targets are not those of"):
        methods.compare((first,), (fewer,), "hr@10")


def test_a_study_that_has_just_begun_says_what_is_pending(plan: Plan, tmp_path: Path) -> None:
    outcomes = Outcomes({}, {}, {Step("train", Trial("DFF", 0, 0)): "no"})
    found = methods.collect(plan, outcomes)
    status = {method.name: method.status for method in found}
    assert status["ID"] == "4 pending" and status["DFF"] == "1 failed"  # two runs, two evaluations
    assert "4 pending" in report.to_text(methods.rows(found, {}, "ID"), "ID")
    assert layer_curve.figure(found, found[0].shown.tested) is None
    outcomes.trained[Trial("ID", 0, 0)] = trained([])
    assert methods.collect(plan, outcomes)[0].status == "3 pending"


def test_the_curve_goes_from_the_first_layer_to_the_deepest(plan: Plan, tmp_path: Path) -> None:
    found = methods.collect(plan, whole(plan, tmp_path))
    ((_, curve),) = layer_curve.curves(found, "hr@10").items()
    assert [method.name for _, method in curve] == ["fusion llm.0", "fusion llm.2", "fusion llm.4"]
    drawn = layer_curve.figure(found, found[0].shown.tested)
    assert drawn is not None
    for axis in drawn.axes:
        (bars,) = axis.containers
        assert bars.lines[0].get_xdata().tolist() == [0, 2, 4]
        assert bars.lines[0].get_ydata() == pytest.approx([8.5 / 40, 10.5 / 40, 6.5 / 40])
        horizontal = {line.get_label() for line in axis.lines if len(set(line.get_ydata())) == 1}
        assert horizontal >= {"ID", "mean", "DFF", "fusion llm.4 (last layer)"} and "DFF shuffled" not in horizontal
    (legend,) = drawn.legends
    assert legend.get_texts()[0].get_text() == "one layer (fusion, sasrec)"
    assert len(legend.get_texts()) == 5
    picture = imread(io.BytesIO(layer_curve.rendered(drawn, "png")))
    assert picture.shape[0] > 300 and picture.shape[1] > 800 and picture.std() > 0.05
    assert b"<svg" in layer_curve.rendered(drawn, "svg")
