"""The micro-world: a small synthetic dataset of real video files, and users with known tastes, generated from a seed.

It replaces datasets that cannot be shipped, and has what makes them hard: a long tail of popularity, short histories,
tastes that drift (so order matters), communities that no pixel shows (so ids matter), and cold items that occur only as
test targets (so content matters).
"""

from __future__ import annotations

import csv
import hashlib
import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lvlmrec.config import option
from lvlmrec.data import micro_videos
from lvlmrec.data.micro_videos import BACKGROUNDS, COLOURS, COUNTS, MOTIONS, SHAPES, TEMPI, Scene
from lvlmrec.errors import InputError

FORMAT = 2  # incremented when the same configuration generates another world
MARKER = "micro_world.json"
PAIRS, TITLES = "MicroLens-sample_pairs.tsv", "MicroLens-sample_titles.csv"

FACTORS = {
    "colour": tuple(COLOURS),
    "background": tuple(BACKGROUNDS),
    "shape": SHAPES,
    "count": COUNTS,
    "motion": MOTIONS,
    "tempo": TEMPI,
}
NUM_COMMUNITIES = 10
# what an item's match with a user's taste adds to the logit of choosing it
_TASTE_LOGITS = {"colour": 4.4, "background": 4.4, "shape": 2.6, "count": 1.6, "motion": 0.3, "tempo": 0.3}
_COMMUNITY_LOGIT = 2.8
_NEXT_VALUE_MATCH = 0.35  # share of a match for an item one step further along the ring of values
_DRIFT_RATE = 0.16  # probability per interaction that a taste moves to the next value of its ring
_POPULARITY_SPREAD = 1.0  # standard deviation of log popularity
_MIN_HISTORY = 5  # interactions per user; the split drops shorter histories
_COLD_ITEM_SHARE = 0.11  # share of the catalogue
_COLD_TARGET_SHARE = 0.125  # share of the users


@dataclass(frozen=True)
class MicroWorldConfig:
    """The size of a micro-world, and its seed."""

    num_items: int = option(360, "videos", minimum=40)
    num_users: int = option(2400, "users", minimum=40)
    seed: int = option(0, "the same seed and sizes give the same files", minimum=0)
    frame_side: int = option(128, "width and height of a video in pixels, even", minimum=32)
    fps: int = option(8, "frames per second", minimum=1)
    clip_seconds: float = option(3.0, "length of a video in seconds", minimum=0.25)


@dataclass(frozen=True)
class World:
    """I items and U users with their true properties.

    item_ids     [I] str, not dense
    factors      int64 [I, 6]: values of `FACTORS`, in its order
    communities  int64 [I]: the community of an item, which no video and no title shows
    popularity   float64 [I]: the part of the logit that all users share
    cold         bool [I]: occurs only as the last interaction of users
    histories    per user the positions of the user's items in `item_ids`, oldest first
    """

    item_ids: list[str]
    factors: NDArray[np.int64]
    communities: NDArray[np.int64]
    popularity: NDArray[np.float64]
    cold: NDArray[np.bool_]
    histories: list[list[int]]


def make(directory: Path, config: MicroWorldConfig) -> None:
    """Write the world of `config` into `directory`, unless it is there already.

        interactions/MicroLens-sample_pairs.tsv, interactions/MicroLens-sample_titles.csv
        videos/<item_id>.mp4
        factors.csv          the true properties of each item, which models do not see
        micro_world.json     configuration and digest of all files; written last, so an incomplete world is made anew

    Raises `InputError` if the directory is a file, or contains videos or interactions of something else.
    """
    if directory.is_file():
        raise InputError(f"{directory}: a file; expected a folder for the micro-world")
    if config.frame_side % 2:
        raise InputError(f"frame_side: {config.frame_side} is odd; H.264 wants an even number")
    wanted: dict[str, object] = {"format": FORMAT, "config": asdict(config)}
    found = _read_marker(directory)
    if found is not None and found.pop("digest", None) is not None and found == wanted:
        return
    world = draw(config)
    folders = [directory / "interactions", directory / "videos"]
    if found is None:
        _refuse_foreign_files(folders, {PAIRS, TITLES, *(f"{item_id}.mp4" for item_id in world.item_ids)})
    directory.mkdir(parents=True, exist_ok=True)
    _write_marker(directory, wanted)  # without a digest: an incomplete micro-world, which may be overwritten
    for folder in folders:
        if folder.is_dir():
            shutil.rmtree(folder)
        folder.mkdir()
    _write_interactions(directory / "interactions", world, config.seed)
    _write_factors(directory / "factors.csv", world)
    _write_videos(directory / "videos", world, config)
    _write_marker(directory, wanted | {"digest": _digest(directory)})


