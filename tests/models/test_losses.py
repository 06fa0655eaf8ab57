"""The in-batch softmax against MicroLens' form: one column per occurrence, one row and one column at a time."""

import math

import pytest
import torch

from lvlmrec.models.losses import in_batch_softmax

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
