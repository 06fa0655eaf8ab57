"""Each fusion against its equation, written out here from the formula, one layer at a time, values and gradients."""

import itertools

import pytest
import torch

from lvlmrec.models.sequential.fusions import FUSIONS
from lvlmrec.models.sequential.fusions.base import FeatureShape
from tests.models.sequential.packing import as_stored

NUM_ITEMS, E = 6, 4
ITEMS = torch.tensor([3, 1, 6, 3])
ONE_SET = [FeatureShape(3, 5)]
TWO_SETS = [FeatureShape(3, 5), FeatureShape(2, 7)]
DFF_SETTINGS = [
    {"projection": projection, "gate": gate, "gate_size": size}
    for projection, gate, size in itertools.product(
        ("after_sum", "before_sum"), ("linear", "mlp"), ("elementwise", "scalar")
    )
]
# of stored features; what encodes frames has test_video.py
CASES = [(name, {}) for name in FUSIONS if not FUSIONS[name].reads_frames]
CASES += [("dff", settings) for settings in DFF_SETTINGS]


def projected(name, settings, p, sets):
    """v [N, E]; sets: for each feature set its layers, a list of [N, D_k]."""
    dims = [layers[0].shape[1] for layers in sets]
    w, b = p["projection.linear.weight"].split(dims, dim=1), p["projection.linear.bias"]
    if name == "dff":
        exponents = torch.exp(p["layer_logits"])
        alpha = iter(exponents / exponents.sum())
        if settings.get("projection") == "before_sum":
            return sum(
                next(alpha) * (layer @ w_k.T + b).clamp(min=0)
                for w_k, layers in zip(w, sets, strict=True)
                for layer in layers
            )
        h = [sum(next(alpha) * layer for layer in layers) for layers in sets]
    elif name == "mean":
        h = [sum(layers) / len(layers) for layers in sets]
    else:
        h = [layers[0] for layers in sets]
    return (sum(h_k @ w_k.T for h_k, w_k in zip(h, w, strict=True)) + b).clamp(min=0)


def equation(name, settings, p, sets):
    """Plain sums over the formula; p holds the module's parameters by name."""
    if name == "id":
        return torch.stack([p["ids.weight"][i] for i in ITEMS])
    v = projected(name, settings, p, sets)
    if name == "replacement":
        return v
    e_id = torch.stack([p["ids.weight"][i] for i in ITEMS])
    if name == "concatenation":
        return e_id @ p["joint.weight"][:, :E].T + v @ p["joint.weight"][:, E:].T + p["joint.bias"]
    both = torch.cat([e_id, v], dim=1)
    if settings.get("gate") == "mlp":
        hidden = (both @ p["gate.0.weight"].T + p["gate.0.bias"]).clamp(min=0)
        logit = hidden @ p["gate.2.weight"].T + p["gate.2.bias"]
    else:
        logit = both @ p["gate.weight"].T + p["gate.bias"]
    assert logit.shape[1] == (1 if settings.get("gate_size") == "scalar" else E)
    g = 1 / (1 + torch.exp(-logit))
    return g * e_id + (1 - g) * v


@pytest.mark.parametrize("shapes", [ONE_SET, TWO_SETS], ids=["one set", "two sets"])
@pytest.mark.parametrize(("name", "settings"), CASES, ids=lambda x: x if isinstance(x, str) else "-".join(x.values()))
def test_values_and_gradients_follow_the_equation(name, settings, shapes):
    torch.manual_seed(0)
    if FUSIONS[name].layers != "many":
        shapes = [FeatureShape(1, shape.dim) for shape in shapes]
    module = FUSIONS[name](**settings).build(NUM_ITEMS, E, shapes).double()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter)  # biases and layer logits too
    sets = [list(torch.randn(shape.num_layers, len(ITEMS), shape.dim, dtype=torch.float64)) for shape in shapes]
    parameters = dict(module.named_parameters())

    actual = module(ITEMS, as_stored(*(torch.stack(layers, dim=1) for layers in sets)))
    expected = equation(name, settings, parameters, sets)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)

    weights = torch.randn(len(ITEMS), E, dtype=torch.float64)
    actual_gradients = torch.autograd.grad((actual * weights).sum(), list(parameters.values()))
    expected_gradients = torch.autograd.grad((expected * weights).sum(), list(parameters.values()))
    for key, one, other in zip(parameters, actual_gradients, expected_gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12, msg=key)


def test_dff_starts_with_equal_layer_weights_that_sum_to_one_over_all_feature_sets():
    module = FUSIONS["dff"]().build(NUM_ITEMS, E, TWO_SETS)
    torch.testing.assert_close(module.layer_weights(), torch.full((5,), 1 / 5))
    module.layer_logits.data = torch.tensor([0.0, 2.0, -1.0, 0.0, 1.0])
    weights = module.layer_weights()
    assert weights.sum().item() == pytest.approx(1) and weights.argmax() == 1


@pytest.mark.parametrize("projection", ["after_sum", "before_sum"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_stored_half_precision_features_are_computed_in_the_dtype_of_the_weights(dtype, projection):
    torch.manual_seed(0)
    features = torch.randn(len(ITEMS), 3, 5).to(dtype)
    module = FUSIONS["dff"](projection=projection).build(NUM_ITEMS, E, ONE_SET)
    torch.testing.assert_close(
        module(ITEMS, as_stored(features)), module(ITEMS, as_stored(features.float())), rtol=0, atol=0
    )


def test_weights_start_xavier_normal_and_the_padding_row_zero():
    torch.manual_seed(0)
    module = FUSIONS["fusion"]().build(400, 100, [FeatureShape(1, 300)])
    assert module.ids.weight[0].abs().sum() == 0
    assert module.ids.weight[1:].std().item() == pytest.approx((2 / 501) ** 0.5, rel=0.03)
    assert module.projection.linear.weight.std().item() == pytest.approx((2 / 400) ** 0.5, rel=0.03)
    assert module.gate.weight.std().item() == pytest.approx((2 / 300) ** 0.5, rel=0.03)
    assert module.gate.bias.abs().sum() == 0 and module.projection.linear.bias.abs().sum() == 0
