import re
from dataclasses import dataclass
from pathlib import Path

import pytest

from lvlmrec.config import changed, describe, flatten, from_arguments, load, option, to_dict, variant
from lvlmrec.errors import ConfigError
from lvlmrec.extraction.settings import ExtractConfig
from lvlmrec.runs.evaluating import EvaluateConfig
from lvlmrec.runs.experiment import TrainConfig


@dataclass(frozen=True)
class Base:
    name: str


@dataclass(frozen=True)
class Attention(Base):
    name: str = "attention"
    heads: int = option(2, "heads", minimum=1)


@dataclass(frozen=True)
class Recurrent(Base):
    name: str = "recurrent"
    layers: int = option(1, "layers", minimum=1)


@dataclass(frozen=True)
class Prompt:
    text: str = option("Describe.", "what is asked")


@dataclass(frozen=True)
class Config:
    workspace: str = option("./workspace", "where things live")
    input: str = option("${workspace}/videos", "videos")
    backbone: Base = variant({"attention": Attention, "recurrent": Recurrent}, "attention", "sequence encoder")
    taps: list[str] = option(["llm.0"], "hidden states")
    prompts: dict[str, Prompt] = option({"plain": Prompt()}, "prompt bank")
    dtype: str = option("float16", "stored dtype", choices=("float16", "float32"))


def test_layers_then_overrides(tmp_path: Path) -> None:
    first, second = tmp_path / "a.yaml", tmp_path / "b.yaml"
    first.write_text("workspace: /one\ntaps: [llm.1]\ndtype: float32\n")
    second.write_text("taps: [llm.2, llm.3]\n")
    config = load(Config, [first, second], ["workspace=/two"])
    assert (config.workspace, config.input, config.taps, config.dtype) == (
        "/two",
        "/two/videos",
        ["llm.2", "llm.3"],
        "float32",
    )


def test_the_jobs_own_layer_is_used_only_when_none_is_given(tmp_path: Path) -> None:
    own, other = tmp_path / "job.yaml", tmp_path / "other.yaml"
    own.write_text("workspace: /own\n")
    other.write_text("dtype: float32\n")
    assert from_arguments(Config, ["dtype=float32"], own).workspace == "/own"
    assert from_arguments(Config, [str(other)], own).workspace == "./workspace"


def test_a_variant_is_chosen_by_its_name() -> None:
    config = load(Config, [], ["backbone.name=recurrent", "backbone.layers=3"])
    assert config.backbone == Recurrent(layers=3)
    with pytest.raises(ConfigError, match=r"backbone\.heads.*unknown key.*choices: layers, name"):
        load(Config, [], ["backbone.name=recurrent", "backbone.heads=3"])


def test_named_things_of_a_layer_replace_the_defaults() -> None:
    config = load(Config, [], ["prompts.ask.text=Say: what is it?"])
    assert config.prompts == {"ask": Prompt("Say: what is it?")}


