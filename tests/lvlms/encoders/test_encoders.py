"""What every encoder of text, images or videos in `LVLMS` must hold, against transformers itself."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lvlmrec.errors import ConfigError, InputError
from lvlmrec.features import recipe_config as recipes
from lvlmrec.features.model_recipe import ModelRecipe, Prompt
from lvlmrec.features.poolings import find
from lvlmrec.features.recipe_config import LVLMInfo, RecipeConfig
from lvlmrec.lvlms import LVLM, LVLMS, LVLMConfig, tiny
from lvlmrec.lvlms.encoders import text_encoder, text_model, vision_encoder, vision_model
from lvlmrec.lvlms.protocol import Item
from tests.lvlms.conftest import ENCODERS, gradient_clip

FRAMES = 8
NEIGHBOUR_TOLERANCE = {"float32": 2e-6, "bfloat16": 2e-2}  # as the LVLMs'
SIZES: dict[str, Any] = {"num_hidden_layers": 3, "hidden_size": 48, "intermediate_size": 96, "num_attention_heads": 4}
IMAGE: dict[str, Any] = {**SIZES, "image_size": 56, "patch_size": 14}
TITLES = (
    "The dog runs",
    "A person shows how to cook a quick meal at home, frame after frame, second after second",
    "music",
    "What is the main topic of the video? Answer in one word.",
)
# model_type -> class, arguments of its configuration; beside the tiny models of the families
TEXT_MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "mpnet": ("MPNetConfig", SIZES),
    "xlm-roberta": ("XLMRobertaConfig", {**SIZES, "max_position_embeddings": 40}),
    "modernbert": ("ModernBertConfig", SIZES),
    "qwen3": ("Qwen3Config", {**SIZES, "num_key_value_heads": 2, "head_dim": 12}),
}
VISION_MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "clip": ("CLIPConfig", {"vision_config": IMAGE, "text_config": SIZES}),
    "dinov2": ("Dinov2Config", IMAGE),
    "dinov2_with_registers": ("Dinov2WithRegistersConfig", {**IMAGE, "num_register_tokens": 3}),
    "resnet": ("ResNetConfig", {"embedding_size": 8, "hidden_sizes": [16, 24, 40, 48], "depths": [2, 1, 1, 1]}),
    "siglip": ("SiglipConfig", {"vision_config": IMAGE, "text_config": SIZES}),
    "vit": ("ViTConfig", IMAGE),
    "timesformer": ("TimesformerConfig", {**IMAGE, "num_frames": FRAMES}),
    "vivit": ("VivitConfig", {**IMAGE, "num_frames": FRAMES, "tubelet_size": [2, 14, 14]}),
    "vjepa2": (
        "VJEPA2Config",
        {**IMAGE, "crop_size": 56, "pred_hidden_size": 48, "pred_num_attention_heads": 4, "pred_num_hidden_layers": 1},
    ),
}
SPECIAL_IDS = ("pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id")
CASES = [*ENCODERS, *TEXT_MODELS, *VISION_MODELS]
PROCESSORS = {"image": "CLIPImageProcessor", "timesformer": "TimesformerVideoProcessor"}
PROCESSORS |= {"vivit": "VivitVideoProcessor", "vjepa2": "VJEPA2VideoProcessor"}


def family_of(case: str) -> str:
    """The family that reads a case."""
    if case in TEXT_MODELS:
        return "text_encoder"
    if case in VISION_MODELS:
        return "image_encoder" if case in vision_encoder.IMAGE_MODELS else "video_encoder"
    return case if case in ENCODERS else "text_encoder"


@pytest.fixture(scope="session")
def directories(tiny_models, tmp_path_factory) -> dict[str, Path]:
    """Case -> directory of a tiny model."""
    import transformers

    root = tmp_path_factory.mktemp("encoders")
    for case, (name, arguments) in TEXT_MODELS.items():
        words = tiny.tokenizer({"cls_token": "[CLS]"})
        arguments = {**arguments, "vocab_size": len(words), **dict.fromkeys(SPECIAL_IDS, words.pad_token_id)}
        tiny.write(getattr(transformers, name)(**arguments), words, root / case, 0, "AutoModel")
    for case, (name, arguments) in VISION_MODELS.items():
        size, crop = {"shortest_edge": 56}, {"height": 56, "width": 56}
        processor = getattr(transformers, PROCESSORS.get(case, PROCESSORS["image"]))(size=size, crop_size=crop)
        tiny.write(getattr(transformers, name)(**arguments), processor, root / case, 0, "AutoModel")
    return {case: tiny_models.get(case, root / case) for case in CASES}


def make_config(directory: Path, case: str = "", **changes: object) -> LVLMConfig:
    name = family_of(case or directory.name)
    return dataclasses.replace(LVLMConfig(), name=name, model=str(directory), device="cpu", **changes)


def prompts_for(info: LVLMInfo) -> dict[str, Prompt]:
    if info.inputs == ("text",):
        return {"title": Prompt("{title}", input="text"), "asked": Prompt("A video: {title}", input="text")}
    return {kind + "_shown": Prompt("", input=kind) for kind in info.inputs}


@functools.cache
def load(directory: Path, taps: tuple[str, ...] = (), **changes: object) -> tuple[LVLM, ModelRecipe]:
    """A loaded model with all its poolings, of all taps unless named; shared by the tests that ask for the same one."""
    config = make_config(directory, **changes)
    entry = LVLMS[config.name]
    info = entry.inspect(config)
    taps = taps or tuple(f"{tower}.*" for tower in info.num_layers)
    wanted = RecipeConfig(frames=FRAMES, taps=[*taps], prompts=prompts_for(info), poolings=[*info.poolings])
    recipe = recipes.resolve_source(wanted, info)
    return entry.load(config, recipe), recipe


@functools.cache
def items() -> list[Item]:
    return [
        Item(str(i), gradient_clip(60 + 10 * i, 90, FRAMES, i), gradient_clip(80, 50 + 9 * i, 1, 9 + i), {"title": t})
        for i, t in enumerate(TITLES)
    ]


def extract(model: LVLM, shown: Sequence[Item]) -> dict[str, Any]:
    return model.extract(model.prepare(shown))


@functools.cache
def hugging_face(directory: Path) -> Any:
    from transformers import AutoModel

    model = AutoModel.from_pretrained(directory, dtype=torch.float32).eval()
    return getattr(model, "vision_model", model)


@torch.inference_mode()
def reference(directory: Path, model: Any, recipe: ModelRecipe) -> dict[str, Tensor]:
    """Every column from Hugging Face's own hidden states, over the batches that the model makes."""
    whole = hugging_face(directory)
    columns: dict[str, Tensor] = {}
    for batch in model.prepare(items()):
        if isinstance(batch, text_model.Batch):
            inputs: dict[str, Any] = {"input_ids": batch.ids, "attention_mask": batch.attended.long()}
        else:
            inputs = {whole.main_input_name: batch.pixels.flatten(0, 1) if reads_images(model) else batch.pixels}
        states = whole(**inputs, output_hidden_states=True).hidden_states
        ((tower, num_layers),) = model.info.num_layers.items()
        assert len(states) == num_layers + 1
        for layer, state in enumerate(states):
            for pooling in recipe.poolings:
                prefix, value = pool(model, batch, pooling, state)
                empty = torch.zeros(len(TITLES), value.shape[1])
                columns.setdefault(f"{prefix}/{tower}.{layer}/{pooling}", empty)[batch.rows] = value
    return columns


