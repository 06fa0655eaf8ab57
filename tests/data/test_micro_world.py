"""The micro-world: determinism, properties of its users and items, and its files."""

import csv
import json
import shutil
from collections import Counter
from pathlib import Path

import av
import numpy as np
import pytest

from lvlmrec.data import DatasetConfig, load, micro_videos, micro_world
from lvlmrec.data.interactions import from_columns
from lvlmrec.data.micro_videos import Scene
from lvlmrec.data.micro_world import FACTORS, MicroWorldConfig, World
from lvlmrec.data.split import Split, leave_one_out
from lvlmrec.errors import InputError

SMALL = MicroWorldConfig(num_items=40, num_users=80, seed=3, frame_side=32, fps=4, clip_seconds=1.0)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def splitted(world: World) -> Split:
    users = [str(user) for user, history in enumerate(world.histories) for _ in history]
    return leave_one_out(from_columns(users, [world.item_ids[item] for items in world.histories for item in items]))


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world") / "sample"
    micro_world.make(folder, SMALL)
    return folder


@pytest.fixture(scope="module")
def world() -> World:
    return micro_world.draw(MicroWorldConfig())


def test_same_seed_same_bytes(small: Path, tmp_path: Path) -> None:
    micro_world.make(tmp_path, SMALL)
    assert contents(tmp_path) == contents(small)
    other = MicroWorldConfig(**(vars(SMALL) | {"seed": 4}))
    micro_world.make(tmp_path, other)
    assert len(list(tmp_path.glob("videos/*"))) == 40
    changed, before = contents(tmp_path), contents(small)
    assert changed[f"interactions/{micro_world.PAIRS}"] != before[f"interactions/{micro_world.PAIRS}"]


def test_a_second_call_does_nothing(small: Path) -> None:
    before = {file: file.stat().st_mtime_ns for file in small.rglob("*")}
    micro_world.make(small, SMALL)
    assert {file: file.stat().st_mtime_ns for file in small.rglob("*")} == before


@pytest.mark.parametrize("marker", ["none", "broken", "unfinished"])
def test_half_made_is_made_anew(small: Path, tmp_path: Path, marker: str) -> None:
    folder = tmp_path / "sample"
    shutil.copytree(small, folder)
    lost = next(folder.glob("videos/*"))
    lost.unlink()
    next(folder.glob("videos/*")).write_bytes(b"half")
    path = folder / micro_world.MARKER
    unfinished = json.loads(path.read_text())
    del unfinished["digest"]
    path.write_text({"none": "", "broken": "{", "unfinished": json.dumps(unfinished)}[marker])
    if marker == "none":
        path.unlink()
    micro_world.make(folder, SMALL)
    assert contents(folder) == contents(small)


