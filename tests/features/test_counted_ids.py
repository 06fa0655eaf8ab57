"""Ids that an import counted, and datasets whose ids are others: no item may read the features of another."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lvlmrec import config, storage
from lvlmrec.errors import InputError
from lvlmrec.features import compact, imported, store
from lvlmrec.features.imported import ImportConfig
from lvlmrec.runs import experiment
from tests.toy import train_config

ROWS = 60


def import_rows(folder: Path, item_ids: str, rows: int = ROWS, rejected: tuple[int, ...] = ()) -> str:
    array = np.random.default_rng(0).standard_normal((rows, 5)).astype(np.float32)
    array[list(rejected)] = np.nan
    np.save(folder / "features.npy", array)
    given = {"file": f"{folder}/features.npy", "store": f"{folder}/store", "item_ids": item_ids}
    return str(imported.run(config.load(ImportConfig, [given]))["feature_set"])


def meets(uri: str, item_ids: list[str], folder: Path) -> compact.FeatureArray:
    feature_set = store.read(uri)
    return compact.compact([(feature_set, feature_set.feature_names)], item_ids, str(folder / "cache"))


def ids(start: int, end: int, *more: str) -> list[str]:
    return [*map(str, range(start, end)), *more]


@pytest.mark.parametrize(
    ("counted", "item_ids", "match"),
    [
        ("from_zero", ids(1, 61), r"1 of the dataset's 60 items are outside \(60\).*item_ids=from_one or a file"),
        ("from_one", ids(0, 60), r"rows 1 to 60, and 1 of .*outside \(0\).*item_ids=from_zero or a file"),
        ("from_one", ids(2, 62), r"outside \(61\), so .*item_ids=a file of the ids"),
        ("from_zero", [*ids(0, 57), *ids(80, 83)], r"3 of the .*outside \(80, 81, 82\), .*item_ids=a file of the ids"),
        ("from_zero", ids(0, 59, "v60"), r"1 of the .*outside \(v60\)"),
        ("from_zero", ids(0, 59, "007"), r"outside \(007\)"),
        ("from_one", [f"v{i}" for i in range(60)], r"60 of the .*outside \(v0, v1, v2, \.\.\.\).*item_ids=a file"),
    ],
)
def test_items_outside_of_the_rows_say_that_the_ids_are_others(
    tmp_path: Path, counted: str, item_ids: list[str], match: str
) -> None:
    uri = import_rows(tmp_path, counted)
    with pytest.raises(InputError, match=rf"features '.*': imported with item_ids={counted}, .*{match}") as error:
        meets(uri, item_ids, tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("counted", "start"), [("from_zero", 0), ("from_one", 1)])
def test_ids_within_the_rows_read_their_own(tmp_path: Path, counted: str, start: int) -> None:
    """Gaps are fine, and so are rows that were rejected, the last one too."""
    item_ids = [*ids(start, start + 20), *ids(start + 30, start + ROWS)]
    uri = import_rows(tmp_path, counted, rejected=(7, ROWS - 1))
    array = meets(uri, item_ids, tmp_path)
    assert [item_ids[k - 1] for k in np.flatnonzero(array.missing[:, 0]) if k] == ids(start + 7, start + 8) + ids(
        start + ROWS - 1, start + ROWS
    )
    raw = np.load(tmp_path / "features.npy").astype(np.float16).astype(np.float32)
    expected = np.nan_to_num(raw[[int(item) - start for item in item_ids]])
    np.testing.assert_array_equal(array.rows(np.arange(1, len(item_ids) + 1))[:, 0].numpy(), expected)


def test_ids_of_a_file_are_believed_also_where_they_are_those_of_counting(tmp_path: Path) -> None:
    """The same set under the same name: what is known of its ids is no part of its fingerprint."""
    counted = import_rows(tmp_path, "from_zero")
    with pytest.raises(InputError, match="outside"):
        meets(counted, ids(0, 61), tmp_path)
    (tmp_path / "ids.txt").write_text("\n".join(ids(0, ROWS)))
    again = import_rows(tmp_path, f"{tmp_path}/ids.txt")
    assert again == counted
    assert meets(again, ids(0, 61), tmp_path).missing[:, 0].sum() == 2
    assert import_rows(tmp_path, "from_zero") == counted
    with pytest.raises(InputError, match="outside"):
        meets(counted, ids(0, 61), tmp_path)


def test_a_set_imported_before_this_was_recorded_learns_it_by_the_same_import(tmp_path: Path) -> None:
    uri = import_rows(tmp_path, "from_zero")
    at = f"{uri}/recipe.json"
    content = json.loads(storage.read_bytes(at))
    fingerprint = content["fingerprint"]
    assert content.pop(store.IDS_FROM) == "from_zero"
    storage.write_bytes(at, json.dumps(content).encode())
    assert store.read(uri).ids_from == ""
    assert import_rows(tmp_path, "from_zero") == uri
    read = store.read(uri)
    assert (read.ids_from, read.recipe.fingerprint) == ("from_zero", fingerprint)


def dataset(folder: Path, rows: list[list[int]]) -> Path:
    lines = ["user_id,item_id", *(f"u{user},{item}" for user, row in enumerate(rows) for item in row)]
    (folder / "interactions.csv").write_text("\n".join(lines) + "\n")
    return folder / "interactions.csv"


def prepare(folder: Path, path: Path, uri: str, **values: Any) -> experiment.Experiment:
    given = {"dataset__name": "table", "dataset__path": path, "features": uri, "model__item_encoder__name": "fusion"}
    return experiment.prepare(train_config(folder, folder, **given | values))


@pytest.mark.parametrize("values", [{}, {"dataset__core": 2}])
def test_an_item_that_the_dataset_drops_tells_as_well(tmp_path: Path, values: dict[str, Any]) -> None:
    """Ids 1 to 60 counted from zero: every item is off by one, and the only one outside is a rare one."""
    rows = [[1 + (user + step) % 59 for step in range(7)] for user in range(59)]
    rows += [[60, 1, 2]] if not values else [[60, 1, 2, 3, 4, 5]]
    path = dataset(tmp_path, rows)
    with pytest.raises(InputError, match=r"1 of the dataset's 60 items are outside \(60\).*item_ids=from_one"):
        prepare(tmp_path, path, import_rows(tmp_path, "from_zero"), **values)
    right = prepare(tmp_path, path, import_rows(tmp_path, "from_one"), **values)
    assert right.features is not None and not right.features.missing[1:].any()
    assert "60" not in right.data.item_ids


@pytest.mark.data
@pytest.mark.parametrize("counted", ["from_zero", "from_one"])
@pytest.mark.parametrize("rows", [19_220, 19_099])
def test_microlens_ids_are_not_places(real_data: Path, tmp_path: Path, counted: str, rows: int) -> None:
    uri = import_rows(tmp_path, counted, rows)
    with pytest.raises(InputError, match=r"of the dataset's 19220 items are outside \(19\d+, .*item_ids=a file"):
        prepare(tmp_path, real_data / "microlens_50k", uri, dataset__name="microlens")
