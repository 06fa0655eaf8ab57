"""A small convolutional encoder with random initial weights: for the sample and for tests."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from lvlmrec.config import option
from lvlmrec.errors import ConfigError
from lvlmrec.models.sequential.video_encoders.base import VideoEncoder, VideoEncoderConfig, normalise

GROUPS = 4


@dataclass(frozen=True)
class TinyConfig(VideoEncoderConfig):
    """Convolutions that each halve the frames, the last one also over time; mean over pixels and frames."""

    name: str = option("tiny", "a few convolutions, from random weights")
    channels: int = option(16, "channels of the first convolution; each of the next has twice as many", minimum=GROUPS)
    num_blocks: int = option(3, "convolutions after the first", minimum=1)

    def check(self) -> None:
        if self.channels % GROUPS:
            raise ConfigError(f"channels: {self.channels} is not a multiple of {GROUPS}, the groups of its norms")

    def build(self, shape: tuple[int, ...]) -> VideoEncoder:
        return Tiny(self.channels, self.num_blocks)


class Tiny(VideoEncoder):
    """Block: GELU(GroupNorm(Conv 3 x 3, stride 2)), the last one over 3 frames too. No norm is over several items."""

    def __init__(self, channels: int, num_blocks: int) -> None:
        super().__init__()
        self.width = channels * 2**num_blocks
        self.embedding = _block(3, channels, 1)
        sizes = [channels * 2**number for number in range(num_blocks + 1)]
        self.blocks = nn.ModuleList(
            _block(sizes[k], sizes[k + 1], 3 if k + 1 == num_blocks else 1) for k in range(num_blocks)
        )

    def forward(self, frames: Tensor) -> Tensor:
        x = self.embedding(normalise(frames, next(self.parameters()).dtype))
        for block in self.blocks:
            x = block(x)
        return x.mean(dim=(2, 3, 4))


def _block(inputs: int, outputs: int, frames: int) -> nn.Module:
    convolution = nn.Conv3d(inputs, outputs, (frames, 3, 3), stride=(1, 2, 2), padding=(frames // 2, 1, 1))
    return nn.Sequential(convolution, nn.GroupNorm(GROUPS, outputs), nn.GELU())
