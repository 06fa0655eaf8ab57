"""What the extractor is worth beside the plain Hugging Face loop, on one CPU thread.

    python benchmarks/extraction.py [--rounds 5] [--save]

A LLaVA-OneVision with random weights, 8 layers x 512, whose vision tower (19 % of the operations) and vocabulary have
the share of the work that they have in the 7B model; 16 frames, 785 video tokens. Every variant gives the same pooled
features of the same clip (checked). Rounds are interleaved, times are CPU time, ratios are medians over the rounds.

    naive    transformers' model with its head: all hidden states, logits, cache; one forward per prompt
    base     the same without head and cache, hidden states of the taps alone: the fair baseline
    rerun    as `base`, one forward per tap and prompt
    lvlmrec  this project's extractor
    merged   the same, and beside the means the video's tokens merged to 16

The last line is a JSON object: `speedup_4_half` is base / lvlmrec for four prompts with the top tap at half depth,
`..._over_naive` is naive / lvlmrec,
`cost_of_merged_16` is merged / lvlmrec. --save writes it to benchmarks/results/ with the date.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from record import save

from lvlmrec.features import recipe_config as recipes
from lvlmrec.features.model_recipe import Prompt
from lvlmrec.features.recipe_config import RecipeConfig
from lvlmrec.lvlms import LVLMS, LVLMConfig, tiny
from lvlmrec.lvlms.engine.pooling import TokenMasks, pool_columns
from lvlmrec.lvlms.files import source, torchvision_shim
from lvlmrec.lvlms.protocol import Item
from lvlmrec.lvlms.tiny.llava_onevision import sized
from lvlmrec.media.sampling import Clip

SIDE, FRAMES = 196, 16
TEXT = {
    "num_hidden_layers": 8,
    "hidden_size": 512,
    "intermediate_size": 2688,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 6400,
}
VISION = {"num_hidden_layers": 7, "hidden_size": 176, "intermediate_size": 656, "num_attention_heads": 4}
PROMPTS = {
    "describe": "Describe this video.",
    "topic": "What is the main topic of the video? Answer in one word.",
    "mood": "Which mood does the music of this video have?",
    "audience": "Who would like to watch this video, and why?",
}
TAPS = {"half": (2, 4), "88": (4, 7)}
POOLINGS = ("visual_mean", "last_token")
TOLERANCE = 1e-5  # share of a feature's largest entry

Variant = Callable[[], dict[str, torch.Tensor]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--save", action="store_true")
    parser.add_argument("--peak", nargs=2, metavar=("VARIANT", "MODEL"), help="the peak memory of one variant alone")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torchvision_shim.ensure_importable()
    if arguments.peak:
        print(json.dumps(peak_memory(*arguments.peak)))
        return
    with tempfile.TemporaryDirectory() as folder:
        tiny.write(*sized(TEXT, VISION, SIDE), Path(folder), seed=0)
        result = state_of_machine() | measure(folder, arguments.rounds)
        result["peak_mb"] = {name: peak_in_a_child(name, folder) for name in VARIANTS}
    if arguments.save:
        print(save("extraction", __doc__ or "", f"```json\n{json.dumps(result, indent=1)}\n```"), file=sys.stderr)
    for name, seconds in result["cpu_seconds"].items():
        print(f"{name:18}{seconds:8.2f} s {result['peak_mb'][name]}", file=sys.stderr)
    print(json.dumps(result))


def measure(model: str, rounds: int) -> dict[str, Any]:
    """Median CPU seconds of every variant and their ratios, round by round."""
    variants = {name: make(model) for name, make in VARIANTS.items()}
    features = {name: run() for name, run in variants.items()}  # also warms up
    largest = max(check(features[name], features[baseline]) for name, baseline in PAIRS.values())
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(rounds):
        for name, run in variants.items():
            started = time.process_time()
            run()
            seconds[name].append(time.process_time() - started)
        print(f"round {turn + 1}: { {n: round(s[-1], 2) for n, s in seconds.items()} }", file=sys.stderr)
    ratios = {
        label: [slow / fast for slow, fast in zip(seconds[baseline], seconds[name], strict=True)]
        for label, (name, baseline) in PAIRS.items()
    }
    return {
        **{label: round(statistics.median(values), 2) for label, values in ratios.items()},
        "spread": {label: [round(min(values), 2), round(max(values), 2)] for label, values in ratios.items()},
        "cpu_seconds": {name: round(statistics.median(values), 3) for name, values in seconds.items()},
        "largest_difference": largest,
        "rounds": rounds,
    }


def check(features: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """The largest difference between two variants, as a share of a feature's largest entry."""
    assert features.keys() <= expected.keys(), sorted(features.keys() - expected.keys())
    worst = max(float((features[name] - expected[name]).abs().max() / expected[name].abs().max()) for name in features)
    assert worst <= TOLERANCE, worst
    return worst


