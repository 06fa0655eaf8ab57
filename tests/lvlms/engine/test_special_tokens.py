"""A rendered conversation is read with the special tokens that transformers gives it, never with them twice."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pytest
from tokenizers.processors import TemplateProcessing

from lvlmrec.features.model_recipe import Prompt
from lvlmrec.features.recipe_config import RecipeConfig, resolve_source
from lvlmrec.lvlms import LVLMS, LVLMConfig
from lvlmrec.lvlms.engine import conversation
from lvlmrec.lvlms.families.auto import AutoFamily
from lvlmrec.lvlms.protocol import Item
from tests.lvlms.test_contract import hugging_face, messages, read

BOS = "<s>"


def make_config(directory: Path) -> LVLMConfig:
    return dataclasses.replace(LVLMConfig(), name="qwen2_vl", model=str(directory), device="cpu")


@pytest.fixture
def with_bos(tiny_models, tmp_path):
    """`with_bos(adds, writes)`: the tiny Qwen2-VL whose tokenizer adds and whose chat template writes `<s>`, or not."""

    def make(adds: bool, writes: bool) -> Path:
        from transformers import AutoProcessor

        directory = Path(shutil.copytree(tiny_models["qwen2_vl"], tmp_path / f"{adds}-{writes}"))
        processor: Any = AutoProcessor.from_pretrained(directory)
        words = processor.tokenizer
        words.add_special_tokens({"bos_token": "<|im_end|>"})  # an id that its embedding has
        mark = [(words.bos_token, words.bos_token_id)]
        if adds:
            words.backend_tokenizer.post_processor = TemplateProcessing(f"{words.bos_token} $A", special_tokens=mark)
        processor.chat_template = ("{{ bos_token }}" if writes else "") + processor.chat_template
        processor.save_pretrained(directory)
        return directory

    return make


@pytest.mark.parametrize(("adds", "writes"), [(True, True), (True, False), (False, True), (False, False)])
def test_a_prompt_has_the_tokens_that_transformers_gives_it(with_bos, adds, writes) -> None:
    directory = with_bos(adds, writes)
    info = LVLMS["qwen2_vl"].inspect(make_config(directory))
    prompt = Prompt("What is a cat?", input="text")
    recipe = resolve_source(RecipeConfig(taps=["llm.0"], prompts={"ask": prompt}, poolings=["all_mean"]), info)
    model: Any = LVLMS["qwen2_vl"].load(make_config(directory), recipe)
    (batch,) = model.prepare([Item("a")])
    _, processor = hugging_face(directory)
    (expected,) = read(processor, messages(processor, prompt, 4), {})["input_ids"].tolist()
    assert batch.prompts["ask"] == [expected]
    assert expected.count(processor.tokenizer.bos_token_id) == 1 + (adds or writes)  # `<|im_end|>` ends the message
    assert info.bos_written == recipe.bos_written == (adds and writes)


def test_a_model_found_by_looking_says_so_too(with_bos) -> None:
    stranger = AutoFamily({})
    assert stranger.inspect(make_config(with_bos(True, True))).bos_written
    assert not stranger.inspect(make_config(with_bos(True, False))).bos_written


def test_a_processor_that_adds_none_of_its_own_is_followed(tiny_models) -> None:
    _, processor = hugging_face(tiny_models["qwen2_vl"])
    assert conversation.adds_special_tokens(processor, "no token begins this")
    silent = type("Silent", (type(processor),), {"text_kwargs": {"add_special_tokens": False}})
    processor = silent(processor.image_processor, processor.tokenizer, processor.video_processor)
    assert not conversation.adds_special_tokens(processor, "no token begins this")
