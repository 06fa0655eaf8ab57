"""torchvision beside a torch without its operators, in fresh interpreters."""

from __future__ import annotations

import sys
from subprocess import run

IMPORT_PLAINLY = "import torchvision; print('plain')"
USE_A_RESIZE = (
    "import torch; from torchvision.transforms.v2 import functional; "
    "print(*functional.resize(torch.zeros(1, 3, 8, 8, dtype=torch.uint8), [4, 4], antialias=True).shape, "
    "len(torchvision_shim._declared))"
)
START = "from lvlmrec.lvlms import torchvision_shim; torchvision_shim.ensure_importable(); "


def python(code: str) -> str:
    return run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip()


def test_torchvision_imports_and_resizes() -> None:
    """Operators are declared exactly where the plain import fails, and only once."""
    needed = 0 if python(IMPORT_PLAINLY) == "plain" else 1
    assert python(START + START + USE_A_RESIZE) == f"1 3 4 4 {needed}"


def test_nothing_is_declared_where_the_plain_import_works() -> None:
    declare = (
        "import torch; library = torch.library.Library('torchvision', 'FRAGMENT'); "
        "[library.define(name + '(Tensor dets, Tensor scores, float iou_threshold) -> Tensor') "
        "for name in ('nms', 'qnms') if not hasattr(torch.ops.torchvision, name)]; import torchvision; "
    )
    assert python(declare + START + USE_A_RESIZE) == "1 3 4 4 0"
