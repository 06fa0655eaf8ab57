"""Phi-3.5-vision's pictures: tiles, tokens and views, against the published transform."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lvlmrec.lvlms.ports import phi_3_5_vision_processor as processor_file
from tests.lvlms.ports import phi_3_5_vision_reference as plain


@pytest.mark.parametrize(
    ("num_crops", "size", "count"),
    [
        (1, (1280, 720), 313),
        (1, (720, 1280), 313),
        (1, (64, 64), 313),
        (4, (1280, 720), 757),
        (16, (1280, 720), 2353),
        (16, (640, 480), 1921),
        (16, (500, 500), 2509),
    ],
)
def test_tokens_of_a_picture(num_crops: int, size: tuple[int, int], count: int) -> None:
    tiles = processor_file.plan_tiles(size, 336, num_crops)
    assert processor_file.num_tokens(*tiles) == count


@pytest.mark.parametrize("size", [(1280, 720), (720, 1280), (640, 480), (333, 500), (800, 131), (60, 60), (336, 672)])
@pytest.mark.parametrize("num_crops", [1, 4, 16])
def test_views_are_the_published_transform(size: tuple[int, int], num_crops: int) -> None:
    frame = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8)
    tiles = processor_file.plan_tiles(size, 336, num_crops)
    expected, rows, columns = plain.hd_transform(frame, 336, num_crops)
    assert tiles == (rows, columns)
    torch.testing.assert_close(processor_file.make_views(frame, tiles, 336), expected, rtol=0, atol=0)


def test_a_strip_of_pixels_has_a_height() -> None:
    frame = np.zeros((1, 1000, 3), np.uint8)
    assert processor_file.make_views(frame, processor_file.plan_tiles((1000, 1), 336, 4), 336).shape[1:] == (
        3,
        336,
        336,
    )
