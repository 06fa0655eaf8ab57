"""What every family of video-language models in `LVLMS` must hold, against transformers itself.

A new family is found by itself. Encoders have a contract of their own: test_encoders.py.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import inspect
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lvlmrec.errors import ConfigError
from lvlmrec.features import recipe_config as recipes
from lvlmrec.features.model_recipe import ModelRecipe, Prompt
from lvlmrec.features.recipe_config import RecipeConfig
from lvlmrec.lvlms import LVLM, LVLMS, LVLMConfig
from lvlmrec.lvlms.engine import inputs, prefix
from lvlmrec.lvlms.engine.pooling import TokenMasks, pool_columns
from lvlmrec.lvlms.protocol import Item
from lvlmrec.media.sampling import Clip
from tests.lvlms.conftest import LVLM_FAMILIES

POOLINGS = ("visual_mean", "all_mean", "last_token")
PROMPTS = {
    "after": Prompt("What is shown?", "after"),
    "before": Prompt("Look at the cat.", "before"),
    "bare": Prompt("", "after"),
    "long": Prompt("What is shown, and why does the person in the video look so surprised by the music?", "after"),
}
AFTER_AND_BEFORE = ("after", "before", "bare", "long")
BANK_TOLERANCE = 1e-6  # share of a feature's largest entry, float32; measured on CPU: 4.9e-7
# Share of a feature's largest entry. Kernels sum in another order for another batch shape; nothing else may differ.
# Measured on CPU: 3.5e-7 and 8e-3 with clips of different sizes (Qwen-VL pads them), 0 with equal ones; 1.3e-2 on one
# that has instructions for bfloat16.
NEIGHBOUR_TOLERANCE = {"float32": 2e-6, "bfloat16": 2e-2}
# Times more where a linear layer's decays are differences of long sums and a norm divides by what is left: 16 measured
# in float32; in bfloat16 1.23 on a CPU with instructions for it, less than 1 without.
LINEAR = {"minicpmv4_6": 20}
LINEAR_BFLOAT16 = {"minicpmv4_6": 1.5} if torch.cpu._is_avx512_bf16_supported() else {}
PORTS = {
    "minicpm_v_2_6": "minicpm_v_reference",
    "minicpm_v_4_5": "minicpm_v_reference",
    "phi_3_5_vision": "phi_3_5_vision_reference",
}
FRAMES_ARE_IMAGES = {"Gemma3Processor"}
READS_PROMPTS_ALONE = {"minicpmv4_6"}
READS_SECONDS = {"qwen2_5_vl", "qwen3_vl", "smolvlm", "gemma4", "video_llama_3"}

pytestmark = pytest.mark.parametrize("family", LVLM_FAMILIES)


def make_config(directory: Path, **changes: object) -> LVLMConfig:
    return dataclasses.replace(LVLMConfig(), name=directory.name, model=str(directory), device="cpu", **changes)


@functools.cache
def load(
    directory: Path,
    taps: tuple[str, ...] = ("llm.*", "vision.*"),
    poolings: tuple[str, ...] = POOLINGS,
    prompts: tuple[str, ...] = ("after", "before", "bare"),
    **changes: object,
) -> tuple[LVLM, ModelRecipe]:
    """A loaded model, shared by the tests that ask for the same one."""
    config = make_config(directory, **changes)
    entry = LVLMS[config.name]
    bank = {name: PROMPTS[name] for name in prompts}
    recipe = recipes.resolve_source(
        RecipeConfig(taps=[*taps], prompts=bank, poolings=[*poolings]), entry.inspect(config)
    )
    return entry.load(config, recipe), recipe


def extract(model: LVLM, clips: Sequence[Clip]) -> dict[str, Any]:
    """The features of clips alone."""
    return model.extract(model.prepare([Item(str(row), clip) for row, clip in enumerate(clips)]))


@dataclasses.dataclass
class Reference:
    """Hugging Face's own forward of the whole model, all hidden states kept."""

    hidden: tuple[torch.Tensor, ...]
    vision: tuple[torch.Tensor, ...]
    masks: TokenMasks


