"""Features read where they are stored: scaled as when all are read at once, and summed over layers in blocks."""

import pytest
import torch

from lvlmrec.models import item_features
from lvlmrec.models.item_features import ItemFeatures, sum_of_layers
from tests.models.sequential.packing import as_stored

N, T, COLUMNS, D = 7, 9, (3, 0, 2), 5


def features_of(dtype: torch.dtype, scaled: bool) -> ItemFeatures:
    torch.manual_seed(0)
    stored = torch.randn(T, 4, D).to(dtype)
    row = torch.tensor([8, 1, 1, 0, 5, 3, 2])
    missing = torch.zeros(N, len(COLUMNS), dtype=torch.bool)
    missing[3] = True
    missing[5, 1] = True
    for n, layer in missing.nonzero().tolist():
        stored[row[n], COLUMNS[layer]] = 0
    mean, std = (torch.randn(3, D), torch.rand(3, D) + 0.5) if scaled else (None, None)
    if std is not None:
        std[2, 1] = torch.inf  # a dimension that does not vary
    return ItemFeatures([stored[:, list(COLUMNS)]], row, mean, std, missing)


def plain(features: ItemFeatures, dtype: torch.dtype) -> torch.Tensor:
    """Features [N, L, D], read one item and layer at a time."""
    rows = []
    for n, row in enumerate(features.row.tolist()):
        for layer in range(len(COLUMNS)):
            value = features.stored[0][row, layer].to(dtype)
            if features.mean is not None and features.std is not None:
                value = (value - features.mean[layer].to(dtype)) / features.std[layer].to(dtype)
            rows.append(torch.zeros_like(value) if features.missing[n, layer] else value)
    return torch.stack(rows).unflatten(0, (N, len(COLUMNS)))


@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_layer_is_converted_scaled_and_zero_where_it_is_missing(dtype: torch.dtype, scaled: bool) -> None:
    features = features_of(dtype, scaled)
    expected = plain(features, torch.float32)
    for number in range(3):
        torch.testing.assert_close(features.layer(number, torch.float32), expected[:, number])


@pytest.mark.parametrize("at_once", [1, 7 * D, 1 << 17])
@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("layers", [range(3), range(1, 3)])
def test_the_sum_and_its_gradient_are_those_of_all_layers_in_memory(
    monkeypatch: pytest.MonkeyPatch, layers: range, scaled: bool, at_once: int
) -> None:
    monkeypatch.setitem(item_features.VALUES_PER_BLOCK, "cpu", at_once)
    features = features_of(torch.float16, scaled)
    weights = torch.randn(len(layers), dtype=torch.float64, requires_grad=True)
    every = plain(features, torch.float64)[:, layers.start : layers.stop]
    ours, theirs = sum_of_layers(weights, features, layers), torch.einsum("l,nld->nd", weights, every)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    upstream = torch.randn(N, D, dtype=torch.float64)
    gradients = [torch.autograd.grad((out * upstream).sum(), weights)[0] for out in (ours, theirs)]
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-12)


def test_features_as_stored_are_read_as_they_are() -> None:
    values = torch.randn(N, 2, D)
    features = as_stored(values)
    assert torch.equal(features.layer(1, torch.float32), values[:, 1])
    torch.testing.assert_close(
        sum_of_layers(torch.tensor([0.25, 2.0]), features, range(2)), values.mT @ torch.tensor([0.25, 2.0])
    )
