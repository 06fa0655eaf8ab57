"""The index: a union of segments that are written once, in which of several rows of an item the last counts."""

import hashlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lvlmrec import storage
from lvlmrec.features import index, store
from tests.feature_sets import recipe_of, vectors

MakeSet = Callable[..., str]


def rows(*found: tuple[str, int, int], source: str = "") -> pa.Table:
    """Rows of (item, generation, place in its part)."""
    parts = [f"part-{generation:06d}-x.parquet" for _, generation, _ in found]
    places = pa.array([place for _, _, place in found], pa.int64())
    return index.rows_of(pa.array([item for item, _, _ in found]), parts, places, pa.array([source] * len(found)))


def places(table: pa.Table) -> dict[str, tuple[int, int]]:
    found = {row["item_id"]: (row["generation"], row["row"]) for row in table.to_pylist()}
    assert len(found) == len(table)
    return found


def earlier(uri: str) -> None:
    """Make the index of a set as releases before segments wrote it."""
    table = store.read_index(uri).select(["item_id", "part", "row", "source"])
    table = table.set_column(1, "part", table["part"].cast(pa.string()))
    storage.write_table(f"{uri}/index.parquet", table)
    storage.remove(f"{uri}/index")


def test_the_last_row_of_an_item_counts_by_generation_then_by_segment(tmp_path: Path) -> None:
    uri = str(tmp_path)
    index.write(uri, rows(("a", 1, 0), ("b", 1, 1)), 1)
    index.write(uri, rows(("a", 1, 5)), 1)
    index.write(uri, rows(("b", 3, 0), ("c", 3, 1)), 3)
    index.write(uri, rows(("b", 2, 7)), 4)  # adopted late
    assert places(index.read(uri).latest()) == {"a": (1, 5), "b": (3, 0), "c": (3, 1)}


def test_nothing_is_committed_before_the_first_segment_and_an_empty_one_is_a_commit(tmp_path: Path) -> None:
    uri = str(tmp_path)
    assert index.read(uri).segments == () and not store.is_committed(uri)
    assert len(store.finish(uri, 1)) == 0
    assert store.is_committed(uri) and len(index.read(uri).segments) == 1


def test_segments_are_never_written_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uri, written = str(tmp_path), []
    write_bytes = storage.write_bytes
    monkeypatch.setattr(storage, "write_bytes", lambda at, data: (written.append(at), write_bytes(at, data)))
    for k in range(12):
        index.write(uri, rows((f"item{k}", 1, k)), 1)
    assert len({*written}) == 12
    assert [name.split("-")[1] for name in index.segments(uri)] == [f"{k:06d}" for k in range(12)]


def test_a_merge_keeps_what_readers_see_and_what_trainings_know_it_by(tmp_path: Path) -> None:
    uri = str(tmp_path)
    for k in range(5):
        index.write(uri, rows((f"item{k}", k, k), ("same", k, 9)), k)
    before = index.read(uri)
    merged = index.merge(uri, 6)
    after = index.read(uri)
    assert len(after.segments) == 1 and after.segments == merged.segments
    assert places(after.latest()) == places(before.latest())
    assert after.digest == before.digest == merged.digest
    index.write(uri, rows(("more", 7, 0)), 7)
    assert index.read(uri).digest != before.digest


@pytest.mark.parametrize("killed_after", [0, 1, 2])
@pytest.mark.parametrize("commits_between", [False, True])
def test_a_merge_that_was_broken_off_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed_after: int, commits_between: bool
) -> None:
    uri = str(tmp_path)
    for k in range(3):
        index.write(uri, rows((f"item{k}", k, k), ("same", k, 9)), k)
    before, remove, removed = index.read(uri), storage.remove, []

    def die(at: str) -> None:
        if len(removed) == killed_after:
            raise KeyboardInterrupt
        removed.append(at)
        remove(at)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(storage, "remove", die)
        index.merge(uri, 4)
    assert len(index.segments(uri)) == 4 - killed_after
    broken = index.read(uri)
    assert places(broken.latest()) == places(before.latest()) and broken.digest == before.digest
    if commits_between:
        index.write(uri, rows(("more", 5, 0)), 5)
    expected = index.read(uri)
    merged = index.merge(uri, 6)
    after = index.read(uri)
    assert (*index.segments(uri),) == after.segments == merged.segments and len(after.segments) == 1
    assert places(after.latest()) == places(expected.latest()) and after.digest == expected.digest
    assert (after.digest == before.digest) == (not commits_between)


