"""Video encoders that are trained with the recommender: frames in, one vector out. One file and one line each."""

from lvlmrec.models.sequential.video_encoders.base import VideoEncoderConfig
from lvlmrec.models.sequential.video_encoders.tiny import TinyConfig
from lvlmrec.models.sequential.video_encoders.videomae import VideoMAEConfig

VIDEO_ENCODERS: dict[str, type[VideoEncoderConfig]] = {
    "tiny": TinyConfig,
    "videomae": VideoMAEConfig,
}
