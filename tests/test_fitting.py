"""The training loop: the same result whatever the workers and the interruptions, early stopping, learning."""

import multiprocessing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from lvlmrec import experiment
from lvlmrec.baselines import BASELINES
from lvlmrec.config import load
from lvlmrec.evaluation.metrics import metrics
from lvlmrec.evaluation.ranking import rank_from_scores
from lvlmrec.experiment import Experiment, TrainConfig
from lvlmrec.fitting import State, encode_catalogue, rank_holdout
from lvlmrec.models.backbones import BACKBONES
from lvlmrec.models.fusions import FUSIONS
from tests.toy import CPU, ITEM_IDS, Fitting, arguments, fitted, settings, train_config

# Sums over other numbers of rows round differently, and AdamW divides by small numbers.
TOLERANCE = {"rtol": 2e-3, "atol": 2e-5}


class Interrupted(Exception):
    pass


def weights(state: State) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in state.model.state_dict().items()}


def assert_bit_equal(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]), name


def worker(rank: int, folder: Path, cases: dict[str, Experiment]) -> None:
    """Fit every case in a group of three, then in one of two; rank 0 keeps the weights and the metrics."""
    torch.set_num_threads(1)
    for world in (3, 2):
        if rank >= world:
            return
        dist.init_process_group("gloo", init_method=f"file://{folder}/group-{world}", rank=rank, world_size=world)
        for name, case in cases.items():
            fitting = Fitting(case)
            state = fitting.run()
            if rank == 0:
                torch.save((weights(state), fitting.history), folder / f"{name}-{world}.pt")
        dist.destroy_process_group()


@pytest.mark.thorough
def test_any_number_of_workers_gives_the_same_result(world: Path, tmp_path: Path) -> None:
    cases = {
        name: experiment.prepare(train_config(world, tmp_path, **values))
        for name, values in {
            "id": {"model__item_encoder__name": "id"},
            # 150 users in batches of 149: in the last one all workers but the first have nobody
            "dff, one user left": {"model__item_encoder__name": "dff", "training__batch_size": 149},
            "dff, uncorrected": {
                "model__item_encoder__name": "dff",
                "training__batch_size": 74,
                "training__log_popularity_correction": "false",
            },
        }.items()
    }
    multiprocessing.set_forkserver_preload(["tests.test_fitting"])  # torch is imported once for all three
    mp.start_processes(worker, (tmp_path, cases), nprocs=3, start_method="forkserver")
    for name, case in cases.items():
        alone = Fitting(case)
        expected = weights(alone.run())
        for num_workers in (2, 3):
            found, history = torch.load(tmp_path / f"{name}-{num_workers}.pt", weights_only=True)
            for parameter, value in expected.items():
                torch.testing.assert_close(found[parameter], value, **TOLERANCE, msg=lambda m, p=parameter: f"{p}: {m}")
            for ours, theirs in zip(alone.history, history, strict=True):
                assert ours["train_loss"] == pytest.approx(theirs["train_loss"], rel=1e-5)
                assert ours["validation/hr@10"] == theirs["validation/hr@10"]


@pytest.mark.parametrize("encoder", ["id", "dff"])
def test_a_resumed_run_ends_bit_equal(world: Path, tmp_path: Path, encoder: str) -> None:
    config = train_config(
        world, tmp_path, model__item_encoder__name=encoder, model__backbone__dropout=0.3, training__epochs=5
    )
    prepared, undisturbed = fitted(config)

    def interrupt(state: State) -> None:
        if state.progress.epoch == 2:
            raise Interrupted

    first = Fitting(prepared, interrupt)
    state = first.new_state()
    with pytest.raises(Interrupted):
        first.run(state)
    state.save(tmp_path)
    torch.manual_seed(12345)  # another process has another random state

    resumed = Fitting(prepared)
    restored = resumed.new_state()
    restored.load(tmp_path)
    resumed.run(restored)
    assert [metrics["epoch"] for metrics in resumed.history] == [3, 4, 5]
    assert_bit_equal(weights(restored), weights(undisturbed))
    assert_bit_equal(restored.best_weights, undisturbed.best_weights)
    assert restored.progress.best == undisturbed.progress.best
    assert restored.progress.best_epoch == undisturbed.progress.best_epoch


