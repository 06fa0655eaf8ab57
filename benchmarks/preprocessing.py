"""Claim: pictures are resized on the host: it is a small part of a video's work there, and elsewhere another result.

    python benchmarks/preprocessing.py [--rounds 5] [--clips FOLDER] [--save]

cost        CPU ms in one thread for 16 frames of the 60 s 720p clip of `decode.py` (h264, 36 key frames): sampling the
            clip, and what the processor of a LLaVA-OneVision then does with it (384x384, its own size); taking turns
difference  torchvision resizes uint8 pictures on a CPU with a kernel of integers; on a GPU in float32, rounded. The
            second way runs here too, without the first: how many levels of 255 pixels differ, and the features of each
            native family's tiny model, as a share of a feature's largest entry; a frame of the clip and one of noise

No GPU is used. The last line of stdout is a JSON object.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from decode import CLIPS, NUM_FRAMES, WIDTH, write_clip
from record import markdown_table, save

from lvlmrec.features import recipe_config as recipes
from lvlmrec.features.model_recipe import Prompt
from lvlmrec.features.recipe_config import RecipeConfig
from lvlmrec.lvlms import LVLMS, LVLMConfig, tiny
from lvlmrec.lvlms.families.family import NativeFamily
from lvlmrec.lvlms.files import torchvision_shim
from lvlmrec.lvlms.protocol import Item
from lvlmrec.lvlms.tiny.llava_onevision import sized
from lvlmrec.media.sampling import Clip, sample_clip

SIDE = 384
INTEGER_KERNEL = "torchvision.transforms.v2.functional._geometry._do_native_uint8_resize_on_cpu"
ONE_LAYER = {"num_hidden_layers": 1, "hidden_size": 64}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--clips", type=Path, default=Path(tempfile.gettempdir(), "lvlmrec-decode-clips"))
    parser.add_argument("--save", action="store_true", help="write a dated result under benchmarks/results")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torchvision_shim.ensure_importable()
    path = write_clip(next(kind for kind in CLIPS if kind.num_keyframes == 36), arguments.clips, None)
    clip = sample_clip(path, NUM_FRAMES, max_side=WIDTH)
    with tempfile.TemporaryDirectory() as folder:
        cost = measure_cost(path, clip, Path(folder), arguments.rounds)
        differences = {family: measure_difference(family, clip, Path(folder)) for family in native_families()}
    body = markdown_table(["16 frames of a video", "CPU ms"], [[name, value] for name, value in cost.items()])
    head = ["family", "largest difference, levels", "pixels that differ", "by more than one", "features"]
    rows = [[family, *(f"{value:.2g}" for value in row.values())] for family, row in differences.items()]
    body += "\n\n" + markdown_table(head, rows)
    print(body)
    if arguments.save:
        print(save("preprocessing", __doc__ or "", body), file=sys.stderr)
    print(json.dumps({"cpu_ms": cost, "differences": differences}))


def native_families() -> list[str]:
    return sorted(name for name, entry in LVLMS.items() if isinstance(entry, NativeFamily))


def measure_cost(path: Path, clip: Clip, folder: Path, rounds: int) -> dict[str, float]:
    """Medians of both, in turns, after one round that does not count."""
    vision = {"num_hidden_layers": 1, "hidden_size": 64, "num_attention_heads": 2}
    tiny.write(*sized(ONE_LAYER | {"num_attention_heads": 2}, vision, SIDE), folder / "llava", seed=0)
    model, item = load("llava_onevision", folder / "llava"), Item("clip", clip)
    steps = {
        "decode": lambda: sample_clip(path, NUM_FRAMES, max_side=WIDTH),
        "preprocess": lambda: model.prepare([item]),
    }
    spent: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds + 1):
        for name, step in steps.items():
            started = time.process_time()
            step()
            spent[name].append(1000 * (time.process_time() - started))
    return {name: round(statistics.median(values[1:]), 1) for name, values in spent.items()}


def measure_difference(family: str, clip: Clip, folder: Path) -> dict[str, float]:
    """Both ways of resizing, what the tower sees and what comes out."""
    LVLMS[family].write_tiny(folder / family, seed=0)
    model = load(family, folder / family)
    rng = np.random.default_rng(0)
    small = [frames[:4] for frames in (clip.frames, rng.integers(0, 256, clip.frames.shape, dtype=np.uint8))]
    items = [
        Item(str(row), dataclasses.replace(clip, frames=frames, frame_indices=clip.frame_indices[:4]))
        for row, frames in enumerate(small)
    ]
    seen, features = pixels_of(model.prepare(items)), model.extract(model.prepare(items))
    with mock.patch(INTEGER_KERNEL, lambda interpolation: False):
        other, other_features = pixels_of(model.prepare(items)), model.extract(model.prepare(items))
    parts: list[Any] = [getattr(model._processor, name, None) for name in ("video_processor", "image_processor")]
    level = 1 / 255 / min(min(part.image_std) for part in parts if getattr(part, "do_normalize", False))
    levels = torch.cat([((a - b).abs() / level).flatten() for a, b in zip(seen, other, strict=True)])
    shares = [float((other_features[n] - f).abs().max() / f.abs().max()) for n, f in features.items()]
    return {
        "levels": round(float(levels.max()), 1),
        "differ": float((levels > 0.5).float().mean()),
        "by_more_than_one": float((levels > 1.5).float().mean()),
        "features": max(shares),
    }


def load(family: str, directory: Path) -> Any:
    config = LVLMConfig(name=family, model=str(directory), device="cpu")
    wanted = RecipeConfig(taps=["llm.*", "vision.*"], prompts={"p": Prompt("What is shown?")}, poolings=["visual_mean"])
    return LVLMS[family].load(config, recipes.resolve_source(wanted, LVLMS[family].inspect(config)))


def pixels_of(prepared: Sequence[Any]) -> list[torch.Tensor]:
    """What the tower sees, batch by batch."""
    return [value for batch in prepared for key, value in batch.media["video"].inputs.items() if "pixel_values" in key]


if __name__ == "__main__":
    main()
