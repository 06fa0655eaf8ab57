"""torchvision beside a torch without its operators."""

from __future__ import annotations

import sys
from subprocess import run

import pytest

from lvlmrec.lvlms.files import torchvision_shim

FRESH = """
try:
    import torchvision; print(0)
except RuntimeError:
    print(1)
from lvlmrec.lvlms.files import torchvision_shim
torchvision_shim.ensure_importable()
import torch
from torchvision.transforms.v2 import functional
print(*functional.resize(torch.zeros(1, 3, 8, 8, dtype=torch.uint8), [4, 4], antialias=True).shape)
print(len(torchvision_shim._declared))
"""


@pytest.mark.thorough
def test_operators_are_declared_exactly_where_the_plain_import_fails() -> None:
    lines = run([sys.executable, "-c", FRESH], capture_output=True, text=True, check=True).stdout.splitlines()
    missing, resized, declared = lines
    assert resized == "1 3 4 4"
    assert declared == missing


def test_nothing_more_is_declared_where_the_import_works() -> None:
    torchvision_shim.ensure_importable()
    declared = len(torchvision_shim._declared)
    import torchvision  # noqa: F401

    torchvision_shim.ensure_importable()
    assert len(torchvision_shim._declared) == declared