def pool(model: Any, batch: Any, pooling: str, state: Tensor) -> tuple[str, Tensor]:
    """A state of a batch as its columns have it, and their first name."""
    if isinstance(batch, text_model.Batch):
        return batch.prompt, find(pooling).pool(state, batch.attended)[0]
    return batch.kind, vision_model.pool_states([pooling], state, len(batch.rows), model._before_patches)[pooling]


def reads_images(model: LVLM) -> bool:
    return "cover" in model.info.inputs


@pytest.mark.parametrize("case", CASES)
def test_what_enters_a_model_is_what_its_own_processor_makes(directories, case) -> None:
    from PIL import Image
    from transformers import AutoImageProcessor, AutoTokenizer, AutoVideoProcessor

    model, directory = load(directories[case])[0], directories[case]
    for batch in model.prepare(items()):
        shown = [items()[row] for row in batch.rows]
        if isinstance(batch, text_model.Batch):
            texts = [("A video: " if batch.prompt == "asked" else "") + item.texts["title"] for item in shown]
            made = AutoTokenizer.from_pretrained(directory, padding_side="right")(
                texts, padding=True, return_tensors="pt"
            )
            assert torch.equal(batch.ids, made["input_ids"])
            assert torch.equal(batch.attended, made["attention_mask"].bool())
            continue
        clips = [getattr(item, batch.kind).frames for item in shown]
        if reads_images(model):
            images = [Image.fromarray(frame) for clip in clips for frame in clip]
            made = AutoImageProcessor.from_pretrained(directory)(images=images, return_tensors="pt")
        else:
            processor = AutoVideoProcessor.from_pretrained(directory)
            made = processor(videos=clips, do_sample_frames=False, return_tensors="pt")
        expected = next(iter(made.values()))
        torch.testing.assert_close(batch.pixels.reshape(expected.shape), expected)


