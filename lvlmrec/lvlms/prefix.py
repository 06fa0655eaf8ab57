"""Prompts after a video share the decoder's work on it: one run over what they share, then one over each one's own end.

Positions, masks and deepstack states are not worked out again here: the model's own forward is stopped where it calls
its decoder, and the call is cut in two.

Legend: B clips, P prompts, S positions of a whole sequence, C of what all prompts share, Q of a prompt's own end,
D hidden width; rows of a batch of ends are P * B, prompt by prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

Call = dict[str, Any]  # the keyword arguments of one call of a decoder
_VISUAL_ARGUMENTS = ("visual_pos_masks", "deepstack_visual_embeds")  # of Qwen3-VL; no end holds a visual token


class _Stopped(Exception):
    """Carries a decoder's arguments out of the forward that was about to call it."""

    def __init__(self, call: Call) -> None:
        super().__init__()
        self.call = call


def shared_length(bank: Sequence[Mapping[str, Tensor]], visual_token_id: int) -> int:
    """C, the positions at the start that are the same in all of `bank` (tokens [B, S], padded on the left).

    0 when a visual token lies behind them. Every prompt keeps at least one position of its own.
    """
    shortest = min(tokens["input_ids"].shape[1] for tokens in bank) - 1
    same_S = torch.ones(shortest, dtype=torch.bool, device=bank[0]["input_ids"].device)
    for tokens in bank[1:]:
        for key in ("input_ids", "attention_mask"):
            same_S &= (tokens[key][:, :shortest] == bank[0][key][:, :shortest]).all(dim=0)
    length = int(same_S.long().cumprod(dim=0).sum())
    if any(bool((tokens["input_ids"][:, length:] == visual_token_id).any()) for tokens in bank):
        return 0
    return length


def capture(decoder: nn.Module, forward: Callable[[], Any]) -> Call:
    """The arguments with which `forward` calls `decoder`, which does not run."""

    def stop(module: nn.Module, arguments: tuple[Any, ...], call: Call) -> None:
        raise _Stopped(call)

    handle = decoder.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        forward()
    except _Stopped as stopped:
        return stopped.call
    finally:
        handle.remove()
    raise AssertionError("the forward never called its decoder")


def run_prefix(decoder: nn.Module, call: Call, length: int) -> Any:
    """Run `decoder` over the first `length` positions of `call`. Returns the filled cache."""
    from transformers import DynamicCache

    cut = {
        "inputs_embeds": call["inputs_embeds"][:, :length],
        "attention_mask": call["attention_mask"][:, :length],
        "position_ids": None if call.get("position_ids") is None else call["position_ids"][..., :length],
    }
    if call.get("visual_pos_masks") is not None:
        cut["visual_pos_masks"] = call["visual_pos_masks"][:, :length]
    cache = DynamicCache()
    decoder(**call | cut | {"past_key_values": cache, "use_cache": True})
    return cache


def run_suffixes(decoder: nn.Module, calls: Sequence[Call], length: int, cache: Any) -> None:
    """Run `decoder` over what follows the first `length` positions of each of `calls`, all in one batch [P * B, Q].

    Shorter ends are padded on the right, where causal attention lets nobody look. `cache` is left as it was.
    """
    from transformers import DynamicCache

    longest = max(call["inputs_embeds"].shape[1] for call in calls)
    embeds_RQD = torch.cat([_pad(call["inputs_embeds"][:, length:], longest - length, dim=1) for call in calls])
    mask_RS = torch.cat([_pad(call["attention_mask"], longest, dim=1) for call in calls])
    positions = None
    if calls[0].get("position_ids") is not None:  # [..., B, S]; multimodal RoPE has 3 or 4 of them per token
        ends = [_pad(call["position_ids"][..., length:], longest - length, dim=-1) for call in calls]
        positions = torch.cat(ends, dim=-2)
    # A layer of the copy joins new keys to the old ones in a new tensor: the prefix is never written to.
    copy = DynamicCache(
        [(_repeat(layer.keys, len(calls)), _repeat(layer.values, len(calls))) for layer in cache.layers]
    )
    call = {key: value for key, value in calls[0].items() if key not in _VISUAL_ARGUMENTS}
    suffixes = {"inputs_embeds": embeds_RQD, "attention_mask": mask_RS, "position_ids": positions}
    decoder(**call | suffixes | {"past_key_values": copy, "use_cache": True})


def suffix_mask(masks_BS: Sequence[Tensor], length: int) -> Tensor:
    """bool [P * B, Q]: masks of whole sequences [B, S], cut and padded as `run_suffixes` does."""
    longest = max(mask.shape[1] for mask in masks_BS)
    return torch.cat([_pad(mask[:, length:], longest - length, dim=1) for mask in masks_BS])


def _repeat(tensor: Tensor, times: int) -> Tensor:
    """[B, ...] -> [times * B, ...], the whole batch again and again; no copy when there is nothing to repeat."""
    return tensor if times == 1 else tensor.repeat(times, *[1] * (tensor.ndim - 1))


def _pad(tensor: Tensor, size: int, dim: int) -> Tensor:
    """Zeros behind `tensor` up to `size` along `dim`."""
    shape = list(tensor.shape)
    shape[dim] = size - shape[dim]
    return torch.cat([tensor, tensor.new_zeros(shape)], dim=dim) if shape[dim] else tensor
