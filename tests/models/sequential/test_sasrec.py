"""SASRec against its equations, written out here one user, head and position at a time."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional

from lvlmrec.errors import ConfigError
from lvlmrec.models.sequential.backbones.sasrec import SASRec, SASRecConfig
from lvlmrec.models.sequential.histories import pack
from lvlmrec.models.softmax import softmax_loss
from tests.models.sequential.packing import encode_grid, grid_mask

E, HEADS, LENGTH = 6, 2, 5


def norm(x, weight, bias):
    centred = x - x.mean(-1, keepdim=True)
    return centred / torch.sqrt((centred**2).mean(-1, keepdim=True) + 1e-6) * weight + bias


def attention(x, p, prefix):
    """Multi-head causal attention of one user's real positions, x [s, E], with no bias and no padding."""
    heads = []
    q, k, v = (x @ p[f"{prefix}{name}.weight"].T for name in ("query", "key", "value"))
    for columns in torch.arange(E).chunk(HEADS):
        rows = []
        for s in range(len(x)):
            scores = k[: s + 1, columns] @ q[s, columns] / (E // HEADS) ** 0.5
            share = torch.exp(scores) / torch.exp(scores).sum()
            rows.append(share @ v[: s + 1, columns])
        heads.append(torch.stack(rows))
    return torch.cat(heads, dim=-1) @ p[f"{prefix}output.weight"].T


def plain_sasrec(embeddings, p, num_blocks):
    """One user's real positions alone, embeddings [s, E], the last at position LENGTH - 1."""
    positions = p["positions.weight"][LENGTH - len(embeddings) :]
    x = norm(embeddings + positions, p["norm.weight"], p["norm.bias"])
    for block in range(num_blocks):
        b = f"blocks.{block}."
        x = norm(x + attention(x, p, b), p[b + "attention_norm.weight"], p[b + "attention_norm.bias"])
        inner = (x @ p[b + "inner.weight"].T + p[b + "inner.bias"]).clamp(min=0)
        outer = inner @ p[b + "outer.weight"].T + p[b + "outer.bias"]
        x = norm(x + outer, p[b + "feed_forward_norm.weight"], p[b + "feed_forward_norm.bias"])
    return x


def test_values_and_gradients_follow_the_equations_on_padded_users():
    torch.manual_seed(0)
    module = SASRecConfig().build(E, LENGTH).double().eval()  # as the benchmark: two blocks of two heads
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter)
    lengths = [5, 2, 1]
    embeddings = torch.randn(3, LENGTH, E, dtype=torch.float64)
    mask = grid_mask(lengths, LENGTH)
    parameters = dict(module.named_parameters())

    actual = encode_grid(module, embeddings, mask)[mask]
    rows = [plain_sasrec(e[LENGTH - n :], parameters, 2) for e, n in zip(embeddings, lengths, strict=True)]
    expected = torch.cat(rows)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)

    weights = torch.randn_like(expected)
    actual_gradients = torch.autograd.grad((actual * weights).sum(), list(parameters.values()))
    expected_gradients = torch.autograd.grad((expected * weights).sum(), list(parameters.values()))
    for key, one, other in zip(parameters, actual_gradients, expected_gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-8, msg=key)


def test_query_key_value_and_output_have_no_bias_and_the_feed_forward_is_four_times_wider():
    names = {name: p.shape for name, p in SASRec(E, LENGTH, 1, HEADS, 0.1).named_parameters()}
    assert not [n for n in names if n.endswith(("query.bias", "key.bias", "value.bias", "output.bias"))]
    assert names["blocks.0.inner.weight"] == (4 * E, E) and names["blocks.0.outer.weight"] == (E, 4 * E)


def test_a_tenth_of_the_input_is_dropped_in_training_unless_told_otherwise():
    torch.manual_seed(0)
    module = SASRecConfig(num_blocks=1).build(E, LENGTH)
    module.blocks = torch.nn.ModuleList()
    torch.nn.init.ones_(module.norm.bias)  # so that no entry is 0 unless it is dropped
    embeddings, mask = torch.randn(400, LENGTH, E), torch.ones(400, LENGTH, dtype=torch.bool)
    assert (encode_grid(module, embeddings, mask) == 0).float().mean().item() == pytest.approx(0.1, abs=0.01)


