"""A video's tokens merged into a few that remember how many they stand for.

Size-weighted bipartite soft matching: Token Merging (Bolya et al. 2023, https://arxiv.org/abs/2210.09461), on hidden
states instead of attention keys, and down to a number of tokens instead of a number per layer. A round splits the
tokens by even and odd position and merges the most alike pairs, at most half of the tokens.

Legend: B clips, S sequence positions, N tokens that are left, K tokens that are kept, D hidden width; M even, W odd
tokens of N.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

# Equal tokens (a still video) must tie whatever the last bits of their similarity: the first of them wins then.
SIMILARITY_DECIMALS = 5


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
    tokens_BND = tokens_BND.masked_fill(sizes_BN[..., None] == 0, 0.0)
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
    unit_BND = functional.normalize(tokens_BND, dim=-1)
    even_BM, odd_BW = sizes_BN[:, 0::2], sizes_BN[:, 1::2]
    alike_BMW = (unit_BND[:, 0::2] @ unit_BND[:, 1::2].mT).round(decimals=SIMILARITY_DECIMALS)
    alike_BMW = alike_BMW.masked_fill((even_BM[:, :, None] == 0) | (odd_BW[:, None, :] == 0), -torch.inf)
    best_BM, partner_BM = alike_BMW.max(dim=-1)
    rank_BM = best_BM.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    merged_BM = rank_BM < num_merged_B1
    # A product with the one-hot matrix, where scatter_add would sum in another order on every run of a GPU.
    moved_BMW = functional.one_hot(partner_BM, odd_BW.shape[1]) * (merged_BM * even_BM)[..., None]
    grown_BW = odd_BW + moved_BMW.sum(dim=1)
    sums_BWD = tokens_BND[:, 1::2] * odd_BW[..., None] + moved_BMW.mT @ tokens_BND[:, 0::2]
    tokens_BND, sizes_BN = tokens_BND.clone(), sizes_BN.clone()
    tokens_BND[:, 1::2] = sums_BWD / grown_BW.clamp_min(1.0)[..., None]
    sizes_BN[:, 1::2] = grown_BW
    sizes_BN[:, 0::2] = even_BM.masked_fill(merged_BM, 0.0)
    return tokens_BND.masked_fill(sizes_BN[..., None] == 0, 0.0), sizes_BN


def _take(tokens_BND: Tensor, index_BK: Tensor) -> Tensor:
    return tokens_BND.gather(1, index_BK[..., None].expand(-1, -1, tokens_BND.shape[-1]))
