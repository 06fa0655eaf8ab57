"""Six steps of training against a plain loop: everything between the interactions and the weights, by hand.

The loop knows the interactions, the stored features, the papers' formulas, and that the users of an epoch come in the
order of `default_rng((seed, epoch)).permutation`. It starts from the project's first weights and calls nothing else of
it. All is float64, so that a difference is a fault and not rounding.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lvlmrec.runs import batches, experiment, loop
from tests.feature_sets import recipe_of, vectors, write_set
from tests.models.sequential.test_sasrec import HEADS, LENGTH, E, plain_sasrec
from tests.toy import Fitting, train_config, write_pairs

SEED, LR, DECAY, CLIP, BATCH, EPOCHS = 5, 0.01, 0.1, 0.2, 8, 2
ITEMS = [f"v{i}" for i in range(1, 19)]
COLUMN = "describe/llm.4/visual_mean"
Parameters = dict[str, Tensor]


def histories() -> list[list[str]]:
    """21 users of 5 to 9 items: three batches, the last of five users. Few items are popular."""
    rng = np.random.default_rng(3)
    shares = 1 / np.arange(1, len(ITEMS) + 1)
    lengths = rng.integers(5, 10, 21)
    rows = [rng.choice(ITEMS, length, replace=False, p=shares / shares.sum()).tolist() for length in lengths]
    assert {item for row in rows for item in row[-(LENGTH + 3) : -2]} == set(ITEMS), "v7 is item_index 7, and all train"
    return rows


@pytest.fixture(scope="module")
def small_world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("golden")
    write_pairs(folder / "interactions", histories())
    write_set(folder / "features", [ITEMS], recipe_of("float32"))
    return folder


def train_sequences() -> list[list[int]]:
    """Training items of leave-one-out: of each user's last L + 3 items all but the last two; v1 is item 1."""
    return [[int(item[1:]) for item in row[-(LENGTH + 3) :][:-2]] for row in histories()]


def train_counts() -> list[int]:
    return [sum(sequence.count(item) for sequence in train_sequences()) for item in range(len(ITEMS) + 1)]


def in_batch_softmax(corrected: bool) -> Callable[..., Tensor]:
    """-log of the label's share of exp(h . e - log popularity) over the items of all positions of the batch, one column
    per occurrence, without those of the user's own items that are not the label."""
    counts = train_counts()

    def loss(query: Tensor, items: Tensor, user: list[int], label: int, batch: list[list[int]], _: Any) -> Tensor:
        def logit(item: int) -> Tensor:
            return query @ items[item] - corrected * float(np.log(counts[item] / sum(counts)))

        columns = [logit(item) for sequence in batch for item in sequence if item not in user]
        return torch.stack([logit(label), *columns]).logsumexp(0) - logit(label)

    return loss


def full_softmax(query: Tensor, items: Tensor, user: list[int], label: int, *_: Any) -> Tensor:
    return (items[1:] @ query).logsumexp(0) - items[label] @ query


def bpr(query: Tensor, items: Tensor, user: list[int], label: int, _: Any, negatives: list[int]) -> Tensor:
    margins = torch.stack([items[label] @ query - items[item] @ query for item in negatives])
    return -(1 / (1 + torch.exp(-margins))).log().mean()


def drawn(sequences: np.ndarray) -> np.ndarray:
    """Two items for each real position, user by user, oldest first: some that the user does not have."""
    rows = []
    for sequence in sequences:
        own = sequence[sequence > 0].tolist()
        others = [item for item in range(1, len(ITEMS) + 1) if item not in own]
        rows += [[others[(7 * item) % len(others)], others[(3 * item + 1) % len(others)]] for item in own[:-1]]
    return np.array(rows)


def item_table(p: Parameters, encoder: str) -> Tensor:
    """e of every item [I + 1, E]: the learned one, or relu(W x + b) of its feature, standardised."""
    if encoder == "id":
        return p["item_encoder.ids.weight"]
    raw = vectors(recipe_of("float32"), ITEMS)[COLUMN].double()
    x = (raw - raw.mean(0)) / raw.var(0, correction=0).sqrt()
    e = x @ p["item_encoder.projection.linear.weight"].T + p["item_encoder.projection.linear.bias"]
    return torch.cat([torch.zeros(1, E, dtype=torch.float64), e.clamp(min=0)])


def mean_loss(p: Parameters, encoder: str, batch: list[list[int]], loss: Callable[..., Tensor]) -> Tensor:
    """Mean over all positions that are followed by an item."""
    items, backbone = item_table(p, encoder), {k.removeprefix("backbone."): v for k, v in p.items()}
    width = max(map(len, batch))
    negatives = iter(drawn(np.array([[0] * (width - len(s)) + s for s in batch])).tolist())
    terms = []
    for sequence in batch:
        queries = plain_sasrec(items[sequence[:-1]], backbone, num_blocks=1)
        for query, label in zip(queries, sequence[1:], strict=True):
            terms.append(loss(query, items, sequence, label, batch, next(negatives)))
    return sum(terms) / len(terms)


def rate(progress: float, scheduled: bool) -> float:
    """Factor of the learning rate: rises over a quarter of all steps, then falls linearly to 0."""
    if not scheduled:
        return LR
    return LR * (progress / 0.25 if progress < 0.25 else (1 - progress) / 0.75)


