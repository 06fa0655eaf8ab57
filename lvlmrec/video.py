"""Videos: probing, exact uniform sampling, named errors."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Clip:
    """Frames sampled from one video.

    frames            uint8 [F, H, W, 3], RGB, rotation applied
    timestamps        float64 [F], seconds since the first frame of the video
    frame_indices     int64 [F], position of each frame in display order among the video's frames
    num_source_frames frames that the video has
    duration          seconds from the first frame to the end of the last
    """

    frames: np.ndarray
    timestamps: np.ndarray
    frame_indices: np.ndarray
    num_source_frames: int
    duration: float
