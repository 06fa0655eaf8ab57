from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from lvlmrec.errors import InputError
from lvlmrec.features import store
from lvlmrec.features.compact import choose_columns, compact
from lvlmrec.features.recipe import DTYPES
from tests.feature_sets import captions_recipe, recipe_of, vectors, write_set

MakeSet = Callable[..., str]
ITEMS = [f"item{i}" for i in range(40)]
LLM = ["describe/llm.0/visual_mean", "describe/llm.2/visual_mean", "describe/llm.4/visual_mean"]


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_are_the_stored_features_in_item_index_order(make_set: MakeSet, tmp_path: Path, dtype: str) -> None:
    feature_set = store.read(make_set([ITEMS[:7], ITEMS[7:]], dtype))
    order = ITEMS[::-1]
    array = compact([(feature_set, LLM)], order, str(tmp_path / "cache"))
    assert array.shape == (41, 3, 8)
    expected = vectors(recipe_of(dtype), order)
    stacked = torch.stack([expected[name] for name in LLM], dim=1).to(getattr(torch, dtype)).float()
    assert torch.equal(array.rows(np.arange(1, 41)), stacked)
    assert torch.equal(array.rows(np.array([0])), torch.zeros(1, 3, 8))


def test_a_column_is_made_once_per_set_and_id_map(make_set: MakeSet, tmp_path: Path) -> None:
    feature_set, cache = store.read(make_set([ITEMS])), str(tmp_path / "cache")
    first = compact([(feature_set, LLM)], ITEMS, cache)
    ((paths, _),) = first.files
    changed = [path.stat().st_mtime_ns for path in paths]
    assert compact([(feature_set, LLM)], ITEMS, cache).files == first.files
    assert [path.stat().st_mtime_ns for path in paths] == changed
    assert not {*paths} & {*compact([(feature_set, LLM)], ITEMS[::-1], cache).files[0][0]}


