"""Phi-3.5-vision said again from its published formulas, with transformers' own CLIP and Phi-3 and plain loops.

It answers to what the contract tests ask of a Hugging Face model and processor. Sequences of one call are all on the
same side of the 4,096 tokens, or transformers would mix them up.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from torch.nn import functional
from transformers import CLIPVisionConfig, CLIPVisionModel, Phi3Config, Phi3ForCausalLM, PreTrainedTokenizerFast

PREFIX = "model.vision_embed_tokens."


def hd_transform(frame: np.ndarray, side: int, num_crops: int) -> tuple[torch.Tensor, int, int]:
    """Views [1 + tiles, 3, side, side] and the rows and columns of tiles, as the authors' processor makes them."""
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms import functional as vision

    picture = Image.fromarray(frame)
    transposed = picture.width < picture.height
    if transposed:
        picture = picture.transpose(Image.Transpose.TRANSPOSE)
    ratio = picture.width / picture.height
    scale = 1
    while scale * np.ceil(scale / ratio) <= num_crops:
        scale += 1
    scale -= 1
    size = [int(scale * side / ratio), scale * side]
    picture = vision.resize(picture, size, interpolation=InterpolationMode.BILINEAR)
    target = math.ceil(picture.height / side) * side
    top = (target - picture.height) // 2
    picture = vision.pad(picture, [0, top, 0, target - picture.height - top], fill=[255, 255, 255])
    if transposed:
        picture = picture.transpose(Image.Transpose.TRANSPOSE)
    mean, std = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
    pixels = vision.normalize(vision.to_tensor(picture), mean, std)
    views = [functional.interpolate(pixels[None], size=(side, side), mode="bicubic")[0]]
    rows, columns = pixels.shape[1] // side, pixels.shape[2] // side
    for row in range(rows):
        for column in range(columns):
            views.append(pixels[:, row * side : (row + 1) * side, column * side : (column + 1) * side])
    return torch.stack(views), rows, columns


