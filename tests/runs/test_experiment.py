"""What names a run, and what training gets to see."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from lvlmrec.config import load
from lvlmrec.data.split import Holdout, Split
from lvlmrec.errors import ConfigError, InputError
from lvlmrec.features import provenance, store
from lvlmrec.jobs import sample
from lvlmrec.runs import experiment
from lvlmrec.runs.checkpoint import load_checkpoint
from lvlmrec.runs.experiment import TrainConfig
from tests.feature_sets import captions_recipe, recipe_of, vectors, write_set
from tests.toy import ITEM_IDS, Fitting, fitted, publish, train_config, video, walks, write_pairs, write_world


def key(config: TrainConfig) -> str:
    return experiment.prepare(config).key


@pytest.fixture
def dff(world: Path, tmp_path: Path) -> str:
    return key(train_config(world, tmp_path, model__item_encoder__name="dff"))


@pytest.mark.parametrize(
    "values",
    [
        {"training__num_workers": 3},
        {"training__use_gpu": "true"},
        {"tracking_uri": "http://somewhere:5000"},
        {"cache": "./elsewhere"},
    ],
    ids=lambda values: next(iter(values)),
)
def test_the_key_ignores_where_and_how_fast(
    world: Path, tmp_path: Path, dff: str, values: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert key(train_config(world, tmp_path / "other", model__item_encoder__name="dff", **values)) == dff


def test_the_key_ignores_where_dataset_and_features_lie(world: Path, tmp_path: Path, dff: str) -> None:
    moved = shutil.copytree(world, tmp_path / "moved")
    assert key(train_config(moved, tmp_path, model__item_encoder__name="dff")) == dff


@pytest.mark.parametrize(
    "values",
    [
        {"seed": 1},
        {"training__lr": 0.02},
        {"training__epochs": 3},
        {"training__batch_size": 32},
        {"training__patience": 2},
        {"training__precision": "bfloat16"},
        {"training__loss__name": "bpr"},
        {"training__loss__log_popularity_correction": "false"},
        {"training__uniformity": 0.1},
        {"model__embedding_dim": 32},
        {"model__backbone__dropout": 0.5},
        {"model__item_encoder__name": "fusion"},
        {"dataset__max_length": 5},
        {"dataset__min_interactions": 7},
        {"feature_scaling": "none"},
        {"feature_control": "shuffled"},
        {"feature_control": "gaussian"},
        {"feature_control": "covariance"},
        {"feature_pca": 2},
        {"model__item_encoder__gate": "mlp"},
        {"feature_columns": "[describe/llm.0/visual_mean]"},
    ],
    ids=lambda values: next(iter(values)),
)
def test_the_key_knows_all_that_is_learned_from(world: Path, tmp_path: Path, dff: str, values: dict) -> None:
    assert key(train_config(world, tmp_path, **{"model__item_encoder__name": "dff", **values})) != dff


def test_the_key_knows_the_data_themselves(tmp_path: Path) -> None:
    world = write_world(tmp_path / "world")
    before = key(train_config(world, tmp_path, model__item_encoder__name="dff"))
    rows = walks()
    rows[0][0], rows[0][1] = rows[0][1], rows[0][0]
    write_pairs(world / "interactions", rows)
    interactions = key(train_config(world, tmp_path, model__item_encoder__name="dff"))
    shutil.rmtree(world / "features")
    write_set(world / "features", [ITEM_IDS], recipe_of("float32"))
    features = key(train_config(world, tmp_path, model__item_encoder__name="dff"))
    assert len({before, interactions, features}) == 3


def test_the_controls_and_the_components_are_told_apart(world: Path, tmp_path: Path) -> None:
    values = [{"feature_control": name} for name in ("none", "shuffled", "gaussian", "uniform", "covariance")]
    values += [{"feature_pca": 2}, {"feature_pca": 3}, {"feature_pca": 2, "feature_control": "gaussian"}]
    digests, every = [], np.arange(1, 61)
    for each in values:
        features = experiment.prepare(train_config(world, tmp_path, model__item_encoder__name="dff", **each)).features
        assert features is not None
        digests.append(features.digest)
        assert features.shape == (61, 3, each.get("feature_pca", 8))
        rows = features.rows(every)
        assert abs(rows.mean()) < 0.1 and rows.std() == pytest.approx(1, abs=0.1), "standardised, whatever they are"
    assert len(set(digests)) == len(values)


def test_a_run_is_tagged_with_what_its_features_mix(tmp_path: Path) -> None:
    world = write_world(tmp_path / "world")
    dff = train_config(world, tmp_path, model__item_encoder__name="dff")
    assert "feature_differences" not in experiment.prepare(dff).tags
    (uri,), recipe = store.committed(str(world / "features")), recipe_of("float32")
    for generation, device in enumerate(("cpu", "gpu"), 1):
        rows = store.feature_table(recipe, ITEM_IDS[:2], [8] * 2, vectors(recipe, ITEM_IDS[:2]))
        store.write_part(uri, recipe, rows, generation, [provenance.to_json({"device": device})])
    store.commit(uri, 2)
    prepared = experiment.prepare(dff)
    assert prepared.tags["feature_differences"] == "device: cpu | gpu"
    assert experiment.summary(prepared)["feature_differences"] == "device: cpu | gpu"


def test_features_of_another_catalogue_are_refused(world: Path, tmp_path: Path) -> None:
    other = write_set(tmp_path / "store", [[f"other{i}" for i in range(60)]], recipe_of())
    config = train_config(world, tmp_path, features=other, model__item_encoder__name="dff")
    with pytest.raises(InputError, match=r"100\.0%.*another catalogue.*other0"):
        experiment.prepare(config)


def test_a_remote_cache_is_refused(world: Path, tmp_path: Path) -> None:
    config = train_config(world, tmp_path, cache="s3://bucket/cache", model__item_encoder__name="dff")
    with pytest.raises(InputError, match="cache 's3://bucket/cache'"):
        experiment.prepare(config)


def test_an_encoder_of_one_layer_gets_the_deepest(world: Path, tmp_path: Path) -> None:
    names = {}
    for encoder in ("id", "fusion", "dff"):
        features = experiment.prepare(train_config(world, tmp_path, model__item_encoder__name=encoder)).features
        names[encoder] = features.names if features else ()
    columns = tuple(f"describe/llm.{layer}/visual_mean" for layer in (0, 2, 4))
    assert names == {"id": (), "fusion": columns[-1:], "dff": columns}


@pytest.mark.parametrize("encoder", ["fusion", "replacement", "concatenation"])
def test_a_single_layer_is_chosen_by_its_column(world: Path, tmp_path: Path, encoder: str) -> None:
    """No item encoder of its own: `fusion` on one column is the study's single layer."""
    column = "describe/llm.2/visual_mean"
    config = train_config(world, tmp_path, model__item_encoder__name=encoder, feature_columns=f"[{column}]")
    features = experiment.prepare(config).features
    assert features is not None and features.names == (column,)


