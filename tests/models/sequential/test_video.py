"""A video encoder inside the recommender: the equation, chunks and recomputation without effect, published weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from lvlmrec.errors import ConfigError
from lvlmrec.models.item_features import ItemFeatures
from lvlmrec.models.sequential.fusions.base import FeatureShape
from lvlmrec.models.sequential.fusions.video import Video, VideoConfig
from lvlmrec.models.sequential.video_encoders import VIDEO_ENCODERS
from lvlmrec.models.sequential.video_encoders.base import normalise
from lvlmrec.models.sequential.video_encoders.videomae import VideoMAE, VideoMAEConfig
from lvlmrec.runs import pretrained

NUM_ITEMS, E, SHAPE = 9, 6, (4, 3, 16, 16)
SIZES: dict[str, Any] = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 40,
    "patch_size": 8,
}
ENCODERS = {"tiny": VIDEO_ENCODERS["tiny"](channels=4, num_blocks=2), "videomae": VideoMAEConfig(**SIZES)}  # type: ignore[call-arg]
INDEX = torch.tensor([1, 2, 4, 5, 7, 8, 9])


def features_of(shape: tuple[int, ...] = SHAPE) -> ItemFeatures:
    """Items 1 to NUM_ITEMS; the fourth asked for has no frames."""
    torch.manual_seed(1)
    stored = torch.randint(0, 256, (NUM_ITEMS + 1, 1, torch.Size(shape).numel()), dtype=torch.uint8)
    missing = torch.zeros(len(INDEX), 1, dtype=torch.bool)
    missing[3] = True
    stored[INDEX[3]] = 0
    return ItemFeatures([stored], INDEX, None, None, missing)


def build(encoder: str, dtype: torch.dtype = torch.float64, **settings: Any) -> Video:
    torch.manual_seed(0)
    config = VideoConfig(encoder=ENCODERS[encoder], **settings)
    module = config.build(NUM_ITEMS, E, [FeatureShape(1, torch.Size(SHAPE).numel(), SHAPE)])
    assert isinstance(module, Video)
    return module.to(dtype)


def gradients(module: nn.Module, out: Tensor) -> dict[str, Tensor]:
    torch.manual_seed(2)
    weights = torch.randn(out.shape, dtype=out.dtype)
    trained = {name: weight for name, weight in module.named_parameters() if weight.requires_grad}
    found = torch.autograd.grad((out * weights).sum(), list(trained.values()))
    return dict(zip(trained, found, strict=True))


@pytest.mark.parametrize("encoder", VIDEO_ENCODERS)
@pytest.mark.parametrize("ids", ["none", "gate"])
def test_values_and_gradients_follow_the_equation_item_by_item(encoder: str, ids: str) -> None:
    module, features = build(encoder, ids=ids), features_of()
    rows = []
    for n, item in enumerate(INDEX.tolist()):
        frames = features.stored[0][item, 0].reshape(1, *SHAPE)
        vector = module.encoder(frames)[0] * (0.0 if features.missing[n, 0] else 1.0)
        v = functional.gelu(module.projection.weight @ vector + module.projection.bias)
        if module.ids is not None and module.gate is not None:
            e_id = module.ids.weight[item]
            g = torch.sigmoid(module.gate.weight @ torch.cat([e_id, v]) + module.gate.bias)
            v = g * e_id + (1 - g) * v
        rows.append(v)
    expected, actual = torch.stack(rows), module(INDEX, features)
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-11)
    theirs = gradients(module, expected)
    assert any(name.startswith("encoder.") for name in theirs)
    for name, gradient in gradients(module, actual).items():
        torch.testing.assert_close(gradient, theirs[name], rtol=1e-8, atol=1e-10, msg=name)


@pytest.mark.parametrize("encoder", VIDEO_ENCODERS)
def test_chunks_and_recomputation_change_nothing(encoder: str) -> None:
    whole = build(encoder, items_at_once=100, gradient_checkpointing=False)
    out = whole(INDEX, features_of())
    expected = gradients(whole, out)
    for settings in ({"items_at_once": 2}, {"items_at_once": 3, "gradient_checkpointing": False}):
        module = build(encoder, **settings)
        ours = module(INDEX, features_of())
        torch.testing.assert_close(ours, out, rtol=1e-10, atol=1e-12)
        for name, gradient in gradients(module, ours).items():
            torch.testing.assert_close(gradient, expected[name], rtol=1e-8, atol=1e-10, msg=name)
    with torch.inference_mode():
        torch.testing.assert_close(build(encoder, items_at_once=2)(INDEX, features_of()), out)
    assert build(encoder)(INDEX[:0], features_of().take(slice(0, 0))).shape == (0, E)


def test_recomputation_keeps_no_activations_and_reads_each_chunk_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes that the graph holds, and chunks encoded, with and without."""
    held, encoded = {}, {}
    for checkpointing in (True, False):
        module, sizes, calls = build("videomae", gradient_checkpointing=checkpointing, items_at_once=2), [], []
        encode = module.encode
        monkeypatch.setattr(module, "encode", lambda chunk, e=encode, c=calls: (c.append(len(chunk.row)), e(chunk))[1])

        def pack(tensor: Tensor, sizes: list[int] = sizes) -> Tensor:
            sizes.append(tensor.numel() * tensor.element_size())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            out = module(INDEX, features_of())
        held[checkpointing] = sum(sizes)
        out.sum().backward()
        encoded[checkpointing] = calls
    assert held[True] < 0.1 * held[False]
    assert encoded == {True: [2, 2, 2, 1, 1, 2, 2, 2], False: [2, 2, 2, 1]}


