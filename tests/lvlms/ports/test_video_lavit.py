"""Video-LaVIT's adapter, on a stand-in of its authors' interface. Neither their code nor their weights run here."""

from __future__ import annotations

import dataclasses
import sys
import sysconfig
import venv
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lvlmrec import storage
from lvlmrec.config import load
from lvlmrec.errors import ConfigError, InputError
from lvlmrec.extraction import pipeline
from lvlmrec.extraction.settings import ExtractConfig
from lvlmrec.features import recipe_config as recipes
from lvlmrec.features import store
from lvlmrec.features.model_recipe import ModelRecipe, Prompt
from lvlmrec.features.recipe import Recipe, make
from lvlmrec.features.recipe_config import RecipeConfig
from lvlmrec.lvlms import LVLM, LVLMS, LVLMConfig
from lvlmrec.lvlms.engine.generation import seed_of
from lvlmrec.lvlms.files import authors_code
from lvlmrec.lvlms.ports import video_lavit_model
from lvlmrec.lvlms.ports.video_lavit import POOLINGS
from lvlmrec.lvlms.protocol import Item
from lvlmrec.media.motion import ENCODER, MotionClips, motion_clips, normalise_keyframes
from tests.lvlms.ports.video_lavit_stand_in import LAYERS, REQUIRED, WIDTH, write_code, write_weights
from tests.videos import write_video

pytestmark = pytest.mark.thorough

FAMILY = LVLMS["video_lavit"]
PROMPTS = {"describe": Prompt("Describe this video."), "title": Prompt("It is called {title}. What is shown?")}
OWN_MODULES = ("models", "utils", "conversation")


