"""What every entry of `LVLMS` must hold: video-language models, encoders, and `frames`, which is no model at all.

Each clause is a function of `Made`; all run for all entries that have files here. What a kind of model promises beyond
them stands in test_contract.py (video-language models) and in encoders/.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from lvlmrec.errors import ConfigError, InputError
from lvlmrec.features import recipe_config as recipes
from lvlmrec.features.model_recipe import ModelRecipe, Prompt
from lvlmrec.features.recipe_config import RecipeConfig
from lvlmrec.features.sources import FramesRecipe
from lvlmrec.lvlms import LVLM, LVLMS, LVLMConfig
from lvlmrec.lvlms.files import authors_code
from lvlmrec.lvlms.protocol import Item
from tests.lvlms.conftest import ENCODERS, LVLM_FAMILIES, TITLES, gradient_clip

FRAMES = 8
TOLERANCE = {"minicpmv4_6": 4e-5}  # share of a feature's largest entry; layers of linear attention
ENTRIES = [*LVLM_FAMILIES, *ENCODERS, "frames"]


@dataclasses.dataclass(frozen=True)
class Made:
    """An entry, its model as configured, a recipe of every input that it knows, and items that have all of them."""

    config: LVLMConfig
    recipe: ModelRecipe
    items: list[Item]

    def load(self, **changes: object) -> LVLM:
        return LVLMS[self.config.name].load(dataclasses.replace(self.config, **changes), self.recipe)

    def tolerance(self) -> float:
        return TOLERANCE.get(self.config.name, 2e-6)


def make(name: str, directory: Path | None) -> Made:
    config = dataclasses.replace(LVLMConfig(), name=name, model=str(directory or ""), device="cpu", batch_size=2)
    info = LVLMS[name].inspect(config)
    text = "{title}" if info.inputs == ("text",) else "" if name in (*ENCODERS, "frames") else "Look."
    prompts = {f"{kind}_shown": Prompt(text, input=kind) for kind in info.inputs if kind != "text" or text == "{title}"}
    wanted = RecipeConfig(
        frames=FRAMES,
        taps=[f"{tower}.-1" for tower in info.num_layers],
        prompts=prompts,
        poolings=list(info.poolings) if name in (*ENCODERS, "frames") else ["visual_mean", "all_mean", "last_token"],
        dtype="uint8" if name == "frames" else "float32",
        video_options={"side": 16} if name == "frames" else {},
    )
    titles = [*TITLES, "A person shows how to cook a quick meal at home"]
    shown = [
        (gradient_clip(60 + 10 * k, 90, FRAMES, k), gradient_clip(80, 50 + 9 * k, 1, 9 + k)) for k in range(len(titles))
    ]
    items = [Item(f"item{k}", *shown[k], {"title": title}) for k, title in enumerate(titles)]
    return Made(config, recipes.resolve_source(wanted, info), items)


def extract(model: LVLM, items: Sequence[Item]) -> dict[str, Any]:
    return model.extract(model.prepare(items))


def columns_are_those_of_the_recipe(made: Made) -> None:
    columns = extract(made.load(), made.items)
    assert [*columns] == [str(name) for name in made.recipe.shapes]
    for name in made.recipe.shapes:
        column = columns[str(name)]
        assert column.shape[0] == len(made.items)
        assert column[0].numel() == torch.Size(made.recipe.shapes[name]).numel()
        assert column.dtype == (torch.uint8 if isinstance(made.recipe, FramesRecipe) else torch.float32)
        assert column.device.type == "cpu"


def neighbours_order_and_batch_size_change_nothing(made: Made) -> None:
    model, order = made.load(), [2, 0, 3, 1]
    alone = [extract(model, [item]) for item in made.items]
    for batch_size in (1, 3, 16):
        model.batch_size = batch_size
        together = extract(model, [made.items[row] for row in order])
        for name, column in together.items():
            for place, row in enumerate(order):
                exact = alone[row][name][0].float()
                difference = float((column[place].float() - exact).abs().max())
                assert difference <= made.tolerance() * float(exact.abs().max()), (name, batch_size)


def a_restart_gives_the_same_bits(made: Made) -> None:
    first, second = extract(made.load(), made.items), extract(made.load(), made.items)
    assert all(torch.equal(first[name], second[name]) for name in first)


def features_do_not_turn_on_what_was_extracted_before(made: Made) -> None:
    model = made.load()
    first = extract(model, made.items)
    extract(model, made.items[::-1][:2])
    again = extract(model, made.items)
    assert all(torch.equal(first[name], again[name]) for name in first)


def one_thread_prepares_while_another_extracts(made: Made) -> None:
    model = made.load()
    lots = [made.items[:2], made.items[2:], made.items[1:3], made.items]
    expected = [extract(model, lot) for lot in lots]
    prepared: list[Any] = []
    ready = threading.Semaphore(0)

    def prepare() -> None:
        for lot in lots:
            prepared.append(model.prepare(lot))
            ready.release()

    thread = threading.Thread(target=prepare)
    thread.start()
    for place, columns in enumerate(expected):
        ready.acquire()
        found = model.extract(prepared[place])
        assert all(torch.equal(found[name], column) for name, column in columns.items())
    thread.join()


def the_identity_is_of_the_content_and_no_path(made: Made) -> None:
    entry = LVLMS[made.config.name]
    info = entry.inspect(made.config)
    assert info == entry.inspect(made.config)
    assert info.family == made.config.name
    assert info.identity == made.recipe.identity
    assert not made.config.model or made.config.model not in info.identity


def another_recipe_is_refused_by_its_identity(made: Made) -> None:
    recipe = dataclasses.replace(made.recipe, identity="content:0")
    with pytest.raises(ConfigError, match=r"the recipe names content:0"):
        LVLMS[made.config.name].load(made.config, recipe)


def a_model_that_is_none_is_refused(made: Made) -> None:
    config = dataclasses.replace(made.config, model="/no/such/folder")
    with pytest.raises(ConfigError, match=r"lvlm\.model: '/no/such/folder'"):
        LVLMS[config.name].inspect(config)


def an_item_that_lacks_what_is_shown_is_named(made: Made) -> None:
    with pytest.raises(InputError, match="item 'bare'"):
        made.load().prepare([*made.items, Item("bare")])


CLAUSES: tuple[Callable[[Made], None], ...] = (
    columns_are_those_of_the_recipe,
    neighbours_order_and_batch_size_change_nothing,
    a_restart_gives_the_same_bits,
    features_do_not_turn_on_what_was_extracted_before,
    one_thread_prepares_while_another_extracts,
    the_identity_is_of_the_content_and_no_path,
    another_recipe_is_refused_by_its_identity,
    a_model_that_is_none_is_refused,
    an_item_that_lacks_what_is_shown_is_named,
)


@pytest.mark.parametrize("clause", CLAUSES, ids=lambda clause: clause.__name__)
@pytest.mark.parametrize("family", ENTRIES)
def test_every_entry_holds(tiny_models: dict[str, Path], family: str, clause: Callable[[Made], None]) -> None:
    clause(make(family, tiny_models.get(family)))


def test_no_entry_is_left_out() -> None:
    assert {*LVLMS} == {*ENTRIES, "auto", *authors_code.FAMILIES}  # auto is those; see families/ and ports/