@pytest.mark.parametrize(
    ("hidden", "before", "mean", "first"),
    [
        # two clips of two frames: a class token and two patches of width 1
        (torch.arange(12.0).reshape(4, 3, 1), 1, [3.0, 9.0], [1.5, 7.5]),
        # as maps of 1 x 2 pixels
        (torch.arange(8.0).reshape(4, 1, 1, 2), 0, [1.5, 5.5], [1.0, 5.0]),
    ],
)
def test_pooling_of_frames_by_hand(hidden, before, mean, first) -> None:
    pooled = vision_model.pool_states(("visual_mean", "first_token"), hidden, 2, before)
    assert pooled["visual_mean"].flatten().tolist() == mean
    assert pooled["first_token"].flatten().tolist() == first


def test_pooling_of_texts_by_hand() -> None:
    hidden, attended = torch.tensor([[[1.0], [3.0], [9.0]]]), torch.tensor([[True, True, False]])
    pooled = {pooling: float(*find(pooling).pool(hidden, attended)) for pooling in text_encoder.POOLINGS}
    assert pooled == {"all_mean": 2.0, "first_token": 1.0, "last_token": 3.0}


@pytest.mark.parametrize("case", CASES)
def test_features_are_hugging_face_hidden_states_bit_for_bit(directories, case) -> None:
    model, recipe = load(directories[case])
    features, expected = extract(model, items()), reference(directories[case], model, recipe)
    assert list(features) == [str(name) for name in recipe.feature_names]
    assert {*features} == {*expected}
    for name in recipe.feature_names:
        feature = features[str(name)]
        assert feature.shape[1:] == recipe.shapes[name]
        assert torch.equal(feature, expected[str(name)]), name
        blind = name.tap.layer == 0 or (case == "qwen3" and name.pooling == "first_token")  # causal: it sees no word
        assert blind or not torch.allclose(feature[0], feature[1], atol=1e-3), name


@pytest.mark.parametrize(
    ("case", "dtype"), [*((case, "float32") for case in CASES), *((case, "bfloat16") for case in ENCODERS)]
)
def test_features_do_not_depend_on_batch_neighbours_or_order(directories, monkeypatch, case, dtype) -> None:
    model, recipe = load(directories[case], dtype=dtype)
    alone = [extract(model, [item]) for item in items()]
    order = [2, 0, 3, 1]
    for batch_size in (1, 2, 16):
        monkeypatch.setattr(model, "batch_size", batch_size)
        together = extract(model, [items()[row] for row in order])
        for name in map(str, recipe.feature_names):
            for place, row in enumerate(order):
                tolerance = NEIGHBOUR_TOLERANCE[dtype] * float(alone[row][name].abs().max())
                assert float((together[name][place] - alone[row][name][0]).abs().max()) <= tolerance, (name, batch_size)


