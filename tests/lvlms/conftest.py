"""Tiny models of every family, written once, and clips to show them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from lvlmrec.lvlms import LVLMS
from lvlmrec.lvlms.encoders.text_encoder import TextFamily
from lvlmrec.lvlms.encoders.vision_encoder import VisionFamily
from lvlmrec.lvlms.files import authors_code
from lvlmrec.lvlms.protocol import Item
from lvlmrec.media.sampling import Clip

torch.set_num_threads(1)
ENCODERS = sorted(name for name, entry in LVLMS.items() if isinstance(entry, TextFamily | VisionFamily))
# code that is not here, see test_video_lavit.py; no model at all, see test_frames.py
WITHOUT_TINY = sorted({*authors_code.FAMILIES, "frames"})
LVLM_FAMILIES = sorted({*LVLMS} - {*ENCODERS, *WITHOUT_TINY, "auto"})
QUICK = {"llava_onevision"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests over all families take minutes: the quick part holds one of them, and one encoder of each kind."""
    for item in items:
        callspec = getattr(item, "callspec", None)
        family, case = (callspec.params.get(name) for name in ("family", "case")) if callspec else (None, None)
        if (family in LVLM_FAMILIES and family not in QUICK) or (case is not None and case not in ENCODERS):
            item.add_marker(pytest.mark.thorough)


TITLES = ("A cat plays the piano", "How to fold a shirt in two seconds, explained slowly for beginners", "surf")


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Family -> directory of its tiny model."""
    root = tmp_path_factory.mktemp("models")
    families = sorted({*LVLMS} - {*WITHOUT_TINY})
    for family in families:
        LVLMS[family].write_tiny(root / family, seed=0)
    return {family: root / family for family in families}


def gradient_clip(height: int, width: int, num_frames: int = 4, seed: int = 0) -> Clip:
    """A drifting colour gradient with noise, 25 frames per second."""
    rng = np.random.default_rng(seed)
    base = np.linspace(0, 1, width)[None, None, :, None] * rng.uniform(60, 200, 3)
    drift = np.arange(num_frames)[:, None, None, None] * rng.uniform(-12, 12, 3)
    frames = base + drift + rng.uniform(0, 40, (num_frames, height, width, 3))
    indices = np.arange(num_frames, dtype=np.int64) * 30
    return Clip(frames.clip(0, 255).astype(np.uint8), indices / 25, indices, 120, 4.8)


@pytest.fixture(scope="session")
def clips() -> list[Clip]:
    """Three clips of different sizes, four frames each."""
    return [gradient_clip(90, 160, seed=1), gradient_clip(160, 90, seed=2), gradient_clip(70, 70, seed=3)]


@pytest.fixture(scope="session")
def make_clip() -> Callable[..., Clip]:
    """`make_clip(height, width, num_frames=4, seed=0)`."""
    return gradient_clip


@pytest.fixture(scope="session")
def items(clips, make_clip) -> list[Item]:
    """The three clips with covers and titles."""
    covers = [make_clip(60, 100, num_frames=1, seed=7), make_clip(100, 60, num_frames=1, seed=8)]
    rows = zip(clips, [*covers, covers[0]], TITLES, strict=True)
    return [Item(f"item{i}", clip, cover, {"title": title}) for i, (clip, cover, title) in enumerate(rows)]
