"""The training loop: results do not depend on workers or interruptions; early stopping, schedules."""

import multiprocessing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

from lvlmrec.errors import ConfigError
from lvlmrec.models.losses import LossInputs, alignment, uniformity
from lvlmrec.models.sequential.histories import pack
from lvlmrec.runs import experiment
from lvlmrec.runs.batches import batches_of_epoch, draw_negatives, prefetch
from lvlmrec.runs.experiment import Experiment
from lvlmrec.runs.loop import Loss, State, encode_catalogue, learning_rate_factor, rank_holdout
from tests.toy import CPU, ITEM_IDS, Fitting, fitted, train_config, video

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
    """Fit every case in a group of four, then in one of two; rank 0 keeps the weights and the metrics."""
    torch.set_num_threads(1)
    for world in (4, 2):
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
                "training__loss__log_popularity_correction": "false",
            },
            "full softmax": {"training__loss__name": "full_softmax"},
            # one user left in the last batch: some workers have no user, and hardly an item
            "video": video(world, training__batch_size=149, training__lr=0.001, training__encoder_lr=0.0004),
            "video, ids, uniform": video(
                world,
                model__item_encoder__ids="gate",
                model__item_encoder__frozen_blocks=1,
                training__lr=0.0004,
                training__loss__name="gbce",
                training__loss__negatives=2,
                training__uniformity=0.3,
            ),
            "bpr": {"training__loss__name": "bpr", "model__item_encoder__name": "mean"},
            # the last batch has one user; the others' queries must come from nowhere
            "gbce, aligned, uniform": {
                "training__loss__name": "gbce",
                "training__loss__negatives": 5,
                "training__batch_size": 149,
                "training__alignment": 0.5,
                "training__uniformity": 0.3,
            },
        }.items()
    }
    multiprocessing.set_forkserver_preload(["tests.runs.test_loop"])  # torch is imported once for all four
    mp.start_processes(worker, (tmp_path, cases), nprocs=4, start_method="forkserver")
    for name, case in cases.items():
        alone = Fitting(case)
        expected = weights(alone.run())
        for num_workers in (2, 4):
            found, history = torch.load(tmp_path / f"{name}-{num_workers}.pt", weights_only=True)
            for parameter, value in expected.items():
                torch.testing.assert_close(found[parameter], value, **TOLERANCE, msg=lambda m, p=parameter: f"{p}: {m}")
            for ours, theirs in zip(alone.history, history, strict=True):
                assert ours["train_loss"] == pytest.approx(theirs["train_loss"], rel=1e-5)
                assert ours["validation/hr@10"] == theirs["validation/hr@10"]


def gradients(case: Experiment) -> list[dict[str, torch.Tensor]]:
    """The gradient of each batch, float64, within the caller's process group."""
    state = Fitting(case).new_state()
    loss: torch.nn.Module = Loss(state.model.double(), case.config.training, case.data.train_counts).double()
    rank, workers = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    loss = DistributedDataParallel(loss) if workers > 1 else loss
    found = []
    for batch in batches_of_epoch(case.config, case.data, case.features, 0, CPU, rank, workers):
        loss.zero_grad()
        (loss(batch.items, batch.local) * (workers / batch.num_positions)).backward()
        found.append(
            {name: weight.grad.clone() for name, weight in state.model.named_parameters() if weight.grad is not None}
        )
    return found


def gradient_worker(rank: int, folder: Path, case: Experiment) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=3)
    torch.save(gradients(case), folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.thorough
def test_the_gradient_of_items_that_workers_share_is_that_of_one_worker(world: Path, tmp_path: Path) -> None:
    values = video(world, model__item_encoder__ids="gate", training__batch_size=149, training__uniformity=0.3)
    case = experiment.prepare(train_config(world, tmp_path, **values))
    multiprocessing.set_forkserver_preload(["tests.runs.test_loop"])
    mp.start_processes(gradient_worker, (tmp_path, case), nprocs=3, start_method="forkserver")
    expected = gradients(case)
    assert len(expected) == 2  # in the second batch two workers have no user
    for rank in range(3):
        for ours, theirs in zip(torch.load(tmp_path / f"{rank}.pt", weights_only=True), expected, strict=True):
            assert ours.keys() == theirs.keys()
            for name, gradient in theirs.items():
                assert gradient.abs().sum() > 0, name
                torch.testing.assert_close(
                    ours[name], gradient, rtol=1e-9, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}"
                )


