"""The moments that scale features: in blocks of bounded memory, made once; and how many items may lack features."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lvlmrec.errors import InputError
from lvlmrec.features import array as array_module
from lvlmrec.features import moments
from lvlmrec.features.array import Column, FeatureArray
from lvlmrec.features.cache import ARRAY, Cache
from lvlmrec.runs import experiment
from lvlmrec.runs.checkpoint import load_checkpoint
from tests.feature_sets import recipe_of, write_set
from tests.toy import ITEM_IDS, fitted, publish, train_config

Shape = tuple[int, int, int]


def array(folder: Path, shape: Shape, dtype: str, missing: float = 0.0) -> FeatureArray:
    """Random features of I items; row 0 is the padding, and so many have none."""
    rng = np.random.default_rng(0)
    items, columns, dim = shape
    values = torch.from_numpy(rng.standard_normal((items + 1, columns, dim))).to(getattr(torch, dtype))
    lacking = rng.random((items + 1, columns)) < missing
    lacking[0] = True
    values[torch.from_numpy(lacking)] = 0
    cache = Cache(folder)
    content = (values.view(torch.uint16) if dtype == "bfloat16" else values).numpy()
    held = []
    for column in range(columns):
        with cache.publishing(f"c{column}", {}) as working:
            np.save(working / ARRAY, content[:, column])
        held.append(Column(f"c{column}", 0, f"c{column}", f"c{column}", dim, dtype))
    return FeatureArray(cache, tuple(held), "d", "r", lacking)


def whole_rows(features: FeatureArray, item_index: np.ndarray) -> tuple[Tensor, ...]:
    """The same over whole rows of so many items, as the moments of all earlier runs were made."""
    raw = replace(features, mean=None, std=None)
    total = squares = torch.zeros(features.shape[1:], dtype=torch.float64)
    for start in range(0, len(item_index), array_module.ROWS_AT_ONCE):
        values = raw.rows(item_index[start : start + array_module.ROWS_AT_ONCE]).double()
        total, squares = total + values.sum(0), squares + values.square().sum(0)
    count = torch.from_numpy((~features.is_missing(item_index)).sum(0))[:, None]
    mean, squares = total / count, squares / count
    return mean, (squares - mean.square()).clamp_min(0.0), squares


@pytest.fixture(params=[1, 2], ids=lambda number: f"{number} threads")
def threads(request: pytest.FixtureRequest) -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("shape", "dtype"), [((700, 5, 333), "float16"), ((300, 3, 1000), "bfloat16")])
@pytest.mark.parametrize("view", ["all", "some columns", "shuffled"])
def test_blocks_have_the_sums_of_whole_rows_to_the_last_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threads: None, shape: Shape, dtype: str, view: str
) -> None:
    """Edges of blocks lie within columns and across them, the last blocks are not full."""
    monkeypatch.setattr(array_module, "ROWS_AT_ONCE", 256)
    monkeypatch.setattr(moments, "BYTES_AT_ONCE", 256 * 128 * moments.BYTES_OF_A_VALUE)
    features = array(tmp_path, shape, dtype, missing=0.03)
    features = features.select(["c2", "c0"]) if view == "some columns" else features
    features = features.shuffled(3) if view == "shuffled" else features
    index = np.arange(2, shape[0] + 1)
    for ours, theirs in zip(features.moments(index), whole_rows(features, index), strict=True):
        assert ours.dtype == torch.float64 and torch.equal(ours, theirs)
    scaled = features.standardized(index).rows(index).double()
    assert scaled.mean(0).abs().max() < 1e-6


def test_a_block_is_bounded_whatever_the_width(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moments, "BYTES_AT_ONCE", 1 << 20)
    monkeypatch.setattr(array_module, "ROWS_AT_ONCE", 64)
    read, blocks = moments._read, []

    def recorded(*arguments: Any) -> Tensor:
        values = read(*arguments)
        blocks.append(values.numel() * moments.BYTES_OF_A_VALUE)
        return values

    monkeypatch.setattr(moments, "_read", recorded)
    features = array(tmp_path, (130, 4, 3584), "float16")
    features.moments(np.arange(1, 131))
    assert sum(blocks) == 130 * 4 * 3584 * moments.BYTES_OF_A_VALUE
    assert max(blocks) <= 1 << 20


def test_moments_are_made_once_for_an_array_its_columns_and_items(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []
    sums = moments.sums

    def counted(*arguments: Any) -> tuple[Tensor, Tensor]:
        made.append(arguments)
        return sums(*arguments)

    monkeypatch.setattr(moments, "sums", counted)
    features, index = array(tmp_path / "one", (90, 3, 8), "float32"), np.arange(1, 81)
    first = features.standardized(index)
    for again in (features.standardized(index), replace(features).standardized(index.astype(np.int32))):
        assert torch.equal(again.mean, first.mean) and torch.equal(again.std, first.std)
    assert len(made) == 1
    others = [features.standardized(index[1:]), features.select(["c1"]).standardized(index)]
    others += [features.shuffled(0).standardized(index), features.shuffled(1).standardized(index)]
    assert len(made) == 5
    assert torch.equal(others[1].mean, first.mean[1:2])
    array(tmp_path / "two", (90, 3, 8), "float32").standardized(index)
    assert len(made) == 6
    assert {file.suffix for file in (tmp_path / "one").glob("*/*")} == {".npy", ".safetensors", ".json"}


def test_a_second_run_reads_no_features_to_scale_them(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values: dict[str, Any] = {"model__item_encoder__name": "dff"}
    for more in ({}, {"feature_pca": 2}, {"feature_control": "gaussian"}, {"feature_control": "shuffled"}):
        first = experiment.prepare(train_config(world, tmp_path, **values, **more))
        with monkeypatch.context() as patch:
            patch.delattr(moments, "sums")
            again = experiment.prepare(train_config(world, tmp_path, **values, **more, seed=0))
        assert first.features is not None and again.features is not None
        assert first.features.mean is not None and again.features.mean is not None
        assert torch.equal(first.features.mean, again.features.mean)
        assert first.key == again.key


@pytest.fixture
def sparse(tmp_path: Path) -> str:
    """Features of 54 of the toy world's 60 items."""
    return write_set(tmp_path / "store", [ITEM_IDS[:54]], recipe_of())