def draw(config: MicroWorldConfig) -> World:
    """Draw the world of `config`."""
    rng = np.random.default_rng(config.seed)
    n = config.num_items
    numbers = rng.choice(2 * n, size=n, replace=False) + 1
    cold = np.zeros(n, dtype=bool)
    cold[rng.choice(n, size=round(_COLD_ITEM_SHARE * n), replace=False)] = True
    world = World(
        item_ids=[str(number) for number in numbers],
        factors=np.stack([_balanced(rng, len(values), n) for values in FACTORS.values()], axis=1),
        communities=_balanced(rng, NUM_COMMUNITIES, n),
        # cold items are new, so they had less time to become popular
        popularity=rng.normal(0, _POPULARITY_SPREAD, size=n) * np.where(cold, 0.5, 1),
        cold=cold,
        histories=[],
    )
    return World(**(vars(world) | {"histories": _simulate_histories(rng, world, config.num_users)}))


def _balanced(rng: np.random.Generator, num_values: int, n: int) -> NDArray[np.int64]:
    """`n` values, each of `num_values` about equally often, in random order."""
    return rng.permutation(np.arange(n) % num_values)


def _simulate_histories(rng: np.random.Generator, world: World, num_users: int) -> list[list[int]]:
    """Histories of all users: at each step an item drawn from the softmax of popularity and taste, without repeats."""
    num_items = len(world.item_ids)
    max_history = min(60, num_items // 4)
    lengths = np.minimum(_MIN_HISTORY + np.exp(rng.normal(0.6, 0.95, size=num_users)).astype(np.int64), max_history)
    sizes = np.array([*(len(values) for values in FACTORS.values()), NUM_COMMUNITIES])
    tastes = rng.integers(sizes, size=(num_users, len(sizes)))  # [U, 7] the values each user likes at this step
    ends_cold = np.zeros(num_users, dtype=bool)
    ends_cold[rng.choice(num_users, size=round(_COLD_TARGET_SHARE * num_users), replace=False)] = True
    seen = np.zeros((num_users, num_items), dtype=bool)
    histories: list[list[int]] = [[] for _ in range(num_users)]
    for step in range(lengths.max()):
        users = np.flatnonzero(lengths > step)
        picks_cold = ends_cold[users] & (lengths[users] == step + 1)
        logits = _choice_logits(world, tastes[users], visible_only=picks_cold)
        unavailable = np.where(picks_cold[:, None], ~world.cold, world.cold) | seen[users]
        # the largest logit plus Gumbel noise is a draw from the softmax
        items = np.where(unavailable, -np.inf, logits + rng.gumbel(size=logits.shape)).argmax(axis=1)
        seen[users, items] = True
        for user, item in zip(users, items, strict=True):
            histories[user].append(int(item))
        tastes = (tastes + (rng.random(tastes.shape) < _DRIFT_RATE)) % sizes
    return histories


def _choice_logits(world: World, tastes: NDArray[np.int64], visible_only: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Logits [U, I] of each user's choice for `tastes` [U, 7], a value per factor and a community.

    visible_only [U]: the community does not count.
    """
    logits = np.broadcast_to(world.popularity, (len(tastes), len(world.popularity))).copy()
    values = np.column_stack([world.factors, world.communities])
    weights = [*_TASTE_LOGITS.values(), _COMMUNITY_LOGIT]
    sizes = [*(len(names) for names in FACTORS.values()), NUM_COMMUNITIES]
    for k, (weight, size) in enumerate(zip(weights, sizes, strict=True)):
        distance = (values[:, k] - tastes[:, k, None]) % size  # [U, I] steps along the ring
        match = (distance == 0) + _NEXT_VALUE_MATCH * (distance == 1)
        logits += weight * match * (np.where(visible_only, 0, 1)[:, None] if k == len(FACTORS) else 1)
    return logits


def _read_marker(directory: Path) -> dict[str, object] | None:
    try:
        marker = json.loads((directory / MARKER).read_text())
    except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError):
        return None
    return marker if isinstance(marker, dict) else None


def _write_marker(directory: Path, content: dict[str, object]) -> None:
    temporary = directory / (MARKER + ".partial")
    temporary.write_text(json.dumps(content, indent=1) + "\n")
    temporary.replace(directory / MARKER)


def _refuse_foreign_files(folders: list[Path], expected: set[str]) -> None:
    """Raises `InputError` if the folders contain a file that no micro-world of this configuration has."""
    foreign = [file for folder in folders if folder.is_dir() for file in folder.iterdir() if file.name not in expected]
    if foreign:
        raise InputError(f"{min(foreign)}: no part of a micro-world, and would be lost; name an empty folder")


def _write_interactions(folder: Path, world: World, seed: int) -> None:
    """Pairs and titles in the formats of MicroLens-50K."""
    lines = [
        f"{user + 1}\t{' '.join(world.item_ids[item] for item in history)}\r\n"
        for user, history in enumerate(world.histories)
    ]
    (folder / PAIRS).write_text("".join(lines), newline="")
    rng = np.random.default_rng([seed, 1])
    with (folder / TITLES).open("w", newline="") as file:
        file.write("item,title\r\n")
        writer = csv.writer(file, quoting=csv.QUOTE_NONNUMERIC)
        for item_id, values in zip(world.item_ids, world.factors.tolist(), strict=True):
            writer.writerow([int(item_id), title(values, rng)])


def _write_videos(folder: Path, world: World, config: MicroWorldConfig) -> None:
    phases = np.random.default_rng([config.seed, 2]).random(len(world.item_ids))
    num_frames = max(1, round(config.clip_seconds * config.fps))
    for item_id, values, phase in zip(world.item_ids, world.factors.tolist(), phases.tolist(), strict=True):
        colour, background, shape, count, motion, tempo = values
        scene = Scene(colour, background, shape, count, motion, tempo, phase)
        micro_videos.write(folder / f"{item_id}.mp4", scene, config.frame_side, config.fps, num_frames)


def title(values: list[int], rng: np.random.Generator) -> str:
    """A caption of an item's factors in one of several wordings, some of which leave out factors."""
    colour, background, shape, count, motion, tempo = (
        names[value] for names, value in zip(FACTORS.values(), values, strict=True)
    )
    subject = f"{colour} {shape}" if count == "one" else f"{count} {colour} {shape}{'es' if shape == 'cross' else 's'}"
    setting = {"snow": "in the snow", "beach": "on the beach", "meadow": "on a meadow", "sea": "at sea"}.get(
        background, "at night" if background == "night" else "by the brick wall"
    )
    wordings = (
        f"{subject} {motion} {tempo} {setting}",
        f"{setting}, {subject}, {motion}",
        f"you have to see this: {subject} {setting} # {shape} # {background}",
        f"{motion} {tempo}, {setting}: {subject}",
        f"what {subject} do {setting} # {colour} # {motion}",
        f"{colour} is the colour of the day, {subject} {setting}, wait for the end",
    )
    return wordings[rng.integers(len(wordings))].capitalize()


def _write_factors(path: Path, world: World) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["item_id", *FACTORS, "community", "popularity", "cold"])
        for k, item_id in enumerate(world.item_ids):
            names = [values[value] for values, value in zip(FACTORS.values(), world.factors[k], strict=True)]
            writer.writerow(
                [item_id, *names, world.communities[k], round(float(world.popularity[k]), 4), int(world.cold[k])]
            )


def _digest(directory: Path) -> str:
    """16 hex digits over the names and bytes of all files but the marker."""
    digest = hashlib.blake2b(digest_size=8)
    for file in [directory / "factors.csv", *sorted(directory.glob("*/*"))]:
        digest.update(f"{file.relative_to(directory).as_posix()} {file.stat().st_size}\n".encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()
