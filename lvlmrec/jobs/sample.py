"""The embedded sample, made on the user's machine when a job's configuration points into `<workspace>/sample`.

sample/interactions/, sample/videos/   the micro-world (data/micro_world.py)
sample/models/<family>/                a tiny, randomly initialised LVLM (lvlms/tiny.py): it is untrained
"""

from __future__ import annotations

import shutil
import sys
import time
import uuid
from pathlib import Path
from typing import TYPE_CHECKING

from lvlmrec import config as configs
from lvlmrec import storage
from lvlmrec.data import micro_world
from lvlmrec.errors import InputError, writing
from lvlmrec.extraction import pipeline
from lvlmrec.extraction.settings import ExtractConfig
from lvlmrec.features import lease, store
from lvlmrec.locks import locked
from lvlmrec.lvlms import LVLMS

if TYPE_CHECKING:
    from lvlmrec.runs.experiment import TrainConfig

SEED = 0


def ensure(workspace: str, *uris: str) -> None:
    """Make the parts of the sample that `uris` point to, unless they are there.

    Warns when a model of the sample is given something else to look at.
    """
    if storage.is_remote(workspace):
        return
    root = Path(workspace, "sample")
    paths = [Path(uri) for uri in uris if uri and not storage.is_remote(uri)]
    inside = [path for path in paths if path.is_relative_to(root)]
    if any(path.parent == root / "models" for path in inside) and len(inside) < len(uris):
        print(
            "sample: this model is tiny and untrained; set lvlm.model for features that mean something", file=sys.stderr
        )
    if not inside:
        return
    # Of the first jobs of a workspace one makes it, the others wait.
    with writing(str(root)), locked(root / ".lock"):
        for path in inside:
            if path.parent == root / "models":
                _ensure_model(path)
            else:
                _ensure_world(root)


def ensure_features(config: TrainConfig) -> None:
    """Extract the sample's features when a run on the sample reads features and its own store has none yet."""
    from lvlmrec.runs.experiment import feature_uris  # imports torch, which an extraction does without

    own, sample = (storage.join(config.workspace, name) for name in ("features", "sample"))
    on_sample = config.dataset.path.startswith(f"{sample}/")
    if config.model.item_encoder.layers == "none" or not on_sample:
        return
    sets = store.committed(own)
    if own not in feature_uris(config) or (sets and not any(map(lease.is_unfinished, sets))):
        return
    extract = configs.load(ExtractConfig, [{"workspace": config.workspace}])
    ensure(extract.workspace, extract.input, extract.lvlm.model)
    plan = pipeline.plan(extract)
    if sets and plan.feature_set not in sets:  # what is unfinished there is another set
        return
    print("sample: features are missing, extracting them (python rayjobs/extract.py)", file=sys.stderr)
    is_waiting = False
    while True:
        try:
            pipeline.run(plan, lambda metrics, step: None)
            return
        except lease.BusyInputError as error:  # another job extracts them
            if not is_waiting:
                print(f"sample: waiting until the job that extracts them has ended: {error}", file=sys.stderr)
            is_waiting = True
            time.sleep(lease.BEAT)
            sets = store.committed(own)
            if sets and not any(map(lease.is_unfinished, sets)):
                return


def _ensure_world(root: Path) -> None:
    if not (root / micro_world.MARKER).exists():
        print(f"sample: rendering the micro-world in {root}", file=sys.stderr)
    micro_world.make(root, micro_world.MicroWorldConfig(seed=SEED))


def _ensure_model(path: Path) -> None:
    if path.name not in LVLMS:
        raise InputError(
            f"lvlm.model {str(path)!r}: the sample has no {path.name!r}; choices: {', '.join(sorted(LVLMS))}"
        )
    if path.exists():
        return
    print(f"sample: a tiny untrained {path.name} in {path}", file=sys.stderr)
    working = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        LVLMS[path.name].write_tiny(working, SEED)
        working.rename(path)
    finally:
        shutil.rmtree(working, ignore_errors=True)
