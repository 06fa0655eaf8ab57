"""Which keys of a recipe count in its fingerprint, and which ones in a file this version does not know."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, Field, asdict, fields
from typing import TYPE_CHECKING, Any

from lvlmrec.features.model_recipe import ModelRecipe

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

# The keys that format 3 began with are part of the fingerprint whatever their value. Any other key counts only where
# it differs from its default, so that a new key renames no feature set.
FORMAT_3 = frozenset(
    (
        *("family", "identity", "compute_dtype", "frames", "frame_max_side", "taps", "prompts", "poolings"),
        *("width", "video_options", "seed", "texts_from", "video_form", "video_encoder"),
    )
)
FORMAT_3_PROMPT = frozenset(("text", "place", "input", "max_new_tokens", "stop", "temperature", "top_p"))


def counting(value: DataclassInstance, always: frozenset[str]) -> dict[str, Any]:
    """The keys of a dataclass that count in a fingerprint, with their values as plain ones.

    They are those of `always`, and any others that are not at their default.
    """
    plain = asdict(value)
    return {
        one.name: plain[one.name]
        for one in fields(value)
        if one.init and (one.name in always or getattr(value, one.name) != _default(one))
    }


def of_model(recipe: ModelRecipe) -> dict[str, Any]:
    """Plain values of the keys of a model's recipe that count in its fingerprint."""
    return counting(recipe, FORMAT_3) | {
        "taps": [str(tap) for tap in recipe.taps],
        "prompts": {name: counting(prompt, FORMAT_3_PROMPT) for name, prompt in recipe.prompts.items()},
        "poolings": list(recipe.poolings),
    }


def unknown(kind: type[DataclassInstance], tree: Mapping[str, Any], path: str) -> list[str]:
    """The keys of `tree`, written out as `path`key=value, that `kind` lacks and that are not empty, false or 0."""
    return [f"{path}{key}={value!r}" for key, value in tree.items() if value and key not in _names(kind)]


def known(kind: type[DataclassInstance], tree: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of `tree` that `kind` has."""
    return {key: value for key, value in tree.items() if key in _names(kind)}


def _default(one: Field[Any]) -> Any:
    return one.default if one.default_factory is MISSING else one.default_factory()


def _names(kind: type[DataclassInstance]) -> set[str]:
    return {one.name for one in fields(kind) if one.init}
