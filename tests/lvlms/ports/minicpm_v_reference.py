"""MiniCPM-V said again for the contract tests: the published arrangement, out of transformers' layers and plain torch.

Nothing here is the project's own: weights by their published names, frames with Pillow, patches with `unfold`, every
view padded to the longest with a key mask.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    SiglipVisionConfig,
    SiglipVisionModel,
)

PATCH = 14
SYSTEM = {"2.6": "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n", "4.5": ""}
THINKING = {"2.6": "", "4.5": "<think>\n\n</think>\n\n"}


def read(directory: Path) -> tuple[dict[str, Any], str]:
    tree = json.loads((directory / "config.json").read_text())
    return tree, str(tree["version"])


class Processor:
    """Text and views as the published processors make them, no slices, no packing."""

    video_token = image_token = "(<image>./</image>)"

    def __init__(self, directory: Path) -> None:
        self.tree, self.version = read(directory)
        self.side = json.loads((directory / "preprocessor_config.json").read_text())["scale_resolution"]
        self.tokenizer = PreTrainedTokenizerFast.from_pretrained(directory, padding_side="left")

    def apply_chat_template(self, messages: Sequence[Any], add_generation_prompt: bool) -> str:
        (message,) = messages
        parts = [part.get("text", self.video_token) for part in message["content"]]
        user = "<|im_start|>user\n" + "\n".join(parts) + "<|im_end|>\n"
        return SYSTEM[self.version] + user + "<|im_start|>assistant\n" + THINKING[self.version]

    def resize(self, frame: np.ndarray) -> Image.Image:
        height, width, _ = frame.shape
        fitted_height = int(self.side / math.sqrt(width / height))
        fitted_width = int(fitted_height * (width / height))
        size = [max(round(side / PATCH) * PATCH, PATCH) for side in (fitted_width, fitted_height)]
        return Image.fromarray(frame).resize((size[0], size[1]), Image.Resampling.BICUBIC)

    def __call__(
        self,
        text: Sequence[str],
        videos: Sequence[Any] = (),
        video_metadata: Sequence[Any] = (),
        images: Sequence[Any] = (),
        **_: Any,
    ) -> Any:
        clips = [
            (frames, one["frames_indices"], one["fps"]) for frames, one in zip(videos, video_metadata, strict=True)
        ]
        clips += [(picture[None], [-1], 10) for picture in images]  # at -1, no time
        views, sizes, times, texts = [], [], [], []
        for prompt, (frames, indices, fps) in itertools.zip_longest(text, clips, fillvalue=((), (), 1)):
            shown = []
            for frame, index in zip(frames, indices, strict=True):
                pixels = np.asarray(self.resize(frame)).astype(np.float32) / 255
                pixels = torch.from_numpy((pixels - np.float32(0.5)) / np.float32(0.5)).permute(2, 0, 1)
                cells = functional.unfold(pixels, PATCH, stride=PATCH).reshape(3, PATCH, PATCH, -1)
                views.append(cells.permute(0, 1, 3, 2).reshape(3 * PATCH, -1).T)  # [L * P, 3 * P]
                sizes.append([side // PATCH for side in pixels.shape[1:]])
                times.append(round(index / fps * 10))
                shown.append("<image>" + "<unk>" * self.tree["query_num"] + "</image>")
            number = "<image_id>0</image_id>" if len(images) else ""
            texts.append(prompt.replace(self.video_token, number + "\n".join(shown)))
        tokens = dict(self.tokenizer(texts, padding=True, return_token_type_ids=False, return_tensors="pt"))
        if not views:
            return tokens
        packed = nn.utils.rnn.pad_sequence(views, batch_first=True)
        pixels = packed.permute(0, 2, 1).reshape(len(views), 3, PATCH, -1)
        return tokens | {
            "pixel_values_videos": pixels,
            "pixel_values_sizes": torch.tensor(sizes),
            "pixel_values_times": times if self.version == "4.5" else [-1] * len(times),
        }


class Model:
    """Published weights in transformers' layers."""

    def __init__(self, directory: Path) -> None:
        tree, version = read(directory)
        self.weights = load_file(directory / "model.safetensors")
        keys = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"]
        keys += ["num_key_value_heads", "rms_norm_eps", "max_position_embeddings"]
        text = {key: tree[key] for key in keys} | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}
        qwen2: Any = Qwen2ForCausalLM(Qwen2Config(**text)) if version == "2.6" else None
        self.llm = qwen2 or Qwen3ForCausalLM(Qwen3Config(**text, head_dim=tree["head_dim"]))
        self.llm.load_state_dict(self.under("llm."))
        vision = {key: value for key, value in tree["vision_config"].items() if key != "model_type"}
        self.tower: Any = SiglipVisionModel(SiglipVisionConfig(**vision, vision_use_head=False))
        self.tower.load_state_dict(self.under("vpm."))
        width = tree["hidden_size"]
        self.attention = nn.MultiheadAttention(width, width // 128)
        self.attention.load_state_dict(self.under("resampler.attn."))
        for module in (self.llm, self.tower, self.attention):
            module.eval().requires_grad_(False)
        unknown = PreTrainedTokenizerFast.from_pretrained(directory).convert_tokens_to_ids("<unk>")
        self.config = SimpleNamespace(video_token_id=unknown)
        self.model = self

    def under(self, prefix: str) -> dict[str, torch.Tensor]:
        return {name.removeprefix(prefix): w for name, w in self.weights.items() if name.startswith(prefix)}

    def named_parameters(self) -> list[Any]:
        return list(self.weights.items())

    def get_decoder(self) -> Any:
        return self.llm.model

    def norm(self, name: str, x: torch.Tensor) -> torch.Tensor:
        weights = self.under(f"resampler.{name}.")
        return functional.layer_norm(x, x.shape[-1:], weights["weight"], weights["bias"], eps=1e-6)

    def get_video_features(self, **pixels: Any) -> Any:
        """Hidden states [R, L, V] of all views, and the resampled tokens of each, [R, Q, D]."""
        sizes = pixels["pixel_values_sizes"]
        lengths = sizes.prod(dim=1)
        embeddings = self.tower.embeddings
        hidden = embeddings.patch_embedding(pixels["pixel_values_videos"]).flatten(2).transpose(1, 2)
        side = math.isqrt(len(embeddings.position_embedding.weight))
        places = torch.zeros(hidden.shape[:2], dtype=torch.long)
        boundaries = torch.arange(1 / side, 1.0, 1 / side)
        for row, size in enumerate(sizes.to(torch.int32)):
            y, x = (torch.bucketize(torch.arange(0, 1 - 1e-6, 1 / n), boundaries, right=True) for n in size)
            places[row, : lengths[row]] = (y[:, None] * side + x).flatten()
        states = [hidden + embeddings.position_embedding(places)]
        padding = torch.arange(hidden.shape[1]) >= lengths[:, None]
        mask = (~padding)[:, None, None].expand(-1, 1, hidden.shape[1], -1) if padding.any() else None
        for layer in self.tower.encoder.layers:
            states.append(layer(states[-1], mask))
        seen = self.tower.post_layernorm(states[-1])
        tokens = self.resample(seen, sizes.tolist(), padding, pixels["pixel_values_times"])
        return SimpleNamespace(hidden_states=tuple(states), tokens=tokens)

    def resample(self, seen: torch.Tensor, sizes: Any, padding: torch.Tensor, times: Any) -> torch.Tensor:
        value = self.norm("ln_kv", seen @ self.weights["resampler.kv_proj.weight"].T).permute(1, 0, 2)
        key = value.clone()
        width = value.shape[-1]

        def waves(positions: np.ndarray, size: int) -> np.ndarray:
            omega = np.arange(size // 2, dtype=np.float32)
            omega /= size / 2.0
            angles = np.einsum("n,d->nd", positions.astype(np.float32), (1.0 / 10000**omega).astype(np.float32))
            return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)

        for row, (height, columns) in enumerate(sizes):
            y, x = np.mgrid[:height, :columns].reshape(2, -1)
            key[: height * columns, row] += torch.from_numpy(np.c_[waves(x, width // 2), waves(y, width // 2)])
            if times[row] != -1:
                key[:, row] += torch.from_numpy(waves(np.array(times[row : row + 1]), width))
        query = self.norm("ln_q", self.weights["resampler.query"])[:, None].repeat(1, len(sizes), 1)
        mask = padding if padding.any() else None
        out = self.attention(query, key, value, key_padding_mask=mask, need_weights=False)[0]
        return self.norm("ln_post", out.permute(1, 0, 2)) @ self.weights["resampler.proj"]

    def embed(self, input_ids: torch.Tensor, **pixels: Any) -> torch.Tensor:
        embeds: torch.Tensor = self.llm.model.embed_tokens(input_ids)
        if "pixel_values_videos" in pixels:
            tokens = self.get_video_features(**pixels).tokens
            embeds[input_ids == self.config.video_token_id] = tokens.flatten(0, 1)
        return embeds

    def __call__(self, attention_mask: torch.Tensor, **inputs: Any) -> Any:
        return self.llm.model(
            inputs_embeds=self.embed(**inputs),
            attention_mask=attention_mask,
            position_ids=(attention_mask.cumsum(-1) - 1).clamp(min=0),
            use_cache=False,
            output_hidden_states=True,
        )

    def generate(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, **options: Any) -> Any:
        pixels = {key: options.pop(key) for key in [*options] if key.startswith("pixel_values")}
        embeds = self.embed(input_ids, **pixels)
        return self.llm.generate(input_ids=input_ids, inputs_embeds=embeds, attention_mask=attention_mask, **options)