def videos(processor: Any, clips: Sequence[Clip]) -> dict[str, Any]:
    """Clips as a user of transformers passes them."""
    if type(processor).__name__ in FRAMES_ARE_IMAGES:
        return {"images": [[*clip.frames] for clip in clips], "input_data_format": "channels_last"}
    metadata = [
        {
            "total_num_frames": clip.num_source_frames,
            "fps": clip.num_source_frames / clip.duration,
            "duration": clip.duration,
            "height": clip.frames.shape[1],
            "width": clip.frames.shape[2],
            "frames_indices": clip.frame_indices.tolist(),
        }
        for clip in clips
    ]
    options: dict[str, Any] = {"cap_pixels_per_frame": True} if "Qwen" in type(processor).__name__ else {}
    if "MiniCPM" in type(processor).__name__:
        options = {"max_slice_nums": 1, "stack_frames": 1}
    return {
        "videos": [clip.frames for clip in clips],
        "video_metadata": metadata,
        "do_sample_frames": False,
        **options,
    }


def messages(processor: Any, prompt: Prompt, num_frames: int) -> list[dict[str, Any]]:
    """The conversation as a user of transformers writes it; LLaVA-OneVision's template reorders its parts."""
    is_images = type(processor).__name__ in FRAMES_ARE_IMAGES
    video = [{"type": "image"}] * num_frames if is_images else [{"type": "video"}]
    if prompt.input != "video":
        video = [{"type": "image"}] if prompt.input == "cover" else []
    if prompt.input == "video" and prompt.place == "before" and type(processor).__name__ == "LlavaOnevisionProcessor":
        content = [{"type": "text", "text": f"{prompt.text}\n<video>"}]
    else:
        text = [{"type": "text", "text": prompt.text}] if prompt.text else []
        content = video + text if prompt.place == "after" else text + video
    return [{"role": "user", "content": content}]


def read(processor: Any, conversation: list[dict[str, Any]], shown: dict[str, Any]) -> Any:
    """What a user of transformers gives the model, one row for each video or list of images in `shown`."""
    (message,) = conversation
    inputs = {part["type"] for part in message["content"]} - {"text"}
    options = {"padding": True, **shown}
    is_port = not type(processor).__module__.startswith("transformers.")
    if is_port or (shown and not inputs):  # the latter has its place-holder in the text
        text = processor.apply_chat_template(conversation, add_generation_prompt=True)
        num_rows = len(shown.get("videos", shown.get("images", [0])))
        return processor(text=[text] * num_rows, return_tensors="pt", **options)
    rows = options.pop("videos", None) or options.pop("images", [[]])
    conversations = []
    for row in rows:
        left = iter(row if isinstance(row, list) else [row])
        content = [p if p["type"] == "text" else p | {p["type"]: next(left)} for p in message["content"]]
        conversations.append([message | {"content": content}])
    return processor.apply_chat_template(
        conversations,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs=options,
    )


