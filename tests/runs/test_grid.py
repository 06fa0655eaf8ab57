"""A study as facts: every method's settings, what may not differ, the order of work, and the choice on validation."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lvlmrec import config
from lvlmrec.config import CONF
from lvlmrec.errors import ConfigError
from lvlmrec.models.sequential.backbones import BACKBONES
from lvlmrec.runs import experiment, grid
from lvlmrec.runs.experiment import TrainConfig
from lvlmrec.runs.grid import Outcomes, Step, StudyConfig, Trial
from tests.toy import settings, train_config

METHODS = {"ID": {}, "DFF": {"model.item_encoder.name": "dff"}}


def study_config(world: Path, workspace: Path, methods: dict[str, Any] | None = None, **values: Any) -> StudyConfig:
    study = {"methods": METHODS if methods is None else methods, "search": {"training.lr": [0.01, 0.02]}}
    dotted = settings(world, workspace, **values)
    return config.load(StudyConfig, [{"study": study}], [f"{key}={json.dumps(value)}" for key, value in dotted.items()])


def test_every_method_is_given_every_combination(world: Path, tmp_path: Path) -> None:
    plan = grid.make_plan(study_config(world, tmp_path, study__search={"training.lr": [1, 2], "feature_pca": [0, 3]}))
    assert plan.settings == [{"training.lr": lr, "feature_pca": pca} for lr in (1, 2) for pca in (0, 3)]
    found = [(c.model.item_encoder.name, c.training.lr, c.feature_pca) for cs in plan.configs.values() for c in cs]
    assert found == [(name, lr, pca) for name in ("id", "dff") for lr in (1.0, 2.0) for pca in (0, 3)]


@pytest.mark.parametrize("name", ["SASRec+ID", "what? (en)", "100 % frozen", "名前", "a=b"])
def test_a_method_has_the_name_that_its_authors_gave_it(world: Path, tmp_path: Path, name: str) -> None:
    plan = grid.make_plan(study_config(world, tmp_path, {"ID": {}, name: {"model.item_encoder.name": "dff"}}))
    assert plan.methods == ["ID", name]


def test_a_run_has_the_key_that_the_train_job_gives_it(world: Path, tmp_path: Path) -> None:
    plan = grid.make_plan(study_config(world, tmp_path))
    ours = plan.config(Trial("DFF", 1, 7))
    alone = train_config(world, tmp_path, model__item_encoder__name="dff", training__lr=0.02, seed=7)
    assert type(ours) is TrainConfig and ours == alone
    assert experiment.prepare(ours).checkpoint == experiment.prepare(alone).checkpoint


def test_a_part_of_another_name_starts_from_its_own_defaults(world: Path, tmp_path: Path) -> None:
    """The toy world's base sets the dropout of sasrec, and the backbones have different keys."""
    methods = {
        "ID": {"model.backbone.dropout": 0.3},
        "GRU": {"model": {"backbone": {"dropout": 0.4, "name": "gru4rec"}}},
        "Next": {"model.backbone.name": "nextitnet"},
    }
    given = study_config(world, tmp_path, methods)
    sasrec, gru, nextitnet = (settings[0].model.backbone for settings in grid.make_plan(given).configs.values())
    assert sasrec == replace(given.model.backbone, dropout=0.3)
    assert gru == replace(BACKBONES["gru4rec"](), dropout=0.4)
    assert nextitnet == BACKBONES["nextitnet"]()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"methods": {}}, "study.reference: 'ID' is not one of "),
        ({"methods": {"ID": {}, "A": {"model.embeding_dim": 3}}}, "study.methods.A: model.embeding_dim=3: unknown key"),
        ({"methods": {"ID": {}, "A": {"seed": 3}}}, "study.methods.A.seed: seed is the same for every method"),
        ({"methods": {"ID": {}, "A": {"dataset": {"path": "x"}}}}, "study.methods.A.dataset.path: dataset is the same"),
        ({"methods": {"ID": {}, "A": {"training.epochs": 9}}}, "study.methods.A.training.epochs: training.epochs is"),
        ({"methods": {"ID": {}, "A": {"training.lr": 1}}}, "study.methods.A.training.lr: it is searched"),
        ({"methods": {"ID": {}, "A": {"seed.deep": 1}}}, "study.methods.A.seed.deep"),
        ({"methods": {"ID": {}, "A": {"feature_pca.deep": 1}}}, "study.methods.A.feature_pca.deep: feature_pca is not"),
        ({"methods": {"ID": {}, "A": 3}}, "study.methods.A: 3 is not a group of keys"),
        ({"methods": {"ID": {}, "A": None}}, "study.methods.A: None is not a group of keys"),
        ({"methods": {"ID": {}, "A, b": {}}}, "study.methods.A, b: a name is made of"),
        ({"methods": {"ID": {}, "A": {}}}, "study.methods.A: the same as ID"),
        ({"study__search": {"training.lr": 1}}, "study.search.training.lr: 1 is not a list"),
        ({"study__search": {"training.lr": []}}, r"study.search.training.lr: \[\] is not a list"),
        ({"study__search": {"training.lr": [1, 1]}}, "a value is given twice"),
        ({"study__search": {"seed": [1]}}, "study.search.seed: seed is the same"),
        ({"study__search": {"training.validation_users": [0, 9]}}, "training.validation_users is the same for every"),
        ({"study__seeds": []}, r"study.seeds: \[\]"),
        ({"study__seeds": [1, 1]}, r"study.seeds: \[1, 1\]"),
        ({"study__reference": "A"}, "study.reference: 'A' is not one of ID, DFF"),
        ({"study__name": "a/b"}, "study.name: 'a/b'"),
        ({"training__num_workers": 2}, "training.num_workers: 2"),
    ],
    ids=str,
)
def test_what_cannot_be_compared_is_refused(world: Path, tmp_path: Path, values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        grid.make_plan(study_config(world, tmp_path, **values))


def done(value: float) -> dict[str, Any]:
    return {"validation": {"hr@10": value}}


def test_breadth_first_and_only_what_was_chosen_is_tested(world: Path, tmp_path: Path) -> None:
    """ID is best with its first setting, DFF with its second; its trial with the first fails."""
    plan = grid.make_plan(study_config(world, tmp_path, study__seeds=[3, 4]))
    outcomes, order = Outcomes({}, {}, {}), []
    values = {Trial("ID", 0, 3): 0.5, Trial("ID", 1, 3): 0.5, Trial("DFF", 1, 3): 0.1}
    while steps := grid.next_steps(plan, outcomes):
        order.append(step := steps[0])
        if step == Step("train", Trial("DFF", 0, 3)):
            outcomes.failed[step] = "the loss is gone"
        elif step.action == "train":
            outcomes.trained[step.trial] = done(values.get(step.trial, 0.9))
        else:
            outcomes.evaluated[step.trial] = {}
    assert [(s.action, *s.trial) for s in order] == [
        ("train", "ID", 0, 3),
        ("train", "DFF", 0, 3),
        ("train", "ID", 1, 3),
        ("evaluate", "ID", 0, 3),
        ("train", "DFF", 1, 3),
        ("evaluate", "DFF", 1, 3),
        ("train", "ID", 0, 4),
        ("evaluate", "ID", 0, 4),
        ("train", "DFF", 1, 4),
        ("evaluate", "DFF", 1, 4),
    ]
    assert grid.choose(plan, outcomes) == {"ID": 0, "DFF": 1}


@pytest.mark.parametrize(("split", "setting"), [("leave_one_out", 0), ("random", 1)])
def test_a_setting_is_chosen_by_the_metric_of_the_split(world: Path, tmp_path: Path, split: str, setting: int) -> None:
    plan = grid.make_plan(study_config(world, tmp_path, dataset__split=split))
    validation = [{"hr@10": 0.5, "recall@20": 0.1}, {"hr@10": 0.4, "recall@20": 0.2}]
    trained = {trial: {"validation": validation[trial.setting]} for trial in plan.trials()}
    assert grid.choose(plan, Outcomes(trained, {}, {})) == {"ID": setting, "DFF": setting}


def test_a_method_whose_trials_all_fail_is_left(world: Path, tmp_path: Path) -> None:
    plan = grid.make_plan(study_config(world, tmp_path))
    outcomes = Outcomes({}, {}, {Step("train", trial): "no" for trial in plan.trials() if trial.method == "DFF"})
    assert {step.trial.method for step in grid.next_steps(plan, outcomes)} == {"ID"}
    assert grid.choose(plan, outcomes) == {}


def test_where_it_runs_does_not_name_a_study(world: Path, tmp_path: Path) -> None:
    here = grid.folder(study_config(world, tmp_path))
    assert here == grid.folder(study_config(world, tmp_path, study__max_concurrent=16, study__gpus_per_run=0.5))
    assert here != grid.folder(study_config(world, tmp_path, study__seeds=[0]))


@pytest.mark.thorough
def test_the_grid_of_microlens_50k_has_the_runs_that_it_says() -> None:
    layer = CONF / "study" / "microlens_50k_titles.yaml"
    plan = grid.make_plan(config.load(StudyConfig, [layer]))
    methods, settings, seeds = len(plan.methods), len(plan.settings), len(plan.seeds)
    assert f"{methods} methods x {settings} settings, then {seeds - 1} more seeds" in layer.read_text()
    assert f"{methods * (settings + seeds - 1)} runs, {methods * seeds} tests" in layer.read_text()
    assert config.load(StudyConfig, [layer, CONF / "cluster" / "study_gpu.yaml"]).study.methods.keys() == set(
        plan.methods
    )