def test_readers_beside_merges_and_commits_see_whole_snapshots(tmp_path: Path) -> None:
    uri, ended = str(tmp_path), []
    index.write(uri, rows(("item0", 1, 0)), 1)

    def reads() -> int:
        seen, count = 0, 0
        while not ended:
            found = places(index.read(uri).latest())
            assert len(found) >= seen and {*found} == {f"item{k}" for k in range(len(found))}
            seen, count = len(found), count + 1
        return count

    with ThreadPoolExecutor(1) as thread:
        counted = thread.submit(reads)
        try:
            for k in range(1, 60):
                index.write(uri, rows((f"item{k}", k + 1, 0)), k + 1)
                if k % 4 == 0:
                    index.merge(uri, k + 1)
        finally:
            ended.append(True)
        assert counted.result() > 5


def test_parts_that_no_segment_lists_are_adopted_and_no_others_are_read(
    make_set: MakeSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = make_set([["a", "b"], ["c"]])
    make_set([["d"]], commit=False)
    read, parts = storage.read_table, []

    def counting(at: str, columns: list[str] | None = None) -> pa.Table:
        parts.extend([at] * ("/parts/" in at))
        return read(at, columns)

    monkeypatch.setattr(storage, "read_table", counting)
    assert store.adopt(uri, 1) == 1 and len(parts) == 1
    assert store.adopt(uri, 1) == 0 and len(parts) == 1
    assert sorted(store.read_index(uri)["item_id"].to_pylist()) == [*"abcd"]


def test_a_set_of_an_earlier_release_is_read_extended_and_vacuumed(make_set: MakeSet) -> None:
    uri = make_set([["a", "b"], ["c"]])
    before = places(store.read_index(uri))
    earlier(uri)
    old = store.read(uri)
    assert places(old.index) == before and old.segments == ("index.parquet",)
    frame = pq.read_table(f"{uri}/index.parquet").to_pandas()
    hashed = pd.util.hash_pandas_object(frame, index=False).to_numpy().tobytes()
    assert old.digest == hashlib.blake2b(old.recipe.fingerprint.encode() + hashed, digest_size=8).hexdigest()
    recipe = recipe_of()
    store.write_part(uri, recipe, store.feature_table(recipe, ["c", "d"], [8, 8], vectors(recipe, ["c", "d"])), 3)
    assert {*places(store.commit(uri, 3))} == {*"abcd"} and places(store.read_index(uri))["c"][0] == 3
    store.vacuum(uri, 4)
    assert not storage.exists(f"{uri}/index.parquet") and len(index.segments(uri)) == 1
    assert {*places(store.read(uri).index)} == {*"abcd"}


def test_only_the_folders_of_a_store_are_listed_to_find_its_sets(
    make_set: MakeSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = make_set([["a"]])

    def refuse(*given: object, **options: object) -> None:
        assert not options.get("recursive"), "the whole store is listed"

    listed = storage.list_files
    monkeypatch.setattr(storage, "list_files", lambda at, **options: (refuse(**options), listed(at, **options))[1])
    assert store.find(str(Path(uri).parent)) == uri


def test_ids_are_looked_up_part_by_part_as_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    ids = pa.chunked_array([[f"item{k}" for k in range(50)], ["", "ä", "item7"]])
    others = pa.chunked_array([[f"item{k}" for k in range(0, 90, 3)], ["ä", "b"]], pa.large_string())
    expected = [item in {*others.to_pylist()} for item in ids.to_pylist()]
    assert index.is_among(ids, others).to_pylist() == expected
    monkeypatch.setattr(index, "IDS_LOOKED_UP", 4)
    assert index.is_among(ids, others).to_pylist() == expected
    assert index.is_among(ids.slice(0, 0), others).to_pylist() == []
    assert not index.are_distinct(ids) and index.are_distinct(ids.slice(0, 52))