@functools.cache
def hugging_face(directory: Path) -> tuple[Any, Any]:
    """Model and processor; of ports, which transformers does not hold, what the tests say they are."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    if directory.name in PORTS:
        port = importlib.import_module(f"tests.lvlms.ports.{PORTS[directory.name]}")
        return port.Model(directory), port.Processor(directory)
    model = AutoModelForImageTextToText.from_pretrained(directory, dtype=torch.float32).eval()
    model.config.vision_config.tie_last_hidden_states = False  # Gemma 4 would put its pooled tokens last
    return model, AutoProcessor.from_pretrained(directory)


@torch.inference_mode()
def reference(directory: Path, clips: Sequence[Clip], prompt: Prompt) -> Reference:
    model, processor = hugging_face(directory)
    inputs = read(processor, messages(processor, prompt, len(clips[0].frames)), videos(processor, clips))
    modality = "video" if "pixel_values_videos" in inputs else "image"
    encode = getattr(model.model, f"get_{modality}_features")
    wanted = inspect.signature(encode).parameters
    pixels = {k: v for k, v in inputs.items() if k in wanted or k.startswith("pixel_values")}
    vision = encode(**pixels, output_hidden_states=True, return_dict=True).hidden_states
    hidden = model(**inputs, output_hidden_states=True, use_cache=False).hidden_states
    visual = inputs["input_ids"] == getattr(model.config, f"{modality}_token_id")
    if any(f"{n}_" in name for n in ("cls", "class") for name, _ in model.named_parameters()):
        vision = tuple(state[:, 1:] for state in vision)
    if "video_position_ids" in inputs:  # frames padded to one number of patches
        vision = tuple(state[(inputs["video_position_ids"] != -1).all(dim=-1)] for state in vision)
    none = torch.zeros_like(visual)
    return Reference(hidden, vision, TokenMasks(inputs["attention_mask"].bool(), visual, none, none))


def plain_pool(pooling: str, hidden: torch.Tensor, masks: TokenMasks) -> np.ndarray:
    """The same poolings, said again in numpy, float64."""
    rows = []
    for state, attended, visual in zip(hidden.double().numpy(), masks.attended, masks.visual, strict=True):
        if pooling == "last_token":
            rows.append(state[np.flatnonzero(attended)[-1]])
        else:
            rows.append(state[(visual if pooling == "visual_mean" else attended).numpy()].mean(axis=0))
    return np.stack(rows)


@pytest.mark.parametrize("prompt", sorted(PROMPTS))
def test_llm_features_are_hugging_face_hidden_states_bit_for_bit(tiny_models, clips, family, prompt) -> None:
    model, recipe = load(tiny_models[family], prompts=(prompt,))  # a single prompt has a forward of its own
    (batch,) = model.prepare([Item(str(row), clip) for row, clip in enumerate(clips)])
    clips = [clips[row] for row in batch.rows]  # kernels can round the last rows of a batch in another way
    expected = reference(tiny_models[family], clips, PROMPTS[prompt])
    features = extract(model, clips)
    num_layers = model.info.num_layers["llm"]
    assert len(expected.hidden) == num_layers + 1
    for layer, hidden in enumerate(expected.hidden):
        for pooling in POOLINGS:
            feature = features[f"{prompt}/llm.{layer}/{pooling}"]
            assert torch.equal(feature, pool_columns([pooling], hidden, expected.masks)[pooling]), (layer, pooling)
            plain = plain_pool(pooling, hidden, expected.masks)
            np.testing.assert_allclose(feature.numpy(), plain, rtol=1e-5, atol=1e-5)
    assert list(features) == [str(name) for name in recipe.feature_names]


@pytest.mark.parametrize("batch_size", [1, 4, 16])
def test_a_bank_of_prompts_gives_what_separate_forwards_give(
    tiny_models, clips, make_clip, family, batch_size, monkeypatch
) -> None:
    shared = []
    run_prefix = prefix.run_prefix
    monkeypatch.setattr(prefix, "run_prefix", lambda *a: (shared.append(a[3]), run_prefix(*a))[1])
    clips = [*clips, make_clip(90, 160, num_frames=1, seed=5)]
    model, recipe = load(tiny_models[family], prompts=AFTER_AND_BEFORE, batch_size=batch_size)
    features = extract(model, clips)
    is_shared = family not in READS_PROMPTS_ALONE
    assert len(shared) == (4 if batch_size == 1 else 2) * is_shared  # once for each batch of clips
    for prompt in AFTER_AND_BEFORE:
        alone = extract(load(tiny_models[family], prompts=(prompt,), batch_size=batch_size)[0], clips)
        for name in set(alone) & set(features):
            difference = float((features[name] - alone[name]).abs().max() / alone[name].abs().max())
            assert difference <= BANK_TOLERANCE, (name, difference)
    for tap in (name.tap for name in recipe.feature_names if name.tap.tower == "llm"):
        means = [features[f"{prompt}/{tap}/visual_mean"] for prompt in ("after", "long", "bare")]
        assert not is_shared or all(torch.equal(mean, means[0]) for mean in means)


def test_what_reads_the_video_alone_needs_no_forward_of_the_prompts(tiny_models, clips, family, monkeypatch) -> None:
    poolings = ("visual_mean", "merged_3")
    expected = extract(load(tiny_models[family], poolings=poolings, prompts=("after",))[0], clips)
    monkeypatch.setattr(prefix, "run_suffixes", None)
    features = extract(load(tiny_models[family], poolings=poolings, prompts=("after", "bare"))[0], clips)
    for name, feature in expected.items():
        torch.testing.assert_close(features[name], feature, rtol=1e-5, atol=1e-5)


def test_merged_tokens_keep_the_mean(tiny_models, clips, make_clip, family) -> None:
    prompts = ("after", "before", "bare")
    model, recipe = load(tiny_models[family], ("llm.1", "llm.-1"), ("merged_4", "last_token", "visual_mean"), prompts)
    clips = [*clips, make_clip(90, 160, num_frames=1, seed=5)]
    features = extract(model, clips)
    assert list(features) == [str(name) for name in recipe.feature_names]
    for prompt in prompts:
        for tap in recipe.taps:
            sizes = features[f"{prompt}/{tap}/merged_4.sizes"]
            merged = features[f"{prompt}/{tap}/merged_4"].reshape(len(clips), 4, -1)
            mean = (merged * sizes[..., None]).sum(dim=1) / sizes.sum(dim=1, keepdim=True)
            torch.testing.assert_close(mean, features[f"{prompt}/{tap}/visual_mean"], rtol=1e-5, atol=1e-5)
    for row, clip in enumerate(clips[:3]):
        visual = reference(tiny_models[family], [clip], PROMPTS["after"]).masks.visual
        assert int(sizes[row].sum()) == int(visual.sum())


def test_the_projector_is_the_visual_tokens_of_the_first_state(tiny_models, clips, family) -> None:
    model, recipe = load(tiny_models[family], ("projector", "llm.0"))
    features = extract(model, clips)
    assert str(recipe.feature_names[0]) == "video/projector/visual_mean"
    torch.testing.assert_close(
        features["video/projector/visual_mean"], features["after/llm.0/visual_mean"], rtol=1e-6, atol=1e-6
    )
    ran = []
    alone, _ = load(tiny_models[family], ("projector",))
    alone._base.get_decoder().register_forward_hook(lambda *_: ran.append(1))  # type: ignore[attr-defined]
    assert torch.equal(extract(alone, clips)["video/projector/visual_mean"], features["video/projector/visual_mean"])
    assert not ran


def test_the_state_before_the_final_norm(tiny_models, clips, family) -> None:
    model, _ = load(tiny_models[family], ("llm.-1", "llm.-1.pre_norm"), ("last_token",), ("after",))
    top = model.info.num_layers["llm"]
    features = extract(model, clips)
    before, after = (features[f"after/llm.{top}{suffix}/last_token"] for suffix in (".pre_norm", ""))
    norm = hugging_face(tiny_models[family])[0].get_decoder().norm
    assert torch.equal(norm(before), after)
    assert not torch.allclose(before, after, atol=1e-3)


def test_vision_features_are_hugging_face_vision_states(tiny_models, clips, family) -> None:
    model, _ = load(tiny_models[family])
    for clip in clips:
        features = extract(model, [clip])
        expected = reference(tiny_models[family], [clip], PROMPTS["after"])
        assert len(expected.vision) == model.info.num_layers["vision"] + 1
        for layer, hidden in enumerate(expected.vision):
            patches = hidden.reshape(-1, hidden.shape[-1])
            feature = features[f"video/vision.{layer}/visual_mean"]
            assert torch.equal(feature[0], patches.mean(dim=0)), layer


def test_stopping_early_changes_nothing(tiny_models, clips, family) -> None:
    whole = extract(load(tiny_models[family])[0], clips)
    for taps in (("llm.0",), ("llm.1", "vision.1"), ("llm.0", "llm.2"), ("llm.-2",), ("llm.-1",), ("vision.0",)):
        model, recipe = load(tiny_models[family], taps)
        top = max((tap.layer for tap in recipe.taps if tap.tower == "llm"), default=0)
        decoder = model._base.get_decoder()  # type: ignore[attr-defined]
        assert len(decoder.layers) == top
        features = extract(model, clips)
        assert list(features) == [str(name) for name in recipe.feature_names]
        for name, feature in features.items():
            assert torch.equal(feature, whole[name]), name


def test_vision_taps_alone_do_not_run_the_language_model(tiny_models, clips, family) -> None:
    model, _ = load(tiny_models[family], ("vision.-1",))
    ran = []
    model._base.get_decoder().register_forward_hook(lambda *_: ran.append(1))  # type: ignore[attr-defined]
    assert all(feature.abs().sum() > 0 for feature in extract(model, clips).values())
    assert not ran


@pytest.mark.parametrize("dtype", sorted(NEIGHBOUR_TOLERANCE))
def test_features_do_not_depend_on_neighbours_order_or_length(tiny_models, clips, make_clip, family, dtype) -> None:
    model, recipe = load(tiny_models[family], batch_size=3, dtype=dtype)
    mixed = [clips[2], make_clip(90, 160, num_frames=1, seed=5), clips[0], clips[1]]
    together, shuffled = extract(model, clips), extract(model, mixed)
    tolerance = NEIGHBOUR_TOLERANCE[dtype] * (LINEAR if dtype == "float32" else LINEAR_BFLOAT16).get(family, 1)
    for row, clip in enumerate([*clips, mixed[1]]):
        alone = extract(model, [clip])
        for name in map(str, recipe.feature_names):
            scale = float(alone[name].abs().max())
            others = [shuffled[name][[2, 3, 0, 1][row]]] + ([together[name][row]] if row < 3 else [])
            for other in others:
                assert float((other - alone[name][0]).abs().max()) <= tolerance * scale, name


def test_the_same_clip_gives_the_same_bits_every_time(tiny_models, clips, family) -> None:
    (first, recipe), config = load(tiny_models[family]), make_config(tiny_models[family])
    second = LVLMS[family].load(config, recipe)
    features = extract(first, clips)
    extract(first, clips[:1])
    for again in (extract(first, clips), extract(second, clips)):
        assert all(torch.equal(features[name], again[name]) for name in features)


def test_prompt_text_place_and_video_all_matter(tiny_models, clips, family) -> None:
    model, _ = load(tiny_models[family], ("llm.-1",))
    tap = f"llm.{model.info.num_layers['llm']}"
    features = extract(model, clips)
    after, before, bare = (features[f"{prompt}/{tap}/visual_mean"] for prompt in ("after", "before", "bare"))
    assert not torch.allclose(after, before, atol=1e-3)  # a prompt before the video is seen by its tokens
    assert torch.allclose(after, bare, atol=1e-4)  # one after it is not
    assert not torch.allclose(features[f"after/{tap}/last_token"], features[f"bare/{tap}/last_token"], atol=1e-3)
    assert not torch.allclose(after[0], after[1], atol=1e-2)


def test_timestamps_reach_the_models_that_read_them(tiny_models, clips, family) -> None:
    model, _ = load(tiny_models[family], ("llm.-1",), ("last_token",))
    slow = dataclasses.replace(clips[0], duration=48.0, timestamps=clips[0].timestamps * 10)
    features = extract(model, [clips[0], slow])[f"after/llm.{model.info.num_layers['llm']}/last_token"]
    same = torch.allclose(features[0], features[1], atol=1e-5)
    assert same != (family in READS_SECONDS)


def test_bfloat16_stays_near_float32(tiny_models, clips, family) -> None:
    exact, half = extract(load(tiny_models[family])[0], clips), load(tiny_models[family], dtype="bfloat16")[0]
    assert half.info.compute_dtype == "bfloat16"
    for name, feature in extract(half, clips).items():
        assert feature.dtype == torch.float32
        cosine = torch.nn.functional.cosine_similarity(feature, exact[name])
        assert float(cosine.min()) > 0.99, name


def test_another_family_or_content_is_refused(tiny_models, clips, family) -> None:
    entry = LVLMS[family]
    for other in {*LVLM_FAMILIES} - {family}:
        found = json.loads((tiny_models[other] / "config.json").read_text())["model_type"]
        with pytest.raises(ConfigError, match=rf"lvlm\.model: .*{found} model.*; lvlm.name={family}"):
            entry.inspect(make_config(tiny_models[other]))
    config = make_config(tiny_models[family])
    recipe = recipes.resolve_source(RecipeConfig(taps=["llm.0"]), entry.inspect(config))
    with pytest.raises(ConfigError, match=r"lvlm\.model: .*the recipe names content:0"):
        entry.load(config, dataclasses.replace(recipe, identity="content:0"))


def test_a_prompt_may_not_hold_a_place_holder(tiny_models, family) -> None:
    token = inputs.placeholder(hugging_face(tiny_models[family])[1], "video")
    entry, config = LVLMS[family], make_config(tiny_models[family])
    prompts = {"sly": Prompt(f"Compare with {token}")}
    recipe = recipes.resolve_source(RecipeConfig(taps=["llm.0"], prompts=prompts), entry.inspect(config))
    with pytest.raises(ConfigError, match=r"recipe\.prompts\.sly\.text"):
        entry.load(config, recipe)