@pytest.mark.parametrize("case", CASES)
def test_stopping_early_changes_nothing(directories, case) -> None:
    whole, recipe = load(directories[case])
    features, tower = extract(whole, items()), recipe.taps[0].tower
    for layers in (("0",), ("0", "2"), ("-1",)):
        model, cut = load(directories[case], tuple(f"{tower}.{layer}" for layer in layers))
        held = [m for name, m in model._model.named_modules() if name.split(".")[-1] in ("layer", "layers", "stages")]  # type: ignore[attr-defined]
        assert len(held[0]) == max(cut.taps[-1].layer, 1)
        partial = extract(model, items())
        assert list(partial) == [str(name) for name in cut.feature_names]
        assert all(torch.equal(feature, features[name]) for name, feature in partial.items())


@pytest.mark.parametrize("case", ENCODERS)
def test_all_taps_and_poolings_take_one_forward(directories, case) -> None:
    config = make_config(directories[case], batch_size=16)
    entry = LVLMS[config.name]
    recipe = load(directories[case])[1]
    model: Any = entry.load(config, recipe)
    ran: list[int] = []
    model._model.register_forward_hook(lambda *_: ran.append(1))
    prepared = model.prepare(items())
    model.extract(prepared)
    assert len(ran) == len(prepared)
    if "text" in recipe.width:
        assert len(prepared) <= len(recipe.prompts) * len(TITLES)
    else:
        assert len(prepared) == len(recipe.media)


@pytest.mark.parametrize("case", ENCODERS)
def test_bfloat16_stays_near_float32(directories, case) -> None:
    exact = extract(load(directories[case])[0], items())
    for name, feature in extract(load(directories[case], dtype="bfloat16")[0], items()).items():
        assert feature.dtype == torch.float32
        assert float(torch.nn.functional.cosine_similarity(feature, exact[name]).min()) > 0.99, name


@pytest.mark.parametrize("case", ENCODERS)
def test_what_is_not_the_models_is_refused_by_name(directories, tiny_models, case) -> None:
    config = make_config(directories[case])
    entry = LVLMS[config.name]
    info, recipe = entry.inspect(config), load(directories[case])[1]
    assert "llm" not in info.num_layers
    plain = RecipeConfig(frames=FRAMES, taps=["llm.0"], prompts=prompts_for(info), poolings=[*info.poolings])
    with pytest.raises(ConfigError, match=r"tap 'llm\.0': this model has no such tower; towers: (text|vision)"):
        recipes.resolve_source(plain, info)
    with pytest.raises(ConfigError, match=r"lvlm\.model: .*the recipe names content:0"):
        entry.load(config, dataclasses.replace(recipe, identity="content:0"))
    for other in ({*ENCODERS} - {case}) | {"qwen2_vl"}:
        with pytest.raises(
            ConfigError, match=rf"lvlm\.model: .* model; lvlm\.name={case}: expected .*(bert|clip|text|videomae)"
        ):
            entry.inspect(dataclasses.replace(config, model=str(tiny_models[other])))


@pytest.mark.parametrize("case", ENCODERS)
def test_items_that_lack_what_is_shown_are_named(directories, case) -> None:
    model, _ = load(directories[case])
    with pytest.raises(InputError, match="item 'bare'"):
        model.prepare([*items(), Item("bare", texts={"title": "  "})])


def test_a_text_without_a_token_is_named(directories) -> None:
    from tokenizers.normalizers import Strip

    config, recipe = make_config(directories["qwen3"], "qwen3"), load(directories["qwen3"])[1]
    model: Any = LVLMS[config.name].load(config, recipe)
    model._tokenizer.backend_tokenizer.normalizer = Strip()
    with pytest.raises(InputError, match=r"item 'mark': its text has no token"):
        model.prepare([items()[0], Item("mark", texts={"title": "<|im_end|>"})])


