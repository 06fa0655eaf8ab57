"""One adapter for the families native to transformers: all taps of a prompt pooled inside one forward.

The vision tower runs once per batch of clips, its result serves every prompt. The decoder ends at the highest tap:
layers above it are never loaded, and no head turns states into logits. Prompts that follow the video share the
decoder's work on it, see `prefix.py`; a prompt before the video, or a single one, has a forward of its own.

Legend: B clips, F frames, S sequence positions, D width.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from lvlmrec.errors import ConfigError
from lvlmrec.features.recipe import VISION_PROMPT, LVLMInfo, Prompt, Recipe
from lvlmrec.lvlms import prefix, source, torchvision_shim
from lvlmrec.lvlms.pooling import Start, TokenMasks, pool_columns, pool_end, pool_patches, pool_start, reads_text
from lvlmrec.lvlms.protocol import ModelConfig
from lvlmrec.taps import PROJECTOR, FeatureName, Tap
from lvlmrec.video import Clip

UNKNOWN_FPS = 24.0  # transformers' own assumption about a video without a duration
_PROJECTOR = Tap(PROJECTOR, 0)
_PROBE = "Where does this text stand?"


class Layout(Protocol):
    """What the adapter asks of a family; the fields are explained in `family.NativeFamily`."""

    @property
    def name(self) -> str: ...
    @property
    def vision_layers(self) -> str: ...
    @property
    def patches(self) -> Callable[[Tensor, Mapping[str, Any], int], Sequence[Tensor]]: ...
    @property
    def vision_inputs(self) -> tuple[str, ...]: ...
    @property
    def modality(self) -> str: ...
    @property
    def minimum_frames(self) -> int: ...
    @property
    def video_options(self) -> Mapping[str, Any]: ...
    def inspect(self, config: ModelConfig) -> LVLMInfo: ...


def load(family: Layout, config: ModelConfig, recipe: Recipe) -> NativeLVLM:
    """The model of `config`, ready for `recipe`. Raises `ConfigError`, also when the files are not the recipe's."""
    torchvision_shim.ensure_importable()
    from transformers import AutoProcessor

    device, info = _device(config), family.inspect(config)
    if info.identity != recipe.identity:
        raise ConfigError(f"lvlm.model: {config.model!r} is {info.identity}, the recipe names {recipe.identity}")
    base = _load_base_model(family, config, recipe, info)
    with _reading(config):
        processor = AutoProcessor.from_pretrained(config.model, revision=source.resolve_revision(config))
    processor.tokenizer.padding_side = "left"
    return NativeLVLM(family, base.to(device), processor, recipe, info, config.batch_size)


