"""MiniCPM-V against its published formulas, written again here: plain loops, one frame or group at a time."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lvlmrec.errors import ConfigError
from lvlmrec.lvlms import LVLMS, LVLMConfig
from lvlmrec.lvlms.files import torchvision_shim
from lvlmrec.lvlms.ports import minicpm_v
from lvlmrec.lvlms.protocol import Item
from lvlmrec.lvlms.tiny import minicpm_v as tiny_minicpm_v

torchvision_shim.ensure_importable()

from lvlmrec.lvlms.ports import minicpm_v_model as model_file  # noqa: E402
from tests.lvlms.ports.test_minicpm_v_processor import process, tiny_processor  # noqa: E402

pytestmark = pytest.mark.thorough

VERSIONS = ("2.6", "4.5")
PUBLISHED: dict[str, dict[str, Any]] = {
    "2.6": {
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 151666,
    },
    "4.5": {
        "attention_bias": False,
        "head_dim": 128,
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 151748,
    },
}
PUBLISHED_VISION = {
    "hidden_size": 1152,
    "image_size": 980,
    "intermediate_size": 4304,
    "model_type": "siglip",
    "num_attention_heads": 16,
    "num_hidden_layers": 27,
    "patch_size": 14,
}
NUM_PARAMETERS = {"2.6": 8_099_175_152, "4.5": 17_391_790_560 // 2}  # 4.5: bytes in bfloat16, of the published index


def published_tree(version: str) -> dict[str, Any]:
    common = {"version": float(version), "model_type": "minicpmv", "rope_theta": 1000000, "rope_scaling": None}
    return common | PUBLISHED[version] | {"query_num": 64, "vision_config": PUBLISHED_VISION}


def expected_shapes(version: str) -> dict[str, tuple[int, ...]]:
    """Every published tensor, from the published table of names."""
    sizes = PUBLISHED[version]
    d, vision, inner = sizes["hidden_size"], 1152, 4304
    kv = sizes["num_key_value_heads"] * 128
    shapes: dict[str, tuple[int, ...]] = {
        "llm.lm_head.weight": (sizes["vocab_size"], d),
        "llm.model.embed_tokens.weight": (sizes["vocab_size"], d),
        "llm.model.norm.weight": (d,),
        "vpm.embeddings.patch_embedding.weight": (vision, 3, 14, 14),
        "vpm.embeddings.patch_embedding.bias": (vision,),
        "vpm.embeddings.position_embedding.weight": (4900, vision),
        "resampler.query": (64, d),
        "resampler.proj": (d, d),
        "resampler.kv_proj.weight": (d, vision),
        "resampler.attn.in_proj_weight": (3 * d, d),
        "resampler.attn.in_proj_bias": (3 * d,),
        "resampler.attn.out_proj.weight": (d, d),
        "resampler.attn.out_proj.bias": (d,),
    }
    norms = [("resampler.ln_q", d), ("resampler.ln_kv", d), ("resampler.ln_post", d), ("vpm.post_layernorm", vision)]
    for layer in range(27):
        start = f"vpm.encoder.layers.{layer}"
        norms += [(f"{start}.layer_norm1", vision), (f"{start}.layer_norm2", vision)]
        linears = [(f"self_attn.{name}_proj", vision, vision) for name in "qkv"]
        linears += [("self_attn.out_proj", vision, vision), ("mlp.fc1", inner, vision), ("mlp.fc2", vision, inner)]
        for name, rows, columns in linears:
            shapes |= {f"{start}.{name}.weight": (rows, columns), f"{start}.{name}.bias": (rows,)}
    for name, size in norms:
        shapes |= {f"{name}.weight": (size,), f"{name}.bias": (size,)}
    for layer in range(sizes["num_hidden_layers"]):
        start = f"llm.model.layers.{layer}"
        for name, rows, columns in (
            ("self_attn.q_proj", d, d),
            ("self_attn.k_proj", kv, d),
            ("self_attn.v_proj", kv, d),
            ("self_attn.o_proj", d, d),
            ("mlp.gate_proj", sizes["intermediate_size"], d),
            ("mlp.up_proj", sizes["intermediate_size"], d),
            ("mlp.down_proj", d, sizes["intermediate_size"]),
        ):
            shapes[f"{start}.{name}.weight"] = (rows, columns)
            if version == "2.6" and name.startswith(("self_attn.q", "self_attn.k", "self_attn.v")):
                shapes[f"{start}.{name}.bias"] = (rows,)
        shapes |= {f"{start}.{name}_layernorm.weight": (d,) for name in ("input", "post_attention")}
        if version == "4.5":
            shapes |= {f"{start}.self_attn.{name}_norm.weight": (128,) for name in "qk"}
    return shapes


@pytest.mark.parametrize("version", VERSIONS)
def test_names_shapes_and_size_are_the_published_ones(version) -> None:
    config = model_file.build_config(published_tree(version))
    config.has_head = True
    with torch.device("meta"):
        model = model_file.MiniCPMV(config)
    shapes = {name: tuple(weight.shape) for name, weight in model.named_parameters()}
    assert shapes == expected_shapes(version)
    assert sum(math.prod(shape) for shape in shapes.values()) == NUM_PARAMETERS[version]
    assert config.text_config.rope_parameters["rope_theta"] == 1000000
    assert config.text_config.rms_norm_eps == 1e-6
    assert set(config.text_config.layer_types) == {"full_attention"}


def test_the_towers_last_layer_is_dropped_where_the_files_say_so() -> None:
    tree = tiny_minicpm_v.config_tree("2.6", 300) | {"drop_vision_last_layer": True}
    assert len(model_file.MiniCPMV(model_file.build_config(tree)).vpm.encoder.layers) == 2


def reference_buckets(count: int, side: int) -> torch.Tensor:
    """As the published tower does it: an int32 tensor of counts, the reciprocal given to arange as a tensor."""
    counts = torch.tensor([[count, count]], dtype=torch.int32)
    boundaries = torch.arange(1 / side, 1.0, 1 / side)
    return torch.bucketize(torch.arange(0, 1 - 1e-6, 1 / counts[0][0]), boundaries, right=True)


def test_positions_are_the_references_table() -> None:
    differs = set()
    for count in range(1, 71):
        table = model_file.buckets(count, 70)
        assert len(table) == count
        assert torch.equal(table, reference_buckets(count, 70))
        if table.tolist() != [70 * step // count for step in range(count)]:
            differs.add(count)
    assert differs == {25, 49, 50, 55, 58}
    positions = model_file.position_ids(21, 50, 70).reshape(21, 50)
    for row, column in ((0, 0), (5, 13), (20, 49)):
        assert positions[row, column] == reference_buckets(21, 70)[row] * 70 + reference_buckets(50, 70)[column]
    assert all(len(model_file.buckets(count, 70)) == count for count in range(71, 200))  # very long pictures


def wave(position: float, size: int) -> np.ndarray:
    """[sin(p w_k)..., cos(p w_k)...], w_k = 10000^(-k / (size / 2)), float64."""
    angles = [position * 10000 ** (-k / (size / 2)) for k in range(size // 2)]
    return np.array([math.sin(angle) for angle in angles] + [math.cos(angle) for angle in angles])


def plane(rows: int, columns: int, size: int) -> np.ndarray:
    places = [(row, column) for row in range(rows) for column in range(columns)]
    return np.stack([np.concatenate([wave(column, size // 2), wave(row, size // 2)]) for row, column in places])


def test_places_and_times_are_the_published_waves() -> None:
    ours = model_file.plane_positions(24, 43, torch.empty(1, 256))
    np.testing.assert_allclose(ours.numpy(), plane(24, 43, 256), atol=1e-5)
    times = np.array([0, 1, 43, 1799])
    expected = np.stack([wave(time, 256) for time in times])
    np.testing.assert_allclose(model_file.sincos(times, 256).numpy(), expected, atol=2e-4)  # float32 angles up to 1799


def make_resampler(width: int = 256, vision: int = 48, queries: int = 5) -> Any:
    torch.manual_seed(0)
    resampler = model_file.Resampler(queries, width, vision).eval().requires_grad_(False)
    for weight in resampler.parameters():
        torch.nn.init.normal_(weight, std=weight.shape[-1] ** -0.5 if weight.ndim == 2 else 1.0)
    return resampler


def layer_norm(x: np.ndarray, norm: Any) -> np.ndarray:
    centred = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
    return centred * norm.weight.double().numpy() + norm.bias.double().numpy()


def reference_resampler(resampler: Any, frames: list[torch.Tensor], grid: list[Any], times: list[int]) -> np.ndarray:
    """float64 [Q, D] of one group: keys are patches with place and time, values are patches alone."""
    weights = {name: weight.detach().double().numpy() for name, weight in resampler.named_parameters()}
    width = weights["proj"].shape[0]
    keys, values = [], []
    for frame, (rows, columns), time in zip(frames, grid, times, strict=True):
        value = layer_norm(frame[: rows * columns].double().numpy() @ weights["kv_proj.weight"].T, resampler.ln_kv)
        values.append(value)
        keys.append(value + plane(rows, columns, width) + (0 if time == -1 else wave(time, width)))
    inputs = [layer_norm(weights["query"], resampler.ln_q), np.concatenate(keys), np.concatenate(values)]
    projections = zip(
        np.split(weights["attn.in_proj_weight"], 3), np.split(weights["attn.in_proj_bias"], 3), strict=True
    )
    q, k, v = (x @ weight.T + bias for x, (weight, bias) in zip(inputs, projections, strict=True))
    heads = []
    for head in range(width // 128):
        part = slice(128 * head, 128 * (head + 1))
        scores = q[:, part] @ k[:, part].T / math.sqrt(128)
        shares = np.exp(scores - scores.max(axis=1, keepdims=True))
        heads.append(shares / shares.sum(axis=1, keepdims=True) @ v[:, part])
    out = np.concatenate(heads, axis=1) @ weights["attn.out_proj.weight"].T + weights["attn.out_proj.bias"]
    return layer_norm(out, resampler.ln_post) @ weights["proj"]


GRID = [[3, 4], [3, 4], [2, 5], [3, 4]]
TIMES = [0, 7, 15, -1]


@pytest.mark.parametrize("groups", [[1, 1, 1, 1], [3, 1], [2, 2], [4]])
def test_the_resampler_is_the_published_formula(groups) -> None:
    resampler = make_resampler()
    hidden = torch.randn(4, 12, 48)
    with torch.inference_mode():
        tokens = resampler(hidden, GRID, TIMES, groups)
    assert tokens.shape == (len(groups), 5, 256)
    starts = np.cumsum([0, *groups])
    for group, (start, end) in enumerate(itertools.pairwise(starts)):
        expected = reference_resampler(resampler, list(hidden[start:end]), GRID[start:end], TIMES[start:end])
        np.testing.assert_allclose(tokens[group].numpy(), expected, rtol=0, atol=2e-6 * np.abs(expected).max())


def test_a_group_of_one_is_a_frame_and_its_time_alone_says_nothing() -> None:
    resampler, hidden = make_resampler(), torch.randn(3, 12, 48)
    grid = [[3, 4]] * 3
    with torch.inference_mode():
        alone = [resampler(hidden[i : i + 1], grid[:1], [40 * i], [1])[0] for i in range(3)]
        separate = resampler(hidden, grid, [0, 40, 80], [1, 1, 1])
        untimed = resampler(hidden, grid, [-1, -1, -1], [1, 1, 1])
        packed = resampler(hidden, grid, [0, 40, 80], [3])
        slow = resampler(hidden, grid, [0, 80, 160], [3])
    torch.testing.assert_close(separate, torch.stack(alone), rtol=1e-5, atol=1e-5)
    # The same vector on every key of a softmax changes none of its shares.
    torch.testing.assert_close(separate, untimed, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(packed, slow, atol=1e-2)


def load_whole(directory: Path) -> tuple[Any, Any]:
    """The model and processor of a tiny directory, every layer kept."""
    config = dataclasses.replace(LVLMConfig(), name=directory.name, model=str(directory), device="cpu")
    return minicpm_v.build(config, LVLMS[directory.name].read_config(config))


def reference_tower(model: Any, picture: torch.Tensor, rows: int, columns: int) -> list[torch.Tensor]:
    """Every state [1, L, V] of one ordinary picture [3, H, W], then the one behind the last norm."""
    patches = model.vpm.embeddings.patch_embedding(picture[None]).flatten(2).transpose(1, 2)
    side = model.vpm.config.image_size // 14
    place = reference_buckets(rows, side)[:, None] * side + reference_buckets(columns, side)
    states = [patches + model.vpm.embeddings.position_embedding.weight[place.flatten()]]
    for layer in model.vpm.encoder.layers:
        states.append(layer(states[-1], None))
    return [*states, model.vpm.post_layernorm(states[-1])]


def fold(packed: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    cells = packed[..., : rows * columns * 14].reshape(3, 14, rows, columns, 14)
    return cells.permute(0, 2, 1, 3, 4).reshape(3, rows * 14, columns * 14)


@pytest.mark.parametrize("version", VERSIONS)
@torch.inference_mode()
def test_the_whole_model_is_a_plain_loop(tiny_models, make_clip, version) -> None:
    model, processor = load_whole(tiny_models[f"minicpm_v_{version.replace('.', '_')}"])
    clips = [make_clip(90, 160, seed=1), make_clip(160, 60, num_frames=7, seed=2)]
    inputs, texts = process(processor, clips, packing=3)
    packing = 3 if version == "4.5" else 1
    assert inputs["num_groups"].tolist() == [math.ceil(4 / packing), math.ceil(7 / packing)]
    vision = model.get_video_features(**inputs)
    tokens = processor.tokenizer([f"Look: {text} What?" for text in texts], padding=True, return_tensors="pt")
    assert tokens["attention_mask"][0, 0] == 0, "the shorter text is padded"
    hidden = []
    for layer in model.llm.model.layers:
        layer.register_forward_hook(lambda _, __, output: hidden.append(output))
    model(**tokens, mm_encoder_outputs={"video": vision})
    start = 0
    for row, clip in enumerate(clips):
        frames = [
            reference_tower(model, fold(inputs["pixel_values"][i], *grid), *grid)[-1][0]
            for i, grid in list(enumerate(inputs["grid_hw"].tolist()))[start : start + len(clip.frames)]
        ]
        grid, times = inputs["grid_hw"].tolist()[start:], inputs["temporal_ids"].tolist()[start:]
        start += len(frames)
        groups = [range(i, min(i + packing, len(frames))) for i in range(0, len(frames), packing)]
        visual = np.concatenate(
            [
                reference_resampler(model.resampler, *([x[i] for i in group] for x in (frames, grid, times)))
                for group in groups
            ]
        )
        np.testing.assert_allclose(vision.pooler_output[row].numpy(), visual, atol=2e-4)
        ids = processor.tokenizer(f"Look: {texts[row]} What?")["input_ids"]
        embeds = model.llm.model.embed_tokens(torch.tensor([ids]))
        places = [i for i, token in enumerate(processor.tokenizer.convert_ids_to_tokens(ids)) if token == "<unk>"]
        embeds[0, places] = torch.from_numpy(visual).float()
        expected = model.llm.model(inputs_embeds=embeds, output_hidden_states=True).hidden_states
        for layer, state in enumerate(hidden[: len(expected) - 2]):
            torch.testing.assert_close(state[row, -len(ids) :], expected[layer + 1][0], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("version", VERSIONS)
@torch.inference_mode()
def test_vision_taps_are_every_state_of_the_tower(tiny_models, make_clip, version) -> None:
    from lvlmrec.features import recipe_config as recipes

    directory = tiny_models[f"minicpm_v_{version.replace('.', '_')}"]
    entry = LVLMS[directory.name]
    config = dataclasses.replace(LVLMConfig(), name=directory.name, model=str(directory), device="cpu")
    recipe = recipes.resolve_source(recipes.RecipeConfig(taps=["vision.*"]), entry.inspect(config))
    clips = [make_clip(90, 160, seed=1), make_clip(160, 60, num_frames=4, seed=2)]
    lvlm = entry.load(config, recipe)
    features = lvlm.extract(lvlm.prepare([Item(str(row), clip) for row, clip in enumerate(clips)]))
    model, processor = load_whole(directory)
    for row, clip in enumerate(clips):
        inputs, _ = process(processor, [clip])
        frames = [
            reference_tower(model, fold(packed, *grid), *grid)
            for packed, grid in zip(inputs["pixel_values"], inputs["grid_hw"].tolist(), strict=True)
        ]
        for layer in range(4):
            expected = torch.cat([states[layer] for states in frames], dim=1).mean(dim=1)[0]
            feature = features[f"video/vision.{layer}/visual_mean"][row]
            torch.testing.assert_close(feature, expected, rtol=1e-4, atol=1e-4)


def test_patches_of_packed_frames_stay_with_their_clip(tiny_models, make_clip) -> None:
    clips = [make_clip(90, 160, seed=1), make_clip(160, 60, num_frames=7, seed=2)]
    inputs, _ = process(tiny_processor(tiny_models["minicpm_v_4_5"]), clips, packing=3)
    lengths = inputs["grid_hw"].prod(dim=1)
    hidden = torch.arange(11.0)[:, None, None].expand(11, int(lengths.max()), 2)  # each view's own number
    first, second = minicpm_v.patches_of_views(hidden, inputs, 2)
    assert torch.equal(first[:, 0], torch.arange(4.0).repeat_interleave(lengths[:4]))
    assert torch.equal(second[:, 0], torch.arange(4.0, 11.0).repeat_interleave(lengths[4:]))


def test_padding_counts_no_position(tiny_models) -> None:
    model, _ = load_whole(tiny_models["minicpm_v_2_6"])
    calls: list[Any] = []
    model.llm.model.register_forward_pre_hook(lambda _, __, call: calls.append(call["position_ids"]), with_kwargs=True)
    mask = torch.tensor([[0, 0, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1]])
    model(input_ids=torch.full((2, 6), 20), attention_mask=mask)
    assert calls[0][0, 2:5].tolist() == [0, 1, 2]
    assert calls[0][1].tolist() == [0, 1, 2, 3, 4, 5]


def test_a_token_too_many_is_an_error(tiny_models, make_clip) -> None:
    model, processor = load_whole(tiny_models["minicpm_v_4_5"])
    inputs, (text,) = process(processor, [make_clip(90, 160)])
    tokens = processor.tokenizer([text + "<unk>"], return_tensors="pt")
    with pytest.raises(ValueError, match="17 places for 16 visual tokens"):
        model(**tokens, mm_encoder_outputs={"video": model.get_video_features(**inputs)})


def test_the_other_version_is_refused(tiny_models) -> None:
    old = tiny_models["minicpm_v_2_6"]
    config = dataclasses.replace(LVLMConfig(), name="minicpm_v_4_5", model=str(old))
    with pytest.raises(ConfigError, match=r"lvlm\.model: .*2\.6.*lvlm\.name=minicpm_v_4_5"):
        LVLMS["minicpm_v_4_5"].inspect(config)


def test_a_config_that_lacks_something_is_the_users_fault(tiny_models, tmp_path) -> None:
    directory = Path(shutil.copytree(tiny_models["minicpm_v_2_6"], tmp_path / "minicpm_v_2_6"))
    tree = json.loads((directory / "config.json").read_text())
    del tree["vision_config"]
    (directory / "config.json").write_text(json.dumps(tree))
    config = dataclasses.replace(LVLMConfig(), name="minicpm_v_2_6", model=str(directory))
    with pytest.raises(ConfigError, match=r"lvlm\.model: .*config\.json: KeyError: 'vision_config'"):
        LVLMS["minicpm_v_2_6"].inspect(config)