def test_a_resolved_configuration_loads_to_itself() -> None:
    config = load(Config, [], ["backbone.name=recurrent", "taps=[llm.1,llm.-1]"])
    assert load(Config, [to_dict(config)]) == config


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["dtpye=float32"], r"dtpye='float32': unknown key; did you mean dtype\? choices: .*dtype"),
        (["backbone.haeds=3"], r"backbone\.haeds=3: unknown key; did you mean backbone\.heads\?"),
        (["backbone.name=gru"], r"backbone\.name: 'gru' is not one of attention, recurrent"),
        (["dtype=int8"], r"dtype: 'int8' is not one of float16, float32"),
        (["backbone.heads=0"], r"backbone\.heads: 0 is below 1"),
        (["backbone.heads=1e3"], r"^backbone\.heads: '1e3' is not a whole number$"),
        (["backbone=3"], r"backbone: 3 is not a group of keys"),
        (["taps=3"], r"taps"),
        (["=3"], r"argument '=3'"),
        (["nonsense"], r"argument 'nonsense': neither a layer"),
        (["nowhere.yaml"], r"layer 'nowhere\.yaml': no such file; layers of the project: "),
        (["input=${nowhere}"], r"input: Interpolation key 'nowhere' not found"),
    ],
)
def test_what_is_wrong_is_named(arguments: list[str], message: str, tmp_path: Path) -> None:
    own = tmp_path / "job.yaml"
    own.write_text("")
    with pytest.raises(ConfigError, match=message) as caught:
        from_arguments(Config, arguments, own)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", ["a: [", "- a\n- b\n", "\x00"])
def test_an_unreadable_layer_is_named(content: str, tmp_path: Path) -> None:
    layer = tmp_path / "layer.yaml"
    layer.write_text(content)
    with pytest.raises(ConfigError, match=r"layer\.yaml"):
        load(Config, [layer])


def test_what_is_changed_are_the_names_of_parts_and_the_values_that_are_no_defaults() -> None:
    assert dict(changed(Config())) == {"backbone.name": "attention"}
    loaded = load(Config, [], ["backbone.name=recurrent", "backbone.layers=1", "dtype=float32", "taps=[llm.0]"])
    assert dict(changed(loaded)) == {
        "input": "./workspace/videos",
        "backbone.name": "recurrent",
        "dtype": "float32",
    }
    more = load(Config, [], ["backbone.heads=4", "taps=[llm.1]", "prompts={}"])
    assert dict(changed(more)) == {
        "input": "./workspace/videos",
        "backbone.name": "attention",
        "backbone.heads": 4,
        "taps": ["llm.1"],
        "prompts": {},
    }


def test_help_shows_every_key_with_default_and_choices() -> None:
    text = describe(Config)
    for key, _ in flatten(to_dict(Config())):
        assert key.split(".")[0] in text
    assert "dtype='float16'  stored dtype (float16, float32)" in text
    assert "backbone.name" in text and "attention, recurrent" in text


@pytest.mark.parametrize(
    "text", ["/data/my #1 folder", "0755", "12:30", "2026-12-01", "no", "yes", "a: b", "{title}", "1_a", "0123456"]
)
def test_a_text_on_the_command_line_is_taken_as_it_is(text: str) -> None:
    config = load(ExtractConfig, [], [f"input={text}", f"recipe.prompts.p.text={text}"])
    assert (config.input, config.recipe.prompts["p"].text) == (text, text)


@pytest.mark.parametrize("text", ["1.10", "1_000", "TRUE", "7", ".5"])
def test_a_text_that_looks_like_a_number_keeps_its_letters(text: str) -> None:
    config = load(ExtractConfig, [], [f"input={text}", f"lvlm.revision={text}"])
    assert (config.input, config.lvlm.revision) == (text, text)


def test_numbers_and_words_of_a_layer_are_those_that_are_written(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("workspace: 2024-01-01\ntraining: {epochs: 010, lr: 1e-3, use_gpu: yes}\n")
    config = load(TrainConfig, [tmp_path / "a.yaml"])
    training = config.training
    assert (config.workspace, training.epochs, training.lr, training.use_gpu) == ("2024-01-01", 10, 1e-3, True)


@pytest.mark.parametrize("argument", ["workspace=${", "workspace=${nothing"])
def test_a_broken_reference_is_one_line(argument: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(argument)):
        load(TrainConfig, [], [argument])


def test_a_layer_that_is_a_folder_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").mkdir()
    with pytest.raises(ConfigError, match="not readable as YAML"):
        load(Config, [tmp_path / "a.yaml"])


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("taps[0]=llm.0", r"'taps\[0\]' is not a dotted key; a list is set as a whole: taps=\[a,b\]"),
        ("layers[0]=3", r"'layers\[0\]' is not a dotted key"),
        ("backbone.name[0]=x", r"'backbone.name\[0\]' is not a dotted key"),
        ("taps.0=llm.0", r"taps: \{'0': 'llm.0'\} is not a list, as in taps=\[a,b\]"),
        ("backbone.name={a: 1}", r"backbone.name: \{'a': 1\} is not one of attention, recurrent"),
        ("taps=llm.0", r"taps: 'llm.0' is not a list, as in taps=\[a,b\]"),
        ("backbone.heads=many", r"^backbone.heads: 'many' is not a whole number$"),
        ("backbone.heads=1.5", r"^backbone.heads: 1.5 is not a whole number$"),
        ("backbone.heads=null", r"^backbone.heads: null is not a whole number$"),
        ("backbone.heads=[1]", r"^backbone.heads: \[1\] is not a whole number$"),
        ("workspace={a: 1}", r"^workspace: \{'a': 1\} is not a text$"),
        ("prompts=plain", r"^prompts: 'plain' is not a group of keys$"),
        ("input=${input}", r"input: its reference \$\{...\} leads back to itself"),
        ("input=${", r"argument 'input=\$\{': '\$\{' begins a reference to another key"),
    ],
)
def test_a_value_of_another_kind_is_named_in_plain_words(argument: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        load(Config, [], [argument])
    assert "\n" not in str(caught.value) and "DictConfig" not in str(caught.value)


def test_an_entry_of_another_kind_is_named_in_plain_words() -> None:
    with pytest.raises(ConfigError, match=r"^ks\[1\]: 'ten' is not a whole number$"):
        load(EvaluateConfig, [], ["ks=[10,ten]"])
    with pytest.raises(ConfigError, match=r"^training.use_gpu: 'maybe' is not true or false$"):
        load(TrainConfig, [], ["training.use_gpu=maybe"])
    with pytest.raises(ConfigError, match=r"^training.lr: 'fast' is not a number$"):
        load(TrainConfig, [{"training": {"lr": "fast"}}])


@pytest.mark.parametrize("key", ["workspace", "dtype", "backbone.heads", "prompts.plain.text"])
def test_what_is_still_to_come_is_no_value(key: str) -> None:
    """OmegaConf takes ??? for it, and would silently give the default."""
    with pytest.raises(ConfigError, match=rf"^{key}: '\?\?\?': \?\?\? is no value; give one"):
        load(Config, [], [f"{key}=???"])
    with pytest.raises(ConfigError, match=r"^taps: \['llm.0', '\?\?\?'\]: \?\?\? is no value"):
        load(Config, [{"taps": ["llm.0", "???"]}])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("taps: &all [*all]\n", r"an anchor \(&name\) holds an alias of itself"),
        ("backbone: &one\n  name: attention\n  more: *one\n", "holds an alias of itself"),
        ("taps: " + "[" * 3000 + "]" * 3000 + "\n", "nested too deeply"),
        ("dtype: float16\ntaps: []\ndtype: float32\n", "key 'dtype' is given twice, at line 1 and after"),
        ("backbone:\n  heads: 2\n  heads: 3\n", "key 'heads' is given twice, at line 2"),
        ("taps: [\n", "not readable as YAML: .*at line 2, column 1"),
    ],
)
def test_a_layer_without_an_end_or_with_two_values_is_refused(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "layer.yaml").write_text(content)
    with pytest.raises(ConfigError, match=message) as caught:
        load(Config, [tmp_path / "layer.yaml"])
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


def test_an_alias_of_another_part_and_a_merged_mapping_are_read(tmp_path: Path) -> None:
    (tmp_path / "layer.yaml").write_text(
        "prompts:\n  one: &one {text: A}\n  two: *one\n  three:\n    <<: *one\n    text: B\n"
    )
    prompts = load(Config, [tmp_path / "layer.yaml"]).prompts
    assert {name: prompt.text for name, prompt in prompts.items()} == {"one": "A", "two": "A", "three": "B"}
