"""Code in a model's own repository: off, and where it is asked for, pinned and out of the driver."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import sys
from pathlib import Path
from subprocess import run

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from lvlmrec import storage
from lvlmrec.config import load
from lvlmrec.errors import ConfigError
from lvlmrec.extraction import pipeline
from lvlmrec.extraction.settings import ExtractConfig
from lvlmrec.features import recipe_config as recipes
from lvlmrec.features import store
from lvlmrec.features.recipe_config import RecipeConfig
from lvlmrec.lvlms import LVLMS, LVLMConfig
from lvlmrec.lvlms.protocol import Item
from lvlmrec.media.sampling import sample_clip
from tests.videos import write_video

pytestmark = pytest.mark.thorough

COMMIT = "0123456789abcdef0123456789abcdef01234567"
CODE = """
from transformers import LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration


class OwnConfig(LlavaOnevisionConfig):
    model_type = "own_lvlm"


class OwnModel(LlavaOnevisionForConditionalGeneration):
    config_class = OwnConfig
"""
AUTO_MAP = {"AutoConfig": "own_code.OwnConfig", "AutoModelForImageTextToText": "own_code.OwnModel"}


@pytest.fixture(autouse=True)
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where transformers copies code before it imports it."""
    from transformers import dynamic_module_utils

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    return tmp_path / "modules"


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A tiny LLaVA-OneVision under a name that transformers does not know, with code of its own."""
    from transformers import AutoModelForImageTextToText

    directory = tmp_path / "own_lvlm"
    LVLMS["llava_onevision"].write_tiny(directory, seed=0)
    model = AutoModelForImageTextToText.from_pretrained(directory)
    weights = directory / "model.safetensors"  # under the names in the code: those of old files go by the model's type
    save_file({name: weight.clone() for name, weight in model.state_dict().items()}, weights, {"format": "pt"})
    change(directory, model_type="own_lvlm", architectures=["OwnModel"], auto_map=AUTO_MAP)
    (directory / "own_code.py").write_text(CODE)
    return directory


def change(directory: Path, **values: object) -> None:
    tree = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(tree | values))


def make_config(model: Path | str, **changes: object) -> LVLMConfig:
    changes = {"name": "auto", "trust_remote_code": True, "device": "cpu"} | changes
    return dataclasses.replace(LVLMConfig(), model=str(model), **changes)


def test_code_is_off(own: Path, modules: Path) -> None:
    with pytest.raises(ConfigError, match=r"own_lvlm'.* is not run unless lvlm\.trust_remote_code=true"):
        LVLMS["auto"].inspect(make_config(own, trust_remote_code=False))
    assert not modules.exists()


@pytest.mark.parametrize("revision", ["", "main", COMMIT[:12], COMMIT.upper()])
def test_a_hub_id_needs_its_commit(revision: str) -> None:
    with pytest.raises(ConfigError, match=r"lvlm\.revision: .* expected its commit, 40 hexadecimal digits"):
        LVLMS["auto"].inspect(make_config("acme/own", revision=revision))


def test_only_auto_runs_code(own: Path) -> None:
    config = load(ExtractConfig, [], [f"lvlm.model={own}", "lvlm.name=llava_onevision", "lvlm.trust_remote_code=true"])
    with pytest.raises(ConfigError, match=r"lvlm\.trust_remote_code: lvlm\.name=llava_onevision runs no code"):
        pipeline.plan(config)


def test_code_in_another_repository_is_refused(own: Path, modules: Path) -> None:
    change(own, auto_map=AUTO_MAP | {"AutoConfig": "acme/elsewhere--own_code.OwnConfig"})
    with pytest.raises(ConfigError, match=r"config\.json names code in another repository, 'acme/elsewhere'"):
        LVLMS["auto"].inspect(make_config(own))
    assert not modules.exists()


def test_what_the_adapter_cannot_serve_is_said(own: Path) -> None:
    change(own, auto_map={"AutoConfig": "own_code.OwnConfig", "AutoModel": "own_code.OwnModel"})
    with pytest.raises(ConfigError, match=r"lvlm\.name=auto cannot serve a own_lvlm model: Unrecognized configuration"):
        LVLMS["auto"].inspect(make_config(own))


def test_code_is_part_of_the_identity(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    info = LVLMS["auto"].inspect(make_config(own))
    assert (info.family, info.num_layers, info.width) == ("own_lvlm", {"llm": 6}, {"llm": 128})
    assert "own_lvlm: llm 6 x 128; the generic adapter, not verified for it" in capsys.readouterr().err
    (own / "own_code.py").write_text(CODE + "# changed\n")
    assert LVLMS["auto"].inspect(make_config(own)).identity != info.identity


def test_a_named_family_never_runs_code(tmp_path: Path, modules: Path) -> None:
    directory = tmp_path / "minicpm"
    LVLMS["minicpm_v_4_5"].write_tiny(directory, seed=0)
    change(directory, auto_map=AUTO_MAP)
    assert LVLMS["auto"].inspect(make_config(directory)).family == "minicpm_v_4_5"
    assert not modules.exists()


def test_the_commit_alone_is_read(own: Path, tmp_path: Path) -> None:
    """A hub cache whose `main` holds other code, which fails when it is imported."""
    repository, other = tmp_path / "hub" / "models--acme--own", COMMIT[::-1]
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(other)
    for commit in (COMMIT, other):
        shutil.copytree(own, repository / "snapshots" / commit)
    (repository / "snapshots" / other / "own_code.py").write_text("raise RuntimeError('code of main')\n")
    program = (
        "import dataclasses, sys\n"
        "from lvlmrec.features import recipe_config\n"
        "from lvlmrec.lvlms import LVLMS, LVLMConfig\n"
        "config = dataclasses.replace(LVLMConfig(), name='auto', model='acme/own', revision=sys.argv[1],\n"
        "                             trust_remote_code=True, device='cpu')\n"
        "info = LVLMS['auto'].inspect(config)\n"
        "LVLMS['auto'].load(config, recipe_config.resolve_source(recipe_config.RecipeConfig(taps=['llm.1']), info))\n"
        "print(info.identity)\n"
    )
    places = {"HF_HOME": str(tmp_path), "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    ended = [
        run([sys.executable, "-c", program, commit], capture_output=True, text=True, env=os.environ | places)
        for commit in (COMMIT, other)
    ]
    assert ended[0].stdout.split() == [f"acme/own@{COMMIT}"], ended[0].stderr[-2000:]
    assert "code of main" in ended[1].stderr


@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
def test_videos_to_features_by_a_models_own_code(own: Path, tmp_path: Path, modules: Path) -> None:
    (tmp_path / "videos").mkdir()
    for number in range(3):
        write_video(tmp_path / "videos" / f"v{number}.mp4", num_frames=30, size=(96, 64))
    overrides = [
        f"workspace={tmp_path}",
        f"input={tmp_path / 'videos'}",
        f"lvlm.model={own}",
        "lvlm.name=auto",
        "lvlm.trust_remote_code=true",
        f"lvlm.environment={{env_vars: {{HF_MODULES_CACHE: {modules}}}}}",
        "recipe.taps=[llm.1,llm.-1]",
        "recipe.dtype=float32",
        "estimate.videos=0",
    ]
    config = load(ExtractConfig, [], overrides)
    before = {name for name in sys.modules if name.startswith("transformers_modules")}
    with pytest.raises(ConfigError, match=r"another repository, 'acme/elsewhere'"):
        change(own, auto_map=AUTO_MAP | {"AutoConfig": "acme/elsewhere--own_code.OwnConfig"})
        pipeline.plan(config)
    change(own, auto_map=AUTO_MAP | {"AutoModelForImageTextToText": "own_code.Nothing"})
    with pytest.raises(ConfigError, match=r"own_lvlm model: .*Nothing"):  # raised by the worker
        pipeline.plan(config)
    change(own, auto_map=AUTO_MAP)
    plan = pipeline.plan(config)
    result = pipeline.run(plan, lambda metrics, step: None)
    assert (result["written"], result["rejected"]) == (3, 0)
    assert {name for name in sys.modules if name.startswith("transformers_modules")} == before
    assert (modules / "transformers_modules").is_dir()

    LVLMS["llava_onevision"].write_tiny(tmp_path / "named", seed=0)
    named = make_config(tmp_path / "named", name="llava_onevision", trust_remote_code=False)
    wanted = RecipeConfig(taps=["llm.1", "llm.-1"], dtype="float32")
    model = LVLMS["llava_onevision"].load(
        named, recipes.resolve_source(wanted, LVLMS["llava_onevision"].inspect(named))
    )
    index = store.read(plan.feature_set).index
    for entry in index.to_pylist():
        path = tmp_path / "videos" / f"{entry['item_id']}.mp4"
        clip = sample_clip(path, config.recipe.frames, config.recipe.frame_max_side)
        row = storage.read_table(f"{plan.feature_set}/parts/{entry['part']}").slice(entry["row"], 1).to_pylist()[0]
        with torch.inference_mode():
            features = model.extract(model.prepare([Item(entry["item_id"], clip)]))
        for name, values in features.items():
            np.testing.assert_allclose(row[name], values[0].numpy(), rtol=0, atol=1e-5)
