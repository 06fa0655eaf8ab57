import pytest

from lvlmrec.errors import ConfigError
from lvlmrec.taps import FeatureName, Tap, parse, parse_feature, resolve

LAYERS = {"llm": 4, "vision": 2}


def test_negative_taps_count_from_the_top() -> None:
    assert resolve(["llm.-1", "vision.-3"], LAYERS) == (Tap("llm", 4), Tap("vision", 0))


def test_taps_come_sorted_and_once() -> None:
    assert resolve(["llm.3", "llm.0", "llm.-2"], LAYERS) == (Tap("llm", 0), Tap("llm", 3))


def test_a_star_is_every_hidden_state() -> None:
    assert resolve(["llm.*"], LAYERS) == tuple(Tap("llm", k) for k in range(5))


@pytest.mark.parametrize(
    ("text", "tower", "layers"),
    [
        ("llm.*/2", "llm", [0, 2, 4]),
        ("llm.*/3", "llm", [0, 3]),
        ("llm.*/1", "llm", [0, 1, 2, 3, 4]),
        ("llm.*/9", "llm", [0]),
        ("vision.*/2", "vision", [0, 2]),
        ("text.*/2", "text", [0, 2]),
    ],
)
def test_a_step_counts_from_the_first_state(text: str, tower: str, layers: list[int]) -> None:
    assert resolve([text], LAYERS | {"text": 3}) == tuple(Tap(tower, layer) for layer in layers)


def test_a_step_and_the_last_state_make_each_tap_once() -> None:
    assert resolve(["llm.*/2", "llm.-1"], LAYERS) == resolve(["llm.*/2"], LAYERS)


@pytest.mark.parametrize("text", ["llm.*/0", "llm.*/-1", "llm.*/", "llm.*/x", "vision.*/1.5", "llm.*/2/2"])
def test_a_step_that_is_no_number_is_refused_with_the_choices(text: str) -> None:
    with pytest.raises(ConfigError, match=r"expected a step of 1 or more such as .*; choices: "):
        resolve([text], LAYERS)


@pytest.mark.parametrize("text", ["text.*", "text.*/4", "audio.*/2"])
def test_every_state_of_a_tower_that_the_model_lacks_is_refused_with_its_towers(text: str) -> None:
    with pytest.raises(ConfigError, match="no such tower; towers: llm, vision"):
        resolve([text], LAYERS)


@pytest.mark.parametrize(
    "text", ["llm", "llm.", "llm.x", "audio.1", "llm.1.2", "", "llm.**", "vision.1.pre_norm", "llm.1.post"]
)
def test_what_is_no_tap_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="towers: llm, vision"):
        parse(text)


def test_the_state_before_the_final_norm_is_a_tap_of_its_own() -> None:
    taps = resolve(["llm.-1.pre_norm", "llm.-1"], LAYERS)
    assert [str(tap) for tap in taps] == ["llm.4", "llm.4.pre_norm"]
    assert parse(str(taps[1])) == taps[1]
    with pytest.raises(ConfigError, match=r"only llm\.4\.pre_norm"):
        resolve(["llm.3.pre_norm"], LAYERS)


def test_the_projector_is_a_tap() -> None:
    (tap,) = resolve(["projector"], LAYERS)
    assert str(tap) == "projector"
    assert parse_feature("video/projector/visual_mean").tap == tap


@pytest.mark.parametrize("text", ["llm.5", "llm.-6", "vision.3"])
def test_a_tap_outside_the_model_is_refused_with_the_range(text: str) -> None:
    with pytest.raises(ConfigError, match="out of range; choices"):
        resolve([text], LAYERS)


def test_a_tower_the_model_lacks_is_refused() -> None:
    with pytest.raises(ConfigError, match="no such tower; towers: llm"):
        resolve(["vision.1"], {"llm": 4})


def test_feature_names_read_back() -> None:
    name = FeatureName("describe", Tap("llm", 14), "visual_mean")
    assert str(name) == "describe/llm.14/visual_mean"
    assert parse_feature(str(name)) == name
    with pytest.raises(ConfigError, match="expected prompt/tap/pooling"):
        parse_feature("llm.14")
