"""What the rows of a part were made with: device, attention, batch limit, versions. No part of the fingerprint.

It is a JSON object of texts. A part and a segment of the index carry a list of the distinct ones of their rows in
their files' metadata; features of different ones agree up to rounding only.
"""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version

PACKAGES = ("torch", "transformers", "av", "numpy")
KEY = b"lvlmrec.made_with"  # of a file's metadata


def versions(packages: Sequence[str] = PACKAGES) -> dict[str, str]:
    """The versions of the packages that features depend on."""
    return {package: version(package) for package in packages}


def to_json(known: Mapping[str, object]) -> str:
    """One object of texts, the same for the same content."""
    return json.dumps({key: str(value) for key, value in known.items()}, sort_keys=True)


def metadata(made_with: Iterable[str]) -> dict[bytes, bytes]:
    """The metadata of a file whose rows were made with those objects; empty where nothing is known."""
    distinct = sorted({*made_with} - {""})
    return {KEY: f"[{', '.join(distinct)}]".encode()} if distinct else {}


def read(metadata: Mapping[bytes, bytes] | None) -> list[str]:
    """The objects in a file's metadata; none in files of earlier releases."""
    return [to_json(known) for known in json.loads((metadata or {}).get(KEY, b"[]"))]


def differences(made_with: Sequence[str]) -> str:
    """In what the objects differ, such as `device: NVIDIA A100 | NVIDIA H200; torch: 2.8 | 2.9`; empty in nothing."""
    known = [json.loads(each) for each in made_with]
    keys = sorted({key for each in known for key in each})
    values = {key: sorted({each.get(key, "none") for each in known}) for key in keys}
    return "; ".join(f"{key}: {' | '.join(found)}" for key, found in values.items() if len(found) > 1)


@functools.cache
def say_mixed(uri: str, mixed: str) -> None:
    """Say on stderr, once in a process, in what the parts of a feature set differ, `differences`."""
    if mixed:
        print(f"features {uri!r}: parts were made differently, and agree up to rounding: {mixed}", file=sys.stderr)
