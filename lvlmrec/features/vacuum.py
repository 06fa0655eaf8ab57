"""Remove what no reader of a feature set sees, parts that repeated or superseded work left, and merge its index."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lvlmrec.config import option
from lvlmrec.features import lease, store


@dataclass(frozen=True)
class VacuumConfig:
    """The vacuum job."""

    workspace: str = option("./workspace", "the tracking database lives here", required=True, uri=True)
    tracking_uri: str = option("sqlite:///${workspace}/mlflow.db", "MLflow tracking server or database", required=True)
    features: str = option(
        "${workspace}/features", "feature set, or a store that holds exactly one", required=True, uri=True
    )


def run(config: VacuumConfig) -> dict[str, Any]:
    """Merge the index into one segment, remove parts without a row in it. Not while jobs read the set: they may have
    an older index.

    Raises `InputError` when there is no such feature set, or an extraction writes it.
    """
    uri = store.find(config.features)
    with lease.hold(uri) as own_lease:
        store.adopt(uri, own_lease.number)
        result = {"feature_set": uri, **store.vacuum(uri, own_lease.number)}
        if not own_lease.after_break:  # what a killed extraction did not come to is still missing
            own_lease.finish()
    return result
