"""Noise twins: what they share with the real features, and what they must not."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from lvlmrec.features import array as array_module
from lvlmrec.features import noise, store
from lvlmrec.features.array import FeatureArray
from lvlmrec.features.compact import compact
from lvlmrec.features.mapping import side_by_side
from lvlmrec.features.noise import NOISES, noise_twin
from tests.feature_sets import captions_recipe, write_set, write_values

NUM_ITEMS = 1600
ITEMS = [f"item{i}" for i in range(NUM_ITEMS)]
EVERY = np.arange(1, NUM_ITEMS + 1)
LLM = [f"describe/llm.{layer}/visual_mean" for layer in (0, 2, 4)]


def correlated() -> torch.Tensor:
    """[N, 3, 8]: every dimension a mix of four sources, so that dimensions and layers vary together; skewed."""
    generator = torch.Generator().manual_seed(0)
    sources = torch.rand(NUM_ITEMS, 4, generator=generator) ** 3
    mix = torch.randn(4, 24, generator=generator)
    values = sources @ mix + 0.05 * torch.randn(NUM_ITEMS, 24, generator=generator) + torch.linspace(-50, 90, 24)
    return (values * torch.linspace(0.1, 4, 24)).reshape(NUM_ITEMS, 3, 8)


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> FeatureArray:
    folder = tmp_path_factory.mktemp("real")
    feature_set = store.read(write_values(folder / "store", ITEMS, correlated()))
    return compact([(feature_set, LLM)], ITEMS, str(folder / "cache"))


@pytest.fixture(scope="module", params=NOISES)
def twin(request: pytest.FixtureRequest, real: FeatureArray) -> tuple[str, FeatureArray]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(array_module, "ROWS_AT_ONCE", 700)  # several blocks, the last one not full
        return request.param, noise_twin(real, request.param, seed=3)


def flat(array: FeatureArray) -> np.ndarray:
    return array.rows(EVERY).flatten(1).double().numpy()


def test_mean_and_deviation_of_every_dimension_are_the_real_ones(real: FeatureArray, twin: tuple) -> None:
    ours, theirs = flat(twin[1]), flat(real)
    standard_error = theirs.std(0) / NUM_ITEMS**0.5
    assert (abs(ours.mean(0) - theirs.mean(0)) < 5 * standard_error).all()
    np.testing.assert_allclose(ours.std(0), theirs.std(0), rtol=0.1)


def test_the_covariance_twin_alone_keeps_the_correlations_between_dimensions_and_layers(
    real: FeatureArray, twin: tuple
) -> None:
    kind, array = twin
    theirs, ours = np.corrcoef(flat(real).T), np.corrcoef(flat(array).T)
    off_diagonal = ~np.eye(24, dtype=bool)
    assert abs(theirs[off_diagonal]).max() > 0.9
    if kind == "covariance":
        assert abs(ours - theirs).max() < 0.12
    else:
        assert abs(ours[off_diagonal]).max() < 0.12


def test_the_shape_of_the_distribution_is_the_one_asked_for(twin: tuple) -> None:
    kind, array = twin
    values = flat(array)
    unit = (values - values.mean(0)) / values.std(0)
    kurtosis = (unit**4).mean(0)
    np.testing.assert_allclose(kurtosis, {"uniform": 1.8}.get(kind, 3.0), rtol=0.25)
    assert (abs(unit).max(0) < 1.9).all() if kind == "uniform" else (abs(unit).max(0) > 2.5).all()


def test_it_says_nothing_of_the_items(real: FeatureArray, twin: tuple) -> None:
    ours, theirs = flat(twin[1]), flat(real)
    correlation = [np.corrcoef(ours[:, d], theirs[:, d])[0, 1] for d in range(24)]
    assert max(map(abs, correlation)) < 0.1
    assert len(np.unique(ours, axis=0)) == NUM_ITEMS


def test_it_depends_on_the_seed_alone_and_is_made_once(real: FeatureArray, twin: tuple, tmp_path: Path) -> None:
    kind, array = twin
    paths = array.files[0][0]
    changed = [path.stat().st_mtime_ns for path in paths]
    assert noise_twin(real, kind, seed=3).files == array.files
    assert [path.stat().st_mtime_ns for path in paths] == changed
    other = noise_twin(real.select(LLM[:1]), kind, seed=4) if kind == "covariance" else noise_twin(real, kind, seed=4)
    assert not {*other.files[0][0]} & {*paths} and other.digest != array.digest != real.digest
    assert not np.allclose(other.rows(EVERY)[:, 0], array.rows(EVERY)[:, 0])
    before = flat(array)
    for path in paths:  # so that it is made again
        shutil.rmtree(path.parent)
    side_by_side.cache_clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(array_module, "ROWS_AT_ONCE", 700)
        again = noise_twin(real, kind, seed=3)
    np.testing.assert_array_equal(flat(again), before)


@pytest.mark.parametrize("kind", NOISES)
def test_items_without_features_and_dims_that_do_not_exist_stay_empty(tmp_path: Path, kind: str) -> None:
    items = ITEMS[:60]
    values = torch.randn(60, 3, 8, generator=torch.Generator().manual_seed(1)) + 5
    videos = store.read(write_values(tmp_path / "videos", items, values))
    captions = store.read(write_set(tmp_path / "captions", [items[2:]], captions_recipe()))
    chosen = [(videos, LLM), (captions, ["caption/text.2/all_mean"])]
    array = compact(chosen, items, str(tmp_path / "cache"))
    twin = noise_twin(array, kind, seed=0)
    rows = twin.rows(np.arange(61))
    assert not rows[0].any() and not rows[1:3, 3].any() and not rows[:, 3, 5:].any()
    assert rows[1:, :3].all() and rows[3:, 3, :5].all()
    assert twin.shapes == array.shapes and twin.missing.sum(0).tolist() == [1, 1, 1, 3]
    real = array.rows(np.arange(3, 61))[:, 3, :5].std(0)
    np.testing.assert_allclose(rows[3:, 3, :5].std(0), real, rtol=0.4)


def test_rows_are_made_in_blocks(real: FeatureArray, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    rows = FeatureArray.rows

    def counted(self: FeatureArray, item_index: np.ndarray) -> torch.Tensor:
        asked.append(len(item_index) * len(self.columns))
        return rows(self, item_index)

    monkeypatch.setattr(FeatureArray, "rows", counted)
    monkeypatch.setattr(array_module, "ROWS_AT_ONCE", 256)
    noise_twin(real.select(LLM[:1]), "covariance", seed=9)
    assert asked and max(asked) == 256


def test_the_factor_is_that_of_the_covariance_over_all_items(tmp_path: Path) -> None:
    """Of features of four degrees of freedom, with a dimension that does not vary, and with items that lack a set."""
    values = torch.rand(200, 4, generator=torch.Generator().manual_seed(2)) @ torch.randn(4, 24) + 3
    values[:, 5] = 0.25
    videos = store.read(write_values(tmp_path / "videos", ITEMS[:200], values.reshape(200, 3, 8)))
    captions = store.read(write_set(tmp_path / "captions", [ITEMS[4:200]], captions_recipe()))
    array = compact([(videos, LLM), (captions, ["caption/text.2/all_mean"])], ITEMS[:200], str(tmp_path / "cache"))
    factor = noise._factor(array).astype(np.float64)
    rows, real = array.rows(np.arange(1, 201)).double().numpy(), []
    for column, width in enumerate(array.widths):
        present = ~array.is_missing(np.arange(1, 201))[:, column, None]
        centred = rows[:, column, :width] - rows[present[:, 0], column, :width].mean(0)
        real.append(centred * present / np.sqrt(present.sum()))
    expected = np.concatenate(real, axis=1).T @ np.concatenate(real, axis=1)
    np.testing.assert_allclose(factor @ factor.T, expected, rtol=1e-5, atol=1e-5 * expected.max())
    assert not factor[5].any() and not np.triu(factor, 1).any()


@pytest.mark.parametrize("most", [23, 24])
def test_a_sum_over_items_has_the_same_distribution(
    real: FeatureArray, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    """23 dimensions at most are factored, and here are 24."""
    monkeypatch.setattr(noise, "MOST_DIMENSIONS", most)
    twin = noise_twin(real, "covariance", seed=5)
    assert ("factored" in twin.digest) == (most == 24)
    theirs, ours = np.cov(flat(real).T), np.cov(flat(twin).T)
    deviation = np.sqrt(np.diag(theirs))
    assert (abs(ours - theirs) / deviation / deviation[:, None]).max() < 0.12
    assert np.linalg.norm(ours - theirs) < 0.1 * np.linalg.norm(theirs)
