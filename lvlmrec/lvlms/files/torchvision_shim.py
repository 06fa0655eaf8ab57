"""torchvision beside a torch build without its compiled operators.

The CPU wheel of torch and the default wheel of torchvision fail together with "operator torchvision::nms does not
exist", though no video processor calls such an operator. Declaring the two schemas first lets the import through.
"""

from __future__ import annotations

from typing import Any

_SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
_declared: list[Any] = []  # a torch Library takes its operators with it when it is collected


def ensure_importable() -> None:
    """Import torchvision, declaring its missing operators when (and only when) the plain import fails.

    Raises the import's own error when there is another reason.
    """
    try:
        import torchvision
    except RuntimeError as error:
        if "torchvision::" not in str(error) or _declared:
            raise
        import torch

        library = torch.library.Library("torchvision", "DEF")
        _declared.append(library)
        for operator in ("nms", "qnms"):
            library.define(operator + _SCHEMA)
        import torchvision  # noqa: F401
