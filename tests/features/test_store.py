import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch

from lvlmrec import storage
from lvlmrec.errors import InputError
from lvlmrec.features import store
from lvlmrec.features.recipe import DTYPES
from lvlmrec.storage import parquet
from tests.feature_sets import recipe_of, vectors

MakeSet = Callable[..., str]


def part_of(uri: str) -> str:
    return storage.list_files(f"{uri}/parts")[0].uri


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_other_readers_see_vectors(make_set: MakeSet, dtype: str) -> None:
    uri = make_set([["a", "b"]], dtype)
    expected = vectors(recipe_of(dtype), ["a", "b"])["describe/llm.2/visual_mean"].to(getattr(torch, dtype)).numpy()
    frame = pd.read_parquet(part_of(uri))
    assert frame["item_id"].tolist() == ["a", "b"]
    np.testing.assert_array_equal(np.stack(frame["describe/llm.2/visual_mean"].to_numpy()), expected)
    column = duckdb.sql(
        f"""select "describe/llm.2/visual_mean" as v from '{part_of(uri)}' order by item_id"""
    ).fetchall()
    np.testing.assert_array_equal(np.array([row[0] for row in column], dtype=dtype), expected)


def test_bfloat16_keeps_its_bits_and_says_so(make_set: MakeSet) -> None:
    uri = make_set([["a"]], "bfloat16")
    table = pq.read_table(part_of(uri))
    field = table.schema.field("describe/llm.0/visual_mean")
    assert field.metadata[store.DTYPE_KEY] == b"bfloat16"
    assert field.metadata[store.SHAPE_KEY] == b"8"
    bits = torch.from_numpy(np.array(table["describe/llm.0/visual_mean"][0].as_py(), dtype=np.uint16))
    expected = vectors(recipe_of(), ["a"])["describe/llm.0/visual_mean"][0].bfloat16()
    assert torch.equal(bits.view(torch.bfloat16), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_merged_tokens_are_stored_row_by_row_with_their_sizes(make_set: MakeSet, dtype: str) -> None:
    uri = make_set([["a", "b"]], dtype, poolings=("merged_3", "visual_mean"))
    table = pq.read_table(part_of(uri))
    tokens, sizes = table.schema.field("describe/llm.2/merged_3"), table.schema.field("describe/llm.2/merged_3.sizes")
    assert tokens.metadata == {store.SHAPE_KEY: b"3,8", store.DTYPE_KEY: dtype.encode()}
    assert sizes.metadata == {store.SHAPE_KEY: b"3", store.DTYPE_KEY: b"float32"}
    expected = vectors(recipe_of(dtype, ("merged_3", "visual_mean")), ["a", "b"])
    read = duckdb.sql(f"""select "{sizes.name}" as v from '{part_of(uri)}' order by item_id""").fetchall()
    np.testing.assert_array_equal(np.array([row[0] for row in read], np.float32), expected[sizes.name].numpy())
    values = np.stack(table[tokens.name].to_numpy())
    np.testing.assert_array_equal(values, store.cast(expected[tokens.name], dtype, tokens.name))


@pytest.mark.parametrize("dtype", DTYPES)
def test_parts_are_written_without_dictionary_and_statistics(make_set: MakeSet, dtype: str) -> None:
    columns = pq.ParquetFile(part_of(make_set([["a", "b"]], dtype))).metadata.row_group(0)
    for i in range(columns.num_columns):
        column = columns.column(i)
        assert not column.has_dictionary_page
        assert column.statistics is None
        if "/" in column.path_in_schema and dtype != "float16":
            assert "BYTE_STREAM_SPLIT" in column.encodings


@pytest.mark.parametrize("dtype", DTYPES)
def test_where_a_row_lies_follows_from_the_footer(make_set: MakeSet, dtype: str) -> None:
    """Of the uncompressed dtypes; see `storage.parquet`."""
    part = pq.ParquetFile(part_of(make_set([["a", "b"]], dtype)))
    vectors = [name for name in part.schema_arrow.names if "/" in name]
    assert [*parquet._vectors(part, part.schema_arrow.names)] == (vectors if dtype != "bfloat16" else [])


def test_readers_see_only_what_is_committed(make_set: MakeSet) -> None:
    uri = make_set([["a", "b"]], commit=False)
    with pytest.raises(InputError, match="not committed"):
        store.read(uri)
    store.commit(uri)
    make_set([["c"]], commit=False)
    assert store.read(uri).index["item_id"].to_pylist() == ["a", "b"]
    assert sorted(store.commit(uri)["item_id"].to_pylist()) == ["a", "b", "c"]


def test_an_item_in_two_parts_is_listed_once(make_set: MakeSet) -> None:
    uri = make_set([["a", "b"], ["b", "c"]])
    index = store.read(uri).index
    assert sorted(index["item_id"].to_pylist()) == ["a", "b", "c"]
    for entry in index.to_pylist():
        rows = pq.read_table(f"{uri}/parts/{entry['part']}")["item_id"].to_pylist()
        assert rows[entry["row"]] == entry["item_id"]


def test_writing_the_same_items_again_makes_the_same_file(make_set: MakeSet) -> None:
    uri = make_set([["a", "b"]])
    before = store.read(uri).digest
    assert make_set([["a", "b"]]) == uri
    assert len(storage.list_files(f"{uri}/parts")) == 1
    assert store.read(uri).digest == before


def test_the_recipe_stands_beside_the_features(make_set: MakeSet) -> None:
    uri = make_set([["a"]])
    content = json.loads(storage.read_bytes(f"{uri}/recipe.json"))
    assert content["fingerprint"] == uri.rsplit("-", 1)[1] == recipe_of().fingerprint
    assert content["versions"]["torch"]
    assert store.read(uri).recipe == recipe_of()


def test_rejected_items_keep_their_reason(make_set: MakeSet) -> None:
    uri = make_set([["a"]])
    row = {"item_id": "x", "uri": "/x.mp4", "source": "1", "stage": "open", "error": "not_a_video", "message": "no"}
    store.write_rejected(uri, [row])
    store.write_rejected(uri, [row, row | {"item_id": "y"}])
    rejected = store.read_rejected(uri).sort_by("item_id").to_pylist()
    assert rejected == [row, row | {"item_id": "y"}]


def test_the_last_writers_word_about_an_item_counts(make_set: MakeSet) -> None:
    uri = make_set([["a", "b"]])
    recipe = store.read(uri).recipe
    old = store.read(uri).index["part"][0].as_py()
    rows = store.feature_table(recipe, ["b", "c"], [8, 8], vectors(recipe, ["c", "d"]), ["new", "new"])
    new = store.write_part(uri, recipe, rows, generation=12)
    index = store.commit(uri).sort_by("item_id").to_pylist()
    assert {row["item_id"]: row["part"] for row in index} == {"a": old, "b": new, "c": new}
    assert {row["item_id"]: row["source"] for row in index} == {"a": "", "b": "new", "c": "new"}
    zombie = store.write_part(uri, recipe, rows, generation=7)  # of a writer that was taken over, found later
    assert store.commit(uri).sort_by("item_id").to_pylist() == index
    assert store.vacuum(uri, 13)["removed_parts"] == 1
    assert zombie not in [f.uri.rsplit("/", 1)[1] for f in storage.list_files(f"{uri}/parts")]
    assert store.read_index(uri).sort_by("item_id").to_pylist() == index

    row = {"item_id": "x", "uri": "/x.mp4", "source": "1", "stage": "open", "error": "not_a_video", "message": "no"}
    store.write_rejected(uri, [row | {"message": "later"}], generation=3)
    store.write_rejected(uri, [row], generation=2)
    assert store.read_rejected(uri)["message"].to_pylist() == ["later"]


def test_many_files_of_rejections_become_one_at_a_commit(make_set: MakeSet) -> None:
    uri = make_set([["a"]])
    row = {"uri": "/x.mp4", "source": "1", "stage": "open", "error": "not_a_video", "message": "no"}
    for k in range(20):
        store.write_rejected(uri, [row | {"item_id": str(k)}], generation=1)
    before = store.read_rejected(uri)
    store.commit(uri, generation=1)
    assert len(storage.list_files(f"{uri}/rejected")) == 1
    for rejected in (store.read_rejected(uri), before):
        assert set(rejected["item_id"].to_pylist()) == set(map(str, range(20)))
    store.keep_rejected(uri, before.filter(pc.equal(before["item_id"], "7")), generation=2)
    assert store.read_rejected(uri).to_pylist() == [row | {"item_id": "7"}]
    store.keep_rejected(uri, before[:0], generation=2)
    assert not len(store.read_rejected(uri))


def test_a_commit_sees_what_is_written_beside_it(make_set: MakeSet, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another writer's part and index appear between this one's listing and its writing."""
    uri = make_set([["a"]], commit=False)
    write_bytes = storage.write_bytes

    def interrupted(at: str, data: bytes) -> None:
        monkeypatch.setattr(storage, "write_bytes", write_bytes)
        make_set([["b"]])
        write_bytes(at, data)

    monkeypatch.setattr(storage, "write_bytes", interrupted)
    store.commit(uri)
    assert sorted(store.read(uri).index["item_id"].to_pylist()) == ["a", "b"]


@pytest.mark.parametrize(("value", "dtype"), [(1e5, "float16"), (float("nan"), "float32"), (float("inf"), "bfloat16")])
def test_a_value_that_does_not_fit_is_an_error_with_tap_and_remedy(value: float, dtype: str) -> None:
    features = vectors(recipe_of(dtype), ["a"])
    features["describe/llm.2/visual_mean"][0, 3] = value
    with pytest.raises(store.CastError, match=r"describe/llm\.2/visual_mean: .*(recipe\.dtype=bfloat16|not finite)"):
        store.feature_table(recipe_of(dtype), ["a"], [8], features)


def test_a_store_with_one_set_stands_for_it_and_others_are_refused(make_set: MakeSet, tmp_path: Path) -> None:
    uri = make_set([["a"]])
    root = str(tmp_path / "store")
    assert store.read(root).uri == uri
    make_set([["a"]], "float32")
    with pytest.raises(InputError, match=r"feature sets there: tiny-.*, tiny-"):
        store.read(root)
    with pytest.raises(InputError, match="none; extract features first"):
        store.read(str(tmp_path / "elsewhere"))


def test_a_feature_set_in_object_storage(bucket: str) -> None:
    recipe = recipe_of()
    uri = store.locate(f"{bucket}/store", "tiny", recipe)
    store.create(uri, recipe)
    store.write_part(uri, recipe, store.feature_table(recipe, ["a"], [8], vectors(recipe, ["a"])))
    store.commit(uri)
    assert store.read(f"{bucket}/store").index["item_id"].to_pylist() == ["a"]


WRITTEN_BEFORE = """{
 "family": "llava_onevision", "identity": "content:1", "compute_dtype": "float32", "frames": 8, "frame_max_side": 1280,
 "taps": ["llm.0"], "prompts": {"describe": {"text": "Describe this video.", "place": "after", "input": "video",
 "max_new_tokens": 0, "stop": [], "temperature": 0.0, "top_p": 1.0}}, "poolings": ["visual_mean"], "dtype": "float16",
 "width": {"llm": 2}, "video_options": {}, "seed": 0, "texts_from": "", "video_form": "frames", "video_encoder": "",
 "format": 3, "fingerprint": "%s", "versions": {"torch": "2.0"}}"""


@pytest.mark.parametrize("fingerprint", ["4959e65ffb7b5b56", "00112233aabbccdd"])
def test_a_set_of_an_earlier_version_is_read_under_the_name_it_was_stored_with(
    tmp_path: Path, fingerprint: str
) -> None:
    (tmp_path / "parts").mkdir()
    (tmp_path / "recipe.json").write_text(WRITTEN_BEFORE % fingerprint)
    pq.write_table(
        pa.table({"item_id": ["a"], "part": ["part-000001-0.parquet"], "row": [0], "source": [""]}),
        tmp_path / "index.parquet",
    )
    read = store.read(str(tmp_path))
    assert read.recipe.fingerprint == store.read_recipe(str(tmp_path)).fingerprint == fingerprint
    assert read.feature_names == ["describe/llm.0/visual_mean"]


def test_a_set_of_a_newer_version_says_where_it_lies(tmp_path: Path) -> None:
    (tmp_path / "recipe.json").write_text((WRITTEN_BEFORE % "0").replace('"seed": 0', '"seed": 0, "windows": 3'))
    with pytest.raises(InputError, match=rf"^features '{tmp_path}': recipe\.json: .*newer version.*windows=3"):
        store.read_recipe(str(tmp_path))


def _broken(change: Callable[[dict[str, Any]], object]) -> str:
    tree = recipe_of().to_json()
    change(tree)
    return json.dumps(tree)


@pytest.mark.parametrize(
    "content",
    [
        "",
        '{"source": {',
        "[]",
        "\x00\xff",
        _broken(lambda tree: tree.pop("source")),
        _broken(lambda tree: tree.pop("columns")),
        _broken(lambda tree: tree["source"].pop("kind")),
        _broken(lambda tree: tree["source"].pop("taps")),
        _broken(lambda tree: tree["source"].update(prompts=[])),
        _broken(lambda tree: tree["source"]["prompts"].update(describe=3)),
        _broken(lambda tree: tree["source"].update(taps=["llm"])),
        _broken(lambda tree: tree.update(columns=[{"name": "a/b"}])),
        _broken(lambda tree: tree.update(columns=3)),
        _broken(lambda tree: tree.update(format="4")),
    ],
)
def test_a_damaged_recipe_is_named_in_one_line(tmp_path: Path, content: str) -> None:
    (tmp_path / "recipe.json").write_text(content)
    with pytest.raises(InputError, match=rf"^features '{tmp_path}': [^\n]+$"):
        store.read_recipe(str(tmp_path))
