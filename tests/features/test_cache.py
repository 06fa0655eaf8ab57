"""The cache on disk: entries that are shared, kept while they are in use, and removed to stay within a limit."""

import multiprocessing
import os
import pickle
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from lvlmrec.errors import InputError
from lvlmrec.features import store
from lvlmrec.features.cache import ABOUT, Cache, InUse, NewArray
from lvlmrec.features.compact import compact
from lvlmrec.features.mapping import side_by_side
from tests.feature_sets import recipe_of, vectors

MakeSet = Callable[..., str]
ITEMS = [f"item{i}" for i in range(40)]
LLM = ["describe/llm.0/visual_mean", "describe/llm.2/visual_mean", "describe/llm.4/visual_mean"]


def ones(arrays: Sequence[np.ndarray], numbers: Sequence[int]) -> None:
    for array in arrays:
        array[:] = 1


def hold(cache: Cache, key: str, size: int = 1000) -> InUse:
    (held,) = cache.hold([NewArray(key, np.dtype(np.uint8), (size,))], {}, ones)
    return held


def entries(cache: Cache) -> set[str]:
    return {about.parent.name for about in cache.folder.glob(f"*/{ABOUT}")}


def test_entries_used_least_recently_make_room(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cache = Cache(tmp_path, 4300)
    for key in ("a", "b", "c"):
        hold(cache, key)
    for number, key in enumerate(("b", "c", "a")):  # the order of use
        os.utime(tmp_path / key / ABOUT, ns=(number, number))
    assert capsys.readouterr().err == ""
    hold(cache, "d")
    assert entries(cache) == {"c", "a", "d"}
    (line,) = capsys.readouterr().err.splitlines()
    assert "removed 1 entries used least recently" in line and str(tmp_path) in line
    hold(cache, "c")
    hold(cache, "e", 2000)
    assert entries(cache) == {"c", "d", "e"}


def test_an_entry_in_use_stays_and_what_does_not_fit_is_one_line(tmp_path: Path) -> None:
    cache = Cache(tmp_path, 2500)
    held = hold(cache, "a")
    with pytest.raises(InputError, match=r"cache_gb: .* needs .* GB more, and living processes use"):
        hold(cache, "b", 2000)
    assert entries(cache) == {"a"} and not list(tmp_path.glob(".*"))
    del held
    hold(cache, "b", 2000)
    assert entries(cache) == {"b"}


def keep(about: Path, ready: Callable[[object], None], end: Callable[[], object]) -> None:
    held = InUse(about)
    ready(held.is_held)
    end()


@pytest.mark.thorough
def test_an_entry_that_another_process_uses_stays_until_that_dies(tmp_path: Path) -> None:
    cache, context = Cache(tmp_path, 2500), multiprocessing.get_context("spawn")
    held = hold(cache, "a")
    ours, theirs = context.Pipe()
    other = context.Process(target=keep, args=(held.about, theirs.send, theirs.recv))
    other.start()
    assert ours.recv() is True
    del held
    with pytest.raises(InputError, match="living processes"):
        hold(cache, "b", 2000)
    other.kill()
    other.join()
    hold(cache, "b", 2000)
    assert entries(cache) == {"b"}


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    orphan, alive = tmp_path / ".x.1", tmp_path / ".y.2"
    for folder in (orphan, alive):
        folder.mkdir()
        (folder / ABOUT).write_text("{}")
    held = InUse(alive / ABOUT)
    hold(cache, "a")
    assert held.is_held and alive.exists() and not orphan.exists()


def test_an_entry_removed_before_it_is_in_use_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, made = Cache(tmp_path), []

    def fill(arrays: Sequence[np.ndarray], numbers: Sequence[int]) -> None:
        made.append(list(numbers))
        ones(arrays, numbers)

    use, times = Cache.use, []

    def removed_once(self: Cache, key: str) -> InUse | None:
        times.append(key)
        if len(times) == 2:
            assert self._remove(self.entry(key))
        return use(self, key)

    monkeypatch.setattr(Cache, "use", removed_once)
    cache.hold([NewArray("a", np.dtype(np.uint8), (10,))], {}, fill)
    assert made == [[0], [0]] and entries(cache) == {"a"}


def test_a_failed_fill_publishes_nothing(tmp_path: Path) -> None:
    def fails(arrays: Sequence[np.ndarray], numbers: Sequence[int]) -> None:
        raise OSError("the store is gone")

    wanted = [NewArray(key, np.dtype(np.uint8), (10,)) for key in ("a", "b")]
    with pytest.raises(OSError, match="the store is gone"):
        Cache(tmp_path).hold(wanted, {}, fails)
    assert not list(tmp_path.iterdir())


def test_every_choice_of_columns_reads_the_same_files(
    make_set: MakeSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    feature_set, cache = store.read(make_set([ITEMS[:9], ITEMS[9:]])), str(tmp_path / "cache")
    read: list[list[str]] = []
    read_table = store.storage.read_table

    def counted(uri: str, columns: Sequence[str] | None = None, *rows: Sequence[int]) -> object:
        if columns:
            read.append(list(columns))
        return read_table(uri, columns, *rows)

    monkeypatch.setattr(store.storage, "read_table", counted)
    two = compact([(feature_set, LLM[:2])], ITEMS, cache)
    assert read == [LLM[:2]] * 2  # each part once for both columns
    three = compact([(feature_set, LLM[::-1])], ITEMS, cache)
    assert read[2:] == [LLM[2:]] * 2  # the missing column alone
    one = compact([(feature_set, LLM[:1])], ITEMS, cache)
    assert len(read) == 4 and len(list((tmp_path / "cache").iterdir())) == 3
    every, expected = np.arange(1, 41), vectors(recipe_of(), ITEMS)
    for array, names in ((two, LLM[:2]), (three, LLM[::-1]), (one, LLM[:1])):
        stacked = torch.stack([expected[name].half().float() for name in names], dim=1)
        assert torch.equal(array.rows(every), stacked)
    again = pickle.loads(pickle.dumps(three))  # noqa: S301
    assert torch.equal(again.rows(every), three.rows(every)) and all(c.in_use[0].is_held for c in again.columns)


def test_columns_of_a_living_array_stay_and_others_go(make_set: MakeSet, tmp_path: Path) -> None:
    feature_set, cache = store.read(make_set([ITEMS])), str(tmp_path / "cache")
    size = (41 * 8 * 2 + 128 + 200) / 1e9  # of a column: numbers, header, about.json at most
    first = compact([(feature_set, LLM[:1])], ITEMS, cache, cache_gb=2 * size)
    for name in LLM[1:]:
        compact([(feature_set, [name])], ITEMS, cache, cache_gb=2 * size)
    left = {folder.name for folder in (tmp_path / "cache").iterdir()}
    assert len(left) == 2 and first.columns[0].key in left and first.is_here()


def test_files_side_by_side_are_one_tensor(tmp_path: Path) -> None:
    values = np.random.default_rng(0).standard_normal((7, 3, 5, 2)).astype(np.float32)
    paths = tuple(tmp_path / f"{column}.npy" for column in range(3))
    for column, path in enumerate(paths):
        np.save(path, values[:, column])
    for order in ((0, 1, 2), (2, 0)):
        mapped = side_by_side(tuple(paths[column] for column in order), "float32")
        assert np.array_equal(mapped.numpy(), values[:, list(order)])
    np.save(paths[1], values[:6, 1])
    with pytest.raises(ValueError, match=r"bytes, .* expected"):
        side_by_side((paths[0], paths[1]), "float32")
