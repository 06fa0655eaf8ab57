"""A model that kills its process; apart from the tests, because every one of Ray's workers imports it."""

from __future__ import annotations

import os
import signal
from typing import Any

from lvlmrec.lvlms import LVLMS


class Deadly:
    """The text encoder, whose process dies when a title says so."""

    def __init__(self, family: Any) -> None:
        self.family = family
        self.name = family.name

    def inspect(self, config: Any) -> Any:
        return self.family.inspect(config)

    def load(self, config: Any, recipe: Any) -> Any:
        model = self.family.load(config, recipe)
        prepare = model.prepare

        def die(items: Any) -> Any:
            if any("deadly" in item.texts["title"] for item in items):
                os.kill(os.getpid(), signal.SIGKILL)
            return prepare(items)

        model.prepare = die
        return model


def register() -> None:
    """First thing in each of Ray's workers."""
    LVLMS["text_encoder"] = Deadly(LVLMS["text_encoder"])  # type: ignore[index]