def lvlmrec(model: str, depth: str, num_prompts: int, poolings: Sequence[str] = POOLINGS) -> Variant:
    """This project's extractor."""
    config = LVLMConfig(name="llava_onevision", model=model, device="cpu")
    entry = LVLMS[config.name]
    recipe = recipes.resolve_source(
        RecipeConfig(
            frames=FRAMES,
            taps=[f"llm.{layer}" for layer in TAPS[depth]],
            prompts={name: Prompt(PROMPTS[name]) for name in list(PROMPTS)[:num_prompts]},
            poolings=list(poolings),
        ),
        entry.inspect(config),
    )
    lvlm, item = entry.load(config, recipe), Item("clip", make_clip())

    def run() -> dict[str, torch.Tensor]:
        columns = lvlm.extract(lvlm.prepare([item]))
        return {name: column for name, column in columns.items() if isinstance(column, torch.Tensor)}

    return run


def hugging_face(model: str, kind: str, num_prompts: int) -> Variant:
    """The loop a user of transformers writes: processor and model, prompt by prompt. It always runs all layers."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    with source.quiet():
        whole = AutoModelForImageTextToText.from_pretrained(model, dtype=torch.float32).eval()
    processor, clip = AutoProcessor.from_pretrained(model), make_clip()
    taps = sorted({layer for layers in TAPS.values() for layer in layers})  # its time does not depend on them
    runs = [[layer] for layer in TAPS["half"]] if kind == "rerun" else [taps]

    @torch.inference_mode()
    def run() -> dict[str, torch.Tensor]:
        features: dict[str, torch.Tensor] = {}
        for prompt in list(PROMPTS)[:num_prompts]:
            content = [{"type": "video"}, {"type": "text", "text": PROMPTS[prompt]}]
            text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
            inputs = processor(text=[text], videos=[clip.frames], do_sample_frames=False, return_tensors="pt")
            visual = inputs["input_ids"] == processor.video_token_id
            no_answer = torch.zeros_like(visual)
            masks = TokenMasks(inputs["attention_mask"].bool(), visual, no_answer, no_answer)
            for layers in runs:
                if kind == "naive":
                    states = whole(**inputs, output_hidden_states=True).hidden_states
                else:
                    # transformers keeps the listed states alone, the others are None
                    states = whole.base_model(**inputs, output_hidden_states=layers, use_cache=False).hidden_states
                for layer in layers:
                    for pooling, pooled in pool_columns(POOLINGS, states[layer], masks).items():
                        features[f"{prompt}/llm.{layer}/{pooling}"] = pooled
        return features

    return run


VARIANTS: dict[str, Callable[[str], Variant]] = {
    "naive_1": lambda model: hugging_face(model, "naive", 1),
    "base_1": lambda model: hugging_face(model, "base", 1),
    "rerun_1": lambda model: hugging_face(model, "rerun", 1),
    "lvlmrec_1_half": lambda model: lvlmrec(model, "half", 1),
    "merged_1_half": lambda model: lvlmrec(model, "half", 1, (*POOLINGS, "merged_16")),
    "lvlmrec_1_88": lambda model: lvlmrec(model, "88", 1),
    "naive_4": lambda model: hugging_face(model, "naive", 4),
    "base_4": lambda model: hugging_face(model, "base", 4),
    "lvlmrec_4_half": lambda model: lvlmrec(model, "half", 4),
    "lvlmrec_4_88": lambda model: lvlmrec(model, "88", 4),
}
PAIRS = {
    f"speedup_{case}{suffix}": (f"lvlmrec_{case}", f"{baseline}_{case[0]}")
    for case in ("1_half", "1_88", "4_half", "4_88")
    for baseline, suffix in (("base", ""), ("naive", "_over_naive"))
} | {
    "speedup_1_half_over_rerun": ("lvlmrec_1_half", "rerun_1"),
    "cost_of_merged_16": ("lvlmrec_1_half", "merged_1_half"),
}


def make_clip() -> Clip:
    """A drifting colour gradient with noise, at the size the model reads: decoding and resizing are not measured."""
    rng = np.random.default_rng(0)
    base = np.linspace(0, 1, SIDE)[None, None, :, None] * rng.uniform(60, 200, 3)
    drift = np.arange(FRAMES)[:, None, None, None] * rng.uniform(-12, 12, 3)
    frames = (base + drift + rng.uniform(0, 40, (FRAMES, SIDE, SIDE, 3))).clip(0, 255).astype(np.uint8)
    indices = np.arange(FRAMES, dtype=np.int64) * 25
    return Clip(frames, indices / 25, indices, FRAMES * 25, float(FRAMES))


def peak_in_a_child(name: str, model: str) -> dict[str, int]:
    command = [sys.executable, __file__, "--peak", name, model]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return dict(json.loads(output.splitlines()[-1]))


def peak_memory(name: str, model: str) -> dict[str, int]:
    """MB resident once the model is loaded, and at the highest point of one run (Linux).

    Weights are mapped from their file: some of them become resident only in the run.
    """
    run = VARIANTS[name](model)
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far, of loading, is forgotten
    loaded = _status_mb("VmRSS")
    run()
    return {"loaded": loaded, "peak": _status_mb("VmHWM")}


def _status_mb(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:")) // 1024


def state_of_machine() -> dict[str, Any]:
    """What a reader needs to judge the numbers."""
    import transformers

    return {
        "date": datetime.date.today().isoformat(),
        "cpus": os.cpu_count(),
        "machine": platform.machine(),
        "load_average_before": [round(load, 2) for load in os.getloadavg()],
        "threads": 1,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


if __name__ == "__main__":
    main()
