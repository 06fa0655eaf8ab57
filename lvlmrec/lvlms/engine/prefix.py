"""Prompts after a video share the decoder's work on it: one run over what they share, then one over each one's own end.

Positions, masks and states of visual tokens are not worked out again here: the model's own forward is stopped where
it calls its decoder, and the call is cut in two.

Legend: B clips, P prompts, S positions of a whole sequence, C of what all prompts share, Q of a prompt's own end,
D hidden width, H heads of W numbers; rows of a batch of ends are P * B, prompt by prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lvlmrec.lvlms.engine.layout import Layout
from lvlmrec.lvlms.engine.pooling import TokenMasks

Call = dict[str, Any]  # the keyword arguments of one call of a decoder


class _Stopped(Exception):
    """Carries a decoder's arguments out of the forward that was about to call it."""

    def __init__(self, call: Call) -> None:
        super().__init__()
        self.call = call


class Prompted(Protocol):
    """What is asked of a prompt here: `bank.Reading`."""

    @property
    def tokens(self) -> Mapping[str, Tensor]: ...
    @property
    def masks(self) -> TokenMasks: ...


def shared_length(bank: Sequence[Prompted]) -> int:
    """C, the positions at the start that are the same in all of `bank`, aligned at their last visual tokens.

    0 when a visual token lies behind them. Every row keeps at least one position of its own prompt.
    """
    shortest = min(_last_position(prompt.masks.attended) for prompt in bank)
    first = bank[0].tokens
    same_S = torch.ones(shortest, dtype=torch.bool, device=first["input_ids"].device)
    for prompt in bank[1:]:
        for key in ("input_ids", "attention_mask"):
            same_S &= (prompt.tokens[key][:, :shortest] == first[key][:, :shortest]).all(dim=0)
    length = int(same_S.long().cumprod(dim=0).sum())
    return 0 if any(bool(prompt.masks.visual[:, length:].any()) for prompt in bank) else length


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


def run_prefix(family: Layout, decoder: nn.Module, call: Call, length: int) -> Any:
    """Run `decoder` over the first `length` positions of `call`. Returns the filled cache.

    Raises `RuntimeError` when the decoder left it empty: what follows would be read as if nothing had come before.
    """
    from transformers import DynamicCache

    masks = call["attention_mask"]
    cut = {
        "inputs_embeds": call["inputs_embeds"][:, :length],
        "attention_mask": {kind: _cut_mask(mask, length) for kind, mask in masks.items()}
        if isinstance(masks, dict)  # one for each type of layer
        else _cut_mask(masks, length),
        "position_ids": None if call.get("position_ids") is None else call["position_ids"][..., :length],
    }
    cut |= {key: call[key][:, :length] for key in family.position_arguments if call.get(key) is not None}
    cache = DynamicCache()
    decoder(**call | cut | {_cache_name(call): cache, "use_cache": True})
    if any(decoder.get_submodule("layers").children()) and cache.get_seq_length() != length:
        raise RuntimeError(f"{type(decoder).__name__} kept {cache.get_seq_length()} of {length} positions in its cache")
    return cache


def run_suffixes(
    family: Layout, decoder: nn.Module, calls: Sequence[Call], attended: Sequence[Tensor], length: int, cache: Any
) -> None:
    """Run `decoder` over what follows the first `length` positions of each of `calls`, all in one batch [P * B, Q].

    No end holds a visual token, so that its attention is causal, whatever it is among those: the decoder makes its own
    masks of `attended`, the calls' padding masks [B, S].
    Shorter ends are padded on the right, where causal attention lets nobody look. `cache` is left as it was.
    """
    longest = max(call["inputs_embeds"].shape[1] for call in calls)

    def ends(key: str) -> Tensor:
        return torch.cat([_pad(call[key][:, length:], longest - length, dim=1) for call in calls])

    mask_RS = torch.cat([_pad(mask_BS, longest, dim=1) for mask_BS in attended])
    positions = None
    if calls[0].get("position_ids") is not None:  # [..., B or 1, S]; multimodal RoPE has 3 or 4 of them per token
        parts = [_pad(call["position_ids"][..., length:], longest - length, dim=-1) for call in calls]
        batch_size = len(calls[0]["inputs_embeds"])
        positions = torch.cat([part.expand(*part.shape[:-2], batch_size, -1) for part in parts], dim=-2)
    call = {key: value for key, value in calls[0].items() if key not in family.visual_arguments}
    suffixes = {"inputs_embeds": ends("inputs_embeds"), "attention_mask": mask_RS, "position_ids": positions}
    suffixes |= {key: ends(key) for key in family.position_arguments if call.get(key) is not None}
    decoder(**call | suffixes | {_cache_name(call): _read_only(cache, len(calls)), "use_cache": True})


def suffix_masks(masks: Sequence[TokenMasks], length: int) -> TokenMasks:
    """Masks [P * B, Q] of what `run_suffixes` runs over, from those of whole sequences [B, S]."""
    longest = max(mask.attended.shape[1] for mask in masks)
    ends = [mask.cut(length, mask.attended.shape[1]) for mask in masks]

    def join(parts: Sequence[Tensor]) -> Tensor:
        return torch.cat([_pad(part, longest - length, dim=1) for part in parts])

    return TokenMasks(
        join([end.attended for end in ends]),
        join([end.visual for end in ends]),
        join([end.new for end in ends]),
        join([end.end for end in ends]),
    )


def _cache_name(call: Call) -> str:
    """What a decoder calls its cache: models that bring their own code keep transformers' name from before 5.24."""
    return "past_key_values" if "past_key_values" in call else "cache"


def _cut_mask(mask: Tensor | None, length: int) -> Tensor | None:
    """The first `length` positions of a padding mask [B, S], or of who sees whom, [B, 1, S, S]."""
    if mask is None:
        return None
    return mask[:, :length] if mask.ndim == 2 else mask[..., :length, :length]


def _last_position(mask_BS: Tensor) -> int:
    """The last true position of the row where it comes first."""
    positions_S = torch.arange(mask_BS.shape[1], device=mask_BS.device)
    return int((mask_BS * positions_S).max(dim=1).values.min())


def _read_only(cache: Any, times: int) -> Any:
    """`cache` for one forward over `times` as many rows, the whole batch again and again.

    A layer gives its part of the prefix with what is new behind it, and keeps neither: beside the prefix itself there
    is never more than one layer of it in memory.
    """
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    class Layer(DynamicLayer):
        def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
            assert self.keys is not None and self.values is not None
            return _behind(self.keys, key_states, times), _behind(self.values, value_states, times)

    shared = DynamicCache()
    for layer in cache.layers:
        one = Layer()
        one.lazy_initialization(layer.keys, layer.values)
        one.keys, one.values = layer.keys, layer.values
        shared.layers.append(one)
    return shared


def _behind(prefix: Tensor, new: Tensor, times: int) -> Tensor:
    """[B, H, C, W] and [times * B, H, Q, W] -> [times * B, H, C + Q, W]."""
    repeated = prefix.expand(times, *prefix.shape)
    return torch.cat([repeated, new.unflatten(0, (times, -1))], dim=-2).flatten(0, 1)


def _pad(tensor: Tensor, size: int, dim: int) -> Tensor:
    """Zeros behind `tensor` up to `size` along `dim`."""
    shape = list(tensor.shape)
    shape[dim] = size - shape[dim]
    return torch.cat([tensor, tensor.new_zeros(shape)], dim=dim) if shape[dim] else tensor
