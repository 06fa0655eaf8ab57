"""GRU4Rec and NextItNet against their equations, written out here one user and one position at a time."""

import pytest
import torch
from torch import Tensor, nn

from lvlmrec.models.sequential.backbones.gru4rec import GRU4RecConfig
from lvlmrec.models.sequential.backbones.nextitnet import NextItNetConfig
from tests.models.sequential.packing import encode_grid, grid_mask

E, LENGTH = 4, 9
LENGTHS = [9, 3, 1]


def plain_gru(x: Tensor, p: dict[str, Tensor]) -> Tensor:
    """One user's real positions alone, x [s, E]; the rows of each weight are those of r, z and n."""
    for block in range(2):
        w_r, w_z, w_n = p[f"gru.weight_ih_l{block}"].split(E)
        u_r, u_z, u_n = p[f"gru.weight_hh_l{block}"].split(E)
        h, states = torch.zeros(E, dtype=x.dtype), []
        for row in x:
            r = 1 / (1 + torch.exp(-(w_r @ row + u_r @ h)))
            z = 1 / (1 + torch.exp(-(w_z @ row + u_z @ h)))
            n = torch.tanh(w_n @ row + r * (u_n @ h))
            h = (1 - z) * n + z * h
            states.append(h)
        x = torch.stack(states)
    return x


def convolve(x: Tensor, weight: Tensor, bias: Tensor, dilation: int) -> Tensor:
    """x [s, E], weight [E, E, 3]: each output reads itself, `dilation` back and twice that."""
    rows = []
    for s in range(len(x)):
        row = bias
        for k in range(3):
            place = s - (2 - k) * dilation
            if place >= 0:
                row = row + weight[:, :, k] @ x[place]
        rows.append(row)
    return torch.stack(rows)


def norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / torch.sqrt((centred**2).mean(-1, keepdim=True) + 1e-8) * weight + bias


def plain_nextitnet(x: Tensor, p: dict[str, Tensor]) -> Tensor:
    for block, dilation in enumerate([1, 4, 1, 4]):
        y = x
        for part, step in (("first", dilation), ("second", 2 * dilation)):
            b = f"blocks.{block}.{part}"
            y = convolve(y, p[f"{b}.weight"], p[f"{b}.bias"], step)
            y = norm(y, p[f"{b}_norm.weight"], p[f"{b}_norm.bias"]).clamp(min=0)
        x = x + y
    return x


@pytest.mark.parametrize(
    ("module", "plain"),
    [
        (GRU4RecConfig(num_blocks=2).build(E, LENGTH), plain_gru),
        (NextItNetConfig().build(E, LENGTH), plain_nextitnet),
    ],
    ids=["gru4rec", "nextitnet"],
)
def test_values_and_gradients_follow_the_equations_on_padded_users(module: nn.Module, plain) -> None:
    torch.manual_seed(0)
    module.double().eval()
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    embeddings = torch.randn(3, LENGTH, E, dtype=torch.float64, requires_grad=True)
    mask = grid_mask(LENGTHS, LENGTH)
    parameters = dict(module.named_parameters())

    actual = encode_grid(module, embeddings, mask)[mask]
    rows = [plain(e[LENGTH - n :], parameters) for e, n in zip(embeddings, LENGTHS, strict=True)]
    expected = torch.cat(rows)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)

    weights = torch.randn_like(expected)
    inputs = [embeddings, *parameters.values()]
    actual_gradients = torch.autograd.grad((actual * weights).sum(), inputs)
    expected_gradients = torch.autograd.grad((expected * weights).sum(), inputs)
    for key, one, other in zip(["input", *parameters], actual_gradients, expected_gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-8, msg=key)


def test_defaults_are_those_of_the_benchmark() -> None:
    gru, nextitnet = GRU4RecConfig(), NextItNetConfig()
    names = {name: tuple(p.shape) for name, p in gru.build(E, LENGTH).named_parameters()}
    assert names == {"gru.weight_ih_l0": (3 * E, E), "gru.weight_hh_l0": (3 * E, E)}
    assert len(nextitnet.build(E, LENGTH).blocks) == 4, "dilations 1 and 4, twice"


def test_gru_dropout_acts_on_the_inputs_in_training_only() -> None:
    torch.manual_seed(0)
    module = GRU4RecConfig(dropout=0.5).build(E, LENGTH)
    embeddings, mask = torch.randn(2, LENGTH, E), torch.ones(2, LENGTH, dtype=torch.bool)
    assert not torch.equal(*(encode_grid(module, embeddings, mask) for _ in range(2)))
    module.eval()
    assert torch.equal(*(encode_grid(module, embeddings, mask) for _ in range(2)))
