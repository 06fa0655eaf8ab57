"""Packed histories: every real position once, users of one length side by side, nothing of the padding."""

import pytest
import torch

from lvlmrec.models.sequential.backbones import BACKBONES
from lvlmrec.models.sequential.histories import join_runs, pack, split_runs
from tests.models.sequential.packing import grid_mask

LENGTHS = [2, 4, 0, 2, 1, 4, 2]


def test_the_layout_of_a_small_batch() -> None:
    histories = pack(grid_mask(LENGTHS, 4))
    assert histories.runs == [(1, 1), (2, 3), (4, 2)]
    assert histories.users.tolist() == [4, 0, 3, 6, 1, 5]
    assert histories.grid_index.tolist() == [19, 2, 3, 14, 15, 26, 27, 4, 5, 6, 7, 20, 21, 22, 23]
    assert histories.age.tolist() == [0, 1, 0, 1, 0, 1, 0, 3, 2, 1, 0, 3, 2, 1, 0]
    assert histories.ends.tolist() == [0, 2, 4, 6, 10, 14]


def test_runs_are_views_that_join_to_what_was_split() -> None:
    histories = pack(grid_mask(LENGTHS, 4))
    rows = torch.randn(len(histories.grid_index), 3)
    parts = split_runs(rows, histories.runs)
    assert [tuple(part.shape) for part in parts] == [(1, 1, 3), (3, 2, 3), (2, 4, 3)]
    assert all(part.untyped_storage().data_ptr() == rows.untyped_storage().data_ptr() for part in parts)
    assert torch.equal(join_runs(parts, rows), rows)


@pytest.mark.parametrize("name", BACKBONES)
def test_nobody_has_a_history(name: str) -> None:
    histories = pack(grid_mask([0, 0], 4))
    embeddings = torch.zeros(0, 8, requires_grad=True)
    backbone = BACKBONES[name]().build(8, 4)
    assert backbone(embeddings, histories).shape == backbone(embeddings, histories, last=True).shape == (0, 8)


@pytest.mark.parametrize("name", BACKBONES)
def test_the_last_positions_alone_are_those_of_all_positions(name: str) -> None:
    torch.manual_seed(0)
    histories = pack(grid_mask(LENGTHS, 4))
    backbone = BACKBONES[name]().build(8, 4).double().eval()
    embeddings = torch.randn(len(histories.grid_index), 8, dtype=torch.float64)
    every, last = backbone(embeddings, histories), backbone(embeddings, histories, last=True)
    torch.testing.assert_close(last, every[histories.ends], rtol=1e-12, atol=1e-12)
