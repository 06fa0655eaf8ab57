"""The contract of every fusion with every backbone."""

import dataclasses
import itertools
import math

import pytest
import torch
from torch.nn import functional

from lvlmrec import config
from lvlmrec.errors import ConfigError
from lvlmrec.models.sequential.backbones import BACKBONES
from lvlmrec.models.sequential.fusions import FUSIONS
from lvlmrec.models.sequential.fusions.base import FeatureShape
from lvlmrec.models.sequential.histories import pack
from lvlmrec.models.sequential.recommender import ModelConfig
from tests.models.sequential.packing import as_stored, encode_grid

NUM_ITEMS, E, LENGTH = 12, 8, 6
DIMS = (5, 3)  # of two feature sets
FRAMES = (2, 3, 16, 16)
PAIRS = list(itertools.product(FUSIONS, BACKBONES))
SEQUENCES = torch.tensor([[0, 0, 0, 4, 7, 1], [5, 3, 2, 9, 8, 12], [0, 0, 0, 0, 0, 6]])


def shapes_of(fusion):
    if FUSIONS[fusion].reads_frames:
        return [FeatureShape(1, math.prod(FRAMES), FRAMES)]
    num_layers = {"none": 0, "one": 1, "many": 3}[FUSIONS[fusion].layers]
    return [FeatureShape(num_layers, dim) for dim in DIMS] if num_layers else []


def random_features(num_items, shapes):
    """[num_items, L, D]: the layers of the feature sets one after the other, zeros behind the narrower one."""
    if shapes[0].frames:
        return torch.randint(0, 256, (num_items, 1, shapes[0].dim), dtype=torch.uint8)
    parts = [torch.randn(num_items, num_layers, dim) for num_layers, dim, *_ in shapes]
    return torch.cat([functional.pad(part, (0, max(DIMS) - part.shape[-1])) for part in parts], dim=1)


def build(fusion, backbone, seed=0, **options):
    torch.manual_seed(seed)
    chosen = {"embedding_dim": E, "item_encoder": {"name": fusion}, "backbone": {"name": backbone}, **options}
    shapes = shapes_of(fusion)
    model = config.load(ModelConfig, [chosen]).build(NUM_ITEMS, LENGTH, shapes)
    return model, random_features(NUM_ITEMS + 1, shapes) if shapes else None


def encode(model, features, sequences):
    """Queries [B, S, E], NaN at padding, as a caller makes them: unique items first, then their sequences."""
    index, places = sequences.unique(return_inverse=True)
    items = model.encode_items(index, None if features is None else as_stored(features[index]))
    return encode_grid(model.encode_sequences, items[places], sequences > 0)


@pytest.mark.parametrize("table", [FUSIONS, BACKBONES])
def test_entries_are_frozen_configurations_that_carry_their_own_name(table):
    for name, entry in table.items():
        assert dataclasses.is_dataclass(entry) and entry().name == name
        with pytest.raises(dataclasses.FrozenInstanceError):
            entry().name = "other"
    assert all(entry.layers in ("none", "one", "many") for entry in FUSIONS.values())


@pytest.mark.parametrize(("fusion", "backbone"), PAIRS)
def test_shapes_are_as_stated_and_padding_items_are_zero(fusion, backbone):
    model, features = build(fusion, backbone)
    index = torch.tensor([0, 3, 3, 12])
    items = model.encode_items(index, None if features is None else as_stored(features[index]))
    assert items.shape == (4, E)
    assert items[0].abs().sum() == 0 and torch.equal(items[1], items[2]) and items[3].abs().sum() > 0
    queries = encode(model, features, SEQUENCES)
    assert queries.shape == (3, LENGTH, E) and queries[SEQUENCES > 0].isfinite().all()


