"""The memory that an extraction's processes ask Ray for: from the sizes of the recipe, and no more than there is."""

from __future__ import annotations

import sys
from dataclasses import dataclass

from lvlmrec import cluster
from lvlmrec.errors import ConfigError
from lvlmrec.extraction import stages
from lvlmrec.extraction.settings import PoolConfig
from lvlmrec.features.model_recipe import MOTION
from lvlmrec.features.sources import Reading
from lvlmrec.media.motion import CLIP_FRAMES, KEYFRAME_SIZE, MAP_SIZE

# Bytes of a worker that decodes or writes. Without a figure Ray Data asks for what outputs needed on average so far,
# another number for each task, and for each number Ray keeps a class of scheduling for ever.
WORKER_MEMORY = 400 << 20
CHILD_MEMORY = 300 << 20  # of a decoder beside the frames it keeps: measured 77 MB, and the references of a 4K video
CALLS_AT_ONCE = 3  # of an actor: one in the model, one being prepared, one fetched
USABLE = 0.9  # of a Ray's memory: its other tasks need some


@dataclass(frozen=True)
class Reserved:
    """Bytes of host memory of one process of each stage."""

    decode: int
    actor: int
    write: int = WORKER_MEMORY


def item_bytes(reading: Reading) -> int:
    """Bytes of what an item shows once it is decoded, at most: frames are no larger than `frame_max_side` both ways."""
    frame = reading.frame_max_side**2 * 3
    motion = 3 * KEYFRAME_SIZE**2 + 4 * 2 * CLIP_FRAMES * MAP_SIZE[0] * MAP_SIZE[1]
    video = reading.frames * (motion if reading.video_form == MOTION else frame)
    return sum({"video": video, "cover": frame}[kind] for kind in reading.media)


def needed(reading: Reading, batch_size: int, decode_memory_mb: int) -> Reserved:
    """What one decoder with its child, and one actor with its calls in flight take beside the model's weights.

    An item is held twice: by a decoder in the child and in the worker, by an actor as it came and as it is prepared.
    """
    item = item_bytes(reading)
    child = min(CHILD_MEMORY + item, decode_memory_mb << 20) if item else 0
    in_flight = CALLS_AT_ONCE * stages.BATCHES_AT_ONCE * batch_size
    return Reserved(WORKER_MEMORY + item + child, WORKER_MEMORY + 2 * in_flight * item)


def reserve(pool: PoolConfig, wanted: Reserved) -> Reserved:
    """What the processes are to ask this Ray for, of what is `wanted`.

    Where all that are configured would ask for more than there is, each asks for less, so that none of them waits for
    memory, and a line on stderr says so. Raises `ConfigError` when not even one of each stage fits.
    """
    there = cluster.memory()
    if there is None:  # nodes will come
        return wanted
    usable = USABLE * there
    if usable < (least := (pool.min_actors + 2) * WORKER_MEMORY):
        message = f"{pool.min_actors} actors, a decoder and a writer take {_gb(least)} at least"
        raise ConfigError(f"pool.min_actors: {message}, this Ray has {_gb(usable)} of memory: start it with more")
    base = (pool.max_actors + pool.decode_tasks + 1) * WORKER_MEMORY
    total = pool.max_actors * wanted.actor + pool.decode_tasks * wanted.decode + wanted.write
    if total <= usable:
        return wanted
    share = max(0.0, (usable - base) / (total - base)) if total > base else 0.0
    wish = f"{pool.max_actors} actors and {pool.decode_tasks} decoders may take {_gb(total)} of memory"
    less = "smaller lvlm.batch_size, recipe.frames, recipe.frame_max_side or pool.decode_tasks take less"
    print(f"extract: {wish}, this Ray has {_gb(usable)}: less is reserved; {less}", file=sys.stderr)

    def fitted(size: int) -> int:
        return WORKER_MEMORY + int(share * (size - WORKER_MEMORY))

    return Reserved(fitted(wanted.decode), fitted(wanted.actor))


def _gb(size: float) -> str:
    return f"{size / 1e9:.1f} GB"
