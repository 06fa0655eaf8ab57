"""The losses against their formulas: one position, one column and one negative at a time; gradients too.

The in-batch softmax is compared with MicroLens' form, which has one column per occurrence.
"""

import dataclasses
import math

import pytest
import torch

from lvlmrec.models.losses import LOSSES, LossInputs, alignment, in_batch_softmax, uniformity

# Items in several users' sequences, an item twice in one sequence (7), padding of every length, a user without a row.
SEQUENCES = torch.tensor(
    [[0, 0, 3, 9, 7], [7, 3, 7, 2, 5], [0, 0, 0, 9, 11], [2, 9, 4, 3, 11], [0, 0, 0, 0, 8], [0, 5, 7, 2, 9]]
)
E = 4


def batch(seed=0):
    """Random hidden [B, S, E] and table [13, E], and what the loss needs to know of the global batch."""
    torch.manual_seed(seed)
    hidden = torch.randn(len(SEQUENCES), SEQUENCES.shape[1] - 1, E, dtype=torch.float64, requires_grad=True)
    table = torch.randn(13, E, dtype=torch.float64, requires_grad=True)
    item_index, counts = SEQUENCES[SEQUENCES > 0].unique(return_counts=True)
    return hidden, table, item_index, counts


def duplicated_columns(hidden, table, log_popularity):
    """Sum over real positions of -log softmax at the label's own column; log_popularity [13]."""
    num_users, width = SEQUENCES.shape
    total = torch.zeros((), dtype=torch.float64)
    for user in range(num_users):
        own = set(SEQUENCES[user].tolist()) | {0}
        for step in range(width - 1):
            if SEQUENCES[user, step] == 0:
                continue
            logits, label = [], None
            for other in range(num_users):
                for place in range(width):
                    item = int(SEQUENCES[other, place])
                    is_label = (other, place) == (user, step + 1)
                    if is_label:
                        label = len(logits)
                    if is_label or item not in own:
                        logits.append(hidden[user, step] @ table[item] - log_popularity[item])
            row = torch.stack(logits)
            total = total - (row[label] - row.exp().sum().log())
    return total


@pytest.mark.parametrize("with_popularity", [False, True])
def test_equals_the_loss_over_duplicated_columns_gradients_too(with_popularity):
    hidden, table, item_index, counts = batch()
    log_popularity = torch.randn(13, dtype=torch.float64) if with_popularity else torch.zeros(13, dtype=torch.float64)
    given = log_popularity[item_index] if with_popularity else None

    actual = in_batch_softmax(hidden, table[item_index], item_index, counts, SEQUENCES, given)
    expected = duplicated_columns(hidden, table, log_popularity)
    assert abs(actual.item() - expected.item()) < 1e-10
    for one, other in zip(
        torch.autograd.grad(actual, [hidden, table]), torch.autograd.grad(expected, [hidden, table]), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-10)


def test_workers_sums_add_up_to_the_loss_of_the_whole_batch():
    hidden, table, item_index, counts = batch()
    whole = in_batch_softmax(hidden, table[item_index], item_index, counts, SEQUENCES)
    parts = [
        in_batch_softmax(hidden[rows], table[item_index], item_index, counts, SEQUENCES[rows])
        for rows in (slice(0, 2), slice(2, 6))
    ]
    assert abs(sum(parts).item() - whole.item()) < 1e-10


def test_padding_positions_take_no_part():
    hidden, table, item_index, counts = batch()
    spoilt = torch.where((SEQUENCES[:, :-1] > 0)[..., None], hidden, torch.nan)
    clean = in_batch_softmax(hidden, table[item_index], item_index, counts, SEQUENCES)
    assert torch.equal(in_batch_softmax(spoilt, table[item_index], item_index, counts, SEQUENCES), clean)


def test_a_worker_without_a_real_position_adds_zero_and_a_zero_gradient():
    hidden, table, item_index, counts = batch()
    loss = in_batch_softmax(hidden[4:5], table[item_index], item_index, counts, SEQUENCES[4:5])
    gradient = torch.autograd.grad(loss, table)[0]
    assert loss.item() == 0 and gradient.abs().sum() == 0


def test_a_hand_computed_case():
    """Two users, [1, 2] and [3, 3]: the only foreign item of user 1 is 3, twice; of user 2 items 1 and 2."""
    sequences = torch.tensor([[1, 2], [3, 3]])
    hidden = torch.tensor([[[1.0]], [[2.0]]])
    items = torch.tensor([[0.5], [1.0], [-1.0]])
    loss = in_batch_softmax(hidden, items, torch.tensor([1, 2, 3]), torch.tensor([1, 1, 2]), sequences)
    first = -math.log(math.exp(1) / (math.exp(1) + 2 * math.exp(-1)))
    second = -math.log(math.exp(-2) / (math.exp(-2) + math.exp(1) + math.exp(2)))
    assert loss.item() == pytest.approx(first + second, rel=1e-6)


def test_half_precision_logits_are_normalised_in_float32():
    hidden, table, item_index, counts = batch()
    args = item_index, counts, SEQUENCES
    half = in_batch_softmax(hidden.bfloat16(), table[item_index].bfloat16(), *args)
    assert half.dtype == torch.float32
    assert half.item() == pytest.approx(in_batch_softmax(hidden, table[item_index], *args).item(), rel=0.02)


NUM_ITEMS = 12
NEGATIVES = torch.tensor([1, 4, 6, 10, 12])  # in nobody's sequence