@pytest.mark.parametrize(("fusion", "backbone"), PAIRS)
def test_left_padding_has_no_effect_on_real_positions(fusion, backbone):
    model, features = build(fusion, backbone)
    model.double().eval()
    padded = encode(model, features, SEQUENCES)
    for row, length in enumerate([3, 6, 1]):
        alone = encode(model, features, SEQUENCES[row : row + 1, LENGTH - length :])
        torch.testing.assert_close(padded[row, LENGTH - length :], alone[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("fusion", "backbone"), PAIRS)
def test_a_position_depends_on_itself_and_the_past_alone(fusion, backbone):
    model, features = build(fusion, backbone)
    model.eval()
    before = encode(model, features, SEQUENCES)[1]
    for changed in range(LENGTH):
        sequences = SEQUENCES.clone()
        sequences[1, changed] = 11
        after = encode(model, features, sequences)[1]
        torch.testing.assert_close(after[:changed], before[:changed])
        assert not torch.allclose(after[changed], before[changed])


@pytest.mark.parametrize(("fusion", "backbone"), PAIRS)
def test_the_gradient_reaches_every_parameter_and_not_the_padding_row(fusion, backbone):
    model, features = build(fusion, backbone)
    model.eval()
    queries = encode(model, features, SEQUENCES)[SEQUENCES > 0]
    (queries * torch.randn_like(queries)).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().sum() > 0, name
        if name.endswith("ids.weight"):
            assert parameter.grad[0].abs().sum() == 0


@pytest.mark.parametrize(("fusion", "backbone"), PAIRS)
def test_with_a_temperature_a_score_is_the_cosine_divided_by_it(fusion, backbone):
    model, features = build(fusion, backbone, temperature=0.1)
    model.double().eval()
    index = torch.arange(NUM_ITEMS + 1)
    stored_features = None if features is None else as_stored(features)
    items = model.encode_items(index, stored_features)
    embeddings = model.item_encoder(index, stored_features)
    lengths = embeddings.square().sum(-1, keepdim=True).sqrt()
    torch.testing.assert_close(items[1:], (embeddings / lengths)[1:])
    assert items[0].abs().sum() == 0

    seen = encode_grid(model.backbone, items[SEQUENCES], SEQUENCES > 0)[SEQUENCES > 0]
    cosines = functional.cosine_similarity(seen[:, None], items[None, 1:], dim=-1)
    queries = encode(model, features, SEQUENCES)[SEQUENCES > 0]
    torch.testing.assert_close(queries @ items[1:].T, cosines / 0.1)
    histories = pack(SEQUENCES > 0)
    of_users = model.encode_queries(items[SEQUENCES.flatten()[histories.grid_index]], histories, len(SEQUENCES))
    torch.testing.assert_close(of_users, encode(model, features, SEQUENCES)[:, -1])

    (queries @ items.T).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert not name.endswith("ids.weight") or parameter.grad[0].abs().sum() == 0


@pytest.mark.parametrize(("fusion", "backbone"), PAIRS)
def test_the_same_seed_gives_the_same_model_and_the_same_output(fusion, backbone):
    one, features = build(fusion, backbone)
    same, _ = build(fusion, backbone)
    other, _ = build(fusion, backbone, seed=1)
    outputs = [encode(model.eval(), features, SEQUENCES)[SEQUENCES > 0] for model in (one, same, one, other)]
    assert torch.equal(outputs[0], outputs[1]) and torch.equal(outputs[0], outputs[2])
    assert not torch.equal(outputs[0], outputs[3])


@pytest.mark.parametrize(("fusion", "backbone"), PAIRS)
def test_features_are_not_part_of_the_state(fusion, backbone):
    model, _ = build(fusion, backbone)
    assert not list(model.buffers())
    fresh, features = build(fusion, backbone, seed=1)
    fresh.load_state_dict(model.state_dict())
    ours, theirs = (encode(each.eval(), features, SEQUENCES)[SEQUENCES > 0] for each in (fresh, model))
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("fusion", "shapes"),
    [
        ("fusion", [(2, 5)]),
        ("concatenation", [(1, 5), (2, 3)]),
        ("replacement", []),
        ("replacement", [(0, 5)]),
        ("dff", []),
        ("mean", []),
        ("video", [(1, 5)]),
    ],
)
def test_features_that_do_not_fit_the_fusion_are_the_users_fault(fusion, shapes):
    chosen = config.load(ModelConfig, [{"item_encoder": {"name": fusion}}])
    with pytest.raises(ConfigError, match=f"item_encoder.name: '{fusion}' reads"):
        chosen.build(NUM_ITEMS, LENGTH, [FeatureShape(*shape) for shape in shapes])