def interrupted_and_resumed(prepared: Experiment, folder: Path) -> tuple[State, list[dict[str, float]]]:
    """Train two epochs, save, load into a new state and train on; returns the state and the second part's epochs."""

    def interrupt(state: State) -> None:
        if state.progress.epoch == 2:
            raise Interrupted

    first = Fitting(prepared, interrupt)
    state = first.new_state()
    with pytest.raises(Interrupted):
        first.run(state)
    state.save(folder)
    torch.manual_seed(12345)  # another process has another random state
    resumed = Fitting(prepared)
    restored = resumed.new_state()
    restored.load(folder)
    resumed.run(restored)
    return restored, resumed.history


@pytest.mark.parametrize(
    ("encoder", "loss"),
    [("id", "in_batch_softmax"), ("dff", "in_batch_softmax"), ("id", "bpr"), ("video", "in_batch_softmax")],
)
def test_a_resumed_run_ends_bit_equal(world: Path, tmp_path: Path, encoder: str, loss: str) -> None:
    values: dict[str, Any] = {"model__item_encoder__name": encoder, "training__loss__name": loss, "training__epochs": 5}
    values |= video(world, training__encoder_lr=0.004) if encoder == "video" else {}
    config = train_config(world, tmp_path, model__backbone__dropout=0.3, **values)
    prepared, undisturbed = fitted(config)

    restored, history = interrupted_and_resumed(prepared, tmp_path)
    assert [metrics["epoch"] for metrics in history] == [3, 4, 5]
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
    ranks = rank_holdout(state.model, catalogue, prepared.data.validation)
    assert (ranks <= 10).mean() == state.progress.best["hr@10"] > hit_rates[-1]
    counts = prepared.data.train_counts[prepared.data.validation.targets]
    rare, found = (counts >= 4) & (counts <= 10), state.progress.best_slices["occurs_4_to_10"]
    assert 0 < rare.sum() < len(ranks)
    assert found["users"] == rare.sum() and found["hr@10"] == (ranks[rare] <= 10).mean()
    assert state.progress.best_slices["overall"]["hr@10"] == hit_rates[best]


def test_an_epoch_is_validated_on_the_users_that_were_drawn(world: Path, tmp_path: Path) -> None:
    every = experiment.prepare(train_config(world, tmp_path))
    few = experiment.prepare(train_config(world, tmp_path, training__validation_users=20))
    assert len(few.data.validation.targets) == 20 < len(every.data.validation.targets)
    assert few.key != every.key == experiment.prepare(train_config(world, tmp_path, training__validation_users=0)).key
    _, state = fitted(train_config(world, tmp_path, training__validation_users=20, training__epochs=1))
    assert state.progress.best_slices["overall"]["users"] == 20


def test_alignment_and_uniformity_move_queries_and_items(world: Path, tmp_path: Path) -> None:
    """With a weight, its term becomes smaller than without."""
    terms = {}
    for name in ("neither", "alignment", "uniformity"):
        weight = {} if name == "neither" else {f"training__{name}": 2.0}
        prepared, state = fitted(train_config(world, tmp_path, training__epochs=8, training__patience=8, **weight))
        state.model.eval()
        with torch.no_grad():
            items = encode_catalogue(state.model, len(ITEM_IDS), None, CPU)
            sequences = torch.from_numpy(prepared.data.sequences.astype(np.int64))
            histories = pack(sequences[:, :-1] > 0)
            read = sequences[:, :-1].flatten()[histories.grid_index]
            labels = sequences[:, 1:].flatten()[histories.grid_index]
            queries = state.model.encode_sequences(items[read], histories)
            index = torch.arange(1, len(ITEM_IDS) + 1)
            inputs = LossInputs(queries, labels, labels, items[1:], index, index, index, None, len(ITEM_IDS))
            terms[name] = {
                "alignment": alignment(inputs).item() / len(queries),
                "uniformity": uniformity(queries).item() + uniformity(items[1:]).item(),
            }
    assert terms["alignment"]["alignment"] < 0.9 * terms["neither"]["alignment"]
    assert terms["uniformity"]["uniformity"] < terms["neither"]["uniformity"] - 0.1


