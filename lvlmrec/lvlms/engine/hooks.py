"""Hooks that hand every tapped hidden state to whoever reads the forward under way, and the decoder cut above them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lvlmrec.features.model_recipe import ModelRecipe
from lvlmrec.taps import PROJECTOR, Tap

Pool = Callable[[Tap, Tensor], None]


def ignore(tap: Tap, hidden: Tensor) -> None:
    """A `Pool` for forwards whose states nobody reads."""


def on_output(module: nn.Module, tap: Tap, pool: Pool) -> None:
    """Call `pool(tap, hidden)` with what `module` returns, first of several, inside every forward."""

    def hook(module: nn.Module, arguments: Any, output: Any) -> None:
        pool(tap, output[0] if isinstance(output, tuple) else output)

    module.register_forward_hook(hook)


def on_input(module: nn.Module, tap: Tap, pool: Pool) -> None:
    """Call `pool(tap, hidden)` with what `module` is called with, first or as `hidden_states`, inside every forward."""

    def hook(module: nn.Module, arguments: tuple[Tensor, ...], named: dict[str, Any]) -> None:
        pool(tap, arguments[0] if arguments else named["hidden_states"])

    module.register_forward_pre_hook(hook, with_kwargs=True)


class Hooks:
    """The taps of a recipe on a loaded base model. `pool(tap, hidden)` is called inside the forward; set it before.

    The decoder ends at the highest tap; `whole_decoder` lends the layers above it, for an answer.
    """

    def __init__(self, base: Any, vision_layers: str, recipe: ModelRecipe, num_layers: int) -> None:
        self.pool: Pool = ignore
        self._decoder = base.get_decoder()
        self._layers, self._norm = self._decoder.layers, self._decoder.norm
        self._top = max((tap.layer for tap in recipe.taps if tap.tower == "llm"), default=0)
        self._end = self._norm if self._top == num_layers else nn.Identity()
        towers = {"llm": self._layers, "vision": base.get_submodule(vision_layers)}
        for tap in recipe.taps:
            if tap.tower != PROJECTOR:  # read off the tower's output
                self._attach(tap, towers[tap.tower], num_layers)
        self._cut()

    def compile(self) -> None:
        """Compile each layer of the decoder; hooks stay outside, so that what they pool is not traced."""
        for layer in self._layers:
            layer.forward = torch.compile(layer.forward, dynamic=True)

    @contextlib.contextmanager
    def whole_decoder(self) -> Iterator[None]:
        """The decoder with all its layers and its norm."""
        self._decoder.layers, self._decoder.norm = self._layers, self._norm
        try:
            yield
        finally:
            self._cut()

    def _cut(self) -> None:
        self._decoder.layers, self._decoder.norm = self._layers[: self._top], self._end

    def _attach(self, tap: Tap, layers: Any, num_layers: int) -> None:
        if tap.pre_norm:
            on_input(self._norm, tap, self._hand_over)
        elif tap == Tap("llm", num_layers):
            on_output(self._norm, tap, self._hand_over)
        elif tap.layer > 0:
            # Hugging Face counts what a layer returns, before some decoders add the tower's features to it
            on_output(layers[tap.layer - 1], tap, self._hand_over)
        else:
            first = layers[0] if tap.tower == "vision" or self._top else self._end
            on_input(first, tap, self._hand_over)

    def _hand_over(self, tap: Tap, hidden: Tensor) -> None:
        self.pool(tap, hidden)
