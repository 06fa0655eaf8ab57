"""Phi-3.5-vision: published names and counts, its line at 4,096 tokens, answers and covers; see also the contract."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lvlmrec.errors import ConfigError
from lvlmrec.features import recipe_config as recipes
from lvlmrec.features.model_recipe import Prompt
from lvlmrec.features.recipe_config import RecipeConfig
from lvlmrec.lvlms import LVLMS, LVLMConfig
from lvlmrec.lvlms.engine import prefix
from lvlmrec.lvlms.files import torchvision_shim
from lvlmrec.lvlms.protocol import Item
from lvlmrec.media.sampling import Clip

torchvision_shim.ensure_importable()

from lvlmrec.lvlms.ports import phi_3_5_vision_model as model_file  # noqa: E402
from lvlmrec.lvlms.ports import phi_3_5_vision_processor as processor_file  # noqa: E402
from tests.lvlms.ports import phi_3_5_vision_reference as plain  # noqa: E402

pytestmark = pytest.mark.thorough

FAMILY = "phi_3_5_vision"
PUBLISHED: dict[str, Any] = {
    "model_type": "phi3_v",
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32064,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "rope_scaling": {"type": "su", "short_factor": [1.05] * 48, "long_factor": [1.1 + k for k in range(48)]},
    "max_position_embeddings": 131072,
    "original_max_position_embeddings": 4096,
    "sliding_window": 262144,
    "pad_token_id": 32000,
    "img_processor": {"image_dim_out": 1024, "name": "clip_vision_model", "num_img_tokens": 144},
}


def published_shapes() -> dict[str, tuple[int, ...]]:
    """Names and shapes of the published tensors that are read."""
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (32064, 3072),
        "model.norm.weight": (3072,),
        "lm_head.weight": (32064, 3072),
        "model.vision_embed_tokens.glb_GN": (1, 1, 4096),
        "model.vision_embed_tokens.sub_GN": (1, 1, 1, 4096),
        "model.vision_embed_tokens.img_projection.0.weight": (3072, 4096),
        "model.vision_embed_tokens.img_projection.0.bias": (3072,),
        "model.vision_embed_tokens.img_projection.2.weight": (3072, 3072),
        "model.vision_embed_tokens.img_projection.2.bias": (3072,),
    }
    for layer in range(32):
        name = f"model.layers.{layer}."
        shapes[f"{name}self_attn.qkv_proj.weight"] = (3 * 3072, 3072)
        shapes[f"{name}self_attn.o_proj.weight"] = (3072, 3072)
        shapes[f"{name}mlp.gate_up_proj.weight"] = (2 * 8192, 3072)
        shapes[f"{name}mlp.down_proj.weight"] = (3072, 8192)
        shapes[f"{name}input_layernorm.weight"] = (3072,)
        shapes[f"{name}post_attention_layernorm.weight"] = (3072,)
    vision = "model.vision_embed_tokens.img_processor.vision_model."
    shapes |= {
        f"{vision}embeddings.class_embedding": (1024,),
        f"{vision}embeddings.patch_embedding.weight": (1024, 3, 14, 14),
        f"{vision}embeddings.position_embedding.weight": (577, 1024),
        f"{vision}pre_layrnorm.weight": (1024,),
        f"{vision}pre_layrnorm.bias": (1024,),
    }
    for layer in range(23):
        for module, shape in [
            *((f"self_attn.{kind}_proj", (1024, 1024)) for kind in ("q", "k", "v", "out")),
            ("mlp.fc1", (4096, 1024)),
            ("mlp.fc2", (1024, 4096)),
            ("layer_norm1", (1024,)),
            ("layer_norm2", (1024,)),
        ]:
            shapes[f"{vision}encoder.layers.{layer}.{module}.weight"] = shape
            shapes[f"{vision}encoder.layers.{layer}.{module}.bias"] = shape[:1]
    return shapes


def test_names_and_shapes_are_the_published_ones() -> None:
    config = model_file.build_config(PUBLISHED)
    config.has_head = True
    with torch.device("meta"):
        model = model_file.Phi35Vision(config)
    found = {name: tuple(weight.shape) for name, weight in model.named_parameters()}
    assert found == published_shapes()
    decoder = sum(weight.numel() for name, weight in model.named_parameters() if "vision_embed_tokens" not in name)
    assert decoder == 3_821_079_552  # Phi-3-mini
    assert sum(weight.numel() for weight in model.parameters()) / 1e9 == pytest.approx(4.1, abs=0.1)
    assert config.text_config.sliding_window is None


@pytest.fixture
def directory(tiny_models: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of the tiny model, to be changed."""
    return Path(shutil.copytree(tiny_models[FAMILY], tmp_path / "model"))


