"""Checkpoints: published, found again, and refused where they do not fit."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from lvlmrec.errors import InputError
from lvlmrec.runs import checkpoint
from lvlmrec.runs.loop import encode_catalogue, encode_users
from tests.feature_sets import recipe_of, write_set
from tests.toy import CPU, ITEM_IDS, fitted, publish, train_config


@pytest.mark.parametrize(
    "values",
    [
        {"feature_scaling": "standardize"},
        {"feature_scaling": "none"},
        {"feature_control": "shuffled"},
        {"feature_control": "covariance"},
        {"feature_pca": 3},
        {"feature_pca": 2, "feature_scaling": "none", "feature_control": "shuffled"},
    ],
)
@pytest.mark.parametrize("encoder", ["id", "dff"])
def test_a_loaded_checkpoint_scores_as_before(world: Path, tmp_path: Path, encoder: str, values: dict) -> None:
    prepared, state = fitted(train_config(world, tmp_path, model__item_encoder__name=encoder, **values))
    loaded = checkpoint.load_checkpoint(publish(prepared, state), {})
    state.model.load_state_dict(state.best_weights)
    state.model.eval()
    ours = encode_catalogue(state.model, len(ITEM_IDS), prepared.features, CPU)
    theirs = encode_catalogue(loaded.model, len(loaded.item_ids), loaded.features, CPU)
    assert torch.equal(ours, theirs)
    queries = [encode_users(model, ours, prepared.data.validation.inputs) for model in (state.model, loaded.model)]
    assert torch.equal(queries[0], queries[1])
    assert loaded.item_ids == prepared.data.item_ids.tolist()
    assert loaded.result["validation"] == state.progress.best
    assert loaded.config.model == prepared.config.model


def test_the_newest_checkpoint_of_a_folder_is_found(world: Path, tmp_path: Path) -> None:
    uris = [publish(*fitted(train_config(world, tmp_path, training__epochs=1, seed=seed))) for seed in (0, 1, 2)]
    assert len(set(uris)) == 3
    folder = str(tmp_path / "checkpoints")
    assert checkpoint.latest(folder) == uris[2]
    os.utime(Path(uris[1], checkpoint.RESULT), (2e9, 2e9))
    assert checkpoint.latest(folder) == uris[1]
    assert checkpoint.latest(uris[0]) == uris[0]
    Path(uris[1], checkpoint.RESULT).unlink()  # without its result it is not published
    assert checkpoint.latest(folder) == uris[2]
    assert checkpoint.read_result(uris[1]) is None


def test_no_checkpoint_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no checkpoint there; train first"):
        checkpoint.latest(str(tmp_path / "nowhere"))


def test_features_that_moved_are_found_where_they_are_now(world: Path, tmp_path: Path) -> None:
    moved = shutil.copytree(world, tmp_path / "first")
    uri = publish(*fitted(train_config(moved, tmp_path, model__item_encoder__name="dff")))
    before = checkpoint.load_checkpoint(uri, {})
    assert before.features is not None
    expected = before.features.rows(np.arange(61))
    (moved / "features").rename(tmp_path / "second")
    with pytest.raises(InputError, match="features"):
        checkpoint.load_checkpoint(uri, {})
    after = checkpoint.load_checkpoint(uri, {"features": str(tmp_path / "second"), "dataset.path": ""})
    assert after.features is not None
    assert torch.equal(after.features.rows(np.arange(61)), expected)


def test_a_checkpoint_brings_its_components_to_a_machine_without_them(world: Path, tmp_path: Path) -> None:
    config = train_config(world, tmp_path, model__item_encoder__name="dff", feature_pca=3)
    prepared, state = fitted(config)
    uri = publish(prepared, state)
    loaded = checkpoint.load_checkpoint(uri, {"cache": str(tmp_path / "elsewhere")})
    assert loaded.features is not None and prepared.features is not None
    assert all(path.is_relative_to(tmp_path / "elsewhere") for paths, _ in loaded.features.files for path in paths)
    assert torch.equal(loaded.features.rows(np.arange(61)), prepared.features.rows(np.arange(61)))


def test_features_of_another_recipe_are_refused(world: Path, tmp_path: Path) -> None:
    uri = publish(*fitted(train_config(world, tmp_path, model__item_encoder__name="dff")))
    other = write_set(tmp_path / "store", [ITEM_IDS], recipe_of("float32"))  # same columns, other values
    with pytest.raises(InputError, match=f"not of the recipe {recipe_of().fingerprint}"):
        checkpoint.load_checkpoint(uri, {"features": other})


def test_a_feature_set_may_grow_after_training(world: Path, tmp_path: Path) -> None:
    moved = shutil.copytree(world, tmp_path / "growing")
    uri = publish(*fitted(train_config(moved, tmp_path, model__item_encoder__name="dff")))
    before = checkpoint.load_checkpoint(uri, {}).features
    write_set(moved / "features", [["new1", "new2"]], recipe_of())
    after = checkpoint.load_checkpoint(uri, {}).features
    assert before is not None
    assert after is not None
    assert torch.equal(before.rows(np.arange(61)), after.rows(np.arange(61)))


def test_a_checkpoint_holds_no_address_of_a_tracking_server(world: Path, tmp_path: Path) -> None:
    uri = publish(*fitted(train_config(world, tmp_path, tracking_uri="postgresql://ann:secret@host/db")))
    files = sorted(Path(uri).iterdir())
    assert {file.name for file in files} == {"config.json", "item_ids.json", "model.safetensors", "result.json"}
    assert not any(b"secret" in file.read_bytes() for file in files)
    assert json.loads((Path(uri) / "config.json").read_text())["training"]["lr"] == 0.01