def test_negatives_are_drawn_evenly_from_the_items_that_a_user_does_not_have() -> None:
    owned = np.array([[0, 0, 3, 7], [0, 0, 0, 2], [5, 5, 1, 8]])
    drawn = draw_negatives(np.random.default_rng(0), owned, np.array([1, 0, 3]), np.arange(1, 9), 4000)
    assert drawn.shape == (4, 4000) and drawn.dtype == np.int64
    for position, user in zip(drawn, (0, 2, 2, 2), strict=True):
        found, counts = np.unique(position, return_counts=True)
        assert found.tolist() == sorted(set(range(1, 9)) - set(owned[user]))
        np.testing.assert_allclose(counts, 4000 / len(found), rtol=0.15)


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


def test_a_video_encoder_learns_at_a_rate_of_its_own(world: Path, tmp_path: Path) -> None:
    """Frozen blocks stay; other weights of the encoder learn at encoder_lr, all else at lr; bad settings fail."""
    frozen = "item_encoder.encoder.blocks.0."
    moved = {}
    for rate in (1e-9, 0.01):
        values = video(world, model__item_encoder__frozen_blocks=1, training__encoder_lr=rate, training__epochs=1)
        fitting = Fitting(experiment.prepare(train_config(world, tmp_path, **values)))
        before = weights(fitting.new_state())
        after = weights(fitting.run())
        moved[rate] = {name: float((after[name] - before[name]).abs().max()) for name in before}
        assert all(change == 0 for name, change in moved[rate].items() if name.startswith(frozen))
    for name in moved[0.01]:
        if name.startswith("item_encoder.encoder.blocks") and not name.startswith(frozen):
            assert moved[1e-9][name] < 1e-6 < moved[0.01][name], name
    assert moved[1e-9]["item_encoder.projection.weight"] > 1e-3
    for wrong in (
        {"training__encoder_lr": 0.1},
        video(world, feature_scaling="standardize"),
        video(world, feature_pca=3),
        video(world, feature_control="gaussian"),
        video(world, features=world / "features"),
    ):
        with pytest.raises(ConfigError):
            Fitting(experiment.prepare(train_config(world, tmp_path, **wrong))).new_state()


def test_how_a_video_encoder_is_run_is_no_part_of_a_runs_name(world: Path, tmp_path: Path) -> None:
    def key(**values: Any) -> str:
        return experiment.prepare(train_config(world, tmp_path, **video(world), **values)).key

    assert key() == key(model__item_encoder__items_at_once=3) == key(training__num_workers=2)
    assert key() != key(training__encoder_lr=0.1) != key(model__item_encoder__frozen_blocks=1)


@pytest.mark.parametrize(
    ("schedule", "warmup", "expected"),
    [
        ("constant", 0.0, [1, 1, 1, 1]),
        ("constant", 0.5, [0, 0.5, 1, 1]),
        ("linear", 0.0, [1, 0.75, 0.5, 0.25]),
        ("linear", 0.5, [0, 0.5, 1, 0.5]),
        ("cosine", 0.0, [1, 0.5 + 0.125**0.5, 0.5, 0.5 - 0.125**0.5]),
        ("linear", 1.0, [0, 0.25, 0.5, 0.75]),
    ],
)
def test_the_learning_rate_rises_and_falls_as_scheduled(schedule: str, warmup: float, expected: list[float]) -> None:
    factors = [learning_rate_factor(progress, schedule, warmup) for progress in (0, 0.25, 0.5, 0.75)]
    assert factors == pytest.approx(expected)


def test_a_schedule_reaches_the_optimiser_and_a_resumed_run_keeps_to_it(world: Path, tmp_path: Path) -> None:
    values: dict[str, Any] = {"training__schedule": "cosine", "training__warmup": 0.25, "training__epochs": 4}
    rates: list[float] = []
    prepared = experiment.prepare(train_config(world, tmp_path, **values))
    undisturbed = Fitting(prepared, lambda state: rates.append(state.optimizer.param_groups[0]["lr"])).run()
    highest = prepared.config.training.lr
    assert rates[0] < highest and max(rates) <= highest and rates[1] > rates[2] > rates[3] > 0

    restored, _ = interrupted_and_resumed(prepared, tmp_path)
    assert_bit_equal(weights(restored), weights(undisturbed))


def test_batches_made_ahead_are_the_same_and_an_error_in_making_one_is_raised() -> None:
    made: list[int] = []

    def batches() -> Iterator[Any]:
        for number in range(4):
            if number == 3:
                raise OSError("the disk is gone")
            made.append(number)
            yield number

    used = []
    with pytest.raises(OSError, match="the disk is gone"):
        for batch in prefetch(batches()):
            used.append(batch)
    assert used == made == [0, 1, 2]
    first = next(prefetch(iter([5, 6])))
    assert first == 5
