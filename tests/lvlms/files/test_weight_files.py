"""Weights that cannot be read, or that something beside them would change: one line that says what to do."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from lvlmrec.errors import ConfigError
from lvlmrec.lvlms import LVLMS, LVLMConfig

FAMILIES = ["qwen2_vl", "minicpm_v_4_5", "text_encoder", "image_encoder", "video_encoder"]
LORA = {"peft_type": "LORA", "base_model_name_or_path": "acme/base", "r": 4, "target_modules": ["q_proj"]}
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:{}\nsize 4976698672\n".format("0" * 64)


@pytest.fixture
def model_dir(tiny_models, tmp_path) -> Path:
    """A copy of the tiny text encoder that a test may spoil."""
    return Path(shutil.copytree(tiny_models["text_encoder"], tmp_path / "model"))


def refusal(directory: Path, family: str = "text_encoder") -> str:
    """The one line with which a model is refused before any work."""
    with pytest.raises(ConfigError) as error:
        LVLMS[family].inspect(LVLMConfig(name=family, model=str(directory)))
    assert "\n" not in str(error.value)
    return str(error.value).removeprefix(f"lvlm.model: {str(directory)!r}: ")


def shard(directory: Path) -> list[str]:
    """The weights of `directory` in three files under an index."""
    weights = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    where = {name: f"model-{index % 3 + 1:05d}-of-00003.safetensors" for index, name in enumerate(sorted(weights))}
    for file in set(where.values()):
        part = {name: weight for name, weight in weights.items() if where[name] == file}
        save_file(part, directory / file, metadata={"format": "pt"})
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return sorted({*where.values()})


@pytest.mark.parametrize("family", [*FAMILIES, "auto"])
def test_an_adapter_beside_its_model_is_refused(tiny_models, tmp_path, family) -> None:
    source = "text_encoder" if family == "auto" else family
    directory = Path(shutil.copytree(tiny_models[source], tmp_path / "model"))
    (directory / "adapter_config.json").write_text(json.dumps(LORA))
    (directory / "adapter_model.safetensors").write_bytes(b"")
    found = refusal(directory, family)
    assert re.match(r"adapter_config\.json is an adapter \(LoRA\) beside the model, .*merge_and_unload", found)
    assert "name a folder without adapter_config.json" in found


def test_an_adapter_beside_a_folder_of_sentence_transformers_is_refused(model_dir) -> None:
    (model_dir / "modules.json").write_text("[]")
    (model_dir / "adapter_config.json").write_text(json.dumps(LORA))
    assert refusal(model_dir).startswith("adapter_config.json is an adapter (LoRA) beside the model")


@pytest.mark.parametrize("family", [*FAMILIES, "auto"])
def test_an_adapter_alone_names_its_base(tmp_path, family) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps(LORA))
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    found = refusal(tmp_path, family)
    assert "an adapter (LoRA) of acme/base alone; merge it into that with peft's merge_and_unload" in found


@pytest.mark.parametrize(
    ("names", "what", "remedy"),
    [
        (["pytorch_model.bin"], r"\(pytorch_model\.bin\) are pickled, and nothing is unpickled", "save_pretrained"),
        (
            ["pytorch_model-00001-of-00002.bin", "pytorch_model.bin.index.json"],
            "pickled",
            "a revision with safetensors",
        ),
        (["model.Q4_K_M.gguf"], r"\(model\.Q4_K_M\.gguf\) are GGUF, which llama\.cpp reads", "in safetensors"),
        (["last.ckpt"], r"\(last\.ckpt\) are pickled", "save_pretrained"),
        (["consolidated.00.pth", "params.json"], r"\(consolidated\.00\.pth\) are in the layout of the authors", "-hf"),
        (["consolidated.safetensors"], r"\(consolidated\.safetensors\) are in the layout of the authors", "-hf"),
        (["tf_model.h5"], r"\(tf_model\.h5\) are TensorFlow's", "save_pretrained"),
    ],
)
@pytest.mark.parametrize("with_config", [True, False])
def test_weights_of_another_form_are_named(model_dir, names, what, remedy, with_config) -> None:
    (model_dir / "model.safetensors").rename(model_dir / names[0])
    for name in names[1:]:
        (model_dir / name).write_text("{}")
    if not with_config:
        (model_dir / "config.json").unlink()
    found = refusal(model_dir)
    assert re.match(rf"its weights .*{what}.*; expected model\.safetensors or model\.safetensors\.index\.json: ", found)
    assert remedy in found


@pytest.mark.parametrize("family", FAMILIES)
def test_shards_that_are_missing_are_counted(tiny_models, tmp_path, family) -> None:
    directory = Path(shutil.copytree(tiny_models[family], tmp_path / "model"))
    shards = shard(directory)
    LVLMS[family].inspect(LVLMConfig(name=family, model=str(directory)))
    (directory / shards[1]).unlink()
    assert re.match(
        rf"model\.safetensors\.index\.json names 3 files, of which 1 are missing, first {shards[1]}: ",
        refusal(directory, family),
    )


def test_files_that_are_empty_or_pointers_are_named(model_dir) -> None:
    weights = (model_dir / "model.safetensors").read_bytes()
    (model_dir / "model.safetensors").write_bytes(b"")
    assert refusal(model_dir).startswith("model.safetensors is empty, 0 bytes: ")
    (model_dir / "model.safetensors").write_text(POINTER)
    assert re.match(r"model\.safetensors is a Git LFS pointer, not the file: run `git lfs pull`", refusal(model_dir))
    (model_dir / "model.safetensors").write_bytes(weights)
    shards = shard(model_dir)
    (model_dir / shards[2]).write_text(POINTER)
    assert refusal(model_dir).startswith(f"{shards[2]} is a Git LFS pointer")
    (model_dir / shards[2]).write_bytes(b"")
    assert refusal(model_dir).startswith(f"{shards[2]} is empty")


@pytest.mark.parametrize("name", ["tokenizer.json", "config.json"])
def test_other_files_that_are_pointers_are_named(model_dir, name) -> None:
    (model_dir / name).write_text(POINTER)
    assert refusal(model_dir).startswith(f"{name} is a Git LFS pointer")


def test_what_training_left_beside_good_weights_is_no_fault(model_dir) -> None:
    for name in ("training_args.bin", "optimizer.pt", "pytorch_model.bin", "model.gguf", "tf_model.h5"):
        (model_dir / name).write_bytes(b"x")
    LVLMS["text_encoder"].inspect(LVLMConfig(name="text_encoder", model=str(model_dir)))


@pytest.mark.parametrize("text", ['{"weight_map": 3}', "[]", '{"weight_map": {"a": 1}}'])
def test_an_index_that_is_none_is_named(model_dir, text) -> None:
    shard(model_dir)
    (model_dir / "model.safetensors.index.json").write_text(text)
    assert refusal(model_dir).startswith("model.safetensors.index.json has no weight_map from tensors to files")