def test_standardized_has_mean_zero_and_variance_one_over_the_given_items(make_set: MakeSet, tmp_path: Path) -> None:
    array = compact([(store.read(make_set([ITEMS], "float32")), LLM)], ITEMS, str(tmp_path / "cache"))
    train = np.arange(1, 31)
    scaled = array.standardized(train)
    rows = scaled.rows(train).double()
    torch.testing.assert_close(rows.mean(0), torch.zeros(3, 8, dtype=torch.float64), atol=1e-6, rtol=0)
    torch.testing.assert_close(rows.var(0, correction=0), torch.ones(3, 8, dtype=torch.float64), atol=1e-5, rtol=0)
    raw = array.rows(np.array([35]))
    reference = array.rows(train)
    expected = (raw - reference.mean(0)) / reference.std(0, correction=0)
    torch.testing.assert_close(scaled.rows(np.array([35])), expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(scaled.select(LLM[1:]).rows(train), scaled.rows(train)[:, 1:])


def test_a_dimension_without_variance_becomes_zero(tmp_path: Path) -> None:
    recipe = recipe_of("float32")
    uri = store.locate(str(tmp_path / "store"), "tiny", recipe)
    store.create(uri, recipe)
    features = vectors(recipe, ITEMS)
    features[LLM[0]][:, 2] = 0.1
    store.write_part(uri, recipe, store.feature_table(recipe, ITEMS, [8] * 40, features))
    store.commit(uri)
    array = compact([(store.read(uri), LLM)], ITEMS, str(tmp_path / "cache")).standardized(np.arange(1, 41))
    assert torch.equal(array.rows(np.arange(1, 41))[:, 0, 2], torch.zeros(40))


def test_a_few_missing_items_become_the_mean_and_many_are_an_error(make_set: MakeSet, tmp_path: Path) -> None:
    feature_set, cache = store.read(make_set([ITEMS])), str(tmp_path / "cache")
    array = compact([(feature_set, LLM)], [*ITEMS, "unknown"], cache)
    assert array.missing.all(1).sum() == array.missing.any(1).sum() == 2
    assert torch.equal(array.standardized(np.arange(1, 41)).rows(np.array([41])), torch.zeros(1, 3, 8))
    with pytest.raises(InputError, match=r"100\.0% of the dataset's 2 items.*feature set of another catalogue"):
        compact([(feature_set, LLM)], ["x", "y"], cache)


def test_columns_are_chosen_by_pattern_and_by_what_the_encoder_reads(make_set: MakeSet) -> None:
    feature_set = store.read(make_set([ITEMS]))
    assert choose_columns(feature_set, [], "many") == LLM
    assert choose_columns(feature_set, [], "one") == LLM[-1:]
    assert choose_columns(feature_set, ["*/llm.[02]/*"], "many") == LLM[:2]
    assert choose_columns(feature_set, ["*/llm.[02]/*"], "one") == LLM[1:2]
    with pytest.raises(InputError, match=r"match no column; columns: video/vision\.2"):
        choose_columns(feature_set, ["*/llm.9/*"], "many")
    with pytest.raises(InputError, match=r"different widths \[6, 8\]"):
        choose_columns(feature_set, ["*"], "many")


def test_columns_of_several_tokens_are_chosen_by_the_name_of_their_pooling(make_set: MakeSet) -> None:
    features = store.read(make_set([["a"]], poolings=("merged_3", "visual_mean")))
    means = [f"describe/llm.{layer}/visual_mean" for layer in (0, 2, 4)]
    assert choose_columns(features, [], "many") == means
    assert choose_columns(features, ["describe/*"], "many") == means
    assert choose_columns(features, ["*/merged_3"], "many") == [
        name.replace("visual_mean", "merged_3") for name in means
    ]
    assert choose_columns(features, ["*/merged_3"], "one") == ["describe/llm.4/merged_3"]
    with pytest.raises(InputError, match=r"match no column; columns: .*merged_3 of"):
        choose_columns(features, ["*/merged_3.sizes"], "many")
    with pytest.raises(InputError, match=r"different numbers of tokens \[1, 3\]"):
        choose_columns(features, ["*/llm.*/visual_mean", "*/merged_3"], "many")


def test_the_shuffled_control_permutes_whole_rows(make_set: MakeSet, tmp_path: Path) -> None:
    array = compact([(store.read(make_set([ITEMS])), LLM)], ITEMS, str(tmp_path / "cache"))
    every = np.arange(1, 41)
    shuffled = array.shuffled(seed=3)
    assert not torch.equal(shuffled.rows(every), array.rows(every))
    assert torch.equal(shuffled.rows(every).flatten(1).sort(0).values, array.rows(every).flatten(1).sort(0).values)
    assert torch.equal(shuffled.rows(np.array([0])), torch.zeros(1, 3, 8))
    assert torch.equal(array.shuffled(seed=3).rows(every), shuffled.rows(every))
    assert shuffled.digest != array.digest


CAPTIONS = ["caption/text.0/all_mean", "caption/text.1/all_mean", "caption/text.2/all_mean"]


def test_captions_through_a_text_encoder_are_a_feature_set_like_any_other(tmp_path: Path) -> None:
    feature_set = store.read(write_set(tmp_path, [ITEMS], captions_recipe()))
    assert choose_columns(feature_set, [], "many") == CAPTIONS
    assert choose_columns(feature_set, [], "one") == CAPTIONS[-1:]
    array = compact([(feature_set, CAPTIONS)], ITEMS, str(tmp_path / "cache"))
    expected = torch.stack([vectors(captions_recipe(), ITEMS)[name] for name in CAPTIONS], dim=1)
    assert torch.equal(array.rows(np.arange(1, 41)), expected)


@pytest.mark.parametrize(
    ("dtype", "other"), [("float16", "float32"), ("bfloat16", "float32"), ("bfloat16", "bfloat16")]
)
def test_several_feature_sets_stand_side_by_side(tmp_path: Path, dtype: str, other: str) -> None:
    videos = write_set(tmp_path / "videos", [ITEMS[:9], ITEMS[9:]], recipe_of(dtype))
    captions = write_set(tmp_path / "captions", [ITEMS[1:]], captions_recipe(other))  # none of item0
    chosen = [(store.read(videos), LLM), (store.read(captions), CAPTIONS[1:])]
    array = compact(chosen, ITEMS, str(tmp_path / "cache"))
    assert array.shape == (41, 5, 8)
    assert array.shapes == [(3, 8), (2, 5)]
    assert [stored.dtype for stored in array.stored()] == [getattr(torch, dtype), getattr(torch, other)]
    names = [
        f"{uri.rsplit('/', 1)[-1]}:{name}" for uri, names in ((videos, LLM), (captions, CAPTIONS[1:])) for name in names
    ]
    assert list(array.names) == names
    assert array.recipe == f"{recipe_of(dtype).fingerprint}+{captions_recipe(other).fingerprint}"

    rows = array.rows(np.arange(1, 41))
    for column, (recipe, name) in enumerate(
        [(recipe_of(dtype), n) for n in LLM] + [(captions_recipe(other), n) for n in CAPTIONS[1:]]
    ):
        stored = vectors(recipe, ITEMS)[name].to(getattr(torch, recipe.dtype)).float()
        width = stored.shape[1]
        start = 1 if column >= 3 else 0
        assert torch.equal(rows[start:, column, :width], stored[start:])
        assert not rows[:start, column].any() and not rows[:, column, width:].any()

    assert array.missing[1:].sum(0).tolist() == [0, 0, 0, 1, 1]
    scaled = array.standardized(np.arange(1, 31)).rows(np.arange(1, 41))
    alone = compact(chosen[1:], ITEMS, str(tmp_path / "cache")).standardized(np.arange(1, 31)).rows(np.arange(1, 41))
    torch.testing.assert_close(scaled[:, 3:, :5], alone)
    assert scaled[0, :3].all() and not scaled[0, 3:].any() and not scaled[:, 3:, 5:].any()

    fewer = array.select([names[1], names[4]])
    assert fewer.shapes == [(1, 8), (1, 5)]
    assert torch.equal(fewer.rows(np.arange(1, 41)), rows[:, [1, 4]])
    assert array.select(names[3:]).shapes == [(2, 5)]


def test_a_feature_set_given_twice_is_refused(make_set: MakeSet, tmp_path: Path) -> None:
    feature_set = store.read(make_set([ITEMS]))
    with pytest.raises(InputError, match="given twice"):
        compact([(feature_set, LLM), (feature_set, LLM)], ITEMS, str(tmp_path))
