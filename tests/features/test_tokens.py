"""Columns of several tokens per item: read, scaled and reduced with the number of tokens that each stands for."""

from pathlib import Path

import numpy as np
import pytest
import torch

from lvlmrec.errors import ConfigError, InputError
from lvlmrec.features import pca, store
from lvlmrec.features.array import FeatureArray
from lvlmrec.features.compact import compact
from lvlmrec.features.noise import NOISES
from lvlmrec.models.sequential.fusions.dff import DFFConfig
from lvlmrec.runs import experiment
from lvlmrec.runs.batches import item_features
from tests.feature_sets import recipe_of, vectors, write_set
from tests.toy import ITEM_IDS, train_config

NUM_ITEMS, T, D = 60, 3, 8
EVERY, TRAIN = np.arange(1, NUM_ITEMS + 1), np.arange(1, 46)
MERGED = [f"describe/llm.{layer}/merged_3" for layer in (0, 2, 4)]


def sizes_and_values() -> tuple[torch.Tensor, torch.Tensor]:
    """[N, L, T] whole sizes, the last tokens of some items empty, and [N, L, T, D] values, zeros where empty."""
    generator = torch.Generator().manual_seed(0)
    sizes = torch.randint(1, 9, (NUM_ITEMS, 3, T), generator=generator).float()
    sizes[::4, :, 2] = 0
    scale = torch.tensor([9.0, 5.0, 3.0, 2.0, 1.0, 0.5, 0.2, 0.1])
    values = torch.randn(NUM_ITEMS, 3, T, D, generator=generator) * scale + 4
    return sizes, values.masked_fill(sizes[..., None] == 0, 0.0)


@pytest.fixture
def uri(tmp_path: Path) -> str:
    recipe = recipe_of("float32", poolings=("merged_3", "visual_mean"))
    sizes, values = sizes_and_values()
    columns = vectors(recipe, ITEM_IDS)
    for layer, name in enumerate(MERGED):
        columns |= {name: values[:, layer].flatten(1), f"{name}.sizes": sizes[:, layer]}
    uri = store.locate(str(tmp_path / "store"), "tiny", recipe)
    store.create(uri, recipe)
    for part in (slice(0, 17), slice(17, None)):
        rows = {name: column[part] for name, column in columns.items()}
        store.write_part(uri, recipe, store.feature_table(recipe, ITEM_IDS[part], [8] * len(ITEM_IDS[part]), rows))
    store.commit(uri)
    return uri


@pytest.fixture
def array(uri: str, tmp_path: Path) -> FeatureArray:
    return compact([(store.read(uri), MERGED)], ITEM_IDS, str(tmp_path / "cache"))


def test_rows_and_sizes_are_the_stored_ones(array: FeatureArray) -> None:
    sizes, values = sizes_and_values()
    assert (array.shape, array.tokens, array.shapes) == ((NUM_ITEMS + 1, 3, T, D), T, [(3, D)])
    assert torch.equal(array.rows(EVERY), values) and torch.equal(array.sizes(EVERY), sizes)
    assert not array.rows(np.array([0])).any() and not array.sizes(np.array([0])).any()
    some = array.select(MERGED[::-2])
    assert torch.equal(some.rows(EVERY), values[:, [2, 0]]) and torch.equal(some.sizes(EVERY), sizes[:, [2, 0]])
    shuffled = array.shuffled(1)
    order = shuffled.row(EVERY) - 1
    assert torch.equal(shuffled.rows(EVERY), values[order]) and torch.equal(shuffled.sizes(EVERY), sizes[order])


def test_each_token_counts_as_often_as_tokens_were_merged_into_it(array: FeatureArray) -> None:
    sizes, values = (part[: len(TRAIN)].double() for part in sizes_and_values())
    scaled = array.standardized(TRAIN).rows(TRAIN).double()
    weight = (sizes / sizes.sum((0, 2), keepdim=True))[..., None]
    torch.testing.assert_close((scaled * weight).sum((0, 2)), torch.zeros(3, D).double(), rtol=0, atol=1e-5)
    torch.testing.assert_close((scaled**2 * weight).sum((0, 2)), torch.ones(3, D).double(), rtol=0, atol=1e-5)
    assert not scaled[sizes == 0].any() and values.any()


