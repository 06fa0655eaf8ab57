"""`lvlm.name=auto` on the tiny models: found by their files alone."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from lvlmrec.errors import ConfigError
from lvlmrec.features import recipe_config as recipes
from lvlmrec.features.recipe_config import RecipeConfig
from lvlmrec.lvlms import LVLMS, LVLMConfig
from lvlmrec.lvlms.families.auto import AutoFamily
from lvlmrec.lvlms.families.family import NativeFamily
from lvlmrec.lvlms.protocol import Item, LVLMFamily
from lvlmrec.media.sampling import Clip

pytestmark = pytest.mark.thorough

NATIVE = sorted(name for name, family in LVLMS.items() if isinstance(family, NativeFamily))
STRANGER = AutoFamily({})  # it has no family to choose from, and looks at every model


def make_config(directory: Path) -> LVLMConfig:
    return dataclasses.replace(LVLMConfig(), name="auto", model=str(directory), device="cpu")


def features_of(family: LVLMFamily, directory: Path, clips: list[Clip]) -> dict[str, torch.Tensor]:
    config = make_config(directory)
    wanted = RecipeConfig(taps=["projector", "llm.1", "llm.-1"], poolings=["visual_mean", "last_token"])
    model = family.load(config, recipes.resolve_source(wanted, family.inspect(config)))
    return model.extract(model.prepare([Item(str(row), clip) for row, clip in enumerate(clips)]))  # type: ignore[return-value]


@pytest.mark.parametrize("family", NATIVE)
def test_what_is_found_by_looking_is_what_the_family_gives(tiny_models, clips, family, capsys) -> None:
    if LVLMS[family].video_options:  # type: ignore[attr-defined]
        clips = clips[2:] * 2  # options of the video processor that a family knows decide the size of others
    named = features_of(LVLMS["auto"], tiny_models[family], clips)
    assert "served as such" in capsys.readouterr().err
    found = features_of(STRANGER, tiny_models[family], clips)
    assert "the generic adapter, not verified for it" in capsys.readouterr().err
    assert [*found] == [*named]
    for name, feature in named.items():
        assert torch.equal(found[name], feature), name


@pytest.mark.parametrize("family", ["auto", "qwen2_vl"])
def test_no_model_is_none_to_be_found(family: str) -> None:
    with pytest.raises(ConfigError, match=r"^lvlm\.model is empty; expected a local directory or a hub id"):
        LVLMS[family].inspect(LVLMConfig(name=family, model=""))


def test_what_cannot_be_served_is_said(tiny_models, tmp_path: Path) -> None:
    from transformers import BertConfig

    BertConfig(num_hidden_layers=1, hidden_size=32).save_pretrained(tmp_path / "bert")
    with pytest.raises(ConfigError, match=r"lvlm\.name=auto cannot serve a bert model: "):
        STRANGER.inspect(make_config(tmp_path / "bert"))
    assert LVLMS["auto"].inspect(make_config(tmp_path / "bert")).family == "text_encoder"
    assert LVLMS["auto"].inspect(make_config(tiny_models["minicpm_v_4_5"])).family == "minicpm_v_4_5"
    with pytest.raises(ConfigError, match=r"minicpmv"):
        STRANGER.inspect(make_config(tiny_models["minicpm_v_4_5"]))
    tree = json.loads((tiny_models["internvl"] / "config.json").read_text())
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "config.json").write_text(json.dumps(tree | {"model_type": "something_new"}))
    with pytest.raises(ConfigError, match=r"something_new"):
        LVLMS["auto"].inspect(make_config(tmp_path / "odd"))


def test_vision_taps_of_a_stranger_are_refused(tiny_models) -> None:
    info = STRANGER.inspect(make_config(tiny_models["llava_onevision"]))
    with pytest.raises(ConfigError, match=r"tap 'vision\.-1': this model has no such tower; towers: llm"):
        recipes.resolve_source(RecipeConfig(taps=["vision.-1"]), info)