@pytest.fixture(autouse=True)
def clean_imports(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The stand-in's modules leave with the test: in production they live in an actor of their own."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield
    for name in [name for name in sys.modules if name.split(".")[0] in OWN_MODULES]:
        del sys.modules[name]


@pytest.fixture(scope="module")
def code(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_code(tmp_path_factory.mktemp("code") / "LaVIT")


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_weights(tmp_path_factory.mktemp("models") / "language_model_sft")


@pytest.fixture
def config(code: Path, weights: Path) -> LVLMConfig:
    return LVLMConfig(
        name="video_lavit",
        model=str(weights),
        code=str(code),
        dtype="bfloat16",
        attention="eager",
        batch_size=1,
        device="cpu",
    )


def random_item(seed: int, num_clips: int = 2) -> Item:
    rng = np.random.default_rng(seed)
    clips = MotionClips(
        keyframes=rng.integers(0, 255, (num_clips, 224, 224, 3), dtype=np.uint8),
        motion=rng.normal(0, 1, (num_clips, 2, 24, 20, 36)).astype(np.float32),
        starts=np.arange(num_clips) * 12,
        num_frames=12 * num_clips + 24,
    )
    return Item(f"item{seed}", motion=clips, texts={"title": f"<video> number {seed}</s>"})


ITEMS = [random_item(0), random_item(1, 3), random_item(2, 1)]


def ready(config: LVLMConfig, taps: tuple[str, ...] = ("llm.*",), seed: int = 0) -> tuple[LVLM, ModelRecipe]:
    wanted = RecipeConfig(frames=16, taps=[*taps], prompts=PROMPTS, poolings=[*POOLINGS])
    recipe = recipes.resolve_source(wanted, FAMILY.inspect(config), seed)
    return FAMILY.load(config, recipe), recipe


def extract(lvlm: LVLM, items: list[Item]) -> dict[str, Any]:
    return lvlm.extract(lvlm.prepare(items))


@torch.inference_mode()
def reference(config: LVLMConfig, item: Item, name: str, seed: int) -> tuple[list[torch.Tensor], slice]:
    """Every hidden state by a plain forward of the whole model, and where the video stands in it."""
    import models  # type: ignore[import-not-found]

    runner = models.build_model(model_path=config.model, model_dtype="bf16", device_id="cpu")
    words = f"number {item.item_id[-1]}"
    question = {"describe": "Describe this video.", "title": f"It is called   {words} . What is shown?"}[name]
    before, behind = (
        "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
        "detailed, and polite answers to the user's questions. USER: ",
        f"\n{question} ASSISTANT:",
    )
    head, tail = runner.tokenizer(before).input_ids, runner.tokenizer(behind).input_ids[1:]
    ids = torch.tensor([[*head, -201, *tail]])
    assert item.motion is not None
    seen = (torch.from_numpy(normalise_keyframes(item.motion.keyframes)), torch.from_numpy(item.motion.motion))
    torch.manual_seed(seed_of(seed, "", item.item_id))
    states = runner.model(
        input_ids=ids,
        images=[(seen, "video")],
        attention_mask=torch.ones_like(ids, dtype=torch.bool),
        output_hidden_states=True,
    ).hidden_states
    return [state[0].float() for state in states], slice(len(head), states[0].shape[1] - len(tail))


@pytest.mark.parametrize("taps", [("llm.*",), ("llm.1", "llm.2"), ("llm.0",), ("projector", "llm.3")])
def test_features_are_the_hidden_states_of_a_plain_forward_bit_for_bit(
    config: LVLMConfig, taps: tuple[str, ...]
) -> None:
    lvlm, recipe = ready(config, taps, seed=7)
    features = extract(lvlm, ITEMS)
    assert list(features) == [str(name) for name in recipe.feature_names]
    for row, item in enumerate(ITEMS):
        for prompt in PROMPTS:
            states, video = reference(config, item, prompt, seed=7)
            assert len(states) == LAYERS + 1
            expected = {
                f"{prompt}/llm.{layer}/{pooling}": value
                for layer, state in enumerate(states)
                for pooling, value in zip(
                    POOLINGS, (state[video].mean(dim=0), state.mean(dim=0), state[-1]), strict=True
                )
            }
            expected["video/projector/visual_mean"] = states[0][video].mean(dim=0)
            for name in recipe.feature_names:
                if name.prompt in (prompt, "video"):
                    value = features[str(name)][row]
                    assert value.shape == (WIDTH,)
                    if name.pooling == "last_token":
                        assert torch.equal(value, expected[str(name)])
                    torch.testing.assert_close(value, expected[str(name)], rtol=0, atol=1e-5)  # order of the sum


def test_an_items_features_are_its_own_and_the_seeds(config: LVLMConfig) -> None:
    lvlm, _ = ready(config)
    alone = [extract(lvlm, [item]) for item in ITEMS]
    together = extract(lvlm, [ITEMS[2], ITEMS[0], ITEMS[1]])
    again = extract(ready(config)[0], [ITEMS[1]])
    other = extract(ready(config, seed=1)[0], ITEMS)
    for name, values in together.items():
        for place, row in enumerate((2, 0, 1)):
            assert torch.equal(values[place], alone[row][name][0])
        assert torch.equal(again[name], alone[1][name])
        if not name.endswith("llm.0/last_token"):  # a token of the prompt: it has seen nothing yet
            assert not torch.equal(other[name][0], alone[0][name][0]), name
    before = torch.random.get_rng_state()
    extract(lvlm, ITEMS[:1])
    assert torch.equal(before, torch.random.get_rng_state())


def test_what_decides_a_feature_is_in_the_recipe(config: LVLMConfig, tmp_path: Path) -> None:
    _, recipe = ready(config)
    assert (recipe.video_form, recipe.video_encoder, recipe.frame_max_side) == ("motion", ENCODER, 0)
    assert Recipe.from_json(make(recipe, "float16").to_json()).source == recipe
    other = dataclasses.replace(recipe, video_encoder="libavcodec 1.0.0 mpeg4")
    assert len({make(each, "float16").fingerprint for each in (recipe, other, ready(config, seed=1)[1])}) == 3
    changed = write_code(tmp_path / "LaVIT")
    assert FAMILY.inspect(dataclasses.replace(config, code=str(changed))).identity == recipe.identity
    (changed / "VideoLaVIT" / "utils.py").write_text("MARKS = {'image': (110, 101), 'motion': (102, 103)}\n")
    assert FAMILY.inspect(dataclasses.replace(config, code=str(changed))).identity != recipe.identity
    with pytest.raises(ConfigError, match=r"lvlm\.model: .*the recipe names content:0"):
        FAMILY.load(config, dataclasses.replace(recipe, identity="content:0"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"code": ""}, r"lvlm\.code: empty; video_lavit needs its authors' repository"),
        ({"code": "/nowhere"}, r"lvlm\.code: '/nowhere': .*no such folder"),
        ({"code": str(Path(__file__).parent)}, r"lvlm\.code: .*no models/modeling_video_lavit_hf\.py in it"),
        ({"code": "https://example.org/LaVIT/main.zip"}, r"lvlm\.code: .*no commit of 40 hexadecimal digits"),
        ({"model": "/nowhere"}, r"lvlm\.model: '/nowhere': no such directory; .*language_model_sft"),
        ({"model": str(Path(__file__).parent)}, r"lvlm\.model: .*no num_hidden_layers in its config\.json"),
        ({"dtype": "float32"}, r"lvlm\.dtype: 'float32': the code of video_lavit runs bfloat16 or float16 only"),
        ({"attention": "sdpa"}, r"lvlm\.attention: 'sdpa'.*eager only"),
        ({"batch_size": 4}, r"lvlm\.batch_size: 4.*1 only"),
        ({"compile": True}, r"lvlm\.compile: True"),
    ],
)
def test_what_the_family_needs_and_lacks_is_named(config: LVLMConfig, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        FAMILY.inspect(dataclasses.replace(config, **changes))


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (Prompt(place="before"), r"prompts\.p\.place: 'before': video_lavit reads a prompt after the video"),
        (Prompt(input="cover"), r"prompts\.p\.input: 'cover': video_lavit reads video"),
        (Prompt("Say.", input="text"), r"prompts\.p\.input: 'text': video_lavit reads video"),
        (Prompt(max_new_tokens=5), r"prompts\.p\.max_new_tokens: 5: video_lavit generates no text"),
    ],
)
def test_prompts_that_it_does_not_read_are_refused(config: LVLMConfig, prompt: Prompt, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        recipes.resolve_source(RecipeConfig(prompts={"p": prompt}, poolings=["all_mean"]), FAMILY.inspect(config))


def test_poolings_and_marks_that_it_does_not_have_are_refused(config: LVLMConfig) -> None:
    info = FAMILY.inspect(config)
    for pooling in ("new_mean", "merged_4", "eos"):
        with pytest.raises(ConfigError, match=rf"recipe\.poolings: '{pooling}' is not one of visual_mean, all_mean"):
            recipes.resolve_source(RecipeConfig(poolings=[pooling]), info)
    recipe = recipes.resolve_source(RecipeConfig(prompts={"p": Prompt("Watch <video>.")}), info)
    with pytest.raises(ConfigError, match=r"recipe\.prompts\.p\.text: .* holds <video> or <image>"):
        FAMILY.load(config, recipe)
    with pytest.raises(ConfigError, match=r"lvlm\.code: 'somewhere': qwen2_vl runs no code of its authors"):
        authors_code.of(LVLMConfig(name="qwen2_vl", code="somewhere"))


def test_items_without_motion_or_too_long_are_named(config: LVLMConfig, tmp_path: Path) -> None:
    lvlm, _ = ready(config)
    with pytest.raises(InputError, match=r"item 'bare' has no motion"):
        lvlm.prepare([Item("bare")])
    short = write_weights(tmp_path / "short", tokenizer_model_max_length=200)
    lvlm, _ = ready(dataclasses.replace(config, model=str(short)))
    with pytest.raises(InputError, match=r"item 'item1': the model reads 200 tokens, cut at 200: lower recipe\.frames"):
        extract(lvlm, [ITEMS[1]])


def test_the_code_comes_from_a_zip_by_commit(config: LVLMConfig, code: Path, bucket: str, tmp_path: Path) -> None:
    commit = "8cde9b4" + 33 * "0"
    with zipfile.ZipFile(tmp_path / "code.zip", "w") as archive:
        for path in code.rglob("*.py"):
            archive.write(path, f"LaVIT-{commit}/{path.relative_to(code)}")
    url = f"{bucket}/LaVIT/archive/{commit}.zip"
    storage.write_bytes(url, (tmp_path / "code.zip").read_bytes())
    expected = extract(ready(config)[0], ITEMS[:1])
    for name in [name for name in sys.modules if name.split(".")[0] in OWN_MODULES]:
        del sys.modules[name]
    features = extract(ready(dataclasses.replace(config, code=url))[0], ITEMS[:1])
    assert all(torch.equal(features[name], value) for name, value in expected.items())
    with zipfile.ZipFile(tmp_path / "sly.zip", "w") as archive:
        archive.writestr("../models/__init__.py", "")
    storage.write_bytes(f"{bucket}/{commit}.zip", (tmp_path / "sly.zip").read_bytes())
    with pytest.raises(ConfigError, match=r"lvlm\.code: .*leads out of the zip"):
        authors_code.of(dataclasses.replace(config, code=f"{bucket}/{commit}.zip"))


def test_code_that_cannot_be_imported_is_named(config: LVLMConfig, tmp_path: Path) -> None:
    lacking = dataclasses.replace(config, code=str(write_code(tmp_path / "a", requires=REQUIRED)))
    with pytest.raises(ConfigError, match=rf"lvlm\.code: importing 'models': .*{REQUIRED}.*lvlm\.environment"):
        ready(lacking)
    first = ready(config)
    assert first
    with pytest.raises(ConfigError, match=r"lvlm\.code: this process already holds another module 'models'"):
        ready(dataclasses.replace(config, code=str(write_code(tmp_path / "b", requires="json"))))


def test_the_families_that_run_code_are_in_the_table() -> None:
    assert {*authors_code.FAMILIES} <= {*LVLMS}
    with pytest.raises(ConfigError, match=r"lvlm\.model: of video_lavit there is no tiny model"):
        FAMILY.write_tiny(Path("unused"), 0)


def test_an_environment_that_ray_does_not_know_is_named(tmp_path: Path, code: Path, weights: Path) -> None:
    def plan(*overrides: str) -> pipeline.Plan:
        shared = [f"workspace={tmp_path}", f"input={tmp_path}", f"lvlm.model={weights}", f"lvlm.code={code}"]
        return pipeline.plan(load(ExtractConfig, ["lvlm/video_lavit.yaml"], [*shared, *overrides]))

    write_video(tmp_path / "a.mp4")
    assert plan().config.lvlm.environment["pip"]["pip_check"] is False
    with pytest.raises(ConfigError, match=r"lvlm\.environment: unknown pipp; Ray's runtime_env has .*pip, "):
        plan("lvlm.environment={pipp: [torch]}")
    with pytest.raises(ConfigError, match=r"lvlm\.environment: .*image_uri"):
        plan("lvlm.environment={image_uri: image, pip: [torch]}")


def make_environment(folder: Path) -> Path:
    """The Python of a virtual environment that holds all of this one's, and a library of its own."""
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    site = folder / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
    (site / "shared.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    (site / f"{REQUIRED}.py").write_text("")
    return python


@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
def test_videos_to_features_in_an_environment_of_the_models_own(
    tmp_path: Path, weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, python = write_code(tmp_path / "LaVIT", requires=REQUIRED), make_environment(tmp_path / "environment")
    videos = tmp_path / "videos"
    videos.mkdir()
    for number, num_frames in enumerate((60, 150, 420)):
        write_video(videos / f"v{number}.mp4", num_frames=num_frames, size=(96, 64))
    (videos / "noise.mp4").write_bytes(np.random.default_rng(0).bytes(5000))
    overrides = [
        f"workspace={tmp_path}",
        f"input={videos}",
        f"lvlm.model={weights}",
        f"lvlm.code={code}",
        f"lvlm.environment={{py_executable: {python}}}",
        "lvlm.device=cpu",
        "recipe.taps=[llm.0,llm.-1]",
        "recipe.dtype=float32",
        "estimate.videos=0",
    ]
    config = load(ExtractConfig, ["lvlm/video_lavit.yaml"], overrides)
    plan = pipeline.plan(config)
    assert {"models/__init__.py", "conversation.py"} < {*plan.code}
    result = pipeline.run(plan, lambda metrics, step: None)
    assert (result["written"], result["rejected"]) == (3, 1)
    assert store.read_rejected(plan.feature_set)["item_id"].to_pylist() == ["noise"]
    assert not {*OWN_MODULES} & {*sys.modules}

    monkeypatch.setitem(sys.modules, REQUIRED, type(sys)(REQUIRED))
    lvlm = video_lavit_model.load(config.lvlm, plan.recipe.reading, FAMILY.inspect(config.lvlm))
    index = store.read(plan.feature_set).index.to_pandas()
    for number, num_clips in enumerate((1, 1, 3)):
        item = Item(f"v{number}", motion=motion_clips(videos / f"v{number}.mp4", config.recipe.frames))
        entry = index[index["item_id"] == item.item_id].iloc[0]
        table = storage.read_table(f"{plan.feature_set}/parts/{entry['part']}")
        row = table.slice(entry["row"], 1).to_pylist()[0]
        assert row["num_distinct_frames"] == num_clips
        for name, values in extract(lvlm, [item]).items():
            np.testing.assert_allclose(row[name], values[0].numpy(), rtol=0, atol=1e-6)
