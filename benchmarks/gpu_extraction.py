"""Videos per second and utilisation of an accelerator: the plain Hugging Face loop and this project's extractor.

    python benchmarks/gpu_extraction.py [--size 7b|small] [--batch 8] [--rounds 3] [--out FILE] [--save]

LLaVA-OneVision and Qwen2.5-VL with the shapes of their 7B models (or small ones, to try the script on a CPU) and
random weights; 16 frames of 384 x 384, bfloat16 on a GPU. It needs neither Ray nor a network nor weights: torch,
transformers, omegaconf and av are enough. Variants are interleaved round by round; figures are medians.

    naive     transformers' model with its head: all hidden states and logits, one forward per prompt, `--batch` videos
    lvlmrec   this project's extractor on the same videos, prompts and taps

`videos_per_second` counts the model alone, from tensors on the host to pooled features on the host; the processor's
seconds stand beside it (it runs in another thread, see extraction/extractor.py). `mfu` is the operations that a variant
really does, counted by torch, / (seconds x the dense peak of the device). The last line is a JSON object.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from lvlmrec.features import recipe_config as recipes
from lvlmrec.features.model_recipe import Prompt
from lvlmrec.features.recipe_config import LVLMInfo, RecipeConfig
from lvlmrec.lvlms import LVLMS
from lvlmrec.lvlms.engine.native import NativeLVLM
from lvlmrec.lvlms.files import torchvision_shim
from lvlmrec.lvlms.protocol import Item
from lvlmrec.lvlms.tiny import llava_onevision, qwen2_5_vl
from lvlmrec.media.sampling import Clip

FRAMES, SIDE = 16, 384
PEAK = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "4090": 165e12}  # dense bfloat16, per second
QWEN2_7B = {
    "num_hidden_layers": 28,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152_064,
    "max_position_embeddings": 32_768,
}
SMALL = {
    "num_hidden_layers": 4,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
PROMPTS = {
    "describe": "Describe this video.",
    "topic": "What is the main topic of the video? Answer in one word.",
    "mood": "Which mood does the music of this video have?",
    "audience": "Who would like to watch this video, and why?",
}
Config = tuple[Any, Any]


def llava(size: str) -> Config:
    """LLaVA-OneVision: SigLIP so400m at 384 px without its last layer, Qwen2."""
    if size == "small":
        vision = {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
        return llava_onevision.sized(SMALL, vision, side=84)
    vision = {"num_hidden_layers": 26, "hidden_size": 1152, "intermediate_size": 4304, "num_attention_heads": 16}
    return llava_onevision.sized(QWEN2_7B, vision, side=SIDE)


def qwen(size: str) -> Config:
    """Qwen2.5-VL: its tower of 32 layers with four of full attention, Qwen2.5."""
    if size == "small":
        rope = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 6, 6]}}
        vision = {"depth": 2, "hidden_size": 64, "out_hidden_size": 128, "intermediate_size": 128, "num_heads": 4}
        return qwen2_5_vl.sized(SMALL | rope, vision | {"fullatt_block_indexes": [1]}, largest=112 * 112)
    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}}
    vision = {"depth": 32, "hidden_size": 1280, "out_hidden_size": 3584, "intermediate_size": 3420, "num_heads": 16}
    return qwen2_5_vl.sized(QWEN2_7B | rope, vision, largest=SIDE * SIDE)


FAMILIES: dict[str, Callable[[str], Config]] = {"llava_onevision": llava, "qwen2_5_vl": qwen}


@dataclass
class Variant:
    """One side of a comparison: `prepare` on the host, then `forward` to features on the host."""

    prepare: Callable[[], Any]
    forward: Callable[[Any], Any]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=["7b", "small"], default="7b" if torch.cuda.is_available() else "small")
    parser.add_argument("--families", nargs="+", choices=sorted(FAMILIES), default=sorted(FAMILIES))
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--compile", action="store_true", help="torch.compile the decoder's layers in ours too")
    parser.add_argument("--out", type=Path, help="also write the JSON object here")
    parser.add_argument("--save", action="store_true", help="write a dated file under benchmarks/results/")
    arguments = parser.parse_args()
    torchvision_shim.ensure_importable()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    peak = next((value for key, value in PEAK.items() if key in name), None)
    result: dict[str, Any] = {"device": name, "size": arguments.size, "batch": arguments.batch, "frames": FRAMES}
    for family in arguments.families:
        result[family] = measure_family(family, arguments, device, peak)
    text = json.dumps(result)
    if arguments.out:
        arguments.out.write_text(text)
    if arguments.save:
        from record import fenced, save

        print(save("gpu_extraction", __doc__ or "", fenced(json.dumps(result, indent=1))), file=sys.stderr)
    print(text)
    return 0


def measure_family(family: str, arguments: Any, device: torch.device, peak: float | None) -> dict[str, Any]:
    """All variants of one family."""
    model, processor = build(family, arguments.size, device)
    clips = [noise(seed) for seed in range(arguments.batch)]
    measured: dict[str, Any] = {}
    for num_prompts in (1, 4):
        for depth in ("half", "full"):
            sides = {
                "naive": naive(model, processor, family, clips, num_prompts),
                "lvlmrec": ours(model, processor, family, clips, num_prompts, depth, arguments),
            }
            rows = compare(sides, arguments.rounds, len(clips), device, peak)
            rows["speedup"] = round(rows["lvlmrec"]["videos_per_second"] / rows["naive"]["videos_per_second"], 2)
            measured[f"prompts_{num_prompts}_{depth}"] = rows
            print(f"{family}, {num_prompts} prompts, {depth} depth: {json.dumps(rows)}", file=sys.stderr)
    return measured


def build(family: str, size: str, device: torch.device) -> tuple[Any, Any]:
    """The whole model with random weights, made where it runs, and its processor."""
    from transformers import AutoModelForImageTextToText

    model_config, processor = FAMILIES[family](size)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with torch.device(device):
        model = AutoModelForImageTextToText.from_config(model_config, dtype=dtype, attn_implementation="sdpa")
    processor.tokenizer.padding_side = "left"
    return model.eval().requires_grad_(False), processor


def noise(seed: int) -> Clip:
    """A clip of 16 random frames."""
    frames = np.random.default_rng(seed).integers(0, 256, (FRAMES, SIDE, SIDE, 3), dtype=np.uint8)
    indices = np.arange(FRAMES, dtype=np.int64) * 30
    return Clip(frames, indices / 30.0, indices, FRAMES * 30, FRAMES * 1.0)


def naive(model: Any, processor: Any, family: str, clips: list[Clip], num_prompts: int) -> Variant:
    """What a user of transformers writes; the mean over visual tokens of every layer stays on the host."""
    options = {key: value for key, value in LVLMS[family].video_options.items() if value}  # type: ignore[attr-defined]

    def prepare() -> list[Any]:
        prepared = []
        for prompt in list(PROMPTS.values())[:num_prompts]:
            content = [{"type": "video"}, {"type": "text", "text": prompt}]
            text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
            videos = [clip.frames for clip in clips]
            prepared.append(
                processor(
                    text=[text] * len(clips),
                    videos=videos,
                    do_sample_frames=False,
                    return_tensors="pt",
                    padding=True,
                    **options,
                )
            )
        return prepared

    @torch.inference_mode()
    def forward(prepared: list[Any]) -> list[Any]:
        features = []
        for inputs in prepared:
            inputs = inputs.to(model.device, model.dtype)
            states = model(**inputs, output_hidden_states=True, use_cache=False).hidden_states
            mask = (inputs["input_ids"] == model.config.video_token_id)[..., None]
            features.append([((state.float() * mask).sum(1) / mask.sum(1)).cpu() for state in states])
        return features

    return Variant(prepare, forward)


def ours(
    model: Any, processor: Any, family: str, clips: list[Clip], num_prompts: int, depth: str, arguments: Any
) -> Variant:
    """This project's extractor over the same weights: visual and last-token pooling at every fourth layer."""
    entry = LVLMS[family]
    text = model.config.get_text_config()
    layers = text.num_hidden_layers
    vision = getattr(model.config.vision_config, "num_hidden_layers", 0) or model.config.vision_config.depth
    info = LVLMInfo(family, "random", str(model.dtype), {"llm": layers, "vision": vision}, {"llm": text.hidden_size})
    top = layers // 2 if depth == "half" else layers
    wanted = RecipeConfig(
        frames=FRAMES,
        taps=[f"llm.{layer}" for layer in range(0, top + 1, max(1, layers // 7))],
        prompts={name: Prompt(PROMPTS[name]) for name in list(PROMPTS)[:num_prompts]},
        poolings=["visual_mean", "last_token"],
    )
    weights = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    base = copy.deepcopy(model.base_model, weights)  # modules of its own to hook and cut, the same weights
    lvlm = NativeLVLM(entry, base, processor, recipes.resolve_source(wanted, info), info, arguments.batch)  # type: ignore[arg-type]
    if arguments.compile:
        lvlm.hooks.compile()
    items = [Item(str(row), clip) for row, clip in enumerate(clips)]
    return Variant(lambda: lvlm.prepare(items), lvlm.extract)


def compare(
    sides: dict[str, Variant], rounds: int, num_videos: int, device: torch.device, peak: float | None
) -> dict[str, Any]:
    """Medians over interleaved rounds; a first round warms up and counts operations."""
    operations = {}
    for name, side in sides.items():
        with FlopCounterMode(display=False) as counter:
            side.forward(side.prepare())
        operations[name] = counter.get_total_flops()
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, side in sides.items():
            started = time.perf_counter()
            prepared = side.prepare()
            between = time.perf_counter()
            side.forward(prepared)
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds[name].append((between - started, time.perf_counter() - between))
    rows = {}
    for name, pairs in seconds.items():
        forward = statistics.median(pair[1] for pair in pairs)
        rows[name] = {
            "videos_per_second": round(num_videos / forward, 3),
            "processor_seconds_per_video": round(statistics.median(pair[0] for pair in pairs) / num_videos, 4),
            "tflop_per_video": round(operations[name] / num_videos / 1e12, 4),
            "mfu": round(operations[name] / forward / peak, 4) if peak else None,
        }
    return rows


if __name__ == "__main__":
    sys.exit(main())
