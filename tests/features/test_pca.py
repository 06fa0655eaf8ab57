"""Principal components against numpy's, fitted on training items alone."""

from pathlib import Path

import numpy as np
import pytest
import torch

from lvlmrec.errors import InputError
from lvlmrec.features import array as array_module
from lvlmrec.features import pca, store
from lvlmrec.features.array import FeatureArray
from lvlmrec.features.compact import compact
from tests.feature_sets import captions_recipe, write_set, write_values

ITEMS = [f"item{i}" for i in range(90)]
EVERY, TRAIN = np.arange(1, 91), np.arange(1, 71)
LLM = [f"describe/llm.{layer}/visual_mean" for layer in (0, 2, 4)]


def values() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    scale = torch.tensor([9.0, 5.0, 3.0, 2.0, 1.0, 0.5, 0.2, 0.1])
    turn = torch.linalg.qr(torch.randn(3, 8, 8, generator=generator))[0]
    return torch.einsum("nld,lde->nle", torch.randn(90, 3, 8, generator=generator) * scale, turn) + 4


def array_of(folder: Path, content: torch.Tensor) -> FeatureArray:
    feature_set = store.read(write_values(folder / "store", ITEMS, content))
    return compact([(feature_set, LLM)], ITEMS, str(folder / "cache"))


@pytest.mark.parametrize("rows_at_once", [4096, 16])
def test_it_is_numpys_pca_of_the_training_items(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows_at_once: int
) -> None:
    monkeypatch.setattr(array_module, "ROWS_AT_ONCE", rows_at_once)
    content = values()
    reduced = pca.reduce(array_of(tmp_path, content), TRAIN, 3)
    assert reduced.shape == (91, 3, 3) and reduced.shapes == [(3, 3)]
    for column in range(3):
        layer = content[:, column].double().numpy()
        centred = layer - layer[:70].mean(0)
        _, _, directions = np.linalg.svd(centred[:70], full_matrices=False)
        expected = centred @ directions[:3].T
        signs = np.sign(directions[:3][np.arange(3), abs(directions[:3]).argmax(1)])
        np.testing.assert_allclose(reduced.rows(EVERY)[:, column], expected * signs, rtol=1e-4, atol=1e-4)
    assert not reduced.rows(np.array([0])).any()


def test_standardized_it_is_whitened(tmp_path: Path) -> None:
    whitened = pca.reduce(array_of(tmp_path, values()), TRAIN, 4).standardized(TRAIN).rows(TRAIN).double()
    for column in range(3):
        covariance = whitened[:, column].T @ whitened[:, column] / len(TRAIN)
        torch.testing.assert_close(covariance, torch.eye(4, dtype=torch.float64), rtol=0, atol=1e-4)


def test_only_training_items_decide(tmp_path: Path) -> None:
    content = values()
    reduced = pca.reduce(array_of(tmp_path / "one", content), TRAIN, 3)
    content[70:] = 1000 * content[70:].flip(2)  # items that training does not have
    other = pca.reduce(array_of(tmp_path / "two", content), TRAIN, 3)
    assert torch.equal(other.rows(TRAIN), reduced.rows(TRAIN))
    assert not torch.equal(other.rows(EVERY), reduced.rows(EVERY))
    content[0] += 100
    third = pca.reduce(array_of(tmp_path / "three", content), TRAIN, 3)
    assert not torch.allclose(third.rows(TRAIN)[1:], reduced.rows(TRAIN)[1:])


def test_it_is_made_once_per_number_of_components_and_training_items(tmp_path: Path) -> None:
    array = array_of(tmp_path, values())
    reduced = pca.reduce(array, TRAIN, 3)
    changed = [path.stat().st_mtime_ns for path in reduced.files[0][0]]
    again = pca.reduce(array, TRAIN, 3)
    assert again.files == reduced.files and [path.stat().st_mtime_ns for path in again.files[0][0]] == changed
    assert pca.reduce(array, TRAIN, 2).files != reduced.files
    assert pca.reduce(array, TRAIN[1:], 3).files != reduced.files
    assert reduced.projection is not None
    assert pca.project(array, reduced.projection).files == reduced.files


def test_each_feature_set_of_another_width_has_components_of_its_own(tmp_path: Path) -> None:
    videos = store.read(write_values(tmp_path / "videos", ITEMS, values()))
    captions = store.read(write_set(tmp_path / "captions", [ITEMS[3:]], captions_recipe()))  # the first three: none
    text = ["caption/text.2/all_mean"]
    both = pca.reduce(compact([(videos, LLM), (captions, text)], ITEMS, str(tmp_path / "cache")), TRAIN, 4)
    alone = pca.reduce(compact([(captions, text)], ITEMS, str(tmp_path / "cache")), TRAIN, 4)
    assert both.shapes == [(3, 4), (1, 4)]
    assert torch.equal(both.rows(EVERY)[:, 3:], alone.rows(EVERY))
    assert not alone.rows(np.arange(1, 4)).any() and alone.rows(np.arange(4, 91)).all()


def test_directions_without_variance_become_zero_not_noise(tmp_path: Path) -> None:
    content = values()
    content[..., 2:] = 0  # two dimensions are left
    reduced = pca.reduce(array_of(tmp_path, content), TRAIN, 5).standardized(TRAIN)
    assert reduced.rows(EVERY)[..., :2].all() and not reduced.rows(EVERY)[..., 2:].any()


@pytest.mark.parametrize(("items", "components"), [(TRAIN, 9), (TRAIN[:4], 4)])
def test_more_components_than_there_can_be_are_refused(tmp_path: Path, items: np.ndarray, components: int) -> None:
    with pytest.raises(InputError, match=rf"feature_pca: {components}: .*choices: 0 \(off\) to {components - 1}"):
        pca.reduce(array_of(tmp_path, values()), items, components)
