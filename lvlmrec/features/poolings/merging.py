"""A video's tokens merged into a few that remember how many they stand for.

Size-weighted bipartite soft matching: Token Merging (Bolya et al. 2023, https://arxiv.org/abs/2210.09461), on hidden
states instead of attention keys, and down to a number of tokens instead of a number per layer. A round splits the
tokens by even and odd position and merges the most alike pairs, at most half of the tokens.

Legend: B clips, S sequence positions, N tokens that are left, K tokens that are kept, D hidden width; M even, W odd
tokens of N, m and d a part of M and D.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

# Equal tokens (a still video) must tie whatever the last bits of their similarity: the first of them wins then.
SIMILARITY_DECIMALS = 5
NUMBERS_AT_ONCE = 1 << 26  # that a step holds beside the tokens: a quarter of a gigabyte


def merge_tokens(hidden_BSD: Tensor, visual_BS: Tensor, num_kept: int) -> tuple[Tensor, Tensor]:
    """float32 [B, K, D] merged visual tokens in the order of the video, and float32 [B, K] how many each stands for.

    The sizes of a clip sum to its number of visual tokens, and the mean of its merged tokens weighted by size is the
    mean of its visual tokens. A clip with fewer than K ends in zeros of size zero. Rounding in the last bits can
    decide between two pairs that are equally alike, so that neighbours in a batch may change single merged tokens.
    """
    count_B1 = visual_BS.sum(dim=1, keepdim=True)
    num_tokens = int(count_B1.max())
    tokens_BND = _take(hidden_BSD, (~visual_BS).long().argsort(dim=1, stable=True)[:, :num_tokens]).float()
    sizes_BN = (torch.arange(num_tokens, device=count_B1.device) < count_B1).float()
    tokens_BND.masked_fill_(sizes_BN[..., None] == 0, 0.0)
    while num_tokens > num_kept:
        num_tokens = max(num_tokens - num_tokens // 2, num_kept)
        tokens_BND, sizes_BN = _merge_round(tokens_BND, sizes_BN, num_kept)
        order_BN = (sizes_BN == 0).long().argsort(dim=1, stable=True)[:, :num_tokens]
        tokens_BND, sizes_BN = _take(tokens_BND, order_BN), sizes_BN.gather(1, order_BN)
    missing = num_kept - num_tokens
    return functional.pad(tokens_BND, (0, 0, 0, missing)), functional.pad(sizes_BN, (0, missing))


def _merge_round(tokens_BND: Tensor, sizes_BN: Tensor, num_kept: int) -> tuple[Tensor, Tensor]:
    """One round; what was merged into another token stays in its place with size zero."""
    count_B1 = (sizes_BN > 0).sum(dim=1, keepdim=True)
    num_merged_B1 = torch.minimum(count_B1 // 2, (count_B1 - num_kept).clamp_min(0))
    even_BM, odd_BW = sizes_BN[:, 0::2], sizes_BN[:, 1::2]
    best_BM, partner_BM = _most_alike(tokens_BND, even_BM > 0, odd_BW > 0)
    rank_BM = best_BM.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    merged_BM = rank_BM < num_merged_B1
    moved_BM = merged_BM * even_BM
    grown_BW = odd_BW.scatter_add(1, partner_BM, moved_BM)  # whole numbers: exact in any order
    tokens_BND, sizes_BN = tokens_BND.clone(), sizes_BN.clone()
    tokens_BND[:, 1::2] *= odd_BW[..., None]
    _add_moved(tokens_BND, moved_BM, partner_BM)
    tokens_BND[:, 1::2] /= grown_BW.clamp_min(1.0)[..., None]
    sizes_BN[:, 1::2] = grown_BW
    sizes_BN[:, 0::2] = even_BM.masked_fill(merged_BM, 0.0)
    return tokens_BND.masked_fill_(sizes_BN[..., None] == 0, 0.0), sizes_BN


def _most_alike(tokens_BND: Tensor, is_even_BM: Tensor, is_odd_BW: Tensor) -> tuple[Tensor, Tensor]:
    """[B, M]: the similarity of each even token to the odd token most like it, and which of the odd ones that is."""
    odd_BDW = functional.normalize(tokens_BND[:, 1::2], dim=-1).mT
    found = []
    for begin in range(0, is_even_BM.shape[1], rows := max(1, NUMBERS_AT_ONCE // is_odd_BW.numel())):
        behind = begin + rows
        even_BmD = functional.normalize(tokens_BND[:, 0::2][:, begin:behind], dim=-1)
        alike_BmW = (even_BmD @ odd_BDW).round_(decimals=SIMILARITY_DECIMALS)
        alike_BmW.masked_fill_(~(is_even_BM[:, begin:behind, None] & is_odd_BW[:, None, :]), -torch.inf)
        found.append(alike_BmW.max(dim=-1))
    return torch.cat([best for best, _ in found], dim=1), torch.cat([partner for _, partner in found], dim=1)


def _add_moved(tokens_BND: Tensor, moved_BM: Tensor, partner_BM: Tensor) -> None:
    """Add each even token, `moved_BM` times, to its partner among the odd ones, in place.

    In order of position and in float64, where index_add would sum in another order on every run of a GPU.
    """
    num_odd = tokens_BND.shape[1] // 2
    order_BM1 = partner_BM.argsort(dim=1, stable=True)[..., None]
    times_BM1 = moved_BM.gather(1, order_BM1[..., 0])[..., None].double()
    lengths_BW = partner_BM.new_zeros(len(partner_BM), num_odd).scatter_add_(1, partner_BM, torch.ones_like(partner_BM))
    for part_BNd in tokens_BND.split(max(1, NUMBERS_AT_ONCE // (4 * moved_BM.numel())), dim=-1):
        even_BMd = part_BNd[:, 0::2].gather(1, order_BM1.expand(-1, -1, part_BNd.shape[-1])) * times_BM1
        sums = torch.segment_reduce(even_BMd.flatten(0, 1), "sum", lengths=lengths_BW.flatten(), unsafe=True)
        part_BNd[:, 1::2] += sums.unflatten(0, lengths_BW.shape)


def _take(tokens_BND: Tensor, index_BK: Tensor) -> Tensor:
    return tokens_BND.gather(1, index_BK[..., None].expand(-1, -1, tokens_BND.shape[-1]))
