"""Claim: frames leave decoding with up to eight times the bytes of what most models look at; prepared ones have four.

    python benchmarks/frame_bytes.py [--save]

What would travel from a decode task to the process of the model, in MB a video (10^6 bytes), of 720p, 1080p and
portrait (1080 x 1920) videos, 8 and 16 frames; with `recipe.frame_max_side=1280` all of them are decoded to 1280 x 720
or 720 x 1280:

frames     as it is: uint8 frames no larger than `frame_max_side`
seen       uint8 frames at the size that the model looks at: resized, cropped and cut into views as its processor does
float32    what the processor makes of them, as `prepare` gives it
bfloat16   the same in the dtype of the model

earlier    whether frames that the processor's own code resized before come out of it as the same inputs, bit for bit
           (noise of 720p); -: what comes out are patches, or it is a port: not tried
CPU ms     of the processor on 16 frames of 720p, one thread: as they come / resized before

transformers' own video and image processors run here, with the sizes of the published preprocessor configurations
(those of conf/lvlm/, with its `video_options`; where they were not at hand, transformers' defaults, marked *), over
black frames: sizes do not depend on what is shown. Of ported models the sizes are computed by the ports' own rules. The
last line of stdout is a JSON object.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from record import markdown_table, save

from lvlmrec.lvlms.files import torchvision_shim

torchvision_shim.ensure_importable()

import transformers  # noqa: E402

from lvlmrec.lvlms.ports.minicpm_v_processor import fitted_size  # noqa: E402

MAX_SIDE = 1280
CLIPS = {"720p": (720, 1280), "1080p": (1080, 1920), "portrait": (1920, 1080)}  # height, width
NUM_FRAMES = (8, 16)
PHI_SIDE, PHI_VIEWS = 336, 2  # of each frame: the whole of it, and its one crop


def decoded_size(height: int, width: int) -> tuple[int, int]:
    """Height and width of a frame that leaves decoding."""
    scale = min(1.0, MAX_SIDE / max(height, width))
    return round(height * scale), round(width * scale)


class Processor:
    """A processor of transformers, of whole videos or of frames one by one."""

    def __init__(self, name: str, **options: Any) -> None:
        self._made, self._by_frame = getattr(transformers, name)(**options), name.endswith("ImageProcessor")

    def pixels(self, frames: np.ndarray, **options: Any) -> torch.Tensor:
        """What it makes of frames [F, H, W, 3]."""
        shown = {"images": [*frames]} if self._by_frame else {"videos": [frames], "do_sample_frames": False}
        inputs = self._made(**shown, input_data_format="channels_last", return_tensors="pt", **options)
        found: torch.Tensor = next(value for key, value in inputs.items() if key.startswith("pixel_values"))
        return found

    def __call__(self, frames: np.ndarray) -> int:
        return self.pixels(frames).numel()

    def earlier(self, frames: np.ndarray) -> dict[str, Any]:
        """Whether resizing before makes the same inputs, and CPU ms of the processor without and with it."""
        if self.pixels(frames[:2]).shape[:-3].numel() != 2:  # patches
            return {"earlier": "-", "CPU ms": f"{cpu_ms(functools.partial(self.pixels, frames)):.0f}"}
        raw = self.pixels(frames, do_rescale=False, do_normalize=False)
        resized = raw.reshape(-1, *raw.shape[-3:]).permute(0, 2, 3, 1).to(torch.uint8).contiguous().numpy()
        is_same = torch.equal(self.pixels(frames), self.pixels(resized))
        costs = [cpu_ms(functools.partial(self.pixels, shown)) for shown in (frames, resized)]
        return {"earlier": "same" if is_same else "other", "CPU ms": " / ".join(f"{cost:.0f}" for cost in costs)}


def cpu_ms(run: Callable[[], object], rounds: int = 3) -> float:
    """The least of some rounds."""
    costs = []
    for _ in range(rounds):
        started = time.process_time()
        run()
        costs.append(1e3 * (time.process_time() - started))
    return min(costs)


def minicpm_v(frames: np.ndarray) -> int:
    across, down = fitted_size((frames.shape[2], frames.shape[1]), 448, 14)
    return len(frames) * across * down * 3


def phi_3_5_vision(frames: np.ndarray) -> int:
    return len(frames) * PHI_VIEWS * PHI_SIDE**2 * 3


def models() -> dict[str, Callable[[np.ndarray], int]]:
    """Layer of conf/lvlm/ -> how many values its model reads of frames [F, H, W, 3]."""
    qwen2 = {"size": {"shortest_edge": 56 * 56, "longest_edge": 602_112}}  # of a frame: `video_options.max_pixels`
    qwen3 = {"size": {"shortest_edge": 4096, "longest_edge": 25_165_824}}  # of a video; of a frame 768 x 32 x 32
    square = {side: {"height": side, "width": side} for side in (384, 448, 896)}
    return {
        "llava_onevision_7b": Processor("LlavaOnevisionVideoProcessor", size=square[384]),
        "llava_next_video_7b": Processor(
            "LlavaNextVideoVideoProcessor", size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336}
        ),
        "internvl3_8b": Processor("InternVLVideoProcessor", size=square[448]),
        "gemma3_12b": Processor("Gemma3ImageProcessor", size=square[896]),
        "gemma4_e4b *": Processor("Gemma4VideoProcessor"),
        "qwen2_vl_7b, qwen2_5_vl_7b": Processor("Qwen2VLVideoProcessor", cap_pixels_per_frame=True, **qwen2),
        "qwen3_vl_8b": Processor("Qwen3VLVideoProcessor", cap_pixels_per_frame=True, **qwen3),
        "video_llama_3_7b": Processor(
            "VideoLlama3VideoProcessor", size={"shortest_edge": 112 * 112, "longest_edge": 12_845_056}
        ),
        "smolvlm2_2_2b *": Processor("SmolVLMVideoProcessor"),
        "minicpm_v_4_6 *": Processor("MiniCPMV4_6VideoProcessor"),
        "minicpm_v_2_6, minicpm_v_4_5": minicpm_v,
        "phi_3_5_vision": phi_3_5_vision,
    }


def measure(values_of: Callable[[np.ndarray], int], size: tuple[int, int], num_frames: int) -> dict[str, float]:
    """MB of one video in each form."""
    frames = np.zeros((num_frames, *decoded_size(*size), 3), np.uint8)
    seen = values_of(frames)
    sizes = {"frames": frames.nbytes, "seen": seen, "float32": 4 * seen, "bfloat16": 2 * seen}
    return {name: round(size / 1e6, 2) for name, size in sizes.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--save", action="store_true", help="write a dated result under benchmarks/results")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    noise = np.random.default_rng(0).integers(0, 256, (16, *CLIPS["720p"], 3), np.uint8)
    results: dict[str, dict[str, Any]] = {}
    rows = []
    for name, values_of in models().items():
        earlier = values_of.earlier(noise) if isinstance(values_of, Processor) else {"earlier": "-", "CPU ms": "-"}
        results[name] = dict(earlier)
        for num_frames in NUM_FRAMES:
            sizes = {clip: measure(values_of, size, num_frames) for clip, size in CLIPS.items()}
            results[name][f"{num_frames} frames"] = sizes
            for clips, of in same(sizes).items():
                less = f"{of['frames'] / of['seen']:.1f}"
                rows.append([name, clips, num_frames, *of.values(), less, *earlier.values()])
        print(name, results[name], file=sys.stderr)
    units = [f"{form}, MB" for form in ("frames", "seen", "float32", "bfloat16")]
    body = markdown_table(["model", "video", "frames", *units, "frames / seen", "earlier", "CPU ms"], rows)
    print(body)
    if arguments.save:
        print(save("frame_bytes", __doc__ or "", body), file=sys.stderr)
    print(json.dumps(results))


def same(sizes: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    """Those of several clips with the same sizes as one, under all their names."""
    found: dict[str, dict[str, float]] = {}
    for clip, of in sizes.items():
        alike = next((names for names, others in found.items() if others == of), "")
        found.pop(alike, None)
        found[f"{alike}, {clip}" if alike else clip] = of
    return found


if __name__ == "__main__":
    main()
