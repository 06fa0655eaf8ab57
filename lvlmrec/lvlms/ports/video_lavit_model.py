"""Video-LaVIT's forward by its authors' code, with pooling inside: one video and one prompt at a time.

Their token selector keeps patches by Gumbel noise. Torch is seeded for each item before each forward, so that all
prompts of an item see the same tokens, whatever was read before; another kind of device draws other noise.

The video stands in the sequence as one span: for each clip its visual vectors and motion codes with the marks around
both. How many tokens that are is known only inside the forward, from the length of the hidden states.

Legend: N clips, S sequence positions, D width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lvlmrec.errors import ConfigError, InputError
from lvlmrec.features.model_recipe import ModelRecipe
from lvlmrec.features.recipe_config import LVLMInfo
from lvlmrec.lvlms.engine import conversation, generation
from lvlmrec.lvlms.engine.hooks import Hooks
from lvlmrec.lvlms.engine.pooling import TokenMasks, pool_columns
from lvlmrec.lvlms.files import authors_code, loading, source, torchvision_shim
from lvlmrec.lvlms.protocol import Item, ModelConfig
from lvlmrec.media.motion import normalise_keyframes
from lvlmrec.taps import PROJECTOR, FeatureName, Tap

VIDEO, VIDEO_TOKEN = "<video>", -201
IMAGE = "<image>"
DTYPES = {"bfloat16": "bf16", "float16": "fp16"}
# Vicuna's, as published; the answer would follow.
TEMPLATE = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions. USER: {video}\n{prompt} ASSISTANT:"
)
_PROJECTOR, _FIRST = Tap(PROJECTOR, 0), Tap("llm", 0)


@dataclass(frozen=True)
class Prepared:
    """One item, on the CPU.

    keyframes  float32 [N, 3, 224, 224]
    motion     float32 [N, 2, 24, 20, 36]
    prompts    prompt -> token ids before and behind the video
    """

    item_id: str
    keyframes: Tensor
    motion: Tensor
    prompts: dict[str, tuple[list[int], list[int]]]


def load(config: ModelConfig, recipe: ModelRecipe, info: LVLMInfo) -> VideoLaVIT:
    """The model of `config`, loaded by the authors' code. Raises `ConfigError`."""
    source.check_identity(config, recipe, info)
    device = loading.choose_device(config)
    torchvision_shim.ensure_importable()
    build_model = authors_code.import_from(authors_code.unpack(authors_code.of(config)), "models").build_model
    runner = build_model(
        model_path=config.model,
        model_dtype=DTYPES[config.dtype],
        device_id=device.index or 0 if device.type == "cuda" else device.type,
        use_xformers=False,
        understanding=True,
        max_video_clips=recipe.frames,
    )
    return VideoLaVIT(runner.model, runner.tokenizer, recipe, info)


class VideoLaVIT:
    """A loaded model; see `protocol.LVLM`."""

    batch_size = 1

    def __init__(self, model: Any, tokenizer: Any, recipe: ModelRecipe, info: LVLMInfo) -> None:
        self.info = info
        self._model, self._tokenizer, self._recipe = model.eval(), tokenizer, recipe
        self._model.lm_head = nn.Identity()  # nobody reads logits, and those of thousands of positions are large
        self._specials = sorted({*tokenizer.all_special_tokens, VIDEO, IMAGE}, key=lambda token: (-len(token), token))
        for name, prompt in recipe.prompts.items():
            if VIDEO in prompt.text or IMAGE in prompt.text:
                raise ConfigError(f"recipe.prompts.{name}.text: {prompt.text!r} holds {VIDEO} or {IMAGE}")
        taps = recipe.taps
        if _PROJECTOR in taps and _FIRST not in taps:  # its tokens are those that enter the decoder
            taps = (*taps, _FIRST)
        # "": there is no vision tower to hook, and the model itself is a submodule
        self._hooks = Hooks(self._model, "", dataclasses.replace(recipe, taps=taps), info.num_layers["llm"])

    def prepare(self, items: Sequence[Item]) -> list[Prepared]:
        """See `protocol.LVLM.prepare`."""
        return [self._prepare(item) for item in items]

    def extract(self, prepared: Sequence[Prepared]) -> dict[str, Tensor | list[str]]:
        """See `protocol.LVLM.extract`."""
        rows = []
        for item in prepared:
            pooled: dict[str, Tensor] = {}
            for name in item.prompts:
                pooled |= {key: value for key, value in self._read(item, name).items() if key not in pooled}
            rows.append(pooled)
        return {str(name): torch.cat([row[str(name)] for row in rows]).cpu() for name in self._recipe.feature_names}

    def _prepare(self, item: Item) -> Prepared:
        if item.motion is None:
            raise InputError(f"item {item.item_id!r} has no motion, and a prompt has input=video")
        keyframes = torch.from_numpy(normalise_keyframes(item.motion.keyframes))
        prompts = {}
        for name, prompt in self._recipe.prompts.items():
            words = conversation.fill(prompt.text, prompt, item.texts, self._specials)
            before, behind = TEMPLATE.format(video=VIDEO, prompt=words).split(VIDEO)
            prompts[name] = (self._tokenizer(before).input_ids, self._continue(behind))
        return Prepared(item.item_id, keyframes, torch.from_numpy(item.motion.motion.copy()), prompts)

    def _continue(self, text: str) -> list[int]:
        """Token ids of a text that is not the beginning of the sequence."""
        ids: list[int] = self._tokenizer(text).input_ids
        return ids[1:] if ids[:1] == [self._tokenizer.bos_token_id] else ids

    @torch.inference_mode()
    def _read(self, item: Prepared, name: str) -> dict[str, Tensor]:
        """Column -> float32 [1, D]: one prompt's forward."""
        before, behind = item.prompts[name]
        pooled: dict[str, Tensor] = {}

        def pool(tap: Tap, hidden_1SD: Tensor) -> None:
            masks = self._masks(item.item_id, hidden_1SD, len(before), len(behind))
            for pooling, value in pool_columns(self._recipe.poolings, hidden_1SD, masks).items():
                pooled[str(FeatureName(name, tap, pooling))] = value
            if tap == _FIRST and _PROJECTOR in self._recipe.taps:
                column = FeatureName("video", _PROJECTOR, "visual_mean")
                pooled[str(column)] = pool_columns(["visual_mean"], hidden_1SD, masks)["visual_mean"]

        self._hooks.pool = pool
        device = self._model.device
        ids_1S = torch.tensor([[*before, VIDEO_TOKEN, *behind]], device=device)
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(generation.seed_of(self._recipe.seed, "", item.item_id))
            self._model(
                input_ids=ids_1S,
                images=[((item.keyframes, item.motion), "video")],
                attention_mask=torch.ones_like(ids_1S, dtype=torch.bool),
                use_cache=False,
                output_hidden_states=False,
            )
        return pooled

    def _masks(self, item_id: str, hidden_1SD: Tensor, num_before: int, num_behind: int) -> TokenMasks:
        """The video's tokens are what is neither before nor behind it. Raises `InputError`."""
        length = hidden_1SD.shape[1]
        limit = getattr(self._model.config, "tokenizer_model_max_length", None)
        if length <= num_before + num_behind or (limit is not None and length >= limit):
            raise InputError(f"item {item_id!r}: the model reads {length} tokens, cut at {limit}: lower recipe.frames")
        attended = torch.ones(1, length, dtype=torch.bool, device=hidden_1SD.device)
        visual, none = torch.zeros_like(attended), torch.zeros_like(attended)
        visual[:, num_before : length - num_behind] = True
        return TokenMasks(attended, visual, none, none)
