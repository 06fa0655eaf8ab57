"""One adapter for the families native to transformers: all taps of a prompt pooled inside one forward.

The vision tower runs once per batch of items, its result serves every prompt. The decoder ends at the highest tap, and
no head turns states into logits unless a prompt is answered. Prompts that follow the video share the decoder's work on
it, see `bank.py` and `prefix.py`. An answer is generated first; then one forward over prompt, answer and an
end-of-sequence token gives the states of all of them.

Legend: B items, S sequence positions, D width.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lvlmrec.errors import InputError
from lvlmrec.features.model_recipe import ANSWER, FINISH, ModelRecipe
from lvlmrec.features.recipe_config import LVLMInfo
from lvlmrec.lvlms.engine import context, conversation, generation, inputs
from lvlmrec.lvlms.engine.bank import Bank, Reading
from lvlmrec.lvlms.engine.copies import to_device, to_host
from lvlmrec.lvlms.engine.hooks import Hooks, ignore
from lvlmrec.lvlms.engine.inputs import Media
from lvlmrec.lvlms.engine.layout import Layout
from lvlmrec.lvlms.engine.pooling import pool_patches
from lvlmrec.lvlms.files import loading
from lvlmrec.lvlms.protocol import Item, ModelConfig
from lvlmrec.taps import PROJECTOR, FeatureName, Tap

_PROJECTOR = Tap(PROJECTOR, 0)
_NO_TOKEN = -1
Column = Tensor | list[str]


@dataclass(frozen=True)
class Batch:
    """The items of one forward, on the CPU.

    rows     where they stand among the items that were prepared
    prompts  prompt -> each item's token ids
    """

    rows: list[int]
    item_ids: list[str]
    media: dict[str, Media]
    prompts: dict[str, list[list[int]]]


def load(family: Layout, config: ModelConfig, recipe: ModelRecipe, info: LVLMInfo) -> NativeLVLM:
    """The model of `config`, ready for `recipe`. Raises `ConfigError`, also when the files are not the recipe's."""
    model = loading.load_model(config, recipe, info, family.depth_keys)
    return serve(family, config, recipe, info, model, loading.load_processor(config))


def serve(
    family: Layout, config: ModelConfig, recipe: ModelRecipe, info: LVLMInfo, model: Any, processor: Any
) -> NativeLVLM:
    """A model and its processor, ready for `recipe`."""
    lvlm = NativeLVLM(family, model, processor, recipe, info, config.batch_size)
    if config.compile:
        lvlm.hooks.compile()
    return lvlm