def with_line(directory: Path, line: int) -> Path:
    """The model with its line between short and long sequences at `line` tokens."""
    tree = json.loads((directory / "config.json").read_text())
    tree["original_max_position_embeddings"] = line
    (directory / "config.json").write_text(json.dumps(tree))
    return directory


def load(directory: Path, prompts: dict[str, Prompt], batch_size: int = 4, **changes: Any) -> Any:
    config = dataclasses.replace(
        LVLMConfig(), name=FAMILY, model=str(directory), device="cpu", batch_size=batch_size, **changes
    )
    wanted = RecipeConfig(taps=["llm.*"], prompts=prompts, poolings=["visual_mean", "all_mean", "last_token"])
    return LVLMS[FAMILY].load(config, recipes.resolve_source(wanted, LVLMS[FAMILY].inspect(config)))


def extract(model: Any, clips: Sequence[Clip]) -> dict[str, Any]:
    return model.extract(model.prepare([Item(str(row), clip) for row, clip in enumerate(clips)]))


def assert_same(first: dict[str, Any], second: dict[str, Any], tolerance: float = 2e-6) -> None:
    for name in second:
        scale = float(second[name].abs().max())
        torch.testing.assert_close(first[name], second[name], rtol=0, atol=tolerance * scale, msg=name)


SHORT, LONG = Prompt("What?"), Prompt("What is shown, and why does the person look so surprised by the music?")


def lengths(directory: Path, clip: Clip) -> list[int]:
    """Tokens of a clip with `SHORT` and with `LONG`."""
    processor = plain.Processor(directory)
    found = []
    for prompt in (SHORT, LONG):
        content = [{"type": "video"}, {"type": "text", "text": prompt.text}]
        text = processor.apply_chat_template([{"role": "user", "content": content}], True)
        found.append(processor([text], [clip.frames])["input_ids"].shape[1])
    return found


@torch.inference_mode()
def reference(directory: Path, clip: Clip, prompt: Prompt) -> tuple[torch.Tensor, ...]:
    """All hidden states [1, S, D] of one clip alone, as transformers' Phi-3 gives them."""
    processor = plain.Processor(directory)
    content = [{"type": "video"}, {"type": "text", "text": prompt.text}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], True)
    states: tuple[torch.Tensor, ...] = plain.Model(directory)(**processor([text], [clip.frames])).hidden_states
    return states


@pytest.mark.parametrize("offset", [-1, 0, 1])
def test_both_sides_of_the_line_are_transformers_own(directory: Path, clips: list[Clip], offset: int) -> None:
    """As many tokens as the line are short, one more is long."""
    short, _ = lengths(directory, clips[0])
    with_line(directory, short + offset)
    features = extract(load(directory, {"p": SHORT}), clips[:1])
    for layer, state in enumerate(reference(directory, clips[0], SHORT)):
        assert torch.equal(features[f"p/llm.{layer}/last_token"], state[:, -1]), layer
    sides = [reference(with_line(directory, line), clips[0], SHORT)[-1] for line in (short, short - 1)]
    assert not torch.allclose(*sides, atol=1e-2)


def test_a_long_neighbour_and_its_padding_change_nothing(directory: Path, clips: list[Clip], make_clip: Any) -> None:
    """The longer clip lies above the line, the others below; in one batch and each alone."""
    many = [make_clip(90, 160, num_frames=7, seed=4), *clips]
    short, _ = lengths(directory, clips[0])
    with_line(directory, short + 4)
    assert lengths(directory, many[0])[0] > short + 4
    model = load(directory, {"p": SHORT})
    batch = model.prepare([Item(str(row), clip) for row, clip in enumerate(many)])
    rows = [row for one in batch for row in one.rows]
    assert sorted(rows) == [0, 1, 2, 3]
    alone = [extract(model, [clip]) for clip in many]
    expected = {name: torch.cat([one[name] for one in alone]) for name in alone[0]}
    assert_same(extract(model, many), expected)
    for row, clip in enumerate(many):
        state = reference(directory, clip, SHORT)[-1]
        torch.testing.assert_close(expected["p/llm.4/last_token"][row], state[0, -1])


