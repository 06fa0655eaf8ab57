"""The table itself."""

from __future__ import annotations

import sys
from subprocess import run

from lvlmrec.lvlms import LVLMS


def test_entries_bear_their_own_name() -> None:
    assert {name: entry.name for name, entry in LVLMS.items()} == {name: name for name in LVLMS}


def test_the_table_is_cheap_to_import() -> None:
    code = "import sys; from lvlmrec.lvlms import LVLMS, LVLMConfig; print(*sys.modules)"
    loaded = run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "lvlmrec.lvlms" in loaded
    assert not {"torch", "transformers", "torchvision"} & set(loaded)