class NativeLVLM:
    """A loaded model; see `protocol.LVLM`. Not thread-safe: hooks write into the forward under way."""

    def __init__(
        self, family: Layout, base: Any, processor: Any, recipe: Recipe, info: LVLMInfo, batch_size: int
    ) -> None:
        self.info = info
        self._family, self._base, self._processor = family, base, processor
        self._recipe, self._batch_size = recipe, batch_size
        self._has_llm_taps = any(tap.tower == "llm" for tap in recipe.taps)
        self._texts = {name: _render(processor, name, prompt) for name, prompt in recipe.prompts.items()}
        self._pool: Callable[[Tap, Tensor], None]  # what the hooks call; set anew before every forward
        self._attach_hooks()

    def extract(self, clips: Sequence[Clip]) -> dict[str, Tensor]:
        """The recipe's features of `clips`: `str(FeatureName)` -> float32 [B, D] on the CPU, in the order of `clips`.

        Clips with the same number of frames share forwards of at most `batch_size` clips.
        """
        rows_by_length: dict[int, list[int]] = defaultdict(list)
        for row, clip in enumerate(clips):
            rows_by_length[len(clip.frames)].append(row)
        features = {
            str(name): torch.empty(len(clips), math.prod(self._recipe.shape(name)))
            for name in self._recipe.feature_names
        }
        for rows in rows_by_length.values():
            for start in range(0, len(rows), self._batch_size):
                batch = rows[start : start + self._batch_size]
                for name, pooled_BD in self._extract_batch([clips[row] for row in batch]).items():
                    features[name][batch] = pooled_BD
        return features

    @torch.inference_mode()
    def _extract_batch(self, clips: Sequence[Clip]) -> dict[str, Tensor]:
        pooled: dict[str, Tensor] = {}
        inputs, video_texts = self._process(clips)

        def pool_vision(tap: Tap, hidden: Tensor) -> None:
            patches = self._family.patches(hidden, inputs, len(clips))
            pooled[str(FeatureName(VISION_PROMPT, tap, "visual_mean"))] = pool_patches(patches)

        self._pool = pool_vision
        vision = self._encode_video(inputs)
        if _PROJECTOR in self._recipe.taps:
            pooled[str(FeatureName(VISION_PROMPT, _PROJECTOR, "visual_mean"))] = _pool_projected(vision, len(clips))
        if self._has_llm_taps:
            bank: dict[str, dict[str, Tensor]] = {}
            for name, text in self._texts.items():
                texts = [text.replace(self._processor.video_token, video_text) for video_text in video_texts]
                bank[name] = self._tokenize(texts)
            pooled |= self._read_bank(bank, inputs, vision)
        return {name: pooled_BD.cpu() for name, pooled_BD in pooled.items()}

    def _process(self, clips: Sequence[Clip]) -> tuple[dict[str, Any], list[str]]:
        """The processor's tensors for the videos, and each video's text: its place-holder tokens and timestamps."""
        frames = [_at_least(clip.frames, self._family.minimum_frames) for clip in clips]
        inputs = self._processor(
            text=[self._processor.video_token] * len(clips),
            videos=frames,
            video_metadata=[_metadata(clip, len(frames[row])) for row, clip in enumerate(clips)],
            do_sample_frames=False,
            input_data_format="channels_last",
            return_text_replacement_offsets=True,
            return_tensors="pt",
            padding=True,
            **self._family.video_options,
        )
        video_texts = [offsets[0]["replacement"] for offsets in inputs.pop("text_replacement_offsets")]
        for key in ("input_ids", "attention_mask", "mm_token_type_ids"):
            inputs.pop(key, None)
        return self._to_device(inputs), video_texts

    def _encode_video(self, inputs: Mapping[str, Any]) -> Any:
        """The vision tower's output, projected for the language model; hooks pool the vision taps on the way."""
        encode = getattr(self._base, f"get_{self._family.modality}_features")
        return encode(**{key: inputs[key] for key in self._family.vision_inputs}, return_dict=True)

    def _tokenize(self, texts: Sequence[str]) -> dict[str, Any]:
        tokens = self._processor.tokenizer(list(texts), padding=True, return_token_type_ids=False, return_tensors="pt")
        if self._processor.return_mm_token_type_ids:
            types = self._processor.create_mm_token_type_ids(tokens["input_ids"].tolist())
            tokens["mm_token_type_ids"] = torch.tensor(types)
        return self._to_device(tokens)

    def _read_bank(
        self, bank: Mapping[str, dict[str, Tensor]], inputs: Mapping[str, Any], vision: Any
    ) -> dict[str, Tensor]:
        """The pooled features of all prompts, those after the video together when they share it."""
        after = {name: tokens for name, tokens in bank.items() if self._recipe.prompts[name].place == "after"}
        length = prefix.shared_length(list(after.values()), self._visual_token_id()) if len(after) > 1 else 0
        pooled = self._read_after(after, length, inputs, vision) if length else {}
        for name, tokens in bank.items():
            if not length or name not in after:
                pooled |= self._read_prompt(name, tokens, inputs, vision)
        return pooled

    def _read_prompt(
        self, prompt: str, tokens: Mapping[str, Tensor], inputs: Mapping[str, Any], vision: Any
    ) -> dict[str, Tensor]:
        """One forward of the decoder: the pooled features of one prompt."""
        pooled: dict[str, Tensor] = {}
        masks = self._masks(tokens)

        def pool_llm(tap: Tap, hidden_BSD: Tensor) -> None:
            for column, feature in pool_columns(self._recipe.poolings, hidden_BSD, masks).items():
                pooled[str(FeatureName(prompt, tap, column))] = feature

        self._pool = pool_llm
        self._forward(tokens, inputs, vision)
        return pooled

    def _read_after(
        self, bank: Mapping[str, dict[str, Tensor]], length: int, inputs: Mapping[str, Any], vision: Any
    ) -> dict[str, Tensor]:
        """Prompts whose first `length` positions are the same: those once, then at most `batch_size` ends at once."""
        names, decoder = list(bank), self._base.get_decoder()
        masks = {name: self._masks(tokens) for name, tokens in bank.items()}
        visual = [pooling for pooling in self._recipe.poolings if not reads_text(pooling)]
        first = masks[names[0]]
        start_masks = TokenMasks(first.attended[:, :length], first.visual[:, :length])
        starts: dict[Tap, Start] = {}
        pooled: dict[str, Tensor] = {}

        def call_of(name: str) -> prefix.Call:
            # Not kept for all prompts at once: each holds the embedded video.
            return prefix.capture(decoder, functools.partial(self._forward, bank[name], inputs, vision))

        def pool_starts(tap: Tap, hidden_BCD: Tensor) -> None:
            starts[tap] = pool_start(hidden_BCD, start_masks.attended)
            for column, feature in pool_columns(visual, hidden_BCD, start_masks).items():
                pooled.update({str(FeatureName(name, tap, column)): feature for name in names})

        self._pool = pool_starts
        cache = prefix.run_prefix(decoder, call_of(names[0]), length)
        if len(visual) == len(self._recipe.poolings):
            return pooled
        at_once = max(1, self._batch_size // len(first.attended))
        for begin in range(0, len(names), at_once):
            group = names[begin : begin + at_once]
            attended_RQ = prefix.suffix_mask([masks[name].attended for name in group], length)
            self._pool = functools.partial(self._pool_ends, pooled, group, starts, attended_RQ)
            prefix.run_suffixes(decoder, [call_of(name) for name in group], length, cache)
        return pooled

    def _pool_ends(
        self,
        pooled: dict[str, Tensor],
        prompts: Sequence[str],
        starts: Mapping[Tap, Start],
        attended_RQ: Tensor,
        tap: Tap,
        hidden_RQD: Tensor,
    ) -> None:
        """Join the ends of `prompts` to what was pooled over their common start."""
        num_clips = len(attended_RQ) // len(prompts)
        ends = zip(prompts, hidden_RQD.split(num_clips), attended_RQ.split(num_clips), strict=True)
        for prompt, hidden_BQD, attended_BQ in ends:
            for pooling in filter(reads_text, self._recipe.poolings):
                feature = pool_end(pooling, starts[tap], hidden_BQD, attended_BQ)
                pooled[str(FeatureName(prompt, tap, pooling))] = feature

    def _forward(self, tokens: Mapping[str, Tensor], inputs: Mapping[str, Any], vision: Any) -> None:
        """The base model from tokens and projected video on; hooks pool the taps on the way."""
        if hasattr(self._base, "rope_deltas"):
            self._base.rope_deltas = None  # Qwen-VL keeps those of the forward before
        layout = {key: value for key, value in inputs.items() if not key.startswith("pixel_values")}
        self._base(**tokens, **layout, mm_encoder_outputs={self._family.modality: vision}, use_cache=False)

    def _masks(self, tokens: Mapping[str, Tensor]) -> TokenMasks:
        return TokenMasks(tokens["attention_mask"].bool(), tokens["input_ids"] == self._visual_token_id())

    def _visual_token_id(self) -> int:
        return int(getattr(self._base.config, f"{self._family.modality}_token_id"))

    def _to_device(self, tensors: Mapping[str, Any]) -> dict[str, Any]:
        """On the model's device. Pixels alone take its dtype: the seconds between frames do not survive bfloat16."""
        moved: dict[str, Any] = {}
        for key, value in tensors.items():
            dtype = self._base.dtype if key.startswith("pixel_values") else None
            moved[key] = value.to(self._base.device, dtype) if isinstance(value, Tensor) else value
        return moved

    def _attach_hooks(self) -> None:
        decoder = self._base.get_decoder()
        vision_layers = self._base.get_submodule(self._family.vision_layers)
        for tap in self._recipe.taps:
            layers = vision_layers if tap.tower == "vision" else decoder.layers
            if tap == _PROJECTOR:
                continue  # read off the tower's output
            if tap.pre_norm:
                decoder.norm.register_forward_pre_hook(self._input_hook(tap))
            elif tap == Tap("llm", self.info.num_layers["llm"]):
                decoder.norm.register_forward_hook(self._output_hook(tap))
            elif tap.layer > 0:
                # Hugging Face counts what a layer returns, before Qwen3-VL's deepstack adds to it
                layers[tap.layer - 1].register_forward_hook(self._output_hook(tap))
            else:
                first = layers[0] if len(layers) else decoder.norm
                first.register_forward_pre_hook(self._input_hook(tap))

    def _output_hook(self, tap: Tap) -> Callable[..., None]:
        def hook(module: nn.Module, arguments: Any, output: Any) -> None:
            self._pool(tap, output[0] if isinstance(output, tuple) else output)

        return hook

    def _input_hook(self, tap: Tap) -> Callable[..., None]:
        def hook(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            self._pool(tap, arguments[0])

        return hook


def _load_base_model(family: Layout, config: ModelConfig, recipe: Recipe, info: LVLMInfo) -> Any:
    """The model without its head, its decoder cut above the highest tap of the language model."""
    from transformers import AutoModelForImageTextToText

    model_config = source.read_model_config(config, family.name)
    depth = info.num_layers["llm"]
    top = max((tap.layer for tap in recipe.taps if tap.tower == "llm"), default=0)
    text = model_config.get_text_config()
    text.num_hidden_layers = max(top, 1)
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[: max(top, 1)]
    with _reading(config):
        loaded: Any = AutoModelForImageTextToText.from_pretrained(
            config.model,
            revision=source.resolve_revision(config),
            config=model_config,
            dtype=getattr(torch, config.dtype),
            attn_implementation=config.attention,
            use_safetensors=True,
            output_loading_info=True,
        )
    model, report = loaded
    missing = sorted(report["missing_keys"]) + sorted(str(key) for key in report["mismatched_keys"])
    if missing:
        raise ConfigError(f"lvlm.model: {config.model!r} lacks {len(missing)} weights, first {missing[0]}")
    base = model.base_model.eval().requires_grad_(False)
    decoder = base.get_decoder()
    decoder.layers = decoder.layers[:top]
    if top < depth:
        decoder.norm = nn.Identity()
    return base


@contextlib.contextmanager
def _reading(config: ModelConfig) -> Iterator[None]:
    """What transformers cannot read or run is the configuration's fault. Raises `ConfigError`."""
    try:
        with source.quiet():
            yield
    except (OSError, ValueError, ImportError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ConfigError(f"lvlm.model: {config.model!r} with lvlm.attention={config.attention}: {reason}") from error


def _render(processor: Any, name: str, prompt: Prompt) -> str:
    """The conversation as text, with one place-holder for the video, before or after the prompt's text.

    Some chat templates put every video before every text; there the place-holder is written into the text.
    Raises `ConfigError` when the prompt holds a place-holder of its own or the model has no chat template.
    """
    placeholder = processor.video_token
    if not processor.chat_template:
        raise ConfigError("lvlm.model: it has no chat template; expected a model tuned to follow instructions")
    if any(token in prompt.text for token in processor.all_special_multimodal_tokens):
        raise ConfigError(f"recipe.prompts.{name}.text: {prompt.text!r} holds a token of the model, {placeholder}")

    def in_order(video: Any, text: str) -> list[Any]:
        parts = [video, text] if prompt.place == "after" else [text, video]
        return [part for part in parts if part]

    def render(parts: Sequence[Any]) -> str:
        content = [{"type": "text", "text": part} if isinstance(part, str) else part for part in parts]
        return str(processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True))

    probe = render(in_order({"type": "video"}, _PROBE))
    video_first = probe.index(placeholder) < probe.index(_PROBE)
    if not prompt.text or video_first == (prompt.place == "after"):
        return render(in_order({"type": "video"}, prompt.text))
    return render(["\n".join(in_order(placeholder, prompt.text))])


def _pool_projected(vision: Any, num_clips: int) -> Tensor:
    """float32 [B, D]: the mean of each clip's projected tokens, given as [B, N, D], [B * F, N, D] or B x [N, D]."""
    projected = vision.pooler_output
    if not isinstance(projected, tuple):
        projected = projected.reshape(num_clips, -1, projected.shape[-1])
    return pool_patches(projected)


def _at_least(frames_FHWC: np.ndarray, num_frames: int) -> np.ndarray:
    """Frames as a writable array, the last repeated up to `num_frames`."""
    missing = max(num_frames - len(frames_FHWC), 0)
    frames_FHWC = np.concatenate([frames_FHWC, *[frames_FHWC[-1:]] * missing]) if missing else frames_FHWC
    return np.require(frames_FHWC, requirements=["C", "W"])


def _metadata(clip: Clip, num_frames: int) -> dict[str, Any]:
    """Transformers' VideoMetadata of a clip that is already sampled; timestamps are made from it."""
    indices = clip.frame_indices.tolist()
    height, width = clip.frames.shape[1:3]
    return {
        "total_num_frames": clip.num_source_frames,
        "fps": clip.num_source_frames / clip.duration if clip.duration > 0 else UNKNOWN_FPS,
        "duration": clip.duration,
        "height": height,
        "width": width,
        "frames_indices": indices + indices[-1:] * (num_frames - len(indices)),
    }


def _device(config: ModelConfig) -> torch.device:
    if config.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(config.device)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        choices = ["auto", "cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
        raise ConfigError(f"lvlm.device: {config.device!r} is not one of {', '.join(choices)}") from error
    return device
