"""Phi-3.5-vision (https://huggingface.co/microsoft/Phi-3.5-vision-instruct), ported: transformers does not hold it.

Every frame is a picture of 313 tokens. Sequences of up to 4,096 tokens and longer ones have features of their own
kind, see `phi_3_5_vision_model.py`: keep to one number of frames within a feature set.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lvlmrec.errors import ConfigError
from lvlmrec.lvlms.files import checkpoint_files, source
from lvlmrec.lvlms.ports.port import PortedFamily
from lvlmrec.lvlms.protocol import ModelConfig

if TYPE_CHECKING:
    from torch import Tensor

NAME, MODEL_TYPE = "phi_3_5_vision", "phi3_v"


def patches_of_views(hidden: Tensor, inputs: Mapping[str, Any], num_clips: int) -> Sequence[Tensor]:
    """Patch tokens of each clip, [P, D], from views that lie one after another, [R, 1 + P, D], class token first."""
    frames_B, rows_B, columns_B = inputs["video_tiles"].unbind(dim=-1)
    clips = hidden[:, 1:].split((frames_B * (rows_B * columns_B + 1)).tolist())
    return [views.flatten(0, 1) for views in clips]


def read_config(config: ModelConfig) -> Any:
    """The configuration of a published config.json. Raises `ConfigError` when it is of another model."""
    from lvlmrec.lvlms.ports.phi_3_5_vision_model import build_config

    return build_config(source.read_config(config, (MODEL_TYPE,), NAME))


def build(config: ModelConfig, model_config: Any) -> tuple[Any, Any]:
    """The model that `model_config` describes, with the published weights, and its processor. Raises `ConfigError`."""
    from lvlmrec.lvlms.ports.phi_3_5_vision_model import Phi35Vision, unread_weights

    processor = read_processor(config, model_config)
    model_config.video_token_id = model_config.image_token_id = processor.visual_token_id
    unread = unread_weights(model_config)
    return checkpoint_files.load_weights(Phi35Vision, model_config, config, "model.layers", unread), processor


def read_processor(config: ModelConfig, model_config: Any) -> Any:
    """The processor of a model. Raises `ConfigError`."""
    from lvlmrec.lvlms.ports.phi_3_5_vision_processor import PICTURE, Phi35VisionProcessor

    words, vision = checkpoint_files.load_tokenizer(config), model_config.vision_config
    if PICTURE not in words.get_vocab() or words.bos_token_id is None:
        raise ConfigError(f"lvlm.model: {config.model!r}: its tokenizer lacks {PICTURE} or a beginning-of-text token")
    return Phi35VisionProcessor(words, vision.image_size, vision.patch_size)


FAMILY = PortedFamily(
    name=NAME,
    vision_layers="model.vision_embed_tokens.img_processor.vision_model.encoder.layers",
    patches=patches_of_views,
    read_config=read_config,
    read_processor=read_processor,
    build=build,
    shares_prefix=lambda base, lengths_PB: base.shares_prefix(lengths_PB),
)
