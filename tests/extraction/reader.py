"""A process that opens a feature set again and again while others write it, and checks each snapshot that it sees."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from lvlmrec import storage
from lvlmrec.columns import ITEM_ID
from lvlmrec.errors import InputError
from lvlmrec.features import store
from tests.conftest import ROOT


class Reader:
    """The process; `root` is the store whose only set it opens."""

    def __init__(self, root: str, folder: Path, environment: dict[str, str]) -> None:
        self._counts, self._stop = folder / "reads", folder / "stop"
        command = [sys.executable, "-m", "tests.extraction.reader", root, str(self._counts), str(self._stop)]
        self.process = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)

    def counts(self) -> dict[str, int]:
        """How many reads there were, of them with a commit, and how many different snapshots these saw."""
        assert self.process.poll() in (None, 0), self.process.communicate()[1][-3000:]
        found: dict[str, int] = json.loads(self._counts.read_text()) if self._counts.exists() else {"reads": 0}
        return found

    def end(self) -> dict[str, int]:
        """Its counts after one more read."""
        self._stop.touch()
        _, errors = self.process.communicate(timeout=120)
        assert self.process.returncode == 0, errors[-3000:]
        return self.counts()

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()


def check(found: store.FeatureSet, seen: dict[str, Any], checked: dict[str, list[str]]) -> None:
    """Each item once, where the index says, and none that was there before is gone."""
    rows = found.index.to_pylist()
    items = {row[ITEM_ID] for row in rows}
    assert len(items) == len(rows), "an item is there twice"
    assert items >= seen["items"], f"gone: {sorted(seen['items'] - items)[:3]}"
    seen["items"] = items
    for row in rows:
        part = row["part"]
        if part not in checked:
            table = storage.read_table(storage.join(found.uri, store.PARTS, part), [ITEM_ID])
            checked[part] = table[ITEM_ID].to_pylist()
        assert checked[part][row["row"]] == row[ITEM_ID], f"{part} has another item in row {row['row']}"


def main(root: str, counts: str, stop: str) -> None:
    seen: dict[str, Any] = {"items": set(), "snapshots": set()}
    checked: dict[str, list[str]] = {}
    reads = committed = 0
    while True:
        is_last = Path(stop).exists()
        try:
            found = store.read(root)
            check(found, seen, checked)
            seen["snapshots"].add(found.digest)
            committed += 1
        except InputError as error:
            assert not committed, f"committed, and then: {error}"
        reads += 1
        told = {
            "reads": reads,
            "committed": committed,
            "snapshots": len(seen["snapshots"]),
            "items": len(seen["items"]),
        }
        storage.write_bytes(counts, json.dumps(told).encode())
        if is_last:
            return


if __name__ == "__main__":
    main(*sys.argv[1:])
