"""Each fusion against its equation, written out here from the formula, values and gradients."""

import pytest
import torch

from lvlmrec.models.fusions import FUSIONS

NUM_ITEMS, E, L, D = 6, 4, 3, 5
ITEMS = torch.tensor([3, 1, 6, 3])


def equation(name, p, features):
    """Plain sums over the formula; p holds the module's parameters by name, features [N, L, D]."""
    if name == "id":
        return torch.stack([p["ids.weight"][i] for i in ITEMS])
    if name == "dff":
        w = p["layer_logits"]
        alpha = torch.exp(w) / torch.exp(w).sum()
        h = sum(alpha[layer] * features[:, layer] for layer in range(L))
    else:
        h = features[:, 0]
    v = (h @ p["projection.linear.weight"].T + p["projection.linear.bias"]).clamp(min=0)
    if name == "replacement":
        return v
    e_id = torch.stack([p["ids.weight"][i] for i in ITEMS])
    w_id, w_v = p["gate.weight"][:, :E], p["gate.weight"][:, E:]
    g = 1 / (1 + torch.exp(-(e_id @ w_id.T + v @ w_v.T + p["gate.bias"])))
    return g * e_id + (1 - g) * v


@pytest.mark.parametrize("name", FUSIONS)
def test_values_and_gradients_follow_the_equation(name):
    torch.manual_seed(0)
    num_layers = L if FUSIONS[name].layers == "many" else 1
    module = FUSIONS[name]().build(NUM_ITEMS, E, num_layers, D).double()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter)  # biases and layer logits too
    features = torch.randn(len(ITEMS), num_layers, D, dtype=torch.float64)
    parameters = dict(module.named_parameters())

    actual = module(ITEMS, features)
    expected = equation(name, parameters, features)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)

    weights = torch.randn(len(ITEMS), E, dtype=torch.float64)
    actual_gradients = torch.autograd.grad((actual * weights).sum(), list(parameters.values()))
    expected_gradients = torch.autograd.grad((expected * weights).sum(), list(parameters.values()))
    for key, one, other in zip(parameters, actual_gradients, expected_gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12, msg=key)


def test_dff_starts_with_equal_layer_weights_that_sum_to_one():
    module = FUSIONS["dff"]().build(NUM_ITEMS, E, L, D)
    torch.testing.assert_close(module.layer_weights(), torch.full((L,), 1 / 3))
    module.layer_logits.data = torch.tensor([0.0, 2.0, -1.0])
    weights = module.layer_weights()
    assert weights.sum().item() == pytest.approx(1) and weights.argmax() == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_stored_half_precision_features_are_computed_in_the_dtype_of_the_weights(dtype):
    torch.manual_seed(0)
    features = torch.randn(len(ITEMS), L, D).to(dtype)
    module = FUSIONS["dff"]().build(NUM_ITEMS, E, L, D)
    torch.testing.assert_close(module(ITEMS, features), module(ITEMS, features.float()), rtol=0, atol=0)


def test_weights_start_xavier_normal_and_the_padding_row_zero():
    torch.manual_seed(0)
    module = FUSIONS["fusion"]().build(400, 100, 1, 300)
    assert module.ids.weight[0].abs().sum() == 0
    assert module.ids.weight[1:].std().item() == pytest.approx((2 / 501) ** 0.5, rel=0.03)
    assert module.projection.linear.weight.std().item() == pytest.approx((2 / 400) ** 0.5, rel=0.03)
    assert module.gate.weight.std().item() == pytest.approx((2 / 300) ** 0.5, rel=0.03)
    assert module.gate.bias.abs().sum() == 0 and module.projection.linear.bias.abs().sum() == 0
