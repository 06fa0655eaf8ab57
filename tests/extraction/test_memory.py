"""What the processes of an extraction ask Ray's memory for."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

from lvlmrec import cluster
from lvlmrec.config import load
from lvlmrec.errors import ConfigError
from lvlmrec.extraction import memory
from lvlmrec.extraction.memory import WORKER_MEMORY, Reserved
from lvlmrec.extraction.settings import ExtractConfig, PoolConfig
from lvlmrec.features import recipe_config as recipes
from lvlmrec.features.model_recipe import MOTION, ModelRecipe, Prompt
from lvlmrec.features.recipe_config import LVLMInfo, RecipeConfig
from tests.extraction.test_faults import model, plan_of, run, write_items

__all__ = ["model"]  # the fixture
INFO = LVLMInfo("stand_in", "x", "float32", {"llm": 2, "vision": 1}, {"llm": 3, "vision": 3})
GB = 10**9


def recipe_of(frames: int = 16, side: int = 1280, **prompts: Prompt) -> ModelRecipe:
    wanted = RecipeConfig(frames=frames, frame_max_side=side, taps=["llm.1"], prompts=prompts or {"p": Prompt("x")})
    return recipes.resolve_source(dataclasses.replace(wanted, poolings=["last_token"]), INFO)


def test_it_follows_from_the_sizes_of_the_recipe() -> None:
    item = 16 * 1280 * 1280 * 3
    told = memory.needed(recipe_of(), 8, 4096)
    assert told == Reserved(WORKER_MEMORY + item + memory.CHILD_MEMORY + item, WORKER_MEMORY + 2 * 3 * 4 * 8 * item)
    assert memory.needed(recipe_of(), 8, 256).decode == WORKER_MEMORY + item + (256 << 20)  # the child's own limit
    half = memory.needed(recipe_of(frames=8), 8, 4096)
    assert half.actor - WORKER_MEMORY == (told.actor - WORKER_MEMORY) // 2
    cover = memory.item_bytes(recipe_of(p=Prompt("x", input="cover"), q=Prompt("x")))
    assert cover == item + 1280 * 1280 * 3
    texts = memory.needed(recipe_of(t=Prompt("{title}", input="text")), 8, 4096)
    assert texts == Reserved(WORKER_MEMORY, WORKER_MEMORY)
    moving = dataclasses.replace(recipe_of(), video_form=MOTION, frame_max_side=0)
    assert 10**6 < memory.item_bytes(moving) < item


@pytest.mark.parametrize(("decoders", "actors"), [(1, 1), (8, 1), (3, 4), (64, 8)])
@pytest.mark.parametrize("there", [3 * GB, 6 * GB, 24 * GB, 4000 * GB])
def test_all_that_is_configured_still_fits(
    decoders: int, actors: int, there: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cluster, "memory", lambda: there)
    config = load(ExtractConfig, [], [f"pool.decode_tasks={decoders}", f"pool.max_actors={actors}"])
    told, wanted = memory.reserve(config.pool, memory.needed(recipe_of(), 4, 4096)), memory.needed(recipe_of(), 4, 4096)
    total = decoders * told.decode + actors * told.actor + told.write
    processes = decoders + actors + 1
    assert total <= max(there, processes * WORKER_MEMORY)  # below that Ray starts fewer of them, as it always did
    assert WORKER_MEMORY <= told.decode <= wanted.decode
    assert WORKER_MEMORY <= told.actor <= wanted.actor
    fits = decoders * wanted.decode + actors * wanted.actor + wanted.write <= memory.USABLE * there
    assert (told == wanted) is fits
    assert ("less is reserved; smaller lvlm.batch_size, recipe.frames" in capsys.readouterr().err) is not fits


def test_less_memory_than_one_of_each_takes_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = memory.needed(recipe_of(), 4, 4096)
    monkeypatch.setattr(cluster, "memory", lambda: GB)
    with pytest.raises(ConfigError, match=r"^pool\.min_actors: 1 actors, a decoder and a writer take 1\.3 GB"):
        memory.reserve(PoolConfig(), wanted)
    monkeypatch.setattr(cluster, "memory", lambda: None)  # nodes will come
    assert memory.reserve(load(ExtractConfig, []).pool, memory.needed(recipe_of(), 4, 4096)) == memory.needed(
        recipe_of(), 4, 4096
    )


@pytest.fixture
def small_ray() -> Iterator[None]:
    ray.init("local", num_cpus=2, _memory=2 * GB, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.mark.slow
@pytest.mark.usefixtures("small_ray")
def test_a_small_machine_runs_what_may_take_far_more(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cluster.memory() == 2 * GB
    monkeypatch.setattr(memory, "needed", lambda *sizes: Reserved(3 * GB, 40 * GB))
    write_items(tmp_path / "items.csv", {f"item{k}": f"number {k}" for k in range(20)})
    assert run(plan_of(tmp_path, model))["written"] == 20
