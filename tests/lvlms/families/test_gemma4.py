"""The small Gemma 4, whose layers share keys and embed tokens anew; the contract's tests see the large one."""

from __future__ import annotations

from pathlib import Path

import pytest

from lvlmrec.lvlms import tiny
from lvlmrec.lvlms.tiny import gemma4
from tests.lvlms import test_contract as contract
from tests.lvlms import test_prompts as prompts

pytestmark = pytest.mark.thorough


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    directory = tmp_path_factory.mktemp("small") / "gemma4"
    tiny.write(*gemma4.make(gemma4.SMALL), directory, seed=0)
    return {"gemma4": directory}


def test_features_are_hugging_face_hidden_states_bit_for_bit(small, clips) -> None:
    contract.test_llm_features_are_hugging_face_hidden_states_bit_for_bit(small, clips, "gemma4", "after")


def test_a_bank_of_prompts_gives_what_separate_forwards_give(small, clips, make_clip, monkeypatch) -> None:
    contract.test_a_bank_of_prompts_gives_what_separate_forwards_give(small, clips, make_clip, "gemma4", 4, monkeypatch)


def test_stopping_early_changes_nothing(small, clips) -> None:
    contract.test_stopping_early_changes_nothing(small, clips, "gemma4")


def test_states_of_new_tokens_are_those_of_generate(small, items) -> None:
    prompts.test_states_of_new_tokens_are_those_of_generate(small, items, "gemma4")