def test_a_finished_run_that_is_resumed_does_nothing(world: Path, tmp_path: Path) -> None:
    prepared, state = fitted(train_config(world, tmp_path))
    state.save(tmp_path)
    again = Fitting(prepared)
    restored = again.new_state()
    restored.load(tmp_path)
    again.run(restored)
    assert again.history == []


def test_it_stops_when_patience_is_over(world: Path, tmp_path: Path) -> None:
    config = train_config(world, tmp_path, training__lr=0.0, training__epochs=20, training__patience=3)
    _, state = fitted(config)  # nothing moves, so the first epoch stays the best
    assert (state.progress.best_epoch, state.progress.epoch) == (1, 4)


def test_the_best_epochs_weights_are_kept(world: Path, tmp_path: Path) -> None:
    config = train_config(world, tmp_path, training__lr=0.08, training__epochs=30, training__patience=4)
    prepared = experiment.prepare(config)
    seen: list[dict[str, torch.Tensor]] = []
    fitting = Fitting(prepared, lambda state: seen.append(weights(state)))
    state = fitting.run()
    hit_rates = [metrics["validation/hr@10"] for metrics in fitting.history]
    best = int(np.argmax(hit_rates))
    assert best < len(seen) - 1, "this run never gets worse, so it tests nothing"
    assert len(seen) == 30 or len(seen) - 1 - best == 4
    assert state.progress.best_epoch == best + 1
    assert state.progress.best["hr@10"] == hit_rates[best]
    assert_bit_equal(state.best_weights, seen[best])

    state.model.load_state_dict(state.best_weights)
    state.model.eval()
    catalogue = encode_catalogue(state.model, len(ITEM_IDS), None, CPU)
    assert metrics(rank_holdout(state.model, catalogue, prepared.data.validation)) == state.progress.best


@pytest.mark.parametrize("encoder", FUSIONS)
def test_it_learns_the_walk_that_popularity_does_not_know(world: Path, tmp_path: Path, encoder: str) -> None:
    config = train_config(world, tmp_path, model__item_encoder__name=encoder, training__epochs=25)
    prepared = experiment.prepare(config)
    fitting = Fitting(prepared)
    state = fitting.run()
    assert fitting.history[-1]["train_loss"] < 0.7 * fitting.history[0]["train_loss"]
    validation = prepared.data.validation
    popularity = BASELINES["popularity"]().fit(prepared.data.sequences, len(ITEM_IDS))
    ranks = rank_from_scores(popularity.score(validation.inputs), validation.targets, validation.histories)
    assert state.progress.best["hr@10"] > 1.5 * metrics(ranks)["hr@10"]


@pytest.mark.parametrize("backbone", BACKBONES)
def test_every_backbone_learns_the_walk(world: Path, tmp_path: Path, backbone: str) -> None:
    values = settings(world, tmp_path, model__backbone__name=backbone, training__epochs=15)
    del values["model.backbone.dropout"]  # not every backbone has one
    prepared = experiment.prepare(load(TrainConfig, [], arguments(values)))
    state = Fitting(prepared).run()
    validation = prepared.data.validation
    popularity = BASELINES["popularity"]().fit(prepared.data.sequences, len(ITEM_IDS))
    ranks = rank_from_scores(popularity.score(validation.inputs), validation.targets, validation.histories)
    assert state.progress.best["hr@10"] > 1.5 * metrics(ranks)["hr@10"]


def test_bfloat16_learns_with_float32_weights(world: Path, tmp_path: Path) -> None:
    values: dict[str, Any] = {"model__item_encoder__name": "dff", "training__epochs": 6}
    precise = Fitting(experiment.prepare(train_config(world, tmp_path, **values)))
    rough = Fitting(experiment.prepare(train_config(world, tmp_path, **values, training__precision="bfloat16")))
    state = rough.run()
    precise.run()
    assert {value.dtype for value in state.model.state_dict().values()} == {torch.float32}
    assert rough.history[-1]["train_loss"] < rough.history[0]["train_loss"]
    assert rough.history[-1]["train_loss"] == pytest.approx(precise.history[-1]["train_loss"], rel=0.05)
    assert rough.history[-1]["train_loss"] != precise.history[-1]["train_loss"]
