"""What tells that a file is another than it was."""

from pathlib import Path
from typing import NoReturn

import pytest

from lvlmrec import storage
from lvlmrec.config import load
from lvlmrec.extraction import pipeline
from lvlmrec.extraction.manifest import source_of
from lvlmrec.extraction.settings import ExtractConfig
from lvlmrec.lvlms import LVLMS


def test_the_files_of_a_prefix_are_listed_not_asked_one_by_one(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    LVLMS["llava_onevision"].write_tiny(tmp_path / "model", seed=0)
    uris = {name: f"{bucket}/videos/{name}.mp4" for name in ("a", "b", "c")}
    for name, uri in uris.items():
        storage.write_bytes(uri, name.encode())
    overrides = [f"workspace={tmp_path}", f"input={bucket}/videos", f"lvlm.model={tmp_path}/model"]
    plan = pipeline.plan(load(ExtractConfig, [], overrides))
    asked = {name: source_of({"uri": uri}, plan.recipe.reading, storage.version) for name, uri in uris.items()}

    def refuse(uri: str) -> NoReturn:
        raise AssertionError(f"{uri} was asked")

    monkeypatch.setattr(storage, "version", refuse)
    ids = plan.manifest["item_id"].to_pylist()
    assert (
        dict(zip(ids, pipeline._sources(plan).to_pylist(), strict=True)) == asked
    )  # the decoding workers write what `version` says
    storage.write_bytes(uris["b"], b"another")
    now = zip(ids, pipeline._sources(plan).to_pylist(), strict=True)
    assert {name for name, source in now if source != asked[name]} == {"b"}
