"""The recipe of a feature set: where its values come from, which columns there are, and the fingerprint of both."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

from lvlmrec import taps
from lvlmrec.errors import ConfigError, InputError
from lvlmrec.features import recipe_keys, sources
from lvlmrec.features.model_recipe import ModelRecipe, Prompt
from lvlmrec.features.poolings.pooling import SIZES
from lvlmrec.features.sources import ArrayRecipe, FramesRecipe, Reading, Source
from lvlmrec.taps import FeatureName

DTYPES = ("float16", "bfloat16", "float32")
FORMAT = 4  # of recipe.json
FINGERPRINT = "fingerprint"
# Counted up when sampling, pooling or naming change what a feature is. The fingerprint is a hash of what recipe.json
# held in format 3.
HASHED_FORMAT = 3
KINDS = {"model": ModelRecipe, "frames": FramesRecipe, "array": ArrayRecipe}


@dataclass(frozen=True)
class Column:
    """A feature column: the shape of one item's value, and the dtype in which it is stored."""

    name: FeatureName
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class Recipe:
    """What a feature set is.

    source      where values come from: a model, sampled frames, or an array that was imported
    dtype       in which features are stored
    columns     the feature columns, in order
    text_names  the columns of text that the model generated
    """

    source: Source
    dtype: str
    columns: tuple[Column, ...]
    text_names: tuple[str, ...] = ()
    # as recipe.json has it; not of the constructor, so that a recipe made from this one has a fingerprint of its own
    _stored_fingerprint: str = field(default="", init=False, compare=False, repr=False)

    @cached_property
    def feature_names(self) -> tuple[FeatureName, ...]:
        """The names of the feature columns, in order."""
        return tuple(column.name for column in self.columns)

    @property
    def vector_names(self) -> tuple[FeatureName, ...]:
        """The feature columns that hold one vector, of the width of their tap, or all pixels of an item."""
        return tuple(
            column.name for column in self.columns if len(column.shape) != 2 and not column.name.pooling.endswith(SIZES)
        )

    @property
    def reading(self) -> Reading:
        """What is read of each item by an extraction. Raises `TypeError` of an import, which reads none."""
        if isinstance(self.source, ArrayRecipe):
            raise TypeError(f"{self.source.name}: an imported array is not extracted")
        return self.source

    def column(self, name: FeatureName) -> Column:
        """The column of this name."""
        return self.columns[self.feature_names.index(name)]

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits: the hash of what changes a feature; of a recipe that was read, the one that was stored."""
        if self._stored_fingerprint:
            return self._stored_fingerprint
        model = self.source if isinstance(self.source, ModelRecipe) else self.source.in_format_3()
        tree = recipe_keys.of_model(model) | {"dtype": self.dtype, "format": HASHED_FORMAT}
        return hashlib.blake2b(json.dumps(tree, sort_keys=True).encode(), digest_size=8).hexdigest()

    def to_json(self) -> dict[str, Any]:
        """Plain values; `Recipe.from_json` reads them back."""
        if isinstance(self.source, ModelRecipe):
            source = recipe_keys.of_model(self.source)
        else:
            source = asdict(self.source)
        if isinstance(self.source, ArrayRecipe):
            source["layers"] = [str(tap) for tap in self.source.layers]
        (kind,) = (name for name, each in KINDS.items() if isinstance(self.source, each))
        return {
            "source": {"kind": kind, **source},
            "dtype": self.dtype,
            "columns": [
                {"name": str(column.name), "shape": list(column.shape), "dtype": column.dtype}
                for column in self.columns
            ],
            "text_columns": list(self.text_names),
            "format": FORMAT,
            FINGERPRINT: self.fingerprint,
        }

    @staticmethod
    def from_json(tree: Mapping[str, Any]) -> Recipe:
        """The recipe that `to_json` wrote, here or in format 3, under the `fingerprint` that was stored, if one was.

        Unknown keys that are empty, false or 0 have no effect. Raises `ConfigError` on another format, `InputError` on
        unknown keys with any other value.
        """
        if tree.get("format") == HASHED_FORMAT:
            flat = {key: value for key, value in tree.items() if key not in ("format", "dtype", FINGERPRINT)}
            recipe = make(sources.of_format_3(_model_of(flat, [])), tree["dtype"])
        elif tree.get("format") == FORMAT:
            recipe = _read(tree)
        else:
            raise ConfigError(
                f"recipe format {tree.get('format')!r}: this version of lvlmrec reads formats {HASHED_FORMAT} and "
                f"{FORMAT}; read the set with the version that made it, or extract it again"
            )
        object.__setattr__(recipe, "_stored_fingerprint", tree.get(FINGERPRINT, ""))
        return recipe


def make(source: Source, dtype: str) -> Recipe:
    """The recipe of what a source has, stored in `dtype`; counts keep float32, which float16 has up to 2048 only."""
    columns = tuple(
        Column(name, shape, "float32" if name.pooling.endswith(SIZES) else dtype)
        for name, shape in source.shapes.items()
    )
    return Recipe(source, dtype, columns, source.text_names)


def _read(tree: Mapping[str, Any]) -> Recipe:
    """A recipe in today's format."""
    known = ("source", "dtype", "columns", "text_columns", "format", FINGERPRINT)
    unknown = [f"{key}={value!r}" for key, value in tree.items() if value and key not in known]
    values = dict(tree["source"])
    kind = values.pop("kind")
    if kind not in KINDS:
        unknown.append(f"source.kind={kind!r}")
        _refuse(unknown)
    source: Source
    if kind == "model":
        source = _model_of(values, unknown)
    else:
        unknown += recipe_keys.unknown(KINDS[kind], values, "source.")
        _refuse(unknown)
        values = recipe_keys.known(KINDS[kind], values)
        if kind == "array":
            values["layers"] = tuple(taps.parse(text) for text in values["layers"])
        source = KINDS[kind](**values)
    columns = tuple(
        Column(taps.parse_feature(each["name"]), tuple(each["shape"]), each["dtype"]) for each in tree["columns"]
    )
    return Recipe(source, tree["dtype"], columns, tuple(tree["text_columns"]))


def _model_of(tree: Mapping[str, Any], unknown: list[str]) -> ModelRecipe:
    """A model's part, as `recipe_keys.of_model` wrote it. `unknown`: keys elsewhere that this version lacks."""
    unknown = [*unknown, *recipe_keys.unknown(ModelRecipe, tree, "")]
    prompts: dict[str, Prompt] = {}
    for name, prompt in tree["prompts"].items():
        unknown += recipe_keys.unknown(Prompt, prompt, f"prompts.{name}.")
        prompts[name] = Prompt(**recipe_keys.known(Prompt, prompt))
    _refuse(unknown)
    values = recipe_keys.known(ModelRecipe, tree) | {
        "taps": tuple(taps.parse(text) for text in tree["taps"]),
        "prompts": prompts,
        "poolings": tuple(tree["poolings"]),
    }
    return ModelRecipe(**values)


def _refuse(unknown: list[str]) -> None:
    """Raises `InputError` when there are keys that this version lacks."""
    if unknown:
        raise InputError(
            f"recipe.json: made by a newer version of lvlmrec: unknown {', '.join(unknown)}; "
            "install that version to read this feature set"
        )
