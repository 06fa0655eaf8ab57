"""A bounded run of the fuzzer of benchmarks/: hostile bytes end as a clip or a named error, never otherwise."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest

pytestmark = pytest.mark.thorough

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def fuzzer(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import fuzz_decoder

    yield fuzz_decoder
    sys.modules.pop("fuzz_decoder")


def test_short_cuts_give_what_decoding_everything_gives(fuzzer: ModuleType, tmp_path: Path) -> None:
    outcomes = {path.name: fuzzer.outcome(path) for path in fuzzer.write_generated(tmp_path)}
    assert set(outcomes.values()) == {"equal", "whole"}, outcomes
    assert [name for name, outcome in outcomes.items() if outcome == "whole"] == ["vp9.webm", "mpeg4.avi"]


def test_hostile_bytes_are_clips_or_named_errors(fuzzer: ModuleType) -> None:
    state = {"seed": 1, "case": 0, "seconds": 0.0, "peak_mb": 0, "outcomes": {}, "noted": []}
    fuzzer.fuzz(state, num_cases=400, seconds=60.0, save_state=lambda: None)
    assert sum(state["outcomes"].values()) == state["case"] > 100
    assert not {*fuzzer.BUGS, "timeout"} & set(state["outcomes"]), state
    assert state["outcomes"]["equal"] + state["outcomes"]["whole"] > 50
    assert 0 < state["peak_mb"] < 512


def test_a_case_follows_from_its_number(fuzzer: ModuleType, tmp_path: Path) -> None:
    files = fuzzer.write_generated(tmp_path)
    assert fuzzer.mutated(files, len(files), 0, 7) == fuzzer.mutated(files, len(files), 0, 7)
    assert fuzzer.mutated(files, len(files), 0, 7) != fuzzer.mutated(files, len(files), 0, 8)
