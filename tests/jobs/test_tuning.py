"""The search: every trial a child run that says how it ended, the best chosen on validation, nothing done twice."""

import json
import shlex
from pathlib import Path
from typing import Any

import mlflow
import pytest

from lvlmrec import config, tracking
from lvlmrec.errors import InputError, JobFailed
from lvlmrec.jobs import tuning
from lvlmrec.jobs.tuning import TuneConfig
from lvlmrec.jobs.tuning import _trial as product_trial
from lvlmrec.runs import checkpoint, experiment
from lvlmrec.runs.experiment import Experiment, TrainConfig
from lvlmrec.tracking import Run
from tests.feature_sets import captions_recipe, write_set
from tests.toy import ITEM_IDS, Fitting, arguments, settings

TAPS = ["llm.0", "llm.2", "llm.4"]


def tune_config(world: Path, workspace: Path, **values: Any) -> TuneConfig:
    small = {
        "training__epochs": 4,
        "training__patience": 4,
        "search__trials": 3,
        "search__max_concurrent": 1,
        "search__embedding_dims": "[8]",
        "search__lr_min": 0.001,
        "search__lr_max": 0.01,
        "search__grace_epochs": 1,
    }
    return config.load(TuneConfig, [], arguments(settings(world, workspace, **(small | values))))


def prepare(config: TuneConfig) -> Experiment:
    return experiment.prepare(config, every_layer=True)


@pytest.mark.parametrize(
    ("encoder", "taps", "message"),
    [
        ("dff", "[llm.0+llm.3]", r"'llm.0\+llm.3': not among the features' taps llm.0, llm.2, llm.4 or all"),
        ("dff", "[everything]", "'everything': not among"),
        ("fusion", "[llm.0+llm.2]", "'fusion' reads one tap; choices: llm.0, llm.2, llm.4"),
        ("fusion", "[all]", "'fusion' reads one tap"),
    ],
)
def test_unknown_taps_are_refused(world: Path, tmp_path: Path, encoder: str, taps: str, message: str) -> None:
    wrong = tune_config(world, tmp_path, model__item_encoder__name=encoder, search__taps=taps)
    with pytest.raises(InputError, match=f"search.taps: .*{message}"):
        tuning.space(wrong.search, prepare(wrong))


@pytest.mark.parametrize(
    ("encoder", "expected"), [("id", None), ("fusion", TAPS), ("dff", ["all", *TAPS])], ids=["id", "fusion", "dff"]
)
def test_the_taps_searched_are_those_that_the_encoder_can_read(
    world: Path, tmp_path: Path, encoder: str, expected: list[str] | None
) -> None:
    settings = tune_config(world, tmp_path, model__item_encoder__name=encoder)
    space = tuning.space(settings.search, prepare(settings))
    assert (space["taps"].categories if "taps" in space else None) == expected


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"feature_columns": "[describe/llm.2/visual_mean,caption/text.1/all_mean]"}, ["all"]),
        ({"search__taps": "[llm.0+text.2,llm.4+text.2]"}, ["llm.0+text.2", "llm.4+text.2"]),
        ({"search__taps": "[llm.0]"}, None),
        ({}, None),
    ],
    ids=["columns", "taps", "one set forgotten", "too many"],
)
def test_an_encoder_of_one_layer_searches_one_of_each_feature_set(
    world: Path, tmp_path: Path, values: dict[str, Any], expected: list[str] | None
) -> None:
    captions = write_set(tmp_path / "captions", [ITEM_IDS], captions_recipe())
    both = {"features": f"[{world / 'features'},{captions}]", "model__item_encoder__name": "fusion"}
    settings = tune_config(world, tmp_path, **both, **values)
    if expected is None:
        with pytest.raises(InputError, match=r"search.taps: .*'fusion' reads one tap of each feature set"):
            tuning.space(settings.search, prepare(settings))
    else:
        assert tuning.space(settings.search, prepare(settings))["taps"].categories == expected