def given(seed=0, rows=slice(None), num_negatives=3, whole_catalogue=False):
    """A global batch as the losses read it, and the table [13, E] behind its items; `rows` are one worker's users."""
    hidden, table, item_index, _ = batch(seed)
    negatives = NEGATIVES[torch.randint(len(NEGATIVES), (*hidden.shape[:2], num_negatives))]
    item_index = torch.arange(1, 13) if whole_catalogue else torch.cat([item_index, negatives.unique()]).unique()
    counts = torch.bincount(SEQUENCES.flatten(), minlength=13)[item_index]
    popularity = torch.linspace(-3, -1, 13, dtype=torch.float64)[item_index]
    items = table[item_index]
    inputs = LossInputs(
        hidden[rows], items, item_index, counts, popularity, SEQUENCES[rows], negatives[rows], NUM_ITEMS
    )
    return inputs, hidden, table


def positions(inputs):
    """(user, step) of every position with an input and a label."""
    return [(u, s) for u in range(len(inputs.sequences)) for s in range(4) if inputs.sequences[u, s] > 0]


def formula(name, inputs, table):
    """One position after the other; table [13, E]."""
    total = torch.zeros((), dtype=torch.float64)
    for user, step in positions(inputs):
        h = inputs.hidden[user, step]
        score = h @ table[inputs.sequences[user, step + 1]]
        drawn = [h @ table[k] for k in inputs.negatives[user, step]]
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
            e = table[inputs.sequences[user, step + 1]]
            total = total + ((h / h.norm() - e / e.norm()) ** 2).sum()
    return total


def actual(name, inputs, num_negatives=3):
    if name == "alignment":
        return alignment(inputs)
    settings = {} if name in ("in_batch_softmax", "full_softmax") else {"negatives": num_negatives}
    return LOSSES[name](**settings).sum(inputs)


OTHERS = [name for name in LOSSES if name != "in_batch_softmax"]


@pytest.mark.parametrize("name", [*OTHERS, "alignment"])
def test_values_and_gradients_follow_the_formula(name):
    inputs, hidden, table = given(whole_catalogue=name == "full_softmax")
    ours, theirs = actual(name, inputs), formula(name, inputs, table)
    assert abs(ours.item() - theirs.item()) < 1e-10
    for one, other in zip(
        torch.autograd.grad(ours, [hidden, table]), torch.autograd.grad(theirs, [hidden, table]), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("corrected", [True, False])
def test_the_in_batch_softmax_of_the_table_is_the_function_above(corrected):
    inputs, *_ = given(whole_catalogue=True)
    real = inputs.counts > 0
    read = dataclasses.replace(
        inputs,
        items=inputs.items[real],
        item_index=inputs.item_index[real],
        counts=inputs.counts[real],
        log_popularity=inputs.log_popularity[real],
    )
    popularity = read.log_popularity if corrected else None
    expected = in_batch_softmax(read.hidden, read.items, read.item_index, read.counts, read.sequences, popularity)
    assert torch.equal(LOSSES["in_batch_softmax"](log_popularity_correction=corrected).sum(read), expected)


@pytest.mark.parametrize("name", [*OTHERS, "alignment"])
def test_the_workers_sums_add_up_and_one_without_a_position_adds_zero(name):
    whole, *_ = given()
    parts = [given(rows=rows)[0] for rows in (slice(0, 2), slice(2, 6))]
    assert abs(sum(actual(name, part) for part in parts).item() - actual(name, whole).item()) < 1e-10
    nobody, _, table = given(rows=slice(4, 5))  # one item: no next one
    loss = actual(name, nobody)
    gradient = torch.autograd.grad(loss, table)[0]
    assert loss.item() == 0 and gradient.isfinite().all() and gradient.abs().sum() == 0


@pytest.mark.parametrize("name", [*OTHERS, "alignment"])
def test_padding_and_scores_in_half_precision(name):
    inputs, *_ = given()
    real = (SEQUENCES[:, :-1] > 0)[..., None]
    spoilt = dataclasses.replace(inputs, hidden=torch.where(real, inputs.hidden, torch.nan))
    assert torch.equal(actual(name, spoilt), actual(name, inputs))
    half = dataclasses.replace(inputs, hidden=inputs.hidden.bfloat16(), items=inputs.items.bfloat16())
    assert actual(name, half).dtype == torch.float32
    assert actual(name, half).item() == pytest.approx(actual(name, inputs).item(), rel=0.05)


def test_gbce_without_calibration_is_binary_cross_entropy_and_with_all_of_it_beta_is_the_share_drawn():
    inputs, *_ = given()
    positive, negative = inputs.sampled_scores()
    wrong = torch.nn.functional.softplus(negative).sum()
    right = torch.nn.functional.softplus(-positive).sum()
    for t, beta in ((0.0, 1.0), (1.0, 3 / 11)):
        loss = LOSSES["gbce"](negatives=3, calibration=t).sum(inputs)
        torch.testing.assert_close(loss, (beta * right + wrong) / 4)


def test_a_sampled_softmax_that_draws_everything_else_is_the_full_softmax():
    inputs, *_ = given(whole_catalogue=True)
    labels = inputs.sequences[:, 1:]
    every = torch.arange(1, 13).expand(*labels.shape, 12)
    others = torch.where(labels[..., None] > 0, every, every + 1).reshape(-1, 12)
    kept = torch.stack([row[row != max(label, 1)][:11] for row, label in zip(others, labels.flatten(), strict=True)])
    read = dataclasses.replace(inputs, negatives=kept.reshape(*labels.shape, 11))
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
