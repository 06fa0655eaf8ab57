"""What only one family knows stands in its declaration: engine and extraction name no family and none of its keys."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import lvlmrec
from lvlmrec.lvlms import LVLMS
from lvlmrec.lvlms.engine.layout import Layout

PACKAGE = Path(lvlmrec.__file__).parent
FILES = sorted(path for room in ("lvlms/engine", "extraction") for path in (PACKAGE / room).rglob("*.py"))
DECLARED = [entry for entry in LVLMS.values() if isinstance(entry, Layout)]
MAKERS = re.compile(r"\b(qwen|gemma|llava|internvl|minicpm|phi.?3|smolvlm|videollama|video_llama|lavit)", re.IGNORECASE)


def keys(family: Layout) -> Iterator[str]:
    """Names of attributes, arguments and options that `family` declares."""
    yield from (*family.state_attributes, *family.position_arguments, *family.visual_arguments, *family.depth_keys)
    yield from family.video_options
    if family.kept_tokens_key:
        yield family.kept_tokens_key


def test_something_is_declared() -> None:
    assert {"rope_deltas", "video_compression_mask", "per_layer_inputs", "max_pixels", "num_kv_shared_layers"} <= {
        key for family in DECLARED for key in keys(family)
    }


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_a_file_names_no_family_and_no_key_of_one(path: Path) -> None:
    text = path.read_text()
    assert not MAKERS.findall(text)
    declared = {key for family in DECLARED for key in keys(family)}
    assert not [key for key in declared if re.search(rf"\b{key}\b", text)]