def test_dropout_acts_in_training_only():
    torch.manual_seed(0)
    module = SASRec(E, LENGTH, 2, HEADS, dropout=0.5)
    embeddings, mask = torch.randn(2, LENGTH, E), torch.ones(2, LENGTH, dtype=torch.bool)
    assert not torch.equal(*(encode_grid(module, embeddings, mask) for _ in range(2)))
    module.eval()
    assert torch.equal(*(encode_grid(module, embeddings, mask) for _ in range(2)))


def test_heads_that_do_not_divide_the_width_are_the_users_fault():
    with pytest.raises(ConfigError, match="num_heads: 4 does not divide embedding_dim 6"):
        SASRecConfig(num_heads=4).build(E, LENGTH)


NAMES = {  # RecBole's, of a layer
    "multi_head_attention.query.weight": "query.weight",
    "multi_head_attention.key.weight": "key.weight",
    "multi_head_attention.value.weight": "value.weight",
    "multi_head_attention.dense.weight": "output.weight",
    "multi_head_attention.LayerNorm.weight": "attention_norm.weight",
    "multi_head_attention.LayerNorm.bias": "attention_norm.bias",
    "feed_forward.dense_1.weight": "inner.weight",
    "feed_forward.dense_1.bias": "inner.bias",
    "feed_forward.dense_2.weight": "outer.weight",
    "feed_forward.dense_2.bias": "outer.bias",
    "feed_forward.LayerNorm.weight": "feed_forward_norm.weight",
    "feed_forward.LayerNorm.bias": "feed_forward_norm.bias",
}


def test_recbole_computes_the_same_queries_loss_and_gradients_from_the_same_weights():
    """What RecBole 1.2.1 made of them lies in sasrec_recbole.npz, written by benchmarks/sasrec_recbole.py."""
    reference = dict(np.load(Path(__file__).with_name("sasrec_recbole.npz")))
    reference_weights = {
        key.removeprefix("weights/"): torch.from_numpy(reference[key])
        for key in reference
        if key.startswith("weights/")
    }
    reference_weights = {key: value.requires_grad_() for key, value in reference_weights.items()}
    width, length = (
        reference_weights["item_embedding.weight"].shape[1],
        len(reference_weights["position_embedding.weight"]),
    )
    ours = {"norm.weight": reference_weights["LayerNorm.weight"], "norm.bias": reference_weights["LayerNorm.bias"]}
    for block in range(2):
        ours |= {
            f"blocks.{block}.{name}": reference_weights[f"trm_encoder.layer.{block}.{key}"]
            for key, name in NAMES.items()
        }
    module = SASRec(width, length, num_blocks=2, num_heads=2, dropout=0.1).double().eval()

    queries = []
    for row, n in zip(reference["histories"], reference["lengths"].tolist(), strict=True):
        # RecBole counts positions from a history's first item, this SASRec from its last.
        positions = functional.pad(reference_weights["position_embedding.weight"][:n], (0, 0, length - n, 0))
        items = reference_weights["item_embedding.weight"][torch.from_numpy(row[:n])]
        call = items, pack(torch.ones(1, n, dtype=torch.bool)), True
        queries.append(torch.func.functional_call(module, ours | {"positions.weight": positions}, call))
    torch.testing.assert_close(torch.cat(queries), torch.from_numpy(reference["queries"]), rtol=1e-9, atol=1e-9)

    labels = torch.from_numpy(reference["labels"]) - 1
    loss = softmax_loss(torch.cat(queries), reference_weights["item_embedding.weight"][1:], labels) / len(labels)
    assert loss.item() == pytest.approx(reference["loss"].item(), rel=1e-9)
    shared = [key for key in reference_weights if not key.endswith(("query.bias", "key.bias", "value.bias"))]
    shared = [key for key in shared if not key.endswith("multi_head_attention.dense.bias")]  # which are zero there
    for key, gradient in zip(
        shared, torch.autograd.grad(loss, [reference_weights[key] for key in shared]), strict=True
    ):
        expected = torch.from_numpy(reference[f"gradients/{key}"])
        torch.testing.assert_close(gradient, expected, rtol=1e-8, atol=1e-9, msg=key)