class NativeLVLM:
    """A loaded model; see `protocol.LVLM`. `model` has its head if the recipe asks for answers, else it has none."""

    def __init__(
        self, family: Layout, model: Any, processor: Any, recipe: ModelRecipe, info: LVLMInfo, batch_size: int
    ) -> None:
        self.info = info
        self._family, self._model, self._processor = family, model, processor
        self._base = model.base_model if recipe.text_names else model
        if recipe.text_names:
            generation.leave_to_recipe(model)
        self._recipe, self.batch_size = recipe, batch_size
        # One thread may prepare while another answers, and a tokenizer is not for two.
        self._tokenizer = copy.deepcopy(processor.tokenizer)
        self._specials = conversation.special_tokens(processor)
        self._has_llm_taps = any(tap.tower == "llm" for tap in recipe.taps)
        prompts = recipe.prompts if self._has_llm_taps or recipe.text_names else {}
        self._texts = {name: conversation.render(processor, name, prompt) for name, prompt in prompts.items()}
        self._adds = {name: conversation.adds_special_tokens(processor, text) for name, text in self._texts.items()}
        self.hooks = Hooks(self._base, family.vision_layers, recipe, info.num_layers["llm"])
        self._bank = Bank(self._base, self.hooks, recipe, family)

    def prepare(self, items: Sequence[Item]) -> list[Batch]:
        """See `protocol.LVLM.prepare`. Videos with different numbers of frames never share a batch."""
        filled = [self._fill(item) for item in items]

        num_frames = [0 if item.video is None else len(item.video.frames) for item in items]

        def size(row: int) -> tuple[int, ...]:
            clips = [clip.frames.shape[1:3] for clip in (items[row].video, items[row].cover) if clip is not None]
            return (num_frames[row], *(side for sides in clips for side in sides), sum(map(len, filled[row].values())))

        batches: list[list[int]] = []
        for row in sorted(range(len(items)), key=size):
            if batches and len(batches[-1]) < self.batch_size and num_frames[row] == num_frames[batches[-1][0]]:
                batches[-1].append(row)
            else:
                batches.append([row])
        return [self._prepare_batch(rows, items, filled) for rows in batches]

    def extract(self, prepared: Sequence[Batch]) -> dict[str, Column]:
        """See `protocol.LVLM.extract`."""
        num_items = sum(len(batch.rows) for batch in prepared)
        shapes = self._recipe.shapes
        features = {str(name): torch.empty(num_items, math.prod(shape)) for name, shape in shapes.items()}
        texts = {name: [""] * num_items for name in self._recipe.text_names}
        for batch in prepared:
            pooled, answers = self._extract_batch(batch)
            for name, pooled_BD in pooled.items():
                features[name][batch.rows] = pooled_BD.cpu()
            for name, answered in answers.items():
                for row, text in zip(batch.rows, answered, strict=True):
                    texts[name][row] = text
        return features | texts

    def _fill(self, item: Item) -> dict[str, str]:
        """Each prompt's text with the item's own words in it."""
        return {
            name: conversation.fill(text, self._recipe.prompts[name], item.texts, self._specials)
            for name, text in self._texts.items()
        }

    def _prepare_batch(self, rows: list[int], items: Sequence[Item], filled: Sequence[Mapping[str, str]]) -> Batch:
        shown = {}
        for kind in self._recipe.media:
            clips = [inputs.required(getattr(items[row], kind), items[row].item_id, kind) for row in rows]
            processed = inputs.process(self._family, self._processor, kind, clips, self._recipe.video_options)
            shown[kind] = Media(
                {key: self._on_host(key, value) for key, value in processed.inputs.items()}, processed.texts
            )
        prompts = {}
        for name in self._texts:
            texts, kind = [filled[row][name] for row in rows], self._recipe.prompts[name].input
            own = shown[kind].texts if kind in shown else None
            prompts[name] = conversation.token_ids(self._processor, kind, texts, own, self._adds[name])
            for row, ids in zip(rows, prompts[name], strict=True):
                if too_long := context.excess(self._recipe, name, len(ids), self.info.context):
                    raise InputError(f"item {items[row].item_id!r}: {too_long}")
        return Batch(rows, [items[row].item_id for row in rows], shown, prompts)

    @torch.inference_mode()
    def _extract_batch(self, batch: Batch) -> tuple[dict[str, Tensor], dict[str, list[str]]]:
        """Pooled features, and answers with what ended them."""
        shown = {kind: Media(self._on_device(one.inputs), one.texts) for kind, one in batch.media.items()}
        pooled, encoded = self._see(shown, len(batch.rows))
        answered: dict[str, list[str]] = {}
        bank: dict[str, Reading] = {}
        for name, rows in batch.prompts.items():
            ids: list[list[int]] = [[] for _ in rows]
            if self._recipe.prompts[name].max_new_tokens:
                answers = self._answer(name, batch, shown, encoded)
                answered |= {f"{name}/{ANSWER}": answers.texts, f"{name}/{FINISH}": answers.finishes}
                ids = answers.ids
            bank[name] = self._reading(name, rows, ids, shown, encoded)
        return (pooled | self._bank.read(bank, self.batch_size) if self._has_llm_taps else pooled), answered

    def _see(self, shown: Mapping[str, Media], num_items: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The pooled taps before the decoder, and each kind of media encoded for the language model."""
        pooled: dict[str, Tensor] = {}

        def pool(tap: Tap, hidden: Tensor) -> None:
            patches = self._family.patches(hidden, shown["video"].inputs, num_items)
            pooled[str(FeatureName("video", tap, "visual_mean"))] = pool_patches(patches)

        encoded = {}
        for kind, one in shown.items():
            self.hooks.pool = pool if kind == "video" else ignore
            encode = getattr(self._base, f"get_{self._modality(kind)}_features")
            wanted = inspect.signature(encode).parameters
            encoded[kind] = encode(**{k: value for k, value in one.inputs.items() if k in wanted}, return_dict=True)
        if _PROJECTOR in self._recipe.taps:
            name = str(FeatureName("video", _PROJECTOR, "visual_mean"))
            kept = shown["video"].inputs.get(self._family.kept_tokens_key)
            pooled[name] = _pool_projected(encoded["video"], num_items, kept)
        return pooled, encoded

    def _answer(
        self, name: str, batch: Batch, shown: Mapping[str, Media], encoded: Mapping[str, Any]
    ) -> generation.Answers:
        """Generate the answers to one prompt; the tokens are padded on the left, so that each answer comes next."""
        prompt, rows = self._recipe.prompts[name], batch.prompts[name]
        tokens, _ = conversation.align(rows, [[] for _ in rows], None, _NO_TOKEN, self._padding_id())
        inputs: dict[str, Any] = dict(self._typed(tokens))
        if prompt.input in shown:
            inputs |= shown[prompt.input].layout
            inputs["mm_encoder_outputs"] = {self._modality(prompt.input): encoded[prompt.input]}
        seeds = [generation.seed_of(self._recipe.seed, name, item_id) for item_id in batch.item_ids]
        self.hooks.pool = ignore
        with self.hooks.whole_decoder():
            return generation.generate(self._model, self._tokenizer, prompt, inputs, seeds, self._specials)

    def _reading(
        self,
        name: str,
        rows: Sequence[Sequence[int]],
        answers: Sequence[Sequence[int]],
        shown: Mapping[str, Media],
        encoded: Mapping[str, Any],
    ) -> Reading:
        """A prompt and its answers as tensors. An end-of-sequence token closes them where it is read."""
        prompt = self._recipe.prompts[name]
        end = self._tokenizer.eos_token_id if context.reads_end(self._recipe, name) else None
        modality = self._modality(prompt.input) if prompt.input in shown else ""
        visual = int(getattr(self._base.config, f"{modality}_token_id")) if modality else _NO_TOKEN
        tokens, masks = conversation.align(rows, answers, end, visual, self._padding_id())
        layout = shown[prompt.input].layout if modality else {}
        seen = {modality: encoded[prompt.input]} if modality else {}
        return Reading(self._typed(tokens), masks.to(self._base.device), layout, seen)

    def _typed(self, tokens: dict[str, Tensor]) -> dict[str, Tensor]:
        """Tokens on the device, with their kinds where the model reads those."""
        if self._processor.return_mm_token_type_ids:
            types = self._processor.create_mm_token_type_ids(tokens["input_ids"].tolist())
            tokens = tokens | {self._family.token_types_argument: torch.tensor(types)}
        return {key: value.to(self._base.device) for key, value in tokens.items()}

    def _modality(self, kind: str) -> str:
        """What the model calls a kind of media: some take a video as images."""
        return self._family.modality if kind == "video" else "image"

    def _padding_id(self) -> int:
        return int(self._tokenizer.pad_token_id or 0)

    def _on_host(self, key: str, value: Any) -> Any:
        """A tensor in the dtype it has on the device, in pinned memory for a GPU: its copy then needs no waiting."""
        if not isinstance(value, Tensor):
            return value
        value = value.to(self._base.dtype) if inputs.is_pixels(key) else value
        return to_host(value, self._base.device)

    def _on_device(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        device = self._base.device
        return {k: to_device(v, device) if isinstance(v, Tensor) else v for k, v in inputs.items()}


def _pool_projected(vision: Any, num_clips: int, kept: Tensor | None = None) -> Tensor:
    """float32 [B, D]: the mean of each clip's projected tokens, of those `kept` where a mask over all of them says so.

    They are given as [B, N, D] or [B * F, N, D], or as B or B * F parts [N, D] of different sizes.
    """
    projected = vision.pooler_output
    if isinstance(projected, Tensor):
        return pool_patches(list(projected.reshape(num_clips, -1, projected.shape[-1])))
    if kept is not None:
        masks = kept.split([len(part) for part in projected])
        projected = [part[mask] for part, mask in zip(projected, masks, strict=True)]
    num_parts = len(projected) // num_clips
    return pool_patches([torch.cat(projected[i : i + num_parts]) for i in range(0, len(projected), num_parts)])