@pytest.mark.parametrize("encoder", VIDEO_ENCODERS)
def test_frozen_blocks_get_no_gradient_and_the_others_do(encoder: str) -> None:
    module = build(encoder, frozen_blocks=1)
    found = gradients(module, module(INDEX, features_of()))
    assert not any(name.startswith(("encoder.embedding", "encoder.blocks.0")) for name in found)
    assert any(name.startswith("encoder.blocks.1") for name in found)
    assert all(gradient.abs().sum() > 0 for gradient in found.values())
    with pytest.raises(ConfigError, match="frozen_blocks: 3: the encoder has 2"):
        build(encoder, frozen_blocks=3)


def test_features_that_are_no_frames_are_refused() -> None:
    for shapes in ([FeatureShape(1, 8)], [FeatureShape(1, 3072, SHAPE)] * 2):
        with pytest.raises(ConfigError, match="reads one set of stored frames"):
            VideoConfig().build(NUM_ITEMS, E, shapes)
    with pytest.raises(ConfigError, match="do not divide into tubelets of 2 x 8 x 8"):
        VideoMAEConfig(**SIZES).build((5, 3, 16, 16))


def transformers_model(head: str, mean_pooling: bool) -> Any:
    from lvlmrec.lvlms.files import torchvision_shim

    torchvision_shim.ensure_importable()
    import transformers

    config = transformers.VideoMAEConfig(
        **SIZES, image_size=16, num_frames=4, use_mean_pooling=mean_pooling, decoder_num_hidden_layers=1
    )
    torch.manual_seed(3)
    model = getattr(transformers, head)(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(0, 0.2)  # biases and norms too
    return model


@pytest.mark.parametrize("old_names", [False, True])
@pytest.mark.parametrize(
    ("head", "mean_pooling"),
    [("VideoMAEModel", False), ("VideoMAEForPreTraining", False), ("VideoMAEForVideoClassification", True)],
)
def test_published_weights_give_the_states_of_transformers(
    tmp_path: Path, head: str, mean_pooling: bool, old_names: bool
) -> None:
    model = transformers_model(head, mean_pooling)
    model.save_pretrained(tmp_path)
    tensors = {name: weight.contiguous() for name, weight in model.state_dict().items()}
    for new, old in {"query.bias": "q_bias", "value.bias": "v_bias"}.items() if old_names else []:
        assert any(new in name for name in tensors)
        tensors = {name.replace(new, old): weight for name, weight in tensors.items()}
    save_file(tensors, tmp_path / "model.safetensors")  # in place of transformers' own
    settings = VideoMAEConfig(**SIZES, use_mean_pooling=mean_pooling)
    module = VideoConfig(encoder=settings).build(NUM_ITEMS, E, [FeatureShape(1, 3072, SHAPE)])
    assert isinstance(module, Video) and isinstance(module.encoder, VideoMAE)
    module.load_published(*pretrained.read(str(tmp_path)))
    frames = torch.randint(0, 256, (3, *SHAPE), dtype=torch.uint8)
    pixels = normalise(frames, torch.float32)
    with torch.inference_mode():
        base = getattr(model, "videomae", model)
        expected = base(pixels.transpose(1, 2)).last_hidden_state
        torch.testing.assert_close(module.encoder.states(pixels), expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(module.encoder(frames), expected.mean(1), rtol=1e-5, atol=1e-5)


def test_weights_of_another_encoder_are_refused(tmp_path: Path) -> None:
    module = build("videomae")
    with pytest.raises(ConfigError, match=r"no config.json or no .safetensors there"):
        pretrained.read(str(tmp_path))
    model = transformers_model("VideoMAEModel", False)
    model.save_pretrained(tmp_path)
    config, tensors = pretrained.read(str(tmp_path))
    before = pretrained.digest(str(tmp_path))
    for key, value in {"hidden_size": 48, "model_type": "vivit", "use_mean_pooling": True}.items():
        with pytest.raises(ConfigError, match=f"encoder_weights: {key} is {value!r} there"):
            module.load_published(config | {key: value}, tensors)
    with pytest.raises(ConfigError, match=r"no tensor there for blocks\.1\.attention_norm\.bias, "):
        module.load_published(config, {name: value for name, value in tensors.items() if "layer.1" not in name})
    with pytest.raises(ConfigError, match="'tiny' has no published weights"):
        build("tiny").load_published(config, tensors)
    (tmp_path / "config.json").write_text(json.dumps(config | {"hidden_size": 48}))
    assert pretrained.digest(str(tmp_path)) != before


def test_colours_are_scaled_as_published() -> None:
    frames = torch.full((1, 2, 3, 1, 1), 255, dtype=torch.uint8)
    frames[:, 1] = 0
    white, black = normalise(frames, torch.float64)[0, :, :, 0, 0].T
    torch.testing.assert_close(white, torch.tensor([0.515 / 0.229, 0.544 / 0.224, 0.594 / 0.225], dtype=torch.float64))
    torch.testing.assert_close(black, torch.tensor([-0.485 / 0.229, -0.456 / 0.224, -0.406 / 0.225]).double())
