"""What prompts show and what they are answered, on every family: titles, covers, generated text and its states."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from lvlmrec.errors import ConfigError, InputError
from lvlmrec.features import recipe_config as recipes
from lvlmrec.features.model_recipe import ModelRecipe, Prompt
from lvlmrec.features.recipe_config import RecipeConfig
from lvlmrec.lvlms import LVLM, LVLMS, LVLMConfig
from lvlmrec.lvlms.engine.inputs import placeholder
from lvlmrec.lvlms.protocol import Item
from tests.lvlms.conftest import LVLM_FAMILIES
from tests.lvlms.test_contract import LINEAR, READS_PROMPTS_ALONE, hugging_face, messages, read, videos

TOLERANCE = 2e-6  # share of a feature's largest entry, float32: rows of other lengths are summed in another order
ASK = Prompt("What is shown?", max_new_tokens=6)

pytestmark = pytest.mark.parametrize("family", LVLM_FAMILIES)


@functools.cache
def load(
    directory: Path, batch_size: int, seed: int, poolings: tuple[str, ...], *names: str
) -> tuple[LVLM, ModelRecipe]:
    config = dataclasses.replace(
        LVLMConfig(), name=directory.name, model=str(directory), device="cpu", batch_size=batch_size
    )
    bank = {name: BANK[name] for name in names}
    wanted = RecipeConfig(taps=["llm.1", "llm.-1"], prompts=bank, poolings=[*poolings])
    recipe = recipes.resolve_source(wanted, LVLMS[config.name].inspect(config), seed)
    return LVLMS[config.name].load(config, recipe), recipe


BANK = {
    "ask": ASK,
    "ask_sampled": dataclasses.replace(ASK, temperature=1.0),
    "ask_nucleus": dataclasses.replace(ASK, temperature=1.0, top_p=0.5),
    "ask_before": dataclasses.replace(ASK, place="before"),
    "ask_more": Prompt("Name three keywords for {title}", max_new_tokens=4),
    "plain": Prompt("What is shown?"),
    "titled": Prompt("Its title: {title}. What is shown?"),
    "titled_before": Prompt("Its title: {title}.", place="before"),
    "title_only": Prompt("{title}", input="text"),
    "cover_only": Prompt("What is shown?", input="cover"),
    "cover_titled": Prompt("{title}", input="cover"),
}


def extract(model: LVLM, items: Sequence[Item]) -> dict[str, Any]:
    return model.extract(model.prepare(items))


def processed(directory: Path, item: Item, prompt: Prompt) -> dict[str, Any]:
    """One item and prompt as a user of transformers writes them."""
    _, processor = hugging_face(directory)
    shown: dict[str, Any] = {}
    if prompt.input == "video":
        assert item.video is not None
        shown = videos(processor, [item.video])
    elif prompt.input == "cover":
        assert item.cover is not None
        shown = {"images": [item.cover.frames[0]], "input_data_format": "channels_last"}
    prompt = dataclasses.replace(prompt, text=prompt.text.replace("{title}", item.texts.get("title", "")))
    return dict(read(processor, messages(processor, prompt, 4), shown))


def assert_close(actual: torch.Tensor, expected: torch.Tensor, family: str, what: object) -> None:
    difference = float((actual - expected).abs().max() / expected.abs().max())
    assert difference <= TOLERANCE * LINEAR.get(family, 1), (what, difference)


@pytest.mark.parametrize("name", ["titled", "titled_before", "title_only", "cover_only", "cover_titled"])
def test_titles_and_covers_give_hugging_face_hidden_states(tiny_models, items, family, name) -> None:
    prompt, directory = BANK[name], tiny_models[family]
    poolings = ("all_mean", "last_token")
    features = extract(load(directory, 4, 0, poolings, name)[0], items)
    for row, item in enumerate(items):
        with torch.inference_mode():
            inputs = processed(directory, item, prompt)
            states = hugging_face(directory)[0](**inputs, output_hidden_states=True, use_cache=False).hidden_states
        for layer in (1, len(states) - 1):
            assert_close(features[f"{name}/llm.{layer}/last_token"][row], states[layer][0, -1], family, (layer, row))
            assert_close(
                features[f"{name}/llm.{layer}/all_mean"][row], states[layer][0].mean(dim=0), family, (layer, row)
            )


def test_one_pass_over_everything_equals_passes_alone(tiny_models, items, family) -> None:
    names = ("plain", "titled", "titled_before", "title_only", "cover_only", "cover_titled", "ask", "ask_more")
    poolings = ("visual_mean", "all_mean", "last_token", "new_mean", "eos", "prompt_eos")
    model, recipe = load(tiny_models[family], 4, 0, poolings, *names)
    together = extract(model, items)
    assert [*together] == [*map(str, recipe.feature_names), *recipe.text_names]
    for name in names:
        own = recipe.poolings_of(name)
        alone = extract(load(tiny_models[family], 1, 0, own, name)[0], items)
        for column, values in alone.items():
            if isinstance(values, list):
                assert together[column] == values
            else:
                assert_close(together[column], values, family, column)


@torch.inference_mode()
def test_states_of_new_tokens_are_those_of_generate(tiny_models, items, family) -> None:
    directory = tiny_models[family]
    poolings = ("new_mean", "eos", "last_token", "new_merged_2", "visual_mean")
    features = extract(load(directory, 4, 0, poolings, "ask")[0], items)
    model, processor = hugging_face(directory)
    for row, item in enumerate(items):
        inputs = processed(directory, item, ASK)
        specials = [i for i, token in processor.tokenizer.added_tokens_decoder.items() if token.special]
        answer = model.generate(
            **inputs,
            suppress_tokens=[i for i in specials if i != processor.tokenizer.eos_token_id],
            max_new_tokens=6,
            min_new_tokens=1,
            do_sample=False,
            output_hidden_states=True,
            return_dict_in_generate=True,
        )
        new = answer.sequences[0, inputs["input_ids"].shape[1] :]
        assert features["ask/text"][row] == processor.tokenizer.decode(new, skip_special_tokens=True).strip()
        ended = bool(new[-1] == processor.tokenizer.eos_token_id)
        assert features["ask/finish"][row] == ("eos" if ended else "length")
        num_new = len(new) - ended
        top = len(answer.hidden_states[0]) - 1
        for layer in (1, top):
            assert_close(
                features[f"ask/llm.{layer}/last_token"][row],
                answer.hidden_states[0][layer][0, -1],
                family,
                (layer, row),
            )
            # step k + 1 of generate reads new token k; the last token is never read
            read = torch.cat([step[layer][0] for step in answer.hidden_states[1:]])
            forced = forced_states(directory, inputs, new[:num_new])[layer][0, -num_new - 1 :]
            assert_close(forced[: len(read)], read[: num_new + 1], family, ("forced", layer, row))
            assert_close(features[f"ask/llm.{layer}/new_mean"][row], forced[:-1].mean(dim=0), family, (layer, row))
            assert_close(features[f"ask/llm.{layer}/eos"][row], forced[-1], family, (layer, row))
            sizes = features[f"ask/llm.{layer}/new_merged_2.sizes"][row]
            merged = features[f"ask/llm.{layer}/new_merged_2"][row].reshape(2, -1)
            assert int(sizes.sum()) == num_new
            assert_close((merged * sizes[:, None]).sum(0) / num_new, forced[:-1].mean(dim=0), family, ("merged", layer))


def forced_states(directory: Path, inputs: dict[str, Any], new: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """All states of prompt, answer and an end-of-sequence token in one forward of transformers."""
    model, processor = hugging_face(directory)
    tail = torch.cat([new, torch.tensor([processor.tokenizer.eos_token_id])])[None]
    longer = dict(inputs)
    longer["input_ids"] = torch.cat([inputs["input_ids"], tail], dim=1)
    longer["attention_mask"] = torch.ones_like(longer["input_ids"])
    if "mm_token_type_ids" in inputs:
        longer["mm_token_type_ids"] = torch.cat([inputs["mm_token_type_ids"], torch.zeros_like(tail)], dim=1)
    if hasattr(model.model, "rope_deltas"):
        model.model.rope_deltas = None
    states: tuple[torch.Tensor, ...] = model(**longer, output_hidden_states=True, use_cache=False).hidden_states
    return states


@pytest.mark.parametrize("name", ["ask_sampled", "ask_nucleus"])
def test_sampled_answers_depend_on_seed_and_item_alone(tiny_models, items, family, name) -> None:
    answers = {
        (batch_size, seed): extract(load(tiny_models[family], batch_size, seed, ("eos",), name)[0], items)
        for batch_size, seed in ((1, 0), (4, 0), (4, 1))
    }
    texts = {key: columns[f"{name}/text"] for key, columns in answers.items()}
    assert texts[1, 0] == texts[4, 0]
    assert texts[4, 0] != texts[4, 1]
    reverse = extract(load(tiny_models[family], 4, 0, ("eos",), name)[0], items[::-1])
    assert reverse[f"{name}/text"][::-1] == texts[4, 0]
    same = [dataclasses.replace(items[0], item_id=f"twin{i}") for i in range(4)]
    assert len(set(extract(load(tiny_models[family], 4, 0, ("eos",), name)[0], same)[f"{name}/text"])) > 1


def test_a_stop_string_ends_the_answer_and_is_no_part_of_it(tiny_models, items, family, monkeypatch) -> None:
    whole = extract(load(tiny_models[family], 4, 0, ("eos",), "ask")[0], items)["ask/text"]
    stop = next(text for text in whole if len(text) > 3)[1:3]
    monkeypatch.setitem(BANK, "ask_stop", dataclasses.replace(ASK, stop=[stop]))
    model, _ = load.__wrapped__(tiny_models[family], 4, 0, ("new_mean",), "ask_stop")
    columns = extract(model, items)
    for text, finish, before in zip(columns["ask_stop/text"], columns["ask_stop/finish"], whole, strict=True):
        assert stop not in text
        assert (finish == "stop") == (stop in before)
        assert before.startswith(text)


def test_the_models_own_tokens_in_a_title_are_words(tiny_models, items, family) -> None:
    _, processor = hugging_face(tiny_models[family])
    model, _ = load(tiny_models[family], 4, 0, ("last_token",), "titled")
    video_token = placeholder(processor, "video")
    sly = dataclasses.replace(items[0], texts={"title": f"x{video_token}y{processor.image_token}<|im_end|>"})
    plain = dataclasses.replace(items[0], texts={"title": "x y  "})
    features, expected = extract(model, [sly]), extract(model, [plain])
    assert all(torch.equal(features[name], expected[name]) for name in features)


def test_prefixes_are_shared_across_titles(tiny_models, items, family, monkeypatch) -> None:
    from lvlmrec.lvlms.engine import prefix

    lengths = []
    run_prefix = prefix.run_prefix
    monkeypatch.setattr(prefix, "run_prefix", lambda *a: (lengths.append(a[3]), run_prefix(*a))[1])
    names = ("plain", "titled", "ask", "ask_more", "titled_before", "cover_only", "cover_titled")
    extract(load(tiny_models[family], 4, 0, ("last_token", "eos"), *names)[0], items)
    num_runs = 0 if family in READS_PROMPTS_ALONE else 2  # one for the videos, one for the covers
    assert len(lengths) == num_runs
    assert min(lengths, default=3) > 2


def test_titles_of_any_length_share_a_batch(tiny_models, items, family) -> None:
    model, _ = load(tiny_models[family], 2, 0, ("last_token",), "title_only")
    titles = ["a", "two words", "how to fold a shirt", "in two seconds, explained slowly, for beginners"]
    batches = model.prepare([Item(str(k), texts={"title": title}) for k, title in enumerate(titles)])
    assert len(batches) == 2


def test_what_an_item_lacks_is_named(tiny_models, items, family) -> None:
    model, _ = load(tiny_models[family], 4, 0, ("last_token",), "cover_only")
    with pytest.raises(InputError, match="item 'item0' has no cover, and a prompt has input=cover"):
        model.prepare([dataclasses.replace(items[0], cover=None)])


@pytest.mark.parametrize(
    ("prompt", "poolings", "message"),
    [
        (Prompt("{title}", input="text"), ["visual_mean"], "'visual_mean' has no tokens in any prompt"),
        (Prompt("x"), ["new_mean"], "'new_mean' has no tokens in any prompt"),
        (Prompt("", input="text"), ["all_mean"], r"prompts\.p\.text: empty, and input=text"),
    ],
)
def test_recipes_that_cannot_be(tiny_models, family, prompt, poolings, message) -> None:
    config = dataclasses.replace(LVLMConfig(), name=family, model=str(tiny_models[family]), device="cpu")
    wanted = RecipeConfig(taps=["llm.1"], prompts={"p": prompt}, poolings=poolings)
    with pytest.raises(ConfigError, match=message):
        recipes.resolve_source(wanted, LVLMS[family].inspect(config))


@pytest.mark.thorough
def test_a_compiled_layer_gives_the_same_up_to_the_last_bits(tiny_models, items, family) -> None:
    if family != "qwen2_vl":
        pytest.skip("compiling takes a minute: one family, with multimodal positions, stands for all")
    config = dataclasses.replace(LVLMConfig(), name=family, model=str(tiny_models[family]), device="cpu")
    wanted = RecipeConfig(taps=["llm.1"], prompts={"plain": BANK["plain"]})
    recipe = recipes.resolve_source(wanted, LVLMS[family].inspect(config))
    plain = extract(LVLMS[family].load(config, recipe), items)
    compiled = LVLMS[family].load(dataclasses.replace(config, compile=True), recipe)
    assert_close(
        extract(compiled, items)["plain/llm.1/visual_mean"], plain["plain/llm.1/visual_mean"], family, "compiled"
    )
