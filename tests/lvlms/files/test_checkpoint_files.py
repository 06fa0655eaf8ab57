"""Published checkpoints: one file or many, layers left unread, and errors that name the tensor."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lvlmrec.errors import ConfigError
from lvlmrec.lvlms import LVLMConfig
from lvlmrec.lvlms.files import checkpoint_files, source, torchvision_shim

torchvision_shim.ensure_importable()

from lvlmrec.lvlms.ports.minicpm_v_model import MiniCPMV, build_config  # noqa: E402

LAYERS, HEAD = "llm.model.layers", r"llm\.lm_head\."


pytestmark = pytest.mark.thorough


@pytest.fixture
def model_dir(tiny_models, tmp_path) -> Path:
    """A copy of a tiny model that a test may spoil."""
    return Path(shutil.copytree(tiny_models["minicpm_v_4_5"], tmp_path / "model"))


def config_of(directory: Path, **changes: Any) -> LVLMConfig:
    return dataclasses.replace(LVLMConfig(), name="minicpm_v_4_5", model=str(directory), **changes)


def load(directory: Path, num_layers: int = 4, left_out: tuple[str, ...] = (HEAD,), **changes: Any) -> Any:
    config = config_of(directory, **changes)
    model_config = build_config(source.read_config(config, ("minicpmv",), config.name))
    model_config.text_config.num_hidden_layers = num_layers
    return checkpoint_files.load_weights(MiniCPMV, model_config, config, LAYERS, left_out)


def shard(directory: Path) -> None:
    """The weights of `directory` in three files under an index."""
    weights = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    where = {name: f"model-{index % 3 + 1:05d}-of-00003.safetensors" for index, name in enumerate(sorted(weights))}
    for file in set(where.values()):
        part = {name: weight for name, weight in weights.items() if where[name] == file}
        save_file(part, directory / file, metadata={"format": "pt"})
    size = sum(weight.nbytes for weight in weights.values())
    index = {"metadata": {"total_size": size}, "weight_map": where}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def change(directory: Path, **changes: torch.Tensor | None) -> None:
    """Tensors by name (dots written as two underscores): replaced, added, or removed where None."""
    weights = load_file(directory / "model.safetensors")
    for key, tensor in changes.items():
        name = key.replace("__", ".")
        if tensor is None:
            del weights[name]
        else:
            weights[name] = tensor
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("sharded", [False, True])
def test_every_weight_arrives_under_its_name(model_dir, sharded) -> None:
    published = load_file(model_dir / "model.safetensors")
    if sharded:
        shard(model_dir)
    model = load(model_dir)
    loaded = model.state_dict()
    assert set(published) - set(loaded) == {"llm.lm_head.weight"}
    assert all(torch.equal(weight, published[name]) for name, weight in loaded.items())
    assert not model.training and not any(weight.requires_grad for weight in model.parameters())
    expected = torch.tensor(1e6 ** (-2 / 32))
    torch.testing.assert_close(model.llm.model.rotary_emb.inv_freq[1], expected)  # no buffer is left empty
    half = load(model_dir, dtype="bfloat16")
    assert torch.equal(half.resampler.proj, published["resampler.proj"].bfloat16())


def test_layers_that_the_model_does_not_have_are_not_read(model_dir) -> None:
    change(model_dir, llm__model__layers__2__mlp__up_proj__weight=torch.zeros(3))  # of another shape
    model = load(model_dir, num_layers=2)
    assert len(model.llm.model.layers) == 2
    with pytest.raises(ConfigError, match=r"misshapen weights: 1, first llm\.model\.layers\.2\.mlp\.up_proj\.weight"):
        load(model_dir, num_layers=3)


def test_what_does_not_fit_is_named(model_dir) -> None:
    with pytest.raises(ConfigError, match=r"unknown weights: 1, first llm\.lm_head\.weight"):
        load(model_dir, left_out=())
    change(model_dir, vpm__post_layernorm__weight=torch.zeros(3))
    with pytest.raises(ConfigError, match=r"first vpm\.post_layernorm\.weight \[3\] instead of \[48\]"):
        load(model_dir)
    change(model_dir, resampler__proj=None, resampler__query=None)
    with pytest.raises(ConfigError, match=r"lvlm\.model: .* lacks weights: 2, first resampler\.proj"):
        load(model_dir)


def test_a_missing_shard_is_the_users_fault(model_dir) -> None:
    shard(model_dir)
    next(model_dir.glob("model-00002*")).unlink()
    with pytest.raises(ConfigError, match=r"lvlm\.model: "):
        load(model_dir)


def test_a_cut_off_file_is_the_users_fault(model_dir) -> None:
    path = model_dir / "model.safetensors"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ConfigError, match=r"lvlm\.model: .*not fully covered"):
        load(model_dir)


def test_a_json_file_is_there_or_absent_and_a_configuration_is_an_object(model_dir) -> None:
    assert source.read_json(config_of(model_dir), "absent.json") is None
    assert source.read_json(config_of(model_dir), "config.json") == json.loads((model_dir / "config.json").read_text())
    (model_dir / "config.json").write_text("[1]")
    with pytest.raises(ConfigError, match=r"config\.json holds no JSON object"):
        source.read_config(config_of(model_dir), ("minicpmv",), "minicpm_v_4_5")


def test_the_tokenizer_is_read_whatever_class_is_named(model_dir) -> None:
    named = json.loads((model_dir / "tokenizer_config.json").read_text())
    assert named["tokenizer_class"] == "MiniCPMVTokenizerFast" and named["auto_map"]
    tokenizer = checkpoint_files.load_tokenizer(config_of(model_dir))
    ids = tokenizer("<image><unk></image>")["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == ["<image>", "<unk>", "</image>"]
    assert tokenizer.padding_side == "left"
    (model_dir / "tokenizer.json").unlink()
    with pytest.raises(ConfigError, match=r"lvlm\.model: .*: tokenizer: "):
        checkpoint_files.load_tokenizer(config_of(model_dir))
