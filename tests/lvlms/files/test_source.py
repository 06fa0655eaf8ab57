"""Model files: errors that name the key, and an identity made of content."""

from __future__ import annotations

import dataclasses
import os
import shutil
import sys
from pathlib import Path
from subprocess import run

import pytest

from lvlmrec import config as configuration
from lvlmrec.config import option
from lvlmrec.errors import ConfigError
from lvlmrec.features import recipe_config as recipes
from lvlmrec.features.recipe_config import RecipeConfig
from lvlmrec.lvlms import LVLMS, LVLMConfig
from lvlmrec.lvlms.files.source import NUM_BLOCKS, WHOLE_FILE_BYTES, hash_directory

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def copied(tiny_models: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of the tiny Qwen2-VL that a test may change."""
    return Path(shutil.copytree(tiny_models["qwen2_vl"], tmp_path / "copy"))


def make_config(directory: Path | str, **changes: object) -> LVLMConfig:
    return dataclasses.replace(LVLMConfig(), name="qwen2_vl", model=str(directory), device="cpu", **changes)


def test_identity_is_content_and_not_path_or_date(tiny_models, copied) -> None:
    identity = LVLMS["qwen2_vl"].inspect(make_config(tiny_models["qwen2_vl"])).identity
    os.utime(copied / "model.safetensors", (0, 0))
    for ignored in ("README.md", "LICENSE", ".gitattributes", ".cache/huggingface/x.json"):
        (copied / ignored).parent.mkdir(parents=True, exist_ok=True)
        (copied / ignored).write_text("words about the model")
    assert LVLMS["qwen2_vl"].inspect(make_config(copied)).identity == identity
    assert str(copied) not in identity and "qwen2_vl" not in identity


@pytest.mark.parametrize(
    "name", ["model.safetensors", "tokenizer.json", "chat_template.jinja", "processor_config.json"]
)
def test_identity_changes_with_one_byte(copied, name) -> None:
    before = hash_directory(copied)
    content = bytearray((copied / name).read_bytes())
    content[len(content) // 2] ^= 1
    (copied / name).write_bytes(content)
    assert hash_directory(copied) != before


def test_identity_changes_with_a_name(copied) -> None:
    before = hash_directory(copied)
    (copied / "chat_template.jinja").rename(copied / "other.jinja")
    assert hash_directory(copied) != before


def test_large_files_are_sampled(tmp_path) -> None:
    path, size = tmp_path / "model.safetensors", WHOLE_FILE_BYTES + 2**22
    header = b'{"weight":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    with path.open("wb") as file:  # sparse: it takes no room on disk
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(size)
    seen = {hash_directory(tmp_path)}
    for offset in (8, size // (NUM_BLOCKS - 1) * 20, size - 1):
        with path.open("r+b") as file:
            file.seek(offset)
            file.write(b"\xff")
        seen.add(hash_directory(tmp_path))
    with path.open("ab") as file:
        file.write(b"\0")
    assert len(seen | {hash_directory(tmp_path)}) == 5


@pytest.mark.parametrize("model", ["./nowhere", "/nowhere/at/all", "nowhere", "s3://bucket/model"])
def test_a_wrong_path_names_the_key_and_the_choices(model) -> None:
    with pytest.raises(ConfigError, match=rf"lvlm\.model: '{model}': no such directory; .*hub id.* qwen2_vl"):
        LVLMS["qwen2_vl"].inspect(make_config(model))


def test_a_directory_without_or_with_a_broken_configuration(tmp_path, copied) -> None:
    with pytest.raises(ConfigError, match=r"lvlm\.model: .*no config\.json"):
        LVLMS["qwen2_vl"].inspect(make_config(tmp_path))
    (copied / "config.json").write_text('{"model_type": "made_up"}')
    with pytest.raises(ConfigError, match=r"lvlm\.model: .*made_up"):
        LVLMS["qwen2_vl"].inspect(make_config(copied))


def load(config: LVLMConfig) -> None:
    entry = LVLMS[config.name]
    entry.load(config, recipes.resolve_source(RecipeConfig(taps=["llm.0"]), entry.inspect(config)))


def test_missing_weights_are_not_made_up(copied) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(copied / "model.safetensors")
    del weights["model.embed_tokens.weight"]
    save_file(weights, copied / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"lacks 1 weights, first .*embed_tokens"):
        load(make_config(copied))


def test_files_that_are_missing_or_kernels_that_are_not_there(copied) -> None:
    pytest.importorskip("torch")
    with pytest.raises(ConfigError, match=r"lvlm\.device: 'cuda:99' is not one of auto, cpu"):
        load(dataclasses.replace(make_config(copied), device="cuda:99"))
    (copied / "chat_template.jinja").unlink()
    with pytest.raises(ConfigError, match=r"lvlm\.model: .*chat template"):
        load(make_config(copied))
    (copied / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"lvlm\.model: .*safetensors"):
        load(make_config(copied))


def test_flash_attention_is_refused_where_it_is_missing(copied) -> None:
    from transformers.utils import is_flash_attn_2_available

    if is_flash_attn_2_available():
        pytest.skip("flash attention is installed")
    with pytest.raises(ConfigError, match=r"lvlm\.attention=flash_attention_2"):
        load(make_config(copied, attention="flash_attention_2"))


@pytest.mark.thorough
def test_hub_ids_without_network(copied, tmp_path) -> None:
    """A cached hub id resolves to its commit; an unknown one is the configuration's fault."""
    repository = tmp_path / "hub" / "models--acme--tiny"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    shutil.copytree(copied, repository / "snapshots" / COMMIT)
    code = (
        "import dataclasses\n"
        "from lvlmrec.lvlms import LVLMS, LVLMConfig\n"
        "config = dataclasses.replace(LVLMConfig(), name='qwen2_vl', model='acme/tiny')\n"
        "print(LVLMS['qwen2_vl'].inspect(config).identity)\n"
        "try:\n"
        "    LVLMS['qwen2_vl'].inspect(dataclasses.replace(config, model='acme/unknown'))\n"
        "except ValueError as error:\n"
        "    print(type(error).__name__, error)\n"
    )
    offline = os.environ | {"HF_HOME": str(tmp_path), "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    lines = run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=offline).stdout
    first, second = lines.splitlines()
    assert first == f"acme/tiny@{COMMIT}"
    assert second.startswith("ConfigError lvlm.model: 'acme/unknown': expected a local directory or a hub id")


@dataclasses.dataclass(frozen=True)
class Job:
    """The part of a job's schema that holds a model."""

    workspace: str = option("./workspace", "where files go")
    lvlm: LVLMConfig = option(LVLMConfig, "the model")


def test_the_default_is_the_sample_model_in_the_workspace() -> None:
    config = configuration.load(Job, [], ["workspace=/data"])
    assert (config.lvlm.name, config.lvlm.model) == ("llava_onevision", "/data/sample/models/llava_onevision")
    other = configuration.load(Job, [], ["workspace=/data", "lvlm.name=qwen2_vl"])
    assert other.lvlm.model == "/data/sample/models/qwen2_vl"
    with pytest.raises(ConfigError, match=r"lvlm\.name: 'llava' is not one of auto, frames, gemma3, .*qwen3_vl"):
        configuration.load(Job, [], ["lvlm.name=llava"])
    with pytest.raises(ConfigError, match=r"lvlm\.dtype"):
        configuration.load(Job, [], ["lvlm.dtype=int8"])


@pytest.mark.thorough
@pytest.mark.parametrize("family", ["llava_next_video", "qwen3_vl", "smolvlm"])
def test_a_process_that_imported_nothing_yet_reads_a_model(tiny_models, family) -> None:
    """Configurations of Llama decoders import torchvision, which needs help beside a torch for CPUs."""
    program = (
        "import dataclasses, sys\n"
        "from lvlmrec.lvlms import LVLMS, LVLMConfig\n"
        "config = dataclasses.replace(LVLMConfig(), name=sys.argv[1], model=sys.argv[2])\n"
        "print(LVLMS[config.name].inspect(config).family)\n"
    )
    command = [sys.executable, "-c", program, family, str(tiny_models[family])]
    assert run(command, capture_output=True, text=True, check=True).stdout.split() == [family]