@pytest.mark.parametrize(
    ("encoder", "columns"), [("dff", 6), ("mean", 6), ("fusion", 2), ("concatenation", 2), ("id", 0)]
)
def test_features_may_be_several_feature_sets(world: Path, tmp_path: Path, encoder: str, columns: int) -> None:
    captions = write_set(tmp_path / "captions", [ITEM_IDS[:30], ITEM_IDS[30:]], captions_recipe())
    both = f"[{world / 'features'},{captions}]"
    prepared, state = fitted(
        train_config(world, tmp_path, model__item_encoder__name=encoder, features=both, training__epochs=1)
    )
    names = experiment.summary(prepared)["feature_columns"]
    assert len(names) == columns
    assert sum("caption/text" in name for name in names) == columns // 2
    uri = publish(prepared, state)
    loaded = load_checkpoint(uri, {})
    assert state.best_weights.keys() == loaded.model.state_dict().keys()
    if loaded.features is not None and prepared.features is not None:
        every = np.arange(1, 61)
        np.testing.assert_array_equal(loaded.features.rows(every), prepared.features.rows(every))
        moved = shutil.copytree(captions, tmp_path / "moved" / Path(captions).name)
        again = load_checkpoint(uri, {"features": [str(world / "features"), str(moved)]})
        assert again.features is not None
        np.testing.assert_array_equal(again.features.rows(every), prepared.features.rows(every))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model__item_encoder__frozen_blocks": 9}, "item_encoder.frozen_blocks: 9: the encoder has 3"),
        ({"features": "{world}/features"}, "item_encoder.name: 'video' reads one set of stored frames"),
        (
            {"model__item_encoder__encoder": "{{name: videomae, patch_size: 7}}"},
            "item_encoder.encoder: frames of .* do not divide into tubelets of 2 x 7 x 7",
        ),
    ],
    ids=["frozen", "vectors", "patches"],
)
def test_a_model_that_does_not_fit_the_features_is_refused_before_training(
    world: Path, tmp_path: Path, values: dict, message: str
) -> None:
    wrong = {key: str(value).format(world=world) for key, value in values.items()}
    config = train_config(world, tmp_path, **(video(world) | wrong))
    with pytest.raises(ConfigError, match=message):
        experiment.prepare(config)


