"""Where the features of a batch lie: in the mapped file, or on the device that trains."""

from pathlib import Path

import numpy as np
import pytest
import torch

from lvlmrec import batches, experiment
from lvlmrec.batches import batches_of_epoch, item_features
from tests.toy import CPU, train_config

META = torch.device("meta")  # a device with shapes and without content
INDEX = np.array([3, 7, 60])


@pytest.fixture
def prepared(world: Path, tmp_path: Path) -> experiment.Experiment:
    batches.held_by_device.cache_clear()
    return experiment.prepare(train_config(world, tmp_path, model__item_encoder__name="dff"))


def test_a_device_with_room_holds_the_features_of_all_items(
    prepared: experiment.Experiment, monkeypatch: pytest.MonkeyPatch
) -> None:
    array = prepared.features
    assert array is not None
    kept = array.select(array.names[1:])
    size = kept.stored()[:, list(kept.columns)].numel() * kept.stored().element_size()
    for free, expected in ((2 * size, len(array.missing)), (2 * size - 1, len(INDEX))):
        monkeypatch.setattr(batches, "free_memory", lambda device, free=free: free)
        batches.held_by_device.cache_clear()
        read = item_features(kept, INDEX, META)
        assert read is not None
        assert read.stored.device == META and read.stored.shape == (expected, *kept.shape[1:])
        assert read.columns == tuple(range(len(kept.names))) and read.row.shape == INDEX.shape


@pytest.mark.parametrize("kept", [slice(None), slice(1, None)])
def test_what_a_device_holds_is_what_the_file_has(
    prepared: experiment.Experiment, monkeypatch: pytest.MonkeyPatch, kept: slice
) -> None:
    monkeypatch.setattr(batches, "free_memory", lambda device: 1 << 30)
    monkeypatch.setattr(batches, "ROWS_AT_ONCE", 7)
    array = prepared.features
    assert array is not None
    array = array.select(array.names[kept])
    held = batches.held_by_device(array.path, array.dtype, array.columns, CPU)
    assert held is not None and torch.equal(held, array.stored()[:, list(array.columns)])
    assert held.dtype == array.stored().dtype


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("room", [True, False])
@pytest.mark.parametrize("control", ["none", "shuffled"])
def test_a_gpu_reads_the_features_that_the_cpu_reads(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: bool, control: str
) -> None:
    if not room:
        monkeypatch.setattr(batches, "free_memory", lambda device: 0)
    batches.held_by_device.cache_clear()
    config = train_config(world, tmp_path, model__item_encoder__name="dff", feature_control=control)
    case = experiment.prepare(config)
    ours, theirs = (
        next(batches_of_epoch(config, case.data, case.features, 0, device)).shared.features
        for device in (torch.device("cuda"), CPU)
    )
    assert ours is not None and theirs is not None
    for layer in range(len(theirs.columns)):
        torch.testing.assert_close(ours.layer(layer, torch.float32).cpu(), theirs.layer(layer, torch.float32))