def test_a_tap_set_selects_its_columns() -> None:
    names = [f"{prompt}/{tap}/visual_mean" for prompt in ("one", "two") for tap in TAPS]
    assert tuning.columns_of("all", names) == names
    assert tuning.columns_of("llm.4+llm.0", names) == [names[0], names[2], names[3], names[5]]


def test_the_search_itself_does_not_name_its_trials(world: Path, tmp_path: Path) -> None:
    """So a search with a larger budget finds the trials of a smaller one."""
    keys = {prepare(tune_config(world, tmp_path, search__trials=trials)).key for trials in (3, 30)}
    assert len(keys) == 1


@pytest.mark.parametrize(
    ("encoder", "sampled"),
    [
        ("id", {}),
        ("dff", {"taps": "all"}),
        ("dff", {"taps": "llm.0+llm.4"}),
        ("fusion", {"taps": "llm.2"}),
    ],
)
def test_the_train_job_finds_among_how_many_its_configuration_was_chosen(
    world: Path, tmp_path: Path, encoder: str, sampled: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """With what the search was given and what it says in the end; the checkpoint is not there yet."""
    values = {"model__item_encoder__name": encoder, "training__epochs": 4, "training__patience": 4}
    chosen = {"training.lr": 1e-05 / 3, "model.embedding_dim": 8, **sampled}
    searched = prepare(tune_config(world, tmp_path, model__item_encoder__name=encoder))
    given = tuning._note_trials(searched, chosen, 7)
    assert given is not None and shlex.join(given) in capsys.readouterr().err
    own = [*arguments(settings(world, tmp_path, **values)), *given]
    trained = experiment.prepare(config.load(TrainConfig, [], own))
    assert trained.config.training.lr == 1e-05 / 3
    assert checkpoint.read_trials(trained.checkpoint) == 7 and checkpoint.read_result(trained.checkpoint) is None
    if "taps" in sampled:
        assert trained.features is not None
        assert trained.features.names == tuple(tuning.columns_of(sampled["taps"], searched.features.names))
    other = experiment.prepare(config.load(TrainConfig, [], [*own, "training.lr=0.5"]))
    assert checkpoint.read_trials(other.checkpoint) == 1


def test_a_tap_set_that_leaves_out_a_feature_set_is_told_not_to_be_trained(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    captions = write_set(tmp_path / "captions", [ITEM_IDS], captions_recipe())
    both = {"features": f"[{world / 'features'},{captions}]", "model__item_encoder__name": "dff"}
    searched = prepare(tune_config(world, tmp_path, **both))
    sampled = {"training.lr": 0.01, "model.embedding_dim": 8}
    assert tuning._note_trials(searched, sampled | {"taps": "llm.0+text.2"}, 7) is not None
    assert tuning._note_trials(searched, sampled | {"taps": "llm.0"}, 7) is None
    assert "the train job takes no such configuration: feature_columns" in capsys.readouterr().err


@pytest.fixture
def parent(tracking_uri: str, tmp_path: Path) -> Run:
    return tracking.start(tracking_uri, str(tmp_path), "tune", {})


def children(parent: Run) -> list[mlflow.entities.Run]:
    client = mlflow.MlflowClient(parent.tracking_uri)
    found = client.get_experiment_by_name(tracking.EXPERIMENT)
    assert found is not None
    return list(client.search_runs([found.experiment_id], f"tags.`mlflow.parentRunId` = '{parent.id}'"))


def steps(parent: Run, child: mlflow.entities.Run) -> list[int]:
    history = mlflow.MlflowClient(parent.tracking_uri).get_metric_history(child.info.run_id, "train_loss")
    return [point.step for point in history]


def failing_trial(sampled: dict[str, Any], experiment: Experiment, folder: str) -> None:
    """Trials with one tap fail in their second epoch, others run as they are."""
    if sampled["taps"] == "all":
        product_trial(sampled, experiment, folder)
        return
    original = tuning.fit

    def broken_fit(config: Any, data: Any, features: Any, state: Any, report: Any, device: Any) -> None:
        def broken_report(metrics: dict[str, float], state: Any) -> None:
            if metrics["epoch"] == 2:
                raise RuntimeError("the loss is gone")
            report(metrics, state)

        original(config, data, features, state, broken_report, device)

    tuning.fit = broken_fit
    try:
        product_trial(sampled, experiment, folder)
    finally:
        tuning.fit = original


def never_trained(*arguments: Any) -> None:
    raise AssertionError("this trial was trained again")


def replaying_trial(sampled: dict[str, Any], experiment: Experiment, folder: str) -> None:
    tuning.fit = never_trained
    product_trial(sampled, experiment, folder)


@pytest.mark.slow
def test_each_trial_is_a_child_run_and_the_best_is_chosen_on_validation(
    local_ray: str, world: Path, tmp_path: Path, parent: Run, tracking_uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Seed 0 draws learning rates of about 0.03, 1e-4 and 2e-6: the last two hardly move and are behind at once.
    settings = tune_config(
        world, tmp_path, search__reduction=2, search__lr_min=1e-6, search__lr_max=10, training__batch_size=16
    )
    result = tuning.run(settings, prepare(settings), parent)
    assert (result["trials"], result["failed"]) == (3, 0)
    runs = children(parent)
    assert len(runs) == 3
    assert {run.info.status for run in runs} == {"FINISHED"}
    for run in runs:
        epochs = int(run.data.tags["epochs"])
        whole = epochs == 4
        assert run.data.tags["stop_reason"] == ("last epoch or patience" if whole else "stopped by the scheduler")
        assert steps(parent, run) == list(range(1, epochs + 1))
        assert set(run.data.params) == {"training.lr", "model.embedding_dim"}
        names = {name.removeprefix("best/") for name in run.data.metrics if name.startswith("best/")}
        assert "hr_at_10" in names
        of_all = {name for name in names if " of " not in name}  # slices are of the best epoch alone
        assert all(run.data.metrics[f"validation/{name}"] == run.data.metrics[f"best/{name}"] for name in of_all)
    assert {int(run.data.tags["epochs"]) == 4 for run in runs} == {True, False}, "nothing was stopped early"

    best = max(runs, key=lambda run: run.data.metrics["best/hr_at_10"])
    assert result["best"]["validation"]["hr@10"] == best.data.metrics["best/hr_at_10"]
    assert str(result["best"]["config"]["training.lr"]) == best.data.params["training.lr"]
    chosen = tuning.configured(settings, result["best"]["config"])
    alone = Fitting(experiment.prepare(chosen))
    alone.run()
    slices = result["best"]["validation_slices"]
    assert slices["overall"]["hr@10"] == result["best"]["validation"]["hr@10"]
    assert slices["warm"]["users"] + slices["cold"]["users"] == slices["overall"]["users"] == 150
    assert best.data.metrics["best/hr_at_10 of warm"] == slices["warm"]["hr@10"]
    assert result["best"]["validation"]["hr@10"] == max(
        epoch["validation/hr@10"] for epoch in alone.history[: int(best.data.tags["epochs"])]
    )

    # The same search again, as after a crash: the same trials, and none of them trained.
    monkeypatch.setattr(tuning, "_trial", replaying_trial)
    again = tracking.start(tracking_uri, str(tmp_path), "tune", {})
    assert tuning.run(settings, prepare(settings), again) == result
    histories = [sorted((run.data.params["training.lr"], steps(parent, run)) for run in runs)]
    histories.append(sorted((run.data.params["training.lr"], steps(again, run)) for run in children(again)))
    assert histories[0] == histories[1]


@pytest.mark.slow
def test_a_failing_trial_is_failed_and_the_search_goes_on(
    local_ray: str, world: Path, tmp_path: Path, parent: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuning, "_trial", failing_trial)
    settings = tune_config(
        world,
        tmp_path,
        model__item_encoder__name="dff",
        search__taps="[llm.2, all]",
        search__grace_epochs=2,
        training__epochs=2,
    )
    result = tuning.run(settings, prepare(settings), parent)
    runs = children(parent)
    by_taps = {(run.data.params["taps"], run.info.status) for run in runs}
    assert by_taps == {("llm.2", "FAILED"), ("all", "FINISHED")}
    failed = [run for run in runs if run.info.status == "FAILED"]
    assert all(run.data.tags["stop_reason"] == "error" and steps(parent, run) == [1] for run in failed)
    assert result["failed"] == len(failed)
    assert result["best"]["config"]["taps"] == "all"


@pytest.mark.slow
def test_a_trial_that_diverges_is_failed_with_its_reason_and_the_search_goes_on(
    local_ray: str, world: Path, tmp_path: Path, parent: Run, capfd: pytest.CaptureFixture[str]
) -> None:
    settings = tune_config(world, tmp_path, search__lr_min=1e-3, search__lr_max=1e38, search__trials=4)
    result = tuning.run(settings, prepare(settings), parent)
    runs = {float(run.data.params["training.lr"]): run for run in children(parent)}
    failed = {rate for rate, run in runs.items() if run.info.status == "FAILED"}
    assert 0 < len(failed) < 4 and min(failed) > result["best"]["config"]["training.lr"]
    assert (result["trials"], result["failed"]) == (4, len(failed))
    told = [line for line in capfd.readouterr().err.splitlines() if line.startswith("tune: a trial failed")]
    assert len(told) == len(failed)
    for rate in failed:
        reason = f"Diverged: epoch 1, step 2: the loss is nan; lower training.lr ({rate:g})"
        assert runs[rate].data.tags["error"] == reason
        assert any(reason in line for line in told)


@pytest.mark.slow
def test_a_search_without_a_trial_that_ends_fails(
    local_ray: str, world: Path, tmp_path: Path, parent: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuning, "_trial", failing_trial)
    settings = tune_config(
        world, tmp_path, model__item_encoder__name="fusion", search__taps="[llm.2]", search__trials=1
    )
    with pytest.raises(JobFailed, match=r"all 1 trials failed: .*the loss is gone"):
        tuning.run(settings, prepare(settings), parent)
    assert [run.info.status for run in children(parent)] == ["FAILED"]


@pytest.mark.slow
def test_an_interrupted_search_leaves_killed_trials(
    local_ray: str, world: Path, tmp_path: Path, parent: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(self: Any, iteration: int, trials: list, trial: Any, result: dict, **info: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(tuning.TrialRuns, "on_trial_result", interrupt)
    settings = tune_config(world, tmp_path)
    with pytest.raises(KeyboardInterrupt):
        tuning.run(settings, prepare(settings), parent)
    assert [run.info.status for run in children(parent)] == ["KILLED"]


@pytest.mark.slow
def test_a_search_ends_with_its_result_without_its_tracker(local_ray: str, world: Path, tmp_path: Path) -> None:
    gone = Run("http://127.0.0.1:9", "parent", str(tmp_path))
    settings = tune_config(world, tmp_path)
    result = tuning.run(settings, prepare(settings), gone)
    assert (result["trials"], result["failed"]) == (settings.search.trials, 0)
    kept = [file.read_text() for file in (tmp_path / "untracked").glob("*.jsonl")]
    assert len(kept) == settings.search.trials and all("train_loss" in text for text in kept)


def test_a_record_that_is_not_there_is_an_empty_history(tmp_path: Path) -> None:
    record = tmp_path / "trial.json"
    assert tuning._read_history(str(record)) == []
    record.write_text(json.dumps([{"epoch": 1}]))
    assert tuning._read_history(str(record)) == [{"epoch": 1}]