def test_how_many_items_may_lack_features_is_a_setting(world: Path, tmp_path: Path, sparse: str) -> None:
    values: dict[str, Any] = {"model__item_encoder__name": "dff", "features": sparse, "training__epochs": 1}
    for refused in ({}, {"max_missing_features": 0.09}):
        now = refused.get("max_missing_features", 0.05)
        with pytest.raises(InputError, match=rf"10\.0% of .* 60 items .*set max_missing_features, now {now}, to the"):
            experiment.prepare(train_config(world, tmp_path, **values, **refused))
    prepared, state = fitted(train_config(world, tmp_path, **values, max_missing_features=0.1))
    assert experiment.summary(prepared)["items_without_features"] == 6
    loaded = load_checkpoint(publish(prepared, state), {})
    assert loaded.features is not None and loaded.features.missing[1:].any(1).sum() == 6


@pytest.mark.parametrize("encoder", ["id", "dff"])
def test_what_may_be_missing_is_no_part_of_a_runs_name(world: Path, tmp_path: Path, encoder: str) -> None:
    keys = {
        experiment.prepare(train_config(world, tmp_path, model__item_encoder__name=encoder, **more)).key
        for more in ({}, {"max_missing_features": 0.0}, {"max_missing_features": 0.5})
    }
    assert len(keys) == 1


@pytest.mark.parametrize("more", [{}, {"feature_control": "covariance"}, {"feature_pca": 2}])
def test_one_item_with_features_or_none_leaves_finite_numbers(
    world: Path, tmp_path: Path, more: dict[str, Any]
) -> None:
    features = write_set(tmp_path / "store", [["elsewhere"]], recipe_of())
    values: dict[str, Any] = {"model__item_encoder__name": "dff", "features": features, "training__epochs": 1}
    config = train_config(world, tmp_path, **values, **more, max_missing_features=1.0)
    if "feature_pca" in more:
        with pytest.raises(InputError, match=r"feature_pca: 2: .* 0 training items; choices: 0 \(off\) to 0"):
            experiment.prepare(config)
        return
    prepared, state = fitted(config)
    assert prepared.features is not None
    assert torch.isfinite(prepared.features.rows(np.arange(1, 61))).all()
    assert all(torch.isfinite(value).all() for value in state.model.state_dict().values())
