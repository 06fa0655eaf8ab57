"""The losses against their formulas: one position, one column and one negative at a time; gradients too.

The in-batch softmax is compared with MicroLens' form, which has one column per occurrence.
"""

import dataclasses
import math

import pytest
import torch

from lvlmrec.models import softmax
from lvlmrec.models.losses import LOSSES, LossInputs, alignment, in_batch_softmax, uniformity

# Items in several users' sequences, an item twice in one sequence (7), padding of every length, a user without a row.
SEQUENCES = torch.tensor(
    [[0, 0, 3, 9, 7], [7, 3, 7, 2, 5], [0, 0, 0, 9, 11], [2, 9, 4, 3, 11], [0, 0, 0, 0, 8], [0, 5, 7, 2, 9]]
)
E = 4


REAL = SEQUENCES[:, :-1] > 0
USERS, STEPS = REAL.nonzero(as_tuple=True)  # of each real position
NUM_ITEMS = 12
NEGATIVES = torch.tensor([1, 4, 6, 10, 12])  # in nobody's sequence


def loss_inputs(seed=0, users=range(6), num_negatives=0, whole_catalogue=False, popularity=None):
    """Loss inputs of a global batch, its queries and the table [13, E] of all items; `users`: those of the worker.

    popularity: log shares [13].
    """
    torch.manual_seed(seed)
    queries = torch.randn(len(USERS), E, dtype=torch.float64, requires_grad=True)
    table = torch.randn(13, E, dtype=torch.float64, requires_grad=True)
    drawn = NEGATIVES[torch.randint(len(NEGATIVES), (len(USERS), num_negatives))]
    read = torch.arange(1, 13) if whole_catalogue else torch.cat([SEQUENCES.flatten(), drawn.flatten()]).unique()
    item_index = read[read > 0]
    popularity = torch.linspace(-3, -1, 13, dtype=torch.float64) if popularity is None else popularity
    mine = torch.isin(USERS, torch.tensor(list(users)))
    inputs = LossInputs(
        queries=queries[mine],
        labels=SEQUENCES[:, 1:][REAL][mine],
        user_items=SEQUENCES[USERS][mine],
        items=table[item_index],
        item_index=item_index,
        counts=torch.bincount(SEQUENCES.flatten(), minlength=13)[item_index],
        log_popularity=popularity[item_index],
        negatives=drawn[mine] if num_negatives else None,
        num_items=NUM_ITEMS,
    )
    return inputs, queries, table


def duplicated_columns(queries, table, log_popularity):
    """Sum over real positions of -log softmax at the label's own column; log_popularity [13]."""
    num_users, width = SEQUENCES.shape
    total = torch.zeros((), dtype=torch.float64)
    for query, user, step in zip(queries, USERS.tolist(), STEPS.tolist(), strict=True):
        own = set(SEQUENCES[user].tolist()) | {0}
        logits, label = [], None
        for other in range(num_users):
            for place in range(width):
                item = int(SEQUENCES[other, place])
                is_label = (other, place) == (user, step + 1)
                if is_label:
                    label = len(logits)
                if is_label or item not in own:
                    logits.append(query @ table[item] - log_popularity[item])
        row = torch.stack(logits)
        total = total - (row[label] - row.exp().sum().log())
    return total


@pytest.fixture(params=[1, 3, 1 << 19], ids=lambda number: f"{number} logits at once")
def blocks(request, monkeypatch):
    """Losses computed query by query, in a few blocks, and at once."""
    monkeypatch.setitem(softmax.LOGITS_AT_ONCE, "cpu", request.param * NUM_ITEMS)


@pytest.mark.parametrize("with_popularity", [False, True])
def test_equals_the_loss_over_duplicated_columns_gradients_too(with_popularity, blocks):
    popularity = torch.randn(13, dtype=torch.float64)
    inputs, queries, table = loss_inputs(popularity=popularity)
    actual = LOSSES["in_batch_softmax"](log_popularity_correction=with_popularity).sum(inputs)
    expected = duplicated_columns(queries, table, popularity if with_popularity else torch.zeros_like(popularity))
    assert abs(actual.item() - expected.item()) < 1e-10
    for one, other in zip(
        torch.autograd.grad(2 * actual, [queries, table]),
        torch.autograd.grad(2 * expected, [queries, table]),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-10)


def test_a_hand_computed_case():
    """Two users, [1, 2] and [3, 3]: the only foreign item of user 1 is 3, twice; of user 2 items 1 and 2."""
    sequences = torch.tensor([[1, 2], [3, 3]])
    items = torch.tensor([[0.5], [1.0], [-1.0]])
    queries, zeros = torch.tensor([[1.0], [2.0]]), torch.zeros(3)
    counts = torch.tensor([1, 1, 2])
    inputs = LossInputs(queries, torch.tensor([2, 3]), sequences, items, torch.arange(1, 4), counts, zeros, None, 3)
    first = -math.log(math.exp(1) / (math.exp(1) + 2 * math.exp(-1)))
    second = -math.log(math.exp(-2) / (math.exp(-2) + math.exp(1) + math.exp(2)))
    assert in_batch_softmax(inputs, False).item() == pytest.approx(first + second, rel=1e-6)


def test_autocast_multiplies_in_half_precision_and_normalises_in_float32():
    inputs, *_ = loss_inputs()
    single = dataclasses.replace(inputs, queries=inputs.queries.float(), items=inputs.items.float())
    with torch.autocast("cpu", torch.bfloat16):
        half = in_batch_softmax(single, True)
    precise = in_batch_softmax(single, True)
    assert half.dtype == torch.float32 and half.item() != precise.item()
    assert half.item() == pytest.approx(precise.item(), rel=0.02)
    for one, other in zip(
        torch.autograd.grad(half, [single.queries, single.items]),
        torch.autograd.grad(precise, [single.queries, single.items]),
        strict=True,
    ):
        assert one.dtype == torch.float32
        torch.testing.assert_close(one, other, rtol=0.1, atol=0.05)