@torch.inference_mode()
def test_rows_of_one_tensor_go_by_their_own_length(directory: Path) -> None:
    model = load(with_line(directory, 10), {"p": SHORT})._base
    mask = torch.ones(2, 14, dtype=torch.long)
    mask[1, :5] = 0  # 9 tokens, below the line
    ids = torch.arange(28).reshape(2, 14) + 10
    together = model(input_ids=ids, attention_mask=mask).last_hidden_state
    alone = model(input_ids=ids[1:, 5:], attention_mask=mask[1:, 5:]).last_hidden_state
    torch.testing.assert_close(together[1:, 5:], alone, rtol=1e-5, atol=1e-5)
    phi = plain.Model(directory).llm.model
    torch.testing.assert_close(together[:1], phi(ids[:1]).last_hidden_state, rtol=1e-5, atol=1e-5)
    mixed = phi(input_ids=ids, attention_mask=mask).last_hidden_state
    assert not torch.allclose(mixed[1:, 5:], alone, atol=1e-2)  # what this is about


@pytest.mark.parametrize(("line", "shares"), [("below", True), ("between", False), ("above", True)])
def test_a_start_is_shared_on_one_side_of_the_line_only(
    directory: Path, clips: list[Clip], monkeypatch: pytest.MonkeyPatch, line: str, shares: bool
) -> None:
    short, long = lengths(directory, clips[0])
    with_line(directory, {"below": short - 1, "between": short + 2, "above": long}[line])
    shared = []
    run_prefix = prefix.run_prefix
    monkeypatch.setattr(prefix, "run_prefix", lambda *a: (shared.append(1), run_prefix(*a))[1])
    bank = extract(load(directory, {"short": SHORT, "long": LONG}), clips)
    assert bool(shared) == shares
    for name, prompt in (("short", SHORT), ("long", LONG)):
        assert_same(bank, extract(load(directory, {name: prompt}), clips))


@torch.inference_mode()
def test_the_start_of_a_long_sequence_is_long_though_it_is_short_itself(directory: Path) -> None:
    """The cached start lies below the line, the whole sequence above it."""
    model = load(with_line(directory, 12), {"p": SHORT})._base
    tokens = {"input_ids": torch.arange(16)[None] + 10, "attention_mask": torch.ones(1, 16, dtype=torch.long)}
    call = prefix.capture(model.get_decoder(), lambda: model(**tokens))
    seen: list[torch.Tensor] = []
    handle = model.get_decoder().norm.register_forward_hook(lambda _, __, out: seen.append(out))
    cache = prefix.run_prefix(LVLMS[FAMILY], model.get_decoder(), call, 9)
    prefix.run_suffixes(LVLMS[FAMILY], model.get_decoder(), [call], [call["attention_mask"]], 9, cache)
    handle.remove()
    torch.testing.assert_close(torch.cat(seen, dim=1), model(**tokens).last_hidden_state, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("line", [4096, 0])
@torch.inference_mode()
def test_answers_are_the_likeliest_tokens(directory: Path, clips: list[Clip], line: int) -> None:
    if line == 0:
        line = lengths(directory, clips[0])[0] - 1
    with_line(directory, line)
    prompt = dataclasses.replace(SHORT, max_new_tokens=5)
    features = extract(load(directory, {"p": prompt}), [*clips, clips[0]])
    model, processor = plain.Model(directory), plain.Processor(directory)
    text = processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": SHORT.text}]}], True
    )
    for row, clip in enumerate(clips):
        inputs = processor([text], [clip.frames])
        answer: list[int] = []
        for step in range(5):
            logits = model(**inputs).logits[0, -1]
            special = [
                t for t in processor.tokenizer.all_special_ids if step == 0 or t != processor.tokenizer.eos_token_id
            ]
            logits[special] = -torch.inf
            if int(logits.argmax()) == processor.tokenizer.eos_token_id:
                break
            answer.append(int(logits.argmax()))
            for key, value in (("input_ids", answer[-1]), ("attention_mask", 1)):
                inputs[key] = torch.cat([inputs[key], torch.tensor([[value]])], dim=1)
        assert features["p/text"][row] == processor.tokenizer.decode(answer, skip_special_tokens=True).strip()
    assert features["p/text"][3] == features["p/text"][0]


def test_an_answer_across_the_line_stays_on_its_prompts_side(directory: Path, clips: list[Clip]) -> None:
    short, _ = lengths(directory, clips[0])
    model = load(directory, {"p": dataclasses.replace(SHORT, max_new_tokens=6)})
    rotary = model._base.get_decoder().rotary_emb
    answers = []
    for rotary.original_length in (4096, short + 2, short - 1):
        answers.append(extract(model, clips)["p/text"])
    assert answers[0] == answers[1] != answers[2]


