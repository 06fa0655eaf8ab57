"""Hub ids: a branch is asked for once, every process reads its commit, and a hub out of reach is one line."""

from __future__ import annotations

import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from lvlmrec.errors import ConfigError
from lvlmrec.extraction import pipeline
from lvlmrec.extraction.settings import ExtractConfig
from lvlmrec.features.model_recipe import Prompt
from lvlmrec.features.recipe_config import RecipeConfig, resolve_source
from lvlmrec.lvlms import LVLMS, LVLMConfig
from lvlmrec.lvlms.files import hub, source
from lvlmrec.lvlms.protocol import Item
from tests.lvlms.files.fake_hub import FakeHub, serve, silence

MODEL, FIRST, SECOND = "acme/words", "1" * 40, "2" * 40
RECIPE = RecipeConfig(taps=["text.-1"], prompts={"title": Prompt("{title}", input="text")}, poolings=["all_mean"])


@pytest.fixture
def machine(tmp_path, monkeypatch) -> Iterator[Callable[..., None]]:
    """`machine(name, url, offline=False)`: this process as on a machine with a cache of its own, and a hub at `url`."""
    constants = huggingface_hub.constants

    def become(name: str, url: str, offline: bool = False) -> None:
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / name))
        monkeypatch.setattr(constants, "ENDPOINT", url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
        hub.small_files.cache_clear()
        hub.all_files.cache_clear()

    monkeypatch.setattr(hub, "ANSWER_SECONDS", 0.2)
    yield become
    hub.small_files.cache_clear()
    hub.all_files.cache_clear()


@pytest.fixture
def fake(tiny_models, tmp_path) -> Iterator[FakeHub]:
    """A hub whose model has two commits, of the same configuration and other weights; `main` is the first."""
    first, second = Path(shutil.copytree(tiny_models["text_encoder"], tmp_path / "first")), tmp_path / "second"
    (first / "pytorch_model.bin").write_bytes(b"a pickle that nobody asks for")
    shutil.copytree(first, second)
    weights = {name: weight * 2 for name, weight in load_file(first / "model.safetensors").items()}
    save_file(weights, second / "model.safetensors", metadata={"format": "pt"})
    with serve(FakeHub(MODEL, {FIRST: first, SECOND: second}, FIRST)) as server:
        yield server


@pytest.fixture
def refused() -> str:
    """The URL of a port that nobody listens at."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return f"http://127.0.0.1:{listener.getsockname()[1]}"


def make_config(model: str = MODEL, revision: str = "") -> LVLMConfig:
    return LVLMConfig(name="text_encoder", model=model, revision=revision, device="cpu")


def features_of(config: LVLMConfig) -> np.ndarray:
    family = LVLMS[config.name]
    model: Any = family.load(config, resolve_source(RECIPE, family.inspect(config)))
    (values,) = model.extract(model.prepare([Item("a", texts={"title": "surf"})])).values()
    return values.numpy()


def test_a_branch_that_moves_moves_no_actor(fake, machine, tmp_path, monkeypatch) -> None:
    (tmp_path / "items.csv").write_text("item_id,title\na,surf\n")
    machine("driver", fake.url)
    given = {"workspace": str(tmp_path), "input": str(tmp_path / "items.csv"), "store": str(tmp_path / "store")}
    plan = pipeline.plan(ExtractConfig(**given, lvlm=make_config(), recipe=RECIPE))
    assert plan.config.lvlm.revision == FIRST and plan.recipe.source.identity == f"{MODEL}@{FIRST}"
    assert not any("model.safetensors" in asked for asked in fake.asked)  # the driver needs no weights
    fake.branch = SECOND
    machine("actor", fake.url)
    features = features_of(plan.config.lvlm)
    assert np.array_equal(features, features_of(make_config(str(fake.commits[FIRST]))))
    assert not np.array_equal(features, features_of(make_config(str(fake.commits[SECOND]))))
    assert not any("pytorch_model.bin" in asked for asked in fake.asked)
    assert source.pin(make_config()).revision == SECOND  # another run asks again
    assert source.pin(make_config(revision=FIRST)).revision == FIRST


def test_a_branch_is_asked_for_once(fake, machine) -> None:
    machine("driver", fake.url)
    pinned = source.pin(make_config())
    features_of(pinned)
    assert sum(asked.endswith(("/words", "/revision/main")) for asked in fake.asked) == 1


@pytest.mark.parametrize("revision", ["", FIRST])
def test_what_the_cache_holds_needs_no_network(fake, machine, refused, revision) -> None:
    machine("driver", fake.url)
    features = features_of(source.pin(make_config()))
    fake.asked.clear()
    machine("driver", fake.url)
    assert np.array_equal(features_of(make_config(revision=FIRST)), features)
    assert fake.asked == []  # a commit that is there is not asked for
    for offline in (False, True):
        machine("driver", refused, offline)
        assert np.array_equal(features_of(source.pin(make_config(revision=revision))), features)


def test_a_cache_that_another_library_filled_serves_without_network(fake, machine, refused, tmp_path) -> None:
    repository = tmp_path / "other" / "models--acme--words"
    shutil.copytree(fake.commits[FIRST], repository / "snapshots" / FIRST)
    expected = features_of(make_config(str(fake.commits[FIRST])))
    machine("other", refused)
    assert np.array_equal(features_of(make_config(revision=FIRST)), expected)


@pytest.mark.parametrize("revision", ["", "v1", FIRST])
def test_a_hub_out_of_reach_is_one_line_after_one_request(machine, refused, revision) -> None:
    known = (
        rf"^lvlm\.model: '{MODEL}': expected .* hub id \(owner/name\) of .* cannot be reached, .* not in the cache .*"
    )
    with silence() as (url, connections):
        machine("new", url)
        with pytest.raises(ConfigError, match=known + "name a local directory") as error:
            source.check(make_config(revision=revision))
        assert len(connections) == 1 and "\n" not in str(error.value) and url in str(error.value)
    machine("new", refused)
    with pytest.raises(ConfigError, match=known + "name a local directory"):
        source.check(make_config(revision=revision))
    with pytest.raises(ConfigError, match=known):
        LVLMS["auto"].inspect(make_config(revision=revision))


def test_a_hub_that_fails_is_not_asked_again_and_again(fake, machine) -> None:
    machine("new", fake.url)
    fake.model = "acme/other"  # of another it knows nothing
    with pytest.raises(ConfigError, match=rf"lvlm\.model: '{MODEL}': expected a local directory or a hub id"):
        LVLMS["auto"].inspect(make_config())
    assert len(fake.asked) == 1


def test_files_that_are_missing_are_fetched_and_without_network_named(fake, machine, refused) -> None:
    machine("half", fake.url)
    LVLMS["text_encoder"].inspect(make_config(revision=FIRST))  # no weights yet
    machine("half", refused)
    LVLMS["text_encoder"].inspect(make_config(revision=FIRST))
    with pytest.raises(ConfigError, match=rf"lvlm\.model: '{MODEL}': .* cannot be reached"):
        features_of(make_config(revision=FIRST))
    machine("half", fake.url)
    features_of(make_config(revision=FIRST))


def test_an_adapter_in_a_repository_is_refused_before_weights_are_fetched(fake, machine) -> None:
    (fake.commits[FIRST] / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    machine("driver", fake.url)
    with pytest.raises(ConfigError, match=rf"lvlm\.model: '{MODEL}': adapter_config\.json is an adapter"):
        LVLMS["text_encoder"].inspect(source.pin(make_config()))
    (fake.commits[FIRST] / "adapter_config.json").unlink()
    (fake.commits[FIRST] / "model.safetensors").unlink()
    machine("other", fake.url)
    with pytest.raises(ConfigError, match=r"its weights \(pytorch_model\.bin\) are pickled"):
        LVLMS["text_encoder"].inspect(source.pin(make_config()))