def test_a_feature_set_that_is_given_twice_is_refused(world: Path, tmp_path: Path) -> None:
    twice = f"[{world}/features,{world}/features/]"
    config = train_config(world, tmp_path, features=twice, model__item_encoder__name="dff")
    with pytest.raises(ConfigError, match=r"features: .*: a feature set is given twice"):
        experiment.prepare(config)


def test_no_features_are_asked_of_a_run_on_the_sample_that_reads_none(tmp_path: Path) -> None:
    config = load(TrainConfig, [{"workspace": str(tmp_path), "features": "/nowhere"}], ["features="])
    sample.ensure_features(config)
    assert config.features == "" and not list(tmp_path.iterdir())


@pytest.mark.parametrize("features", ["[]", "3", "[1]", "[[a]]", "''"])
def test_features_that_are_no_uris_are_the_users_fault(world: Path, tmp_path: Path, features: str) -> None:
    config = train_config(world, tmp_path, model__item_encoder__name="dff", features=features)
    with pytest.raises(ConfigError, match=r"features: .* is neither the URI of a feature set nor a list of URIs"):
        experiment.prepare(config)


def test_training_never_opens_the_test_split(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def closed(self: Split) -> Holdout:
        raise AssertionError("the test split was opened")

    monkeypatch.setattr(Split, "test", closed)
    Fitting(experiment.prepare(train_config(world, tmp_path, model__item_encoder__name="dff"))).run()


def test_other_test_interactions_change_nothing_that_training_sees(tmp_path: Path) -> None:
    rows = walks()
    other = [list(row) for row in rows]
    for row in other:  # another last item that the user does not have; every item stays in the catalogue
        row[-1] = next(item for item in ITEM_IDS if item not in row)
    histories = []
    seen = []
    for name, content in {"one": rows, "two": other}.items():
        write_pairs(tmp_path / name / "interactions", content)
        write_set(tmp_path / name / "features", [ITEM_IDS], recipe_of())
        config = train_config(tmp_path / name, tmp_path, model__item_encoder__name="dff")
        prepared = experiment.prepare(config)
        fitting = Fitting(prepared)
        fitting.run()
        histories.append([{k: v for k, v in epoch.items() if k != "epoch_seconds"} for epoch in fitting.history])
        seen.append(prepared)
    one, two = (prepared.data for prepared in seen)
    assert [row[-1] for row in rows] != [row[-1] for row in other]
    assert one.item_ids.tolist() == two.item_ids.tolist()
    for name in ("sequences", "train_counts"):
        np.testing.assert_array_equal(getattr(one, name), getattr(two, name))
    for name in ("inputs", "targets", "histories"):
        np.testing.assert_array_equal(getattr(one.validation, name), getattr(two.validation, name))
    assert histories[0] == histories[1]


def test_the_summary_counts_what_was_left_out(tmp_path: Path) -> None:
    rows = [*walks(), ["v1", "v2"]]  # the last user is too short
    write_pairs(tmp_path / "interactions", rows)
    summary = experiment.summary(experiment.prepare(train_config(tmp_path, tmp_path)))
    assert summary["users"] == 150
    assert summary["catalogue"] == 60
    assert summary["dataset_report"]["users_too_short"] == 1
    assert summary["recipe"] == summary["feature_set"] == "none"
