"""Published arrays as feature sets: every layout and file, orders of items, and what does not fit."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import save_file

from lvlmrec import config
from lvlmrec.errors import ConfigError, InputError
from lvlmrec.features import compact, imported, index, lease, store
from lvlmrec.features.imported import ImportConfig
from lvlmrec.features.sources import ArrayRecipe

IDS = [f"v{i}" for i in range(7)]


def values(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def write_npy(folder: Path, array: np.ndarray) -> Path:
    np.save(folder / "features.npy", array)
    return folder / "features.npy"


def run(folder: Path, path: Path, **keys: Any) -> dict[str, Any]:
    given = {"file": str(path), "store": str(folder / "store"), "dtype": "float32", **keys}
    return imported.run(config.load(ImportConfig, [given]))


def stored(folder: Path, uri: str, item_ids: list[str]) -> np.ndarray:
    """[I, L, D] as training reads them."""
    feature_set = store.read(uri)
    names = compact.choose_columns(feature_set, [], "many")
    array = compact.compact([(feature_set, names)], item_ids, str(folder / "cache"))
    return array.rows(np.arange(1, len(item_ids) + 1)).numpy()


@pytest.mark.parametrize("kind", ["npy", "fortran", "big endian", "safetensors", "pt", "pt of several"])
def test_every_file_reads_as_training_reads_it(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(imported, "PART_BYTES", 4 * 3 * 5 * 2)  # two items in a part
    array, keys = values(7, 3, 5), {}
    path = tmp_path / "features.npy"
    if kind == "npy":
        np.save(path, array)
    elif kind == "fortran":
        np.save(path, np.asfortranarray(array))
    elif kind == "big endian":
        np.save(path, array.astype(">f4"))
    elif kind == "safetensors":
        path = tmp_path / "features.safetensors"
        save_file({"hidden": torch.from_numpy(array)}, path)
    else:
        path, tensors = tmp_path / "features.pt", {"hidden": torch.from_numpy(array), "other": torch.zeros(2)}
        torch.save(tensors["hidden"] if kind == "pt" else tensors, path)
        keys = {} if kind == "pt" else {"tensor": "hidden"}
    result = run(tmp_path, path, **keys)
    assert (result["items"], result["written"], result["rejected"], result["features"]) == (7, 7, 0, 3)
    assert result["columns"] == [f"imported/llm.{layer}/imported" for layer in range(3)]
    assert len(store.read(result["feature_set"]).index["part"].unique()) == 4
    (made_with,) = index.read(result["feature_set"]).made_with
    assert json.loads(made_with).keys() == {"device", "numpy", "torch"}
    np.testing.assert_array_equal(stored(tmp_path, result["feature_set"], [*"6543210"]), array[::-1])


def test_one_layer_without_an_axis_for_it(tmp_path: Path) -> None:
    array = values(7, 5)
    result = run(tmp_path, write_npy(tmp_path, array), name="image", item_ids="from_one")
    assert result["columns"] == ["image/llm.0/imported"]
    np.testing.assert_array_equal(stored(tmp_path, result["feature_set"], [*"1234567"])[:, 0], array)


@pytest.mark.parametrize("ending", ["csv", "parquet", "txt"])
def test_the_order_of_the_items_is_that_of_a_file(tmp_path: Path, ending: str) -> None:
    frame, ids = pd.DataFrame({"title": "t", "item_id": ["007", *IDS[1:]]}), tmp_path / f"ids.{ending}"
    if ending == "csv":
        frame.to_csv(ids, index=False)
    elif ending == "parquet":
        frame.to_parquet(ids)
    else:
        ids.write_text("\ufeff" + "\r\n".join(frame["item_id"]) + "\r\n")
    array = values(7, 5)
    result = run(tmp_path, write_npy(tmp_path, array), item_ids=str(ids))
    np.testing.assert_array_equal(stored(tmp_path, result["feature_set"], ["v3", "007"])[:, 0], array[[3, 0]])


def test_the_recipe_says_where_it_came_from(tmp_path: Path) -> None:
    path = write_npy(tmp_path, values(7, 2, 5).astype(np.float16))
    first = run(tmp_path, path, layers=["llm.28", "llm.14"], dtype="float16")
    recipe = store.read_recipe(first["feature_set"])
    assert isinstance(recipe.source, ArrayRecipe) and recipe.source.identity.startswith("features.npy content:")
    assert first["columns"] == ["imported/llm.28/imported", "imported/llm.14/imported"]
    assert (recipe.source.dtype, recipe.dtype) == ("float16", "float16")
    array = np.load(path)
    kept = stored(tmp_path, first["feature_set"], [*"0123456"])  # training orders layers by depth
    np.testing.assert_array_equal(kept, array[:, ::-1].astype(np.float32))
    others = [
        run(tmp_path, path, layers=["llm.28", "llm.14"], dtype="float16", item_ids="from_one"),
        run(tmp_path, path, layers=["llm.14", "llm.28"], dtype="float16"),
        run(tmp_path, path, layers=["llm.28", "llm.14"], dtype="bfloat16"),
        run(tmp_path, write_npy(tmp_path, array + 1), layers=["llm.28", "llm.14"], dtype="float16"),
    ]
    assert len({first["feature_set"], *(other["feature_set"] for other in others)}) == 5


def test_again_writes_nothing_and_a_killed_import_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(imported, "PART_BYTES", 4 * 5 * 2)
    path = write_npy(tmp_path, values(7, 5))
    write_part = store.write_part

    def killed(*arguments: Any) -> str:
        if arguments[2]["item_id"].to_pylist()[0] == "4":
            raise KeyboardInterrupt
        return write_part(*arguments)

    monkeypatch.setattr(store, "write_part", killed)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, path)
    monkeypatch.setattr(store, "write_part", write_part)
    (uri,) = (tmp_path / "store").iterdir()
    assert not store.is_committed(str(uri))
    resumed, again = run(tmp_path, path), run(tmp_path, path)
    assert (resumed["written"], resumed["skipped"]) == (3, 4)
    assert (again["written"], again["skipped"]) == (0, 7)
    assert len(store.read(str(uri)).index) == 7
    np.testing.assert_array_equal(stored(tmp_path, str(uri), [*"0123456"])[:, 0], np.load(path))


def test_a_second_writer_is_refused(tmp_path: Path) -> None:
    path = write_npy(tmp_path, values(7, 5))
    uri = run(tmp_path, path)["feature_set"]
    with lease.hold(uri), pytest.raises(InputError, match="is writing it"):
        run(tmp_path, path)


def test_rows_that_are_not_finite_are_rejected_and_counted(tmp_path: Path) -> None:
    array = values(7, 2, 5)
    array[2, 1, 3], array[5, 0, 0] = np.nan, np.inf
    result = run(tmp_path, write_npy(tmp_path, array))
    assert (result["written"], result["rejected"], result["rejected_items"]) == (5, 2, ["2", "5"])
    rejected = store.read_rejected(result["feature_set"])
    assert set(rejected["error"].to_pylist()) == {"not_finite"} and set(rejected["stage"].to_pylist()) == {"import"}
    assert sorted(store.read(result["feature_set"]).index["item_id"].to_pylist()) == [*"01346"]
    assert run(tmp_path, tmp_path / "features.npy")["written"] == 0


def test_what_float16_cannot_hold_names_the_item(tmp_path: Path) -> None:
    array = values(7, 5)
    array[3, 1] = -1e5
    path = write_npy(tmp_path, array)
    with pytest.raises(InputError, match=r"dtype: float16: item '3' has 1e\+05, which overflows; .* bfloat16, float32"):
        run(tmp_path, path, dtype="float16")
    assert run(tmp_path, path, dtype="bfloat16")["written"] == 7


@pytest.mark.parametrize(
    ("ids", "match"),
    [
        (IDS[:6], "has 6 ids, the array 7 rows"),
        ([*IDS[:6], "v2"], "has 'v2' twice"),
        ([*IDS[:3], "", *IDS[4:]], "has an empty id"),
    ],
)
def test_ids_that_do_not_fit(tmp_path: Path, ids: list[str], match: str) -> None:
    (tmp_path / "ids.txt").write_text("\n".join(ids) + "\n")
    with pytest.raises(InputError, match=match):
        run(tmp_path, write_npy(tmp_path, values(7, 5)), item_ids=str(tmp_path / "ids.txt"))
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize(
    ("keys", "match"),
    [
        ({"layers": ["llm.1"]}, "layers: 1 names for 2 layers"),
        ({"layers": ["llm.1", "llm.1"]}, "each once"),
        ({"layers": ["llm.0", "text.1"]}, "taps of one of llm, text"),
        ({"layers": ["llm.0", "llm.-1"]}, "count from 0"),
        ({"layers": ["llm.0", "14"]}, "tap '14'"),
        ({"name": "a/b"}, "name: 'a/b'"),
        ({"name": "video"}, "name: 'video'"),
        ({"tensor": "x"}, "tensor: 'x': a .npy holds one array"),
        ({"item_ids": "from_two"}, "item_ids: 'from_two': choices: from_zero, from_one"),
        ({"item_ids": "nowhere.csv"}, "item_ids: 'nowhere.csv': not readable"),
        ({"file": "nowhere.npy"}, "'nowhere.npy': no such file"),
        ({"file": "features.npz"}, r"expected a file that ends in \.npy"),
        ({"file": ""}, "file: ''"),
    ],
)
def test_settings_that_do_not_fit(tmp_path: Path, keys: dict[str, Any], match: str) -> None:
    with pytest.raises(InputError, match=match):
        run(tmp_path, write_npy(tmp_path, values(7, 2, 5)), **keys)


@pytest.mark.parametrize("array", [np.zeros(3), np.zeros((2, 2, 2, 2)), np.zeros((0, 4)), np.zeros((2, 3), int)])
def test_arrays_of_another_kind(tmp_path: Path, array: np.ndarray) -> None:
    with pytest.raises(InputError, match=r"shape \[.*expected \[items, dim\]|holds int64"):
        run(tmp_path, write_npy(tmp_path, array))


class Evil:
    def __reduce__(self) -> Any:
        return print, ("code of the file ran",)


def test_nothing_but_tensors_is_unpickled(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(Evil(), tmp_path / "evil.pt")
    np.save(tmp_path / "evil.npy", np.array([Evil()], dtype=object), allow_pickle=True)
    for name in ("evil.pt", "evil.npy"):
        with pytest.raises(InputError, match=f"{name}: not readable"):
            run(tmp_path, tmp_path / name)
    assert "code of the file ran" not in capsys.readouterr().out


def test_a_tensor_must_be_named_among_several(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(2, 2), "b": torch.zeros(2, 2)}, tmp_path / "two.safetensors")
    with pytest.raises(ConfigError, match="tensor: '': choices: a, b"):
        run(tmp_path, tmp_path / "two.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"\x00" * 20)
    with pytest.raises(InputError, match=r"broken\.safetensors: not readable"):
        run(tmp_path, tmp_path / "broken.safetensors")


def test_from_and_to_object_storage(bucket: str, tmp_path: Path) -> None:
    from lvlmrec import storage

    path = write_npy(tmp_path, values(7, 5))
    storage.write_bytes(f"{bucket}/features.npy", path.read_bytes())
    result = imported.run(
        config.load(ImportConfig, [{"file": f"{bucket}/features.npy", "store": f"{bucket}/store", "dtype": "float32"}])
    )
    np.testing.assert_array_equal(stored(tmp_path, result["feature_set"], [*"0123456"])[:, 0], np.load(path))


@pytest.mark.data
def test_the_features_of_tiktok(real_data: Path, tmp_path: Path) -> None:
    """Their sums overflow in float16; standardised they do not."""
    uris = [
        run(tmp_path, real_data / f"tiktok/{name}_feat.npy", name=name, dtype="float16") for name in ("image", "audio")
    ]
    sets = [store.read(each["feature_set"]) for each in uris]
    item_ids = [str(item) for item in range(6710)]
    chosen = [(each, compact.choose_columns(each, [], "many")) for each in sets]
    array = compact.compact(chosen, item_ids, str(tmp_path / "cache"))
    raw = np.load(real_data / "tiktok/image_feat.npy")
    assert not np.isfinite(raw.sum())
    assert array.shapes == [(1, 128), (1, 128)]
    np.testing.assert_array_equal(array.rows(np.array([6710]))[0, 0].numpy(), raw[-1].astype(np.float32))
    scaled = array.standardized(np.arange(1, 6711)).rows(np.arange(1, 6711))
    assert torch.isfinite(scaled).all()
    np.testing.assert_allclose(scaled.double().mean(0), 0, atol=1e-4)
    np.testing.assert_allclose(scaled.double().std(0, correction=0)[scaled.std(0) > 0], 1, atol=1e-3)


def test_an_npy_that_is_none_says_so_and_advises_no_unpickling(tmp_path: Path) -> None:
    (tmp_path / "bad.npy").write_bytes(b"not an array")
    with pytest.raises(InputError, match=r"not readable: its first bytes are not those of a \.npy file$"):
        imported.open_array(tmp_path / "bad.npy")
