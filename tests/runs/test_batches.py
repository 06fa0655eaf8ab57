"""The users of a batch, and the memory of its features: the mapped files, or the device that trains."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lvlmrec.runs import batches, experiment
from lvlmrec.runs.batches import batches_of_epoch, item_features
from tests.toy import CPU, train_config, walks

META = torch.device("meta")  # a device with shapes and without content
INDEX = np.array([3, 7, 60])


@pytest.fixture
def prepared(world: Path, tmp_path: Path) -> experiment.Experiment:
    batches.columns_on_device.cache_clear()
    return experiment.prepare(train_config(world, tmp_path, model__item_encoder__name="dff"))


def test_a_device_with_room_holds_the_features_of_all_items(
    prepared: experiment.Experiment, monkeypatch: pytest.MonkeyPatch
) -> None:
    array = prepared.features
    assert array is not None
    kept = array.select(array.names[1:])
    (stored,) = kept.stored()
    size = stored.numel() * stored.element_size()
    for free, expected in ((2 * size, len(array.missing)), (2 * size - 1, len(INDEX))):
        monkeypatch.setattr(batches, "free_memory", lambda device, free=free: free)
        batches.columns_on_device.cache_clear()
        read = item_features(kept, INDEX, META)
        assert read is not None
        (stored,) = read.stored
        assert stored.device == META and stored.shape == (expected, *kept.shape[1:])
        assert read.row.shape == INDEX.shape


@pytest.mark.parametrize("kept", [slice(None), slice(1, None)])
def test_what_a_device_holds_is_what_the_file_has(
    prepared: experiment.Experiment, monkeypatch: pytest.MonkeyPatch, kept: slice
) -> None:
    monkeypatch.setattr(batches, "free_memory", lambda device: 1 << 30)
    monkeypatch.setattr(batches, "ROWS_PER_COPY", 7)
    array = prepared.features
    assert array is not None
    array = array.select(array.names[kept])
    copies = batches.columns_on_device(array.files, CPU)
    assert copies is not None and torch.equal(copies[0], array.stored()[0])
    assert copies[0].dtype == array.stored()[0].dtype


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("room", [True, False])
@pytest.mark.parametrize("control", ["none", "shuffled"])
def test_a_gpu_reads_the_features_that_the_cpu_reads(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: bool, control: str
) -> None:
    if not room:
        monkeypatch.setattr(batches, "free_memory", lambda device: 0)
    batches.columns_on_device.cache_clear()
    config = train_config(world, tmp_path, model__item_encoder__name="dff", feature_control=control)
    case = experiment.prepare(config)
    ours, theirs = (
        next(batches_of_epoch(config, case.data, case.features, 0, device)).items.features
        for device in (torch.device("cuda"), CPU)
    )
    assert ours is not None and theirs is not None
    for layer in range(theirs.missing.shape[1]):
        torch.testing.assert_close(ours.layer(layer, torch.float32).cpu(), theirs.layer(layer, torch.float32))


def users_of(batch: batches.Batch) -> list[list[int]]:
    """The training items of each user of a batch, without padding; `v7` is item 7."""
    ends = batch.local.histories.ends
    return [[item for item in row if item] for row in batch.local.user_items[ends].tolist()]


def order_of_users(world: Path, workspace: Path, epoch: int, **values: int) -> list[list[int]]:
    """The order of the users in an epoch, from batches of one user."""
    chosen: dict[str, Any] = {"training__batch_size": 1, "training__loss__name": "full_softmax", **values}
    config = train_config(world, workspace, **chosen)
    data = experiment.prepare(config).data
    return [user for batch in batches_of_epoch(config, data, None, epoch, CPU) for user in users_of(batch)]


def test_every_epoch_has_every_user_once_in_an_order_of_its_own(world: Path, tmp_path: Path) -> None:
    expected = [[int(item[1:]) for item in row[:-2]] for row in walks()]
    orders = [order_of_users(world, tmp_path, epoch, seed=seed) for seed in (0, 1) for epoch in (0, 1)]
    for order in orders:
        assert sorted(order) == sorted(expected)
    for one, other in itertools.combinations([expected, *orders], 2):
        at_the_same_place = sum(a == b for a, b in zip(one, other, strict=True))
        assert at_the_same_place < 10, "of 150 users about one stays where it was by chance"
    assert orders[0] == order_of_users(world, tmp_path, 0, seed=0)


@pytest.mark.parametrize("workers", [1, 3])
def test_the_batches_of_all_workers_are_the_users_the_last_batch_too(world: Path, tmp_path: Path, workers: int) -> None:
    config = train_config(world, tmp_path, training__batch_size=64)
    data = experiment.prepare(config).data
    seen, sizes = [], []
    for rank in range(workers):
        local_batches = list(batches_of_epoch(config, data, None, 0, CPU, rank, workers))
        seen += [user for batch in local_batches for user in users_of(batch)]
        sizes.append([batch.num_positions for batch in local_batches])
        for batch in local_batches:
            assert len(batch.local.labels) == sum(len(user) - 1 for user in users_of(batch))
    expected = [[int(item[1:]) for item in row[:-2]] for row in walks()]
    assert sorted(seen) == sorted(expected)
    assert all(size == sizes[0] for size in sizes), "every worker divides by the same number"
    assert sum(sizes[0]) == sum(len(user) - 1 for user in expected) and len(sizes[0]) == 3