def test_a_label_that_is_next_to_impossible_costs_what_it_costs():
    """float32 has no probability below 1e-45; the loss, a difference of logits, stays exact."""
    queries, items = torch.tensor([[1.0]], requires_grad=True), torch.tensor([[0.0], [500.0]])
    loss = softmax.softmax_loss(queries, items, torch.tensor([0]))
    assert loss.item() == 500.0
    assert torch.autograd.grad(loss, queries)[0].item() == 500.0


def formula(name, inputs, table):
    """The loss from its formula, one position at a time; table [13, E]."""
    total = torch.zeros((), dtype=torch.float64)
    for place, h in enumerate(inputs.queries):
        score = h @ table[inputs.labels[place]]
        drawn = [h @ table[k] for k in inputs.negatives[place]]
        num = len(drawn)
        if name == "full_softmax":
            total = total - score + sum(torch.exp(h @ table[j]) for j in range(1, 13)).log()
        elif name == "bpr":
            total = total - sum((1 / (1 + torch.exp(-(score - s_k)))).log() for s_k in drawn) / num
        elif name == "sampled_softmax":
            others = sum(11 / num * torch.exp(s_k) for s_k in drawn)
            total = total - (torch.exp(score) / (torch.exp(score) + others)).log()
        elif name == "gbce":
            share, t = num / 11, 0.75
            beta = share * (t * (1 - 1 / share) + 1 / share)
            likelihood = (1 / (1 + torch.exp(-score))) ** beta
            for s_k in drawn:
                likelihood = likelihood * (1 - 1 / (1 + torch.exp(-s_k)))
            total = total - likelihood.log() / (num + 1)
        elif name == "alignment":
            e = table[inputs.labels[place]]
            total = total + ((h / h.norm() - e / e.norm()) ** 2).sum()
    return total


def actual(name, inputs, num_negatives=3):
    if name == "alignment":
        return alignment(inputs)
    settings = {} if name in ("in_batch_softmax", "full_softmax") else {"negatives": num_negatives}
    return LOSSES[name](**settings).sum(inputs)


OTHERS = [name for name in LOSSES if name != "in_batch_softmax"]


EVERY = [*LOSSES, "alignment"]


@pytest.mark.parametrize("name", [*OTHERS, "alignment"])
def test_values_and_gradients_follow_the_formula(name, blocks):
    inputs, queries, table = loss_inputs(num_negatives=3, whole_catalogue=name == "full_softmax")
    ours, theirs = actual(name, inputs), formula(name, inputs, table)
    assert abs(ours.item() - theirs.item()) < 1e-10
    gradients = [torch.autograd.grad(loss, [queries, table], retain_graph=True) for loss in (ours, theirs)]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", EVERY)
def test_the_workers_sums_add_up_and_one_without_a_position_adds_zero(name):
    whole, *_ = loss_inputs(num_negatives=3)
    parts = [loss_inputs(users=users, num_negatives=3)[0] for users in (range(2), range(2, 6))]
    assert abs(sum(actual(name, part) for part in parts).item() - actual(name, whole).item()) < 1e-10
    nobody, _, table = loss_inputs(users=[4], num_negatives=3)  # one item: no next one
    loss = actual(name, nobody)
    gradient = torch.autograd.grad(loss, table)[0]
    assert loss.item() == 0 and gradient.isfinite().all() and gradient.abs().sum() == 0


@pytest.mark.parametrize("name", EVERY)
def test_scores_in_half_precision(name):
    inputs, *_ = loss_inputs(num_negatives=3)
    half = dataclasses.replace(inputs, queries=inputs.queries.bfloat16(), items=inputs.items.bfloat16())
    assert actual(name, half).dtype in (torch.float32, torch.float64)
    assert actual(name, half).item() == pytest.approx(actual(name, inputs).item(), rel=0.05)


def test_gbce_without_calibration_is_binary_cross_entropy_and_with_all_of_it_beta_is_the_share_drawn():
    inputs, *_ = loss_inputs(num_negatives=3)
    positive, negative = inputs.sampled_scores()
    wrong = torch.nn.functional.softplus(negative).sum()
    right = torch.nn.functional.softplus(-positive).sum()
    for t, beta in ((0.0, 1.0), (1.0, 3 / 11)):
        loss = LOSSES["gbce"](negatives=3, calibration=t).sum(inputs)
        torch.testing.assert_close(loss, (beta * right + wrong) / 4)


def test_a_sampled_softmax_that_draws_everything_else_is_the_full_softmax():
    inputs, *_ = loss_inputs(whole_catalogue=True)
    every = torch.arange(1, 13)
    others = torch.stack([every[every != label] for label in inputs.labels])
    read = dataclasses.replace(inputs, negatives=others)
    torch.testing.assert_close(actual("sampled_softmax", read, 11), actual("full_softmax", inputs))


def test_uniformity_follows_the_formula():
    torch.manual_seed(0)
    points = torch.randn(7, E, dtype=torch.float64, requires_grad=True)
    x = [point / point.norm() for point in points]
    pairs = [torch.exp(-2 * ((x[a] - x[b]) ** 2).sum()) for a in range(7) for b in range(a)]
    expected = (sum(pairs) / len(pairs)).log()
    torch.testing.assert_close(uniformity(points), expected, rtol=1e-10, atol=1e-12)
    ours, theirs = (torch.autograd.grad(value, points)[0] for value in (uniformity(points), expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-12)
    assert uniformity(points[:1]).item() == 0