def plain_loop(
    p: Parameters, encoder: str, loss: Callable[..., Tensor], scheduled: bool, clip: float = CLIP
) -> list[float]:
    """Trains `p` in place: epochs, batches, gradients clipped by their norm, AdamW. Returns each epoch's mean loss."""
    sequences, step, losses = train_sequences(), 0, []
    moments = {name: (torch.zeros_like(w), torch.zeros_like(w)) for name, w in p.items()}
    for epoch in range(EPOCHS):
        order = np.random.default_rng((SEED, epoch)).permutation(len(sequences))
        sums, positions, starts = 0.0, 0, range(0, len(sequences), BATCH)
        for number, start in enumerate(starts):
            batch = [sequences[user] for user in order[start : start + BATCH]]
            value, size = mean_loss(p, encoder, batch, loss), sum(len(s) - 1 for s in batch)
            gradients = torch.autograd.grad(value, list(p.values()))
            norm = sum(g.square().sum() for g in gradients).sqrt()
            assert (norm > clip) == (clip == CLIP), "every step is clipped, or none"
            step, lr = step + 1, rate((epoch + number / len(starts)) / EPOCHS, scheduled)
            with torch.no_grad():
                for (name, weight), gradient in zip(p.items(), gradients, strict=True):
                    gradient = gradient * min(1, clip / (norm.item() + 1e-6))
                    first, second = moments[name]
                    first.mul_(0.9).add_(0.1 * gradient)
                    second.mul_(0.999).add_(0.001 * gradient**2)
                    weight *= 1 - lr * DECAY
                    weight -= lr * (first / (1 - 0.9**step)) / ((second / (1 - 0.999**step)).sqrt() + 1e-8)
            sums, positions = sums + value.item() * size, positions + size
        losses.append(sums / positions)
    return losses


CASES: dict[str, tuple[str, Callable[..., Tensor], dict[str, Any]]] = {
    "in-batch softmax": ("id", in_batch_softmax(True), {}),
    "in-batch softmax, uncorrected": (
        "id",
        in_batch_softmax(False),
        {"training__loss__log_popularity_correction": "false"},
    ),
    "in-batch softmax of features": (
        "replacement",
        in_batch_softmax(True),
        {"model__item_encoder__name": "replacement", "feature_columns": f"[{COLUMN}]"},
    ),
    "full softmax, scheduled": (
        "id",
        full_softmax,
        {"training__loss__name": "full_softmax", "training__schedule": "linear", "training__warmup": 0.25},
    ),
    # Steps of AdamW hardly change with the size of all gradients: unclipped it tells of that from batch to batch.
    "in-batch softmax, unclipped": ("id", in_batch_softmax(True), {"training__gradient_clip": 1e6}),
    "bpr": ("id", bpr, {"training__loss__name": "bpr", "training__loss__negatives": 2}),
}


@pytest.mark.parametrize("case", CASES)
def test_fit_is_the_plain_loop(small_world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    encoder, loss, chosen = CASES[case]
    values: dict[str, Any] = {"seed": SEED, "dataset__max_length": LENGTH, "model__embedding_dim": E}
    values |= {"model__backbone__num_blocks": 1, "model__backbone__num_heads": HEADS, "training__gradient_clip": CLIP}
    values |= {"training__epochs": EPOCHS, "training__lr": LR, "training__batch_size": BATCH, **chosen}
    fit = Fitting(experiment.prepare(train_config(small_world, tmp_path, **values)))
    # Draws have a test of their own; validation, in float32, too.
    monkeypatch.setattr(batches, "draw_negatives", lambda rng, owned, *_: drawn(owned))
    monkeypatch.setattr(loop, "_validate", lambda _, data, *rest: np.full(len(data.validation.targets), 10**6))
    state = fit.new_state()
    state.model.double()
    start = {name: weight.detach().clone() for name, weight in state.model.named_parameters()}
    expected = {name: weight.clone().requires_grad_() for name, weight in start.items()}

    losses = plain_loop(expected, encoder, loss, "training__schedule" in chosen, values["training__gradient_clip"])
    fit.run(state)

    assert [epoch["train_loss"] for epoch in fit.history] == pytest.approx(losses, rel=1e-6)
    for name, weight in state.model.named_parameters():
        assert (expected[name] - start[name]).abs().max() > 1e-3, f"{name}: nothing happened to it"
        # log popularity and scaling are kept in float32
        torch.testing.assert_close(weight, expected[name], rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def test_validation_asks_for_the_last_item_but_one_and_masks_what_was_before(small_world: Path, tmp_path: Path) -> None:
    """Of each user's last L + 3 items: the model reads the L before the target, and all before it are no candidates."""
    values = {"dataset__max_length": LENGTH, "model__embedding_dim": E, "model__backbone__num_blocks": 1}
    values |= {"model__backbone__num_heads": HEADS, "model__backbone__dropout": 0.5, "training__epochs": 1}
    fit = Fitting(experiment.prepare(train_config(small_world, tmp_path, **values)))
    state = fit.run()
    p = {name: weight.detach() for name, weight in state.model.named_parameters()}
    items, backbone = p["item_encoder.ids.weight"], {k.removeprefix("backbone."): v for k, v in p.items()}
    ranks = []
    for row in histories():
        *before, target, _ = [int(item[1:]) for item in row[-(LENGTH + 3) :]]
        query = plain_sasrec(items[before[-LENGTH:]], backbone, num_blocks=1)[-1]
        others = [item for item in range(1, len(ITEMS) + 1) if item not in (target, *before)]
        ranks.append(1 + sum(float(query @ items[item]) >= float(query @ items[target]) for item in others))
    assert len(set(ranks)) > 5
    expected = {}
    for k in (10, 20):
        hits = [rank for rank in ranks if rank <= k]
        expected[f"validation/hr@{k}"] = len(hits) / len(ranks)
        expected[f"validation/ndcg@{k}"] = sum(1 / np.log2(rank + 1) for rank in hits) / len(ranks)
        expected[f"validation/mrr@{k}"] = sum(1 / rank for rank in hits) / len(ranks)
    assert {name: fit.history[-1][name] for name in expected} == pytest.approx(expected)
