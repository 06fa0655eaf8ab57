"""Merged tokens against cases worked out by hand and against a plain loop."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lvlmrec.features.poolings import merging
from lvlmrec.features.poolings.merging import merge_tokens


def plain_merge(tokens: torch.Tensor, num_kept: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The same for one clip [N, D], token by token."""
    kept = [(token.double(), 1.0) for token in tokens]
    while len(kept) > num_kept:
        even, odd = range(0, len(kept), 2), range(1, len(kept), 2)
        pairs = []
        for i in even:
            alike = [round(float(torch.cosine_similarity(kept[i][0], kept[j][0], dim=0)), 5) for j in odd]
            partner = max(range(len(alike)), key=lambda k: alike[k])
            pairs.append((-alike[partner], i, 2 * partner + 1))
        merged = sorted(pairs)[: min(len(kept) // 2, len(kept) - num_kept)]
        sums = [(token * size, size) for token, size in kept]
        for _, i, j in merged:
            sums[j] = (sums[j][0] + kept[i][0] * kept[i][1], sums[j][1] + kept[i][1])
        gone = {i for _, i, _ in merged}
        kept = [(total / size, size) for i, (total, size) in enumerate(sums) if i not in gone]
    return torch.stack([token for token, _ in kept]), torch.tensor([size for _, size in kept])


def random_tokens(num_clips: int, num_tokens: int, dim: int = 12) -> torch.Tensor:
    return torch.randn(num_clips, num_tokens, dim, generator=torch.Generator().manual_seed(num_tokens))


def test_the_most_alike_pair_is_merged_first() -> None:
    tokens = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [0.0, 3.0], [-1.0, 0.0]]])
    everything = torch.ones(1, 4, dtype=torch.bool)
    merged, sizes = merge_tokens(tokens, everything, 3)
    assert sizes.tolist() == [[1.0, 2.0, 1.0]]
    assert merged.tolist() == [[[1.0, 0.0], [0.0, (1 + 3) / 2], [-1.0, 0.0]]]


@pytest.mark.parametrize(("num_tokens", "num_kept"), [(40, 16), (37, 5), (9, 8), (16, 16), (33, 1), (3, 2)])
def test_equals_a_plain_loop(num_tokens: int, num_kept: int) -> None:
    tokens = random_tokens(1, num_tokens)
    merged, sizes = merge_tokens(tokens, torch.ones(1, num_tokens, dtype=torch.bool), num_kept)
    expected, expected_sizes = plain_merge(tokens[0], num_kept)
    assert sizes[0].tolist() == expected_sizes.tolist()
    torch.testing.assert_close(merged[0].double(), expected, rtol=1e-5, atol=1e-5)


def test_sizes_sum_to_the_tokens_and_their_weighted_mean_is_the_mean() -> None:
    tokens, visual = random_tokens(3, 60), torch.zeros(3, 60, dtype=torch.bool)
    visual[0, 5:] = visual[1, 10:30] = visual[2, ::3] = True
    merged, sizes = merge_tokens(tokens, visual, 8)
    assert merged.shape == (3, 8, 12)
    assert sizes.sum(dim=1).tolist() == [55.0, 20.0, 20.0]
    for row in range(3):
        mean = (merged[row] * sizes[row, :, None]).sum(dim=0) / sizes[row].sum()
        torch.testing.assert_close(mean, tokens[row][visual[row]].mean(dim=0), rtol=1e-5, atol=1e-5)


def test_clips_of_different_length_do_not_touch_each_other() -> None:
    tokens, visual = random_tokens(3, 50), torch.zeros(3, 50, dtype=torch.bool)
    visual[0, 2:49] = visual[1, 20:33] = visual[2, 7:10] = True
    tokens[~visual] = float("nan")  # text and padding never enter
    merged, sizes = merge_tokens(tokens, visual, 6)
    for row in range(3):
        alone, alone_sizes = merge_tokens(tokens[row : row + 1], visual[row : row + 1], 6)
        assert torch.equal(alone_sizes[0], sizes[row])
        torch.testing.assert_close(alone[0], merged[row], rtol=1e-6, atol=1e-6)


def test_fewer_tokens_than_asked_end_in_nothing() -> None:
    tokens = random_tokens(1, 5)
    merged, sizes = merge_tokens(tokens, torch.tensor([[True, False, True, True, False]]), 4)
    assert sizes.tolist() == [[1.0, 1.0, 1.0, 0.0]]
    assert torch.equal(merged[0, :3], tokens[0, [0, 2, 3]])
    assert not merged[0, 3].any()


def test_a_still_video_merges_the_same_way_whatever_the_last_bits() -> None:
    tokens = random_tokens(1, 1).expand(1, 64, 12).contiguous()
    everything = torch.ones(1, 64, dtype=torch.bool)
    noise = 1 + 1e-7 * random_tokens(1, 64)
    assert torch.equal(merge_tokens(tokens, everything, 16)[1], merge_tokens(tokens * noise, everything, 16)[1])


class Largest(TorchDispatchMode):
    """The bytes of the largest tensor that an operation makes."""

    num_bytes = 0

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
        made = function(*arguments, **(named or {}))
        for tensor in made if isinstance(made, tuple) else (made,):
            if isinstance(tensor, torch.Tensor):
                self.num_bytes = max(self.num_bytes, tensor.untyped_storage().nbytes())
        return made


@pytest.mark.parametrize(("num_clips", "num_tokens"), [(1, 900), (3, 500), (2, 701)])
def test_what_is_held_at_once_is_bounded_and_changes_nothing(
    num_clips: int, num_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = random_tokens(num_clips, num_tokens)
    everything = torch.ones(num_clips, num_tokens, dtype=torch.bool)
    expected, sizes = merge_tokens(tokens, everything, 16)
    monkeypatch.setattr(merging, "NUMBERS_AT_ONCE", 4096)
    with Largest() as largest:
        merged, merged_sizes = merge_tokens(tokens, everything, 16)
    assert torch.equal(merged_sizes, sizes)
    torch.testing.assert_close(merged, expected, rtol=1e-6, atol=1e-6)
    # a row of similarities for each clip, or the tokens themselves
    assert largest.num_bytes <= max(4 * 4096, 4 * num_clips * num_tokens, tokens.untyped_storage().nbytes())


@pytest.mark.thorough
def test_the_mean_of_very_many_like_tokens_keeps_its_bits() -> None:
    tokens = 1 + 1e-3 * random_tokens(1, 20_000, dim=2).abs()
    merged, sizes = merge_tokens(tokens, torch.ones(1, 20_000, dtype=torch.bool), 1)
    assert sizes.tolist() == [[20_000.0]]
    torch.testing.assert_close(merged[0, 0].double(), tokens[0].double().mean(dim=0), rtol=3e-7, atol=0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_merges_the_same_way_each_time_and_as_a_cpu_does() -> None:
    tokens, everything = random_tokens(2, 3000, dim=64), torch.ones(2, 3000, dtype=torch.bool)
    expected, sizes = merge_tokens(tokens, everything, 16)
    runs = [merge_tokens(tokens.cuda(), everything.cuda(), 16) for _ in range(5)]
    for merged, merged_sizes in runs:
        assert torch.equal(merged, runs[0][0])
        assert torch.equal(merged_sizes.cpu(), sizes)
        torch.testing.assert_close(merged.cpu(), expected, rtol=1e-5, atol=1e-5)
