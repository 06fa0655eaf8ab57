"""Weights, visual tokens, operations and memory of the LVLMs of conf/lvlm/, from their published configurations alone.

    python benchmarks/model_sizes.py [--save]

Each model is built without weights (torch's meta device) and its parameters are counted. One video is 16 frames of
1280 x 720 and one prompt of 40 tokens; marks and timestamps between frames are left out. Nothing is run: no number here
is a measurement. It needs neither Ray nor a network. Operations are those of the vision tower, what projects its
patches, and the whole decoder without its head:

    2 x weights of the linear layers and convolutions x tokens that pass them
    + 4 x layers x tokens x tokens that each attends to x width of all heads          (scores, and values by scores)

with attention over every pair of tokens, causal or not, as torch counts it (tests/test_model_sizes.py compares both on
tiny models). Embeddings, norms and softmax are left out. `floor` is operations / 989e12, the dense bfloat16 peak of an
H200: no kernel reaches it.

Batch sizes: 90 % of a GPU's 24, 80 or 141 GB less the weights (bfloat16, without the head), divided by the bytes of one
video, at most 16. Those are its keys and values in all layers (a bank of prompts keeps them) and the larger of what one
layer of the decoder and of the tower holds: 8 vectors of its width, the fourth of them in float32 for pooling, and 3
of the MLP, for every token. It is a rule of thumb that has not been tried on a GPU. Configurations: transformers'
defaults, the authors' papers, and public copies of the published config.json files, which were not at hand.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from gpu_extraction import QWEN2_7B, llava, qwen
from record import fenced, markdown_table, save

from lvlmrec.lvlms.files import torchvision_shim

torchvision_shim.ensure_importable()

import transformers  # noqa: E402
from transformers.models.qwen2_vl.video_processing_qwen2_vl import smart_resize  # noqa: E402
from transformers.models.qwen3_vl.video_processing_qwen3_vl import smart_resize as smart_resize_3  # noqa: E402

from lvlmrec.lvlms.ports import minicpm_v_model, phi_3_5_vision_model  # noqa: E402
from lvlmrec.lvlms.ports.minicpm_v_processor import fitted_size  # noqa: E402
from lvlmrec.lvlms.ports.phi_3_5_vision_processor import num_tokens  # noqa: E402

FRAMES, WIDTH, HEIGHT, PROMPT_TOKENS = 16, 1280, 720, 40
PEAK = 989e12  # operations per second
GPUS = {"24 GB": 24e9, "80 GB": 80e9, "141 GB": 141e9}
USABLE, LARGEST_BATCH = 0.9, 16
BYTES = 2
MROPE = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
LINEAR = (torch.nn.Linear, torch.nn.Conv2d, torch.nn.Conv3d)


@dataclass(frozen=True)
class Published:
    """A model: `build` makes it; the rest says what a video of 16 frames is to it.

    tower, decoder  paths of their lists of layers
    patches         tokens in the tower, class tokens included
    span            tokens that each of them attends to, the mean over layers
    tokens          visual tokens in the decoder
    beside          linear layers between the lists of layers, by path -> tokens that pass them
    resampled       MiniCPM-V's resampler: queries of all frames; 0: none
    """

    build: Callable[[], Any]
    tower: str
    decoder: str
    patches: int
    span: float
    tokens: int
    beside: dict[str, int]
    resampled: int = 0


def linear_weights(module: torch.nn.Module) -> int:
    """Weights, biases left out, of the linear layers and convolutions in a module."""
    return sum(part.weight.numel() for part in module.modules() if isinstance(part, LINEAR))


def stack_operations(layers: torch.nn.Module, tokens: int, span: float, heads_width: int) -> float:
    """Operations of a list of transformer layers over `tokens` tokens, see above."""
    num_layers = len(list(layers.children()))
    return 2 * linear_weights(layers) * tokens + 4 * num_layers * tokens * span * heads_width


def resampler_operations(resampler: Any, patches: int, queries: int) -> float:
    """Cross-attention of `queries` learned queries to `patches` patches of their own frame, 64 queries a frame."""
    width = resampler.query.shape[1]
    per_frame = resampler.query.shape[0]
    projected = 2 * (resampler.kv_proj.weight.numel() + 2 * width**2) * patches
    asked = 2 * 3 * width**2 * queries  # queries, output projection, `proj`
    return float(projected + asked + 4 * per_frame * patches * width)


def operations(model: Any, seen: Published, prompt_tokens: int = PROMPT_TOKENS) -> dict[str, float]:
    """Operations of one video in the tower, in what projects its patches, and in the decoder."""
    tower, decoder = model.get_submodule(seen.tower), model.get_submodule(seen.decoder)
    text, length = model.config.get_text_config(), seen.tokens + prompt_tokens
    projected: float = sum(2 * linear_weights(model.get_submodule(path)) * n for path, n in seen.beside.items())
    if seen.resampled:
        projected += resampler_operations(model.resampler, seen.patches, seen.resampled)
    return {
        "vision": stack_operations(tower, seen.patches, seen.span, vision_width(model)),
        "projector": projected,
        "decoder": stack_operations(decoder, length, length, text.num_attention_heads * head_size(text)),
    }


def video_bytes(model: Any, seen: Published) -> float:
    """Bytes of one video beside the weights, the rule of thumb above."""
    text, vision, length = model.config.get_text_config(), model.config.vision_config, seen.tokens + PROMPT_TOKENS
    cached = 2 * text.num_hidden_layers * text.num_key_value_heads * head_size(text) * length * BYTES
    inner = getattr(vision, "intermediate_size", None) or vision_width(model) * vision.mlp_ratio

    def layer(tokens: int, width: int, intermediate: int) -> float:
        return tokens * ((6 * BYTES + 2 * 4) * width + 3 * BYTES * intermediate)

    widest = max(
        layer(length, text.hidden_size, text.intermediate_size), layer(seen.patches, vision_width(model), inner)
    )
    return cached + widest


def batch_sizes(weights: float, video: float) -> dict[str, int]:
    """GPU -> videos in one forward; 0: the weights alone are too large."""
    return {name: max(0, min(int((USABLE * size - weights) // video), LARGEST_BATCH)) for name, size in GPUS.items()}


def head_size(text: Any) -> int:
    """Width of one head."""
    return int(getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)


def vision_width(model: Any) -> int:
    """Width of the tower's layers: Qwen2-VL calls the decoder's width `hidden_size` there."""
    vision = model.config.vision_config
    return int(getattr(vision, "embed_dim", None) or vision.hidden_size)


def native(config: Callable[[], Any]) -> Callable[[], Any]:
    """A model of transformers without its head."""
    return lambda: transformers.AutoModelForImageTextToText.from_config(config()).base_model


def qwen2_vl() -> Any:
    return transformers.Qwen2VLConfig(
        text_config=QWEN2_7B | {"rope_parameters": MROPE}, vision_config={"hidden_size": 3584}
    )


def qwen3_vl() -> Any:
    text = {"num_hidden_layers": 36, "hidden_size": 4096, "intermediate_size": 12288, "num_attention_heads": 32}
    rope = {**MROPE, "rope_theta": 5e6, "mrope_section": [24, 20, 20], "mrope_interleaved": True}
    known = {"num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151_936, "rope_parameters": rope}
    return transformers.Qwen3VLConfig(text_config=text | known, vision_config={"out_hidden_size": 4096})


def internvl() -> Any:
    return transformers.InternVLConfig(text_config={"model_type": "qwen2", **QWEN2_7B, "vocab_size": 151_674})


def gemma3() -> Any:
    text = {"num_hidden_layers": 48, "hidden_size": 3840, "intermediate_size": 15_360, "num_attention_heads": 16}
    vision = {"num_hidden_layers": 27, "hidden_size": 1152, "intermediate_size": 4304, "num_attention_heads": 16}
    return transformers.Gemma3Config(
        text_config=text | {"num_key_value_heads": 8, "head_dim": 256, "sliding_window": 1024, "vocab_size": 262_208},
        vision_config=vision | {"image_size": 896, "patch_size": 14, "vision_use_head": False},
    )


def video_llama_3() -> Any:
    vision = {"num_hidden_layers": 27, "hidden_size": 1152, "intermediate_size": 4304, "num_attention_heads": 16}
    text = {"model_type": "qwen2", **QWEN2_7B}
    return transformers.VideoLlama3Config(text_config=text, vision_config=vision | {"patch_size": 14})


def minicpm_v(version: str) -> Callable[[], Any]:
    def build() -> Any:
        vision = {"num_hidden_layers": 27, "hidden_size": 1152, "intermediate_size": 4304, "num_attention_heads": 16}
        text = {**QWEN2_7B, "vocab_size": 151_666}
        if version == "4.5":
            text = {"num_hidden_layers": 36, "hidden_size": 4096, "intermediate_size": 12_288, "vocab_size": 151_748}
            text |= {"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "attention_bias": False}
        tree = {"version": version, **text, "vision_config": vision | {"image_size": 980, "patch_size": 14}}
        return minicpm_v_model.MiniCPMV(minicpm_v_model.build_config(tree))

    return build


def phi_3_5_vision() -> Any:
    factors = {"type": "su", "short_factor": [1.0] * 48, "long_factor": [1.0] * 48}  # as many as published
    text = {"hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 32, "num_attention_heads": 32}
    known = {"num_key_value_heads": 32, "vocab_size": 32_064, "rope_theta": 1e4, "pad_token_id": 32_000}
    lengths = {"max_position_embeddings": 131_072, "original_max_position_embeddings": 4096}
    tree = {**text, **known, **lengths, "rope_scaling": factors, "img_processor": {}}
    return phi_3_5_vision_model.Phi35Vision(phi_3_5_vision_model.build_config(tree))


def frames(patches: int, tokens: int, views: int = 1) -> dict[str, int]:
    """What a tower that looks at each frame by itself reads; `patches` of a view, `tokens` of a frame."""
    return {"patches": FRAMES * views * patches, "span": patches, "tokens": FRAMES * tokens}


def packed(
    size: tuple[int, int], patch: int, windows: tuple[int, float] = (0, 0.0), frames_per_step: int = 2
) -> dict[str, Any]:
    """What Qwen-VL's towers read: pairs of frames of `size`, four patches a token.

    `windows`: tokens in a window, and the share of layers that look no further.
    """
    per_step = (size[0] // patch) * (size[1] // patch)
    span = per_step * (1 - windows[1]) + windows[0] * windows[1]
    steps = FRAMES // frames_per_step
    return {"patches": steps * per_step, "span": span, "tokens": steps * per_step // 4}


SIGLIP, VISUAL, LANGUAGE = "vision_tower.encoder.layers", "visual.blocks", "language_model.layers"


def table() -> dict[str, Published]:
    """Layer in conf/lvlm/ -> its model."""
    return frame_by_frame() | packed_together() | ports()


def patched(paths: tuple[str, ...], of: dict[str, Any]) -> dict[str, int]:
    """Linear layers that every patch passes."""
    return dict.fromkeys(paths, of["patches"])


def frame_by_frame() -> dict[str, Published]:
    """Models of transformers whose tower looks at each frame by itself."""
    onevision, next_video, views, large = frames(729, 196), frames(577, 144), frames(1025, 256), frames(4096, 256)
    onevision["tokens"] += 1  # a newline ends the video
    return {
        "llava_onevision_7b": Published(
            native(lambda: llava("7b")[0]), SIGLIP, LANGUAGE, **onevision,
            beside=patched(("vision_tower.embeddings", "multi_modal_projector"), onevision),
        ),
        "llava_next_video_7b": Published(
            native(transformers.LlavaNextVideoConfig), SIGLIP, LANGUAGE, **next_video,
            beside=patched(("vision_tower.embeddings",), next_video)
            | {"multi_modal_projector": next_video["tokens"]},
        ),
        "internvl3_8b": Published(
            native(internvl), "vision_tower.encoder.layer", LANGUAGE, **views,
            beside={"vision_tower.embeddings": views["patches"], "multi_modal_projector": views["tokens"]},
        ),
        "gemma3_12b": Published(
            native(gemma3), SIGLIP, LANGUAGE, **large, beside=patched(("vision_tower.embeddings",), large)
        ),
    }  # fmt: skip


def packed_together() -> dict[str, Published]:
    """Models of transformers whose tower reads patches of frames of any size."""
    # qwen-vl-utils: 768 tokens of 28 x 28 pixels a frame; of Qwen3-VL 32 x 32
    size = smart_resize(HEIGHT, WIDTH, 28, 128 * 28**2, 768 * 28**2)
    two, two_5 = packed(size, 14), packed(size, 14, windows=(64, 28 / 32))
    three = packed(smart_resize_3(FRAMES, HEIGHT, WIDTH, 2, 32, 4096, FRAMES * 768 * 32**2), 16)
    # of the whole video; with none of its tokens left out, as when everything moves
    llama = packed(smart_resize(HEIGHT, WIDTH, 28, 112**2, 12_845_056 // FRAMES), 14, frames_per_step=1)

    def merged(of: dict[str, Any]) -> dict[str, int]:
        return {"visual.patch_embed": of["patches"], "visual.merger": of["tokens"]}

    return {
        "qwen2_vl_7b": Published(native(qwen2_vl), VISUAL, LANGUAGE, **two, beside=merged(two)),
        "qwen2_5_vl_7b": Published(native(lambda: qwen("7b")[0]), VISUAL, LANGUAGE, **two_5, beside=merged(two_5)),
        "qwen3_vl_8b": Published(
            native(qwen3_vl), VISUAL, LANGUAGE, **three,
            beside=merged(three) | {"visual.deepstack_merger_list": three["tokens"]},
        ),
        "video_llama_3_7b": Published(
            native(video_llama_3), "vision_model.encoder.layers", LANGUAGE, **llama,
            beside={"vision_model.embeddings": llama["patches"], "projector": llama["tokens"]},
        ),
    }  # fmt: skip


def ports() -> dict[str, Published]:
    """Models that are ported here."""
    across, down = fitted_size((WIDTH, HEIGHT), 448, 14)
    minicpm, phi = frames((across // 14) * (down // 14), 64), frames(577, num_tokens(1, 1), views=2)
    clip = "model.vision_embed_tokens.img_processor.vision_model"
    both = {
        f"minicpm_v_{version.replace('.', '_')}": Published(
            minicpm_v(version), "vpm.encoder.layers", "llm.model.layers", **minicpm,
            beside=patched(("vpm.embeddings",), minicpm), resampled=minicpm["tokens"],
        )
        for version in ("2.6", "4.5")
    }  # fmt: skip
    return both | {
        "phi_3_5_vision": Published(
            phi_3_5_vision, f"{clip}.encoder.layers", "model.layers", **phi,
            beside={f"{clip}.embeddings": phi["patches"], "model.vision_embed_tokens.img_projection": phi["tokens"]},
        ),
    }  # fmt: skip


NOT_COMPUTED = ("smolvlm2_2_2b", "gemma4_e4b", "minicpm_v_4_6", "video_lavit")  # configurations not at hand


def measure(seen: Published) -> dict[str, Any]:
    """All figures of one model."""
    with torch.device("meta"):
        model = seen.build().to(torch.bfloat16)
    text = model.config.get_text_config()
    parameters = sum(weight.numel() for weight in model.parameters())
    done, video = operations(model, seen), video_bytes(model, seen)
    return {
        "layers": text.num_hidden_layers,
        "width": text.hidden_size,
        "parameters": parameters,
        "head": text.vocab_size * text.hidden_size,
        "weights_gb": round(parameters * BYTES / 1e9, 1),
        "visual_tokens": seen.tokens,
        "tflop": {name: round(value / 1e12, 2) for name, value in done.items()},
        "tflop_per_video": round(sum(done.values()) / 1e12, 1),
        "floor_ms": round(1e3 * sum(done.values()) / PEAK, 1),
        "video_gb": round(video / 1e9, 2),
        "batch_size": batch_sizes(parameters * BYTES, video),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--save", action="store_true", help="write a dated result under benchmarks/results")
    arguments = parser.parse_args()
    measured = {layer: measure(seen) for layer, seen in table().items()}
    head = ["conf/lvlm/", "layers x width", "weights", "tokens", "TFLOP (vision + projector + decoder)", "floor",
            "GB a video", "batch at " + ", ".join(GPUS)]  # fmt: skip
    lines = [
        [
            layer,
            f"{row['layers']} x {row['width']}",
            f"{row['weights_gb']} GB",
            f"{row['visual_tokens']:,}",
            f"{row['tflop_per_video']} ({' + '.join(map(str, row['tflop'].values()))})",
            f"{row['floor_ms']} ms",
            row["video_gb"],
            ", ".join(str(size or "weights too large") for size in row["batch_size"].values()),
        ]
        for layer, row in measured.items()
    ]
    text = markdown_table(head, lines + [[layer, "not computed here", *[""] * 6] for layer in NOT_COMPUTED])
    print(text)
    if arguments.save:
        details = fenced(json.dumps(measured, indent=1))
        print(save("model_sizes", __doc__ or "", f"{text}\n\n{details}"), file=sys.stderr)
    print(json.dumps(measured))


if __name__ == "__main__":
    main()