class Model:
    """The whole model; `model` and `get_decoder` as Hugging Face names them."""

    def __init__(self, directory: Path) -> None:
        tree = json.loads((directory / "config.json").read_text())
        weights = load_file(directory / "model.safetensors")
        words = PreTrainedTokenizerFast.from_pretrained(directory)
        self.config = SimpleNamespace(video_token_id=words.convert_tokens_to_ids("<|image|>"))
        self.clip = CLIPVisionModel(CLIPVisionConfig(**tree["img_processor"]["vision_config"])).eval()
        clip = f"{PREFIX}img_processor.vision_model."
        self.clip.load_state_dict({k.removeprefix(clip): v for k, v in weights.items() if k.startswith(clip)})
        rope = tree["rope_scaling"] | {
            "rope_theta": tree["rope_theta"],
            "original_max_position_embeddings": tree["original_max_position_embeddings"],
        }
        known = {k: v for k, v in tree.items() if k in Phi3Config.__dataclass_fields__ and k != "architectures"}
        self.llm = Phi3ForCausalLM(Phi3Config(**known | {"rope_parameters": rope})).eval()
        self.llm.load_state_dict({k: v for k, v in weights.items() if not k.startswith(PREFIX)})
        self.weights = {k.removeprefix(PREFIX): v for k, v in weights.items() if k.startswith(PREFIX)}
        self.model = self

    def get_decoder(self) -> Any:
        return self.llm.model

    def named_parameters(self) -> list[tuple[str, torch.Tensor]]:
        return [("cls_token", torch.zeros(1))]  # the first patch of a vision state is none

    def get_video_features(self, pixel_values_videos: Any, **_: Any) -> Any:
        """The tower's states of all views, and visual tokens [F * N, D] of each clip."""
        views = torch.cat([views for clip in pixel_values_videos for views, _, _ in clip])
        states = self.clip(views, output_hidden_states=True).hidden_states
        patches, start, tokens = states[-2][:, 1:], 0, []
        for clip in pixel_values_videos:
            frames = []
            for frame_views, rows, columns in clip:
                frames.append(self.lay_out(patches[start : start + len(frame_views)], rows, columns))
                start += len(frame_views)
            hidden = functional.linear(
                torch.stack(frames), self.weights["img_projection.0.weight"], self.weights["img_projection.0.bias"]
            )
            hidden = functional.linear(
                functional.gelu(hidden), self.weights["img_projection.2.weight"], self.weights["img_projection.2.bias"]
            )
            tokens.append(hidden.flatten(0, 1))
        return SimpleNamespace(hidden_states=states[:-1], pooler_output=tokens)

    def lay_out(self, patches: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
        """[N, 4 V]: tiles as one picture, line by line, then the whole picture; `patches` begins with the whole."""
        side = round(patches.shape[1] ** 0.5)
        half = side // 2
        cells = {}
        for view, patches_PV in enumerate(patches):
            for i in range(half):
                for j in range(half):
                    corner = [patches_PV[(2 * i + a) * side + 2 * j + b] for a in range(2) for b in range(2)]
                    cells[view, i, j] = torch.cat(corner)
        line_end, between = self.weights["sub_GN"].flatten(), self.weights["glb_GN"].flatten()
        sequence = []
        for y in range(rows * half):
            for x in range(columns * half):
                sequence.append(cells[1 + y // half * columns + x // half, y % half, x % half])
            sequence.append(line_end)
        sequence.append(between)
        for y in range(half):
            sequence += [*(cells[0, y, x] for x in range(half)), line_end]
        return torch.stack(sequence)

    def embed(self, input_ids: torch.Tensor, pixel_values_videos: Any = None, **_: Any) -> torch.Tensor:
        embeds: torch.Tensor = self.llm.model.embed_tokens(input_ids)
        if pixel_values_videos is not None:
            tokens = torch.cat(self.get_video_features(pixel_values_videos).pooler_output)
            embeds[input_ids == self.config.video_token_id] = tokens
        return embeds

    def __call__(self, **inputs: Any) -> Any:
        mask = inputs["attention_mask"]
        return self.llm(inputs_embeds=self.embed(**inputs), attention_mask=mask, output_hidden_states=True)

    def generate(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, **options: Any) -> Any:
        embeds = self.embed(input_ids, options.pop("pixel_values_videos", None))
        return self.llm.generate(input_ids=input_ids, inputs_embeds=embeds, attention_mask=attention_mask, **options)


class Processor:
    """Pictures <|image_1|>, <|image_2|>, ... on lines of their own; text in pieces, each with its own <s>."""

    video_token = image_token = "<|image|>"

    def __init__(self, directory: Path) -> None:
        self.tokenizer = PreTrainedTokenizerFast.from_pretrained(directory, padding_side="left")
        vision = json.loads((directory / "config.json").read_text())["img_processor"]["vision_config"]
        self.side, self.grid = vision["image_size"], vision["image_size"] // vision["patch_size"] // 2

    def apply_chat_template(self, conversation: Any, add_generation_prompt: bool = True) -> str:
        parts = [part.get("text", "<|image|>") for part in conversation[0]["content"]]
        return "<|user|>\n" + "\n".join(parts) + "<|end|>\n<|assistant|>\n"

    def __call__(
        self,
        text: list[str],
        videos: list[np.ndarray] | None = None,
        images: list[np.ndarray] | None = None,
        **_: Any,
    ) -> dict[str, Any]:
        """One tile for each frame of a video, up to 16 for a single picture."""
        num_crops = 1 if videos is not None else 16
        shown = videos if videos is not None else [picture[None] for picture in images or []]
        pixels = [[hd_transform(frame, self.side, num_crops) for frame in frames] for frames in shown]
        rows = [self.ids(one, clip) for one, clip in zip(text, pixels or [[] for _ in text], strict=True)]
        tokens = dict(self.tokenizer.pad({"input_ids": rows}, return_tensors="pt"))
        return tokens | ({"pixel_values_videos": pixels} if pixels else {})

    def ids(self, text: str, clip: list[tuple[torch.Tensor, int, int]]) -> list[int]:
        tags = "\n".join(f"<|image_{k + 1}|>" for k in range(len(clip)))
        ids: list[int] = []
        for k, piece in enumerate(re.split(r"<\|image_\d+\|>", text.replace("<|image|>", tags))):
            ids += [self.tokenizer.bos_token_id, *self.tokenizer(piece, add_special_tokens=False)["input_ids"]]
            if k < len(clip):
                _, rows, columns = clip[k]
                count = (rows * columns + 1) * self.grid**2 + 1 + (rows + 1) * self.grid
                ids += [self.tokenizer.convert_tokens_to_ids("<|image|>")] * count
        return ids