@pytest.mark.parametrize("control", ["none", "shuffled"])
def test_components_are_those_of_the_repeated_tokens(array: FeatureArray, control: str) -> None:
    array = array if control == "none" else array.shuffled(1)
    sizes, values = array.sizes(EVERY), array.rows(EVERY).double()
    reduced = pca.reduce(array, TRAIN, 2)
    assert reduced.shape == (NUM_ITEMS + 1, 3, T, 2) and torch.equal(reduced.sizes(EVERY), sizes)
    for layer in range(3):
        repeats = sizes[: len(TRAIN), layer].flatten().long()
        rows = values[: len(TRAIN), layer].flatten(0, 1).repeat_interleave(repeats, dim=0).numpy()
        _, _, directions = np.linalg.svd(rows - rows.mean(0), full_matrices=False)
        signs = np.sign(directions[:2][np.arange(2), abs(directions[:2]).argmax(1)])
        expected = (values[:, layer].numpy() - rows.mean(0)) @ directions[:2].T * signs
        np.testing.assert_allclose(reduced.rows(EVERY)[:, layer], expected, rtol=1e-4, atol=1e-4)


def test_sets_of_different_numbers_of_tokens_are_refused(uri: str, tmp_path: Path) -> None:
    other = store.read(write_set(tmp_path / "other", [ITEM_IDS], recipe_of()))
    with pytest.raises(InputError, match="sets of 1 and 3 tokens per item"):
        compact([(store.read(uri), MERGED), (other, ["describe/llm.0/visual_mean"])], ITEM_IDS, str(tmp_path / "cache"))


@pytest.mark.parametrize(
    ("encoder", "features", "columns", "message"),
    [
        (
            "dff",
            "tokens",
            "[describe/*/merged_3]",
            r"feature_columns: 'describe/llm.0/merged_3' .* 3 tokens .*another pooling, as",
        ),
        (
            "fusion",
            "tokens",
            "[describe/llm.4/merged_3]",
            r"'describe/llm.4/merged_3' .*item encoder 'fusion' reads vectors",
        ),
        (
            "mean",
            "frames",
            "[]",
            r"item_encoder.name: 'mean' reads vectors, and 'video/vision.0/pixels' .* is frames; set",
        ),
    ],
)
def test_models_of_vectors_refuse_tokens_before_any_is_copied(
    world: Path, tmp_path: Path, uri: str, encoder: str, features: str, columns: str, message: str
) -> None:
    place = uri if features == "tokens" else str(world / "frames")
    config = train_config(
        world,
        tmp_path,
        model__item_encoder__name=encoder,
        features=place,
        feature_columns=columns,
        feature_scaling="none",
    )
    with pytest.raises(ConfigError, match=message):
        experiment.prepare(config)
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("control", NOISES)
def test_tokens_have_no_noise_twin(
    world: Path, tmp_path: Path, uri: str, monkeypatch: pytest.MonkeyPatch, control: str
) -> None:
    monkeypatch.setattr(DFFConfig, "reads_tokens", True)
    values = {"model__item_encoder__name": "dff", "features": uri, "feature_columns": "[describe/*/merged_3]"}
    with pytest.raises(ConfigError, match=rf"feature_control: '{control}' of several tokens; choices: none, shuffled"):
        experiment.load_features(train_config(world, tmp_path, **values, feature_control=control), ITEM_IDS)
    array = experiment.load_features(train_config(world, tmp_path, **values, feature_control="shuffled"), ITEM_IDS)
    assert array is not None and array.tokens == T


@pytest.mark.parametrize("scaled", [True, False])
def test_a_model_reads_the_tokens_of_a_layer(array: FeatureArray, scaled: bool) -> None:
    array = array.standardized(TRAIN) if scaled else array
    features = item_features(array, EVERY[5:9], torch.device("cpu"))
    assert features is not None
    for layer in range(3):
        filled = array.sizes(EVERY[5:9])[:, layer] > 0  # what an empty token is read as is its reader's to mask
        ours, theirs = features.layer(layer, torch.float32), array.rows(EVERY[5:9])[:, layer]
        assert ours.shape == (4, T, D)
        torch.testing.assert_close(ours[filled], theirs[filled])