def test_covers_and_titles(directory: Path, make_clip: Any) -> None:
    """A cover is one picture of up to 16 tiles."""
    covers = [make_clip(90, 160, num_frames=1, seed=7), make_clip(160, 90, num_frames=1, seed=8)]
    prompt = Prompt("The title is {title}.", input="cover")
    model = load(directory, {"p": prompt})
    items = [Item(str(k), None, cover, {"title": f"cake {k} <|image|>"}) for k, cover in enumerate(covers)]
    batches = model.prepare(items)
    features = model.extract(batches)
    processor = plain.Processor(directory)
    for row, cover in enumerate(covers):
        text = f"<|user|>\n<|image|>\nThe title is cake {row}  .<|end|>\n<|assistant|>\n"
        inputs = processor([text], images=[cover.frames[0]])
        assert inputs["pixel_values_videos"][0][0][0].shape[0] == 1 + 15
        with torch.inference_mode():
            state = plain.Model(directory)(**inputs).hidden_states[-1]
        torch.testing.assert_close(features["p/llm.4/last_token"][row], state[0, -1], rtol=1e-4, atol=1e-5)


def test_every_piece_of_text_has_its_own_beginning(directory: Path) -> None:
    words = plain.Processor(directory).tokenizer
    tokenizer = processor_file.PiecewiseTokenizer(words)
    begin, picture, line = words.bos_token_id, words.convert_tokens_to_ids("<|image|>"), words("\n")["input_ids"]
    text = "<|user|>\n<|image|><|image|>\n<|image|>\nWhat?"
    (ids,) = tokenizer([text])["input_ids"]
    start, end = words("<|user|>\n")["input_ids"], words("\nWhat?")["input_ids"]
    assert ids == [begin, *start, picture, picture, begin, *line, picture, begin, *end]
    assert tokenizer([f"{text}<|image|>"])["input_ids"][0][-2:] == [picture, begin]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("model.vision_embed_tokens.sub_GN"), "lacks weights: 1, first .*sub_GN"),
        (lambda w: w.pop("model.layers.2.mlp.down_proj.weight"), "lacks weights: 1, first .*layers.2.mlp"),
        (lambda w: w.update({"model.extra": torch.zeros(1)}), "unknown weights: 1, first model.extra"),
        (
            lambda w: w.update({"model.norm.weight": torch.zeros(3)}),
            r"misshapen weights: 1, first model.norm.weight \[3\]",
        ),
    ],
)
def test_weights_that_do_not_fit_are_named(directory: Path, change: Any, message: str) -> None:
    weights = load_file(directory / "model.safetensors")
    change(weights)
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=message):
        load(directory, {"p": SHORT})


def test_what_no_state_depends_on_is_not_read(directory: Path, clips: list[Clip]) -> None:
    expected = extract(load(directory, {"p": SHORT}), clips)
    weights = load_file(directory / "model.safetensors")
    vision = "model.vision_embed_tokens."
    unread = [name for name in weights if (".layers.3." in name and vision in name) or "post_layernorm" in name]
    assert len(unread) == 18
    for name in [*unread, "lm_head.weight"]:
        del weights[name]
    weights[f"{vision}wte.weight"] = torch.zeros(3)
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    features = extract(load(directory, {"p": SHORT}), clips)
    assert all(torch.equal(features[name], expected[name]) for name in expected)


def test_weights_in_several_files(directory: Path, clips: list[Clip]) -> None:
    expected = extract(load(directory, {"p": SHORT}), clips)
    weights = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    files = [f"model-0000{k + 1}-of-00002.safetensors" for k in range(2)]
    where = {name: files["vision" in name] for name in weights}
    for file in files:
        save_file({n: w for n, w in weights.items() if where[n] == file}, directory / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": where}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    features = extract(load(directory, {"p": SHORT}), clips)
    assert all(torch.equal(features[name], expected[name]) for name in expected)


@pytest.mark.parametrize("key", ["rope_scaling", "img_processor", "original_max_position_embeddings"])
def test_a_configuration_without_a_value_is_refused(directory: Path, key: str) -> None:
    tree = json.loads((directory / "config.json").read_text())
    del tree[key]
    (directory / "config.json").write_text(json.dumps(tree))
    with pytest.raises(ConfigError, match=f"config.json: KeyError: '{key}'"):
        load(directory, {"p": SHORT})


def test_a_tokenizer_without_pictures_is_refused(directory: Path) -> None:
    text = (directory / "tokenizer.json").read_text()
    (directory / "tokenizer.json").write_text(text.replace("<|image|>", "<|other|>"))
    with pytest.raises(ConfigError, match=r"its tokenizer lacks <\|image\|>"):
        load(directory, {"p": SHORT})