def test_an_interrupted_make_leaves_no_complete_marker(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "sample"
    shutil.copytree(small, folder)

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(micro_videos, "write", interrupted)
        micro_world.make(folder, MicroWorldConfig(**(vars(SMALL) | {"seed": 4})))
    micro_world.make(folder, SMALL)
    assert contents(folder) == contents(small)


def test_files_of_others_are_safe(tmp_path: Path) -> None:
    video = tmp_path / "videos" / "holiday.mp4"
    video.parent.mkdir()
    video.write_bytes(b"dear")
    with pytest.raises(InputError, match=r"holiday\.mp4"):
        micro_world.make(tmp_path, SMALL)
    assert video.read_bytes() == b"dear"
    with pytest.raises(InputError, match="a file"):
        micro_world.make(video, SMALL)
    with pytest.raises(InputError, match="frame_side: 33"):
        micro_world.make(tmp_path / "new", MicroWorldConfig(frame_side=33))


def test_the_loader_reads_what_was_drawn(small: Path) -> None:
    drawn = micro_world.draw(SMALL)
    dataset = load(DatasetConfig(path=str(small / "interactions")))
    found = dataset.interactions
    histories = np.split(found.item_ids[found.items], found.offsets[1:-1])
    assert [history.tolist() for history in histories] == [[drawn.item_ids[i] for i in h] for h in drawn.histories]
    assert set(dataset.titles) == set(drawn.item_ids)
    assert not any(dataset.report[name] for name in ("malformed_lines", "duplicate_interactions"))
    assert {file.stem for file in (small / "videos").iterdir()} == set(drawn.item_ids)


def test_factors_file_tells_the_truth(small: Path) -> None:
    drawn = micro_world.draw(SMALL)
    with (small / "factors.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["item_id"] for row in rows] == drawn.item_ids
    for k, (name, values) in enumerate(FACTORS.items()):
        assert [values.index(row[name]) for row in rows] == drawn.factors[:, k].tolist()
    assert [row["cold"] == "1" for row in rows] == drawn.cold.tolist()


def test_titles_speak_of_the_video_in_many_wordings(small: Path) -> None:
    titles = load(DatasetConfig(path=str(small / "interactions"))).titles
    with (small / "factors.csv").open() as file:
        for row in csv.DictReader(file):
            title = titles[row["item_id"]].lower()
            assert row["colour"] in title
            assert row["shape"] in title
    assert len({title.split(" ", 1)[0] for title in titles.values()}) > 8
    assert any("," in title for title in titles.values())


def test_histories(world: World) -> None:
    lengths = np.array([len(history) for history in world.histories])
    assert len(lengths) == 2400
    assert lengths.min() == 5
    assert 6 <= np.median(lengths) <= 8
    assert lengths.max() > 30
    assert all(len(set(history)) == len(history) for history in world.histories)


def test_cold_items_are_only_ever_the_last(world: World) -> None:
    cold = set(np.flatnonzero(world.cold).tolist())
    assert 0.10 <= len(cold) / len(world.item_ids) <= 0.12
    assert not any(cold & set(history[:-1]) for history in world.histories)
    users = Counter(history[-1] for history in world.histories if history[-1] in cold)
    assert set(users) == cold
    assert np.median(list(users.values())) >= 4


def test_cold_targets_after_the_split(world: World) -> None:
    found = splitted(world)
    is_cold = found.is_cold(found.test().targets)
    assert 0.10 <= is_cold.mean() <= 0.15
    assert not found.is_cold(found.validation().targets).any()
    names = {world.item_ids[item] for item in np.flatnonzero(world.cold)}
    assert set(found.item_ids[found.test().targets[is_cold] - 1]) == names


def test_popularity_has_a_long_tail(world: World) -> None:
    counts = np.sort(splitted(world).train_counts())[::-1]
    assert counts[: len(counts) // 10].sum() > 0.25 * counts.sum()
    assert counts[0] > 5 * np.median(counts)


def test_order_and_content_carry_taste(world: World) -> None:
    """Colours and communities stay or move one step along their ring, more often than chance and than a step back; in
    the same histories, each in another order, a step on is no more frequent than a step back."""
    values = np.column_stack([world.factors[:, 0], world.communities])
    rng = np.random.default_rng(0)
    shuffled = [rng.permutation(history).tolist() for history in world.histories]
    for k, size in enumerate((len(FACTORS["colour"]), micro_world.NUM_COMMUNITIES)):
        shares = []
        for histories in (world.histories, shuffled):
            steps = np.concatenate([np.diff(values[history, k]) % size for history in histories])
            shares.append(np.bincount(steps, minlength=size) / len(steps))
        ordered, bag = shares
        assert ordered[0] > 1.5 / size
        assert ordered[1] > 1.1 * ordered[size - 1]
        assert bag[1] < 1.05 * bag[size - 1]


def test_a_clip_is_h264_and_moves(tmp_path: Path) -> None:
    path = tmp_path / "clip.mp4"
    micro_videos.write(path, Scene(0, 0, 0, 3, 2, 1, 0.25), side=128, fps=8, num_frames=12)
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert stream.codec_context.name == "h264"
        frames = [frame.to_ndarray(format="rgb24").astype(int) for frame in container.decode(stream)]
    assert len(frames) == 12
    assert frames[0].shape == (128, 128, 3)
    assert abs(frames[0] - frames[3]).max() > 100
    drawn = np.asarray(next(micro_videos.frames(Scene(0, 0, 0, 3, 2, 1, 0.25), 128, 12))).astype(int)
    assert abs(frames[0] - drawn).mean() < 6


def test_every_value_of_every_factor_shows() -> None:
    base = (0, 1, 2, 2, 1, 1)
    for k, values in enumerate(FACTORS.values()):
        shown = set()
        for value in range(len(values)):
            colour, background, shape, count, motion, tempo = (*base[:k], value, *base[k + 1 :])
            scene = Scene(colour, background, shape, count, motion, tempo, 0.1)
            shown.add(b"".join(frame.tobytes() for frame in micro_videos.frames(scene, 64, 8)))
        assert len(shown) == len(values)


@pytest.mark.thorough
def test_the_default_world(tmp_path: Path) -> None:
    micro_world.make(tmp_path, MicroWorldConfig())
    sizes = [file.stat().st_size for file in (tmp_path / "videos").iterdir()]
    assert len(sizes) == 360
    assert sum(sizes) < 20_000_000
    assert json.loads((tmp_path / micro_world.MARKER).read_text())["digest"]