def test_an_empty_prompt_of_text_is_refused(directories) -> None:
    info = LVLMS["text_encoder"].inspect(make_config(directories["text_encoder"]))
    config = RecipeConfig(taps=["text.0"], prompts={"title": Prompt("", input="text")}, poolings=["all_mean"])
    with pytest.raises(ConfigError, match=r"recipe\.prompts\.title\.text: empty"):
        recipes.resolve_source(config, info)


def test_a_video_model_reads_its_own_number_of_frames(directories) -> None:
    info = LVLMS["video_encoder"].inspect(make_config(directories["video_encoder"]))
    wanted = RecipeConfig(frames=5, taps=["vision.-1"], prompts=prompts_for(info))
    with pytest.raises(ConfigError, match=r"recipe\.frames: 5: this video_encoder reads exactly 8 frames"):
        recipes.resolve_source(wanted, info)
    info = LVLMS["video_encoder"].inspect(make_config(directories["vjepa2"]))
    with pytest.raises(ConfigError, match=r"recipe\.frames: 5: this video_encoder reads frames in groups of 2"):
        recipes.resolve_source(wanted, info)
    model, _ = load(directories["video_encoder"])
    with pytest.raises(InputError, match=r"item 'short': 3 frames, not 8"):
        model.prepare([Item("short", gradient_clip(60, 90, 3))])


def test_long_texts_are_cut_at_what_the_model_has_positions_for(directories, tmp_path, capsys) -> None:
    """XLM-R's positions begin behind its padding token."""
    model: Any = load(directories["xlm-roberta"])[0]
    long = Item("long", texts={"title": "the cat and the dog " * 40})
    features = extract(model, [long])
    assert "2 texts cut to " in capsys.readouterr().err
    assert all(bool(feature.isfinite().all()) for feature in features.values())
    assert max(batch.ids.shape[1] for batch in model.prepare([long])) == model.limit < 40
    assert load(directories["text_encoder"])[0].limit == 512  # type: ignore[attr-defined]


def test_special_tokens_in_a_title_are_no_tokens_of_the_model(directories) -> None:
    model: Any = load(directories["text_encoder"])[0]
    mark = model._tokenizer.sep_token_id
    (plain, sly) = (model.prepare([Item("x", texts={"title": title})]) for title in ("a cat", "a [SEP] cat"))
    assert [int((batch.ids == mark).sum()) for batch in (plain[0], sly[0])] == [1, 1]


def test_batches_are_of_like_length() -> None:
    lengths = [30, 5, 31, 100, 5, 29, 6, 98]
    batches = text_model.group(lengths, batch_size=2)
    assert sorted(row for batch in batches for row in batch) == [*range(8)]
    assert [[lengths[row] for row in batch] for batch in batches] == [[5, 5], [6], [29, 30], [31], [98, 100]]


def test_what_sentence_transformers_says_of_its_model(directories, tmp_path) -> None:
    import shutil

    directory = Path(shutil.copytree(directories["text_encoder"], tmp_path / "text_encoder"))
    assert text_encoder.describe(make_config(directory)) == ""
    kinds = {"Transformer": "", "Pooling": "1_Pooling", "Dense": "2_Dense"}
    modules = [{"type": f"sentence_transformers.models.{kind}", "path": path} for kind, path in kinds.items()]
    (directory / "modules.json").write_text(json.dumps(modules))
    (directory / "1_Pooling").mkdir()
    pooling = {"word_embedding_dimension": 48, "pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}
    (directory / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    expected = "its published embedding is text.-1/first_token before Dense"
    assert text_encoder.describe(make_config(directory)) == expected
    pooling |= {"pooling_mode_max_tokens": True}
    (directory / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    assert "pooled by cls_token, max_tokens, which no column is" in text_encoder.describe(make_config(directory))
    (directory / "1_Pooling" / "config.json").write_text('{"pooling_mode": "mean"}')
    assert "text.-1/all_mean" in text_encoder.describe(make_config(directory))
    (directory / "sentence_bert_config.json").write_text('{"max_seq_length": 7}')
    assert load(directory)[0].limit == 7  # type: ignore[attr-defined]
