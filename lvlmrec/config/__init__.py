"""Configuration: frozen dataclasses beside their components, YAML layers, dotted overrides.

    schema defaults  <  YAML layers in the order given  <  dotted.key=value

A value is written once, in the dataclass of the component that reads it; `option` adds its help text,
choices and bounds, `variant` says that a part of the schema is chosen by its `name` from a table. What several keys
of a dataclass ask of each other stands in its method `check`, which raises `ConfigError` and names keys from there:
`load` calls it, of the parts first, and puts the path in front.
URIs are `str`: `pathlib` would turn `s3://bucket` into `s3:/bucket`.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import operator
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import GrammarParseError, InterpolationResolutionError, OmegaConfBaseException

from lvlmrec.config.layers import CONF, parse_value, read_layer, split_override
from lvlmrec.errors import ConfigError, one_line

__all__ = ["CONF", "MAX_SEED", "changed", "check_gpus", "describe", "flatten", "from_arguments", "load", "option"]
__all__ += ["to_dict", "variant", "with_uris"]

T = TypeVar("T")
BOUNDS: dict[str, tuple[Callable[[Any, float], bool], str]] = {  # of `option`: what holds, and what is said otherwise
    "minimum": (operator.ge, "is below"),
    "maximum": (operator.le, "is above"),
    "above": (operator.gt, "is not above"),
    "below": (operator.lt, "is not below"),
}
KINDS = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "a text"}
MISSING = "???"  # OmegaConf's mark of a value that is still to come
UNSET = (None, "")  # given on the command line: key=null, key=
MAX_SEED = 2**32 - 1  # the largest that NumPy's older generators take


def option(
    default: Any,
    help: str,
    *,
    choices: Mapping[str, Any] | Sequence[str] | None = None,
    required: bool = False,
    distinct: bool = False,
    uri: bool | Callable[[str], bool] = False,
    **bounds: float,
) -> Any:
    """A documented dataclass field. A list, a dict or a class as default becomes a default factory.

    `bounds` are `minimum`, `maximum`, and without the bound itself `above`, `below`; like `choices` they are those of
    each entry of a list or a dict. A `required` one may not be empty, one that is `distinct` lists nothing twice.
    Numbers are finite and texts in a list not empty. `uri`: the value, or each entry of a list, is a path or URI, or is
    one where the function says so.
    """
    assert bounds.keys() <= BOUNDS.keys(), bounds
    metadata: dict[str, Any] = {"help": help, "choices": choices, "required": required, "distinct": distinct}
    metadata |= {"bounds": bounds, "uri": uri}
    if isinstance(default, type):
        return dataclasses.field(default_factory=default, metadata=metadata)
    if isinstance(default, list | dict):
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def variant(table: Mapping[str, type], default: str, help: str) -> Any:
    """A field whose dataclass is `table[name]`, where `name` is the part's own `name` key."""
    metadata = {"help": help, "variants": table}
    return dataclasses.field(default_factory=table[default], metadata=metadata)


def check_gpus(key: str, number: float) -> None:
    """Raises `ConfigError` when a process is to have more than one GPU: it would use the first of them."""
    if number > 1:
        raise ConfigError(f"{key}: {number}: a process uses one GPU at most; set 1, a share of one such as 0.5, or 0")


def load(schema: type[T], layers: Sequence[str | Path | Mapping[str, Any]], overrides: Sequence[str] = ()) -> T:
    """The configuration that `layers` (YAML files or mappings) and `dotted.key=value` overrides describe.

    Raises `ConfigError` naming the key, the value and the choices.
    """
    given = _given(layers, overrides)
    shape = _shape(schema, given, "")
    for override in overrides:
        _keep_text(shape, given, *split_override(override))
    _check_keys(shape, given, "", shape)
    resolved = _merge(shape, _emptied(shape, given))
    _check_values(resolved, "")
    return typing.cast(T, resolved)


def _given(layers: Sequence[str | Path | Mapping[str, Any]], overrides: Sequence[str]) -> dict[str, Any]:
    """All layers and overrides as one tree, the later over the earlier."""
    raw = OmegaConf.create({})
    for layer in layers:
        with _named(f"layer {str(layer)!r}"):
            raw = typing.cast(DictConfig, OmegaConf.merge(raw, read_layer(layer)))
    for override in overrides:
        key, text = split_override(override)
        with _named(f"argument {override!r}"):
            OmegaConf.update(raw, key, parse_value(text), merge=False, force_add=True)
    given = typing.cast(dict[str, Any], OmegaConf.to_container(raw))
    for key, value in flatten(given):
        if value == MISSING or (isinstance(value, list) and MISSING in value):
            raise ConfigError(
                f"{key}: {value!r}: {MISSING} is no value; give one, or leave the key out for its default"
            )
    return given


@contextmanager
def _named(what: str) -> Iterator[None]:
    try:
        yield
    except GrammarParseError as error:
        raise ConfigError(f"{what}: '${{' begins a reference to another key, such as ${{workspace}}") from error
    except OmegaConfBaseException as error:
        raise ConfigError(f"{what}: {_omegaconf_line(error)}") from error


def from_arguments(schema: type[T], arguments: Sequence[str], default_layer: str | Path) -> T:
    """The configuration of a job's command line: `[layer.yaml ...] [dotted.key=value ...]`."""
    layers = [a for a in arguments if "=" not in a]
    overrides = [a for a in arguments if "=" in a]
    for layer in layers:
        if not layer.endswith((".yaml", ".yml")):
            raise ConfigError(f"argument {layer!r}: neither a layer (a path that ends in .yaml) nor dotted.key=value")
    return load(schema, layers or [default_layer], overrides)


def with_uris(config: T, change: Callable[[str], str]) -> T:
    """`config` with `change` applied to every path or URI in it: to what an `option` says is a `uri`."""
    made: dict[str, Any] = {}
    for field in dataclasses.fields(typing.cast(Any, config)):
        value, is_uri = getattr(config, field.name), field.metadata.get("uri", False)
        if dataclasses.is_dataclass(value):
            made[field.name] = with_uris(value, change)
        elif is_uri:
            changed = [
                change(each) if each and isinstance(each, str) and (is_uri is True or is_uri(each)) else each
                for each in (value if isinstance(value, list) else [value])
            ]
            made[field.name] = changed if isinstance(value, list) else changed[0]
    return dataclasses.replace(typing.cast(Any, config), **made)


def to_dict(config: Any) -> dict[str, Any]:
    """A resolved configuration as plain dicts, lists and scalars."""
    return dataclasses.asdict(config)


def flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and leaf values, in order."""
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def changed(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and values that are not the defaults of the dataclass that holds them, and every part's `name`.

    A default that refers to another key, as `${workspace}/cache`, is a value like any other once it is resolved.
    """
    for each in dataclasses.fields(config):
        value, default = getattr(config, each.name), each.default
        if dataclasses.is_dataclass(value):
            yield from changed(value, f"{prefix}{each.name}.")
            continue
        if each.default_factory is not dataclasses.MISSING:
            default = each.default_factory()
        if each.name == "name" or value != default:
            yield f"{prefix}{each.name}", value


def describe(schema: type) -> str:
    """The schema with defaults, for `--help`."""
    lines: list[str] = []
    _describe(schema(), "", lines.append)
    return "\n".join(lines)


def _keep_text(part: Any, given: Any, key: str, text: str) -> None:
    """Where `key` is one of texts, what looks like a number in it is the text that was written: `1.10`, `TRUE`."""
    name, _, rest = key.partition(".")
    kinds = {field.name: field.type for field in dataclasses.fields(part)} if dataclasses.is_dataclass(part) else {}
    if name not in kinds or not isinstance(given, dict):
        return
    if rest:
        _keep_text(getattr(part, name), given.get(name), rest, text)
    elif kinds[name] in (str, "str") and isinstance(given.get(name), int | float):
        given[name] = text


def _shape(schema: type, given: Any, prefix: str) -> Any:
    """A default instance of `schema` with every variant replaced by the one that `given` names."""
    instance = schema()
    replaced = {}
    given = given if isinstance(given, dict) else {}
    for field in dataclasses.fields(instance):
        value = getattr(instance, field.name)
        part = given.get(field.name, {})
        if "variants" in field.metadata:
            name = part.get("name", value.name) if isinstance(part, dict) else value.name
            table = field.metadata["variants"]
            if not isinstance(name, str) or name not in table:
                raise ConfigError(f"{prefix}{field.name}.name: {name!r} is not one of {', '.join(sorted(table))}")
            replaced[field.name] = _shape(table[name], part, f"{prefix}{field.name}.")
        elif dataclasses.is_dataclass(value):
            replaced[field.name] = _shape(type(value), part, f"{prefix}{field.name}.")
        elif isinstance(value, dict) and field.name in given and (isinstance(part, dict) or part in UNSET):
            replaced[field.name] = {}  # named things of a layer replace the default's, they do not join them
    return dataclasses.replace(instance, **replaced)


def _check_keys(shape: Any, given: Any, prefix: str, root: Any) -> None:
    if not isinstance(given, dict):
        raise ConfigError(f"{prefix.rstrip('.')}: {given!r} is not a group of keys")
    names = [f.name for f in dataclasses.fields(shape)]
    for key, value in given.items():
        if key not in names:
            path, value = next(flatten({f"{prefix}{key}": value}))
            close = _meant(str(key), path, prefix, names, [known for known, _ in flatten(dataclasses.asdict(root))])
            hint = f"did you mean {' or '.join(close[:3])}? " if close else ""
            raise ConfigError(f"{path}={value!r}: unknown key; {hint}choices: {', '.join(sorted(names))}")
        default = getattr(shape, key)
        if dataclasses.is_dataclass(default):
            _check_keys(default, value, f"{prefix}{key}.", root)
        elif isinstance(default, list) and isinstance(value, dict):
            raise ConfigError(f"{prefix}{key}: {value!r} is not a list, as in {prefix}{key}=[a,b]")


def _meant(key: str, path: str, prefix: str, siblings: list[str], known: list[str]) -> list[str]:
    """What `prefix` + `key`, the beginning of the unknown `path`, may be: a misspelt neighbour, or one elsewhere."""
    close = [prefix + name for name in difflib.get_close_matches(key, siblings, n=1)]
    whole = [name + path[len(prefix) + len(key) :] for name in close]
    last = path.rsplit(".", 1)[-1]
    elsewhere = [name for name in known if name.rsplit(".", 1)[-1] == last]
    return [name for name in whole if name in known] or elsewhere or close


def _emptied(shape: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """`given` with what is unset (`key=` or `key=null`) as the empty text, list or dict that its key holds."""
    made = {}
    for key, value in given.items():
        default = getattr(shape, key)
        if dataclasses.is_dataclass(default):
            value = _emptied(default, value)
        elif value in UNSET and isinstance(default, str | list | dict):
            value = type(default)()
        made[key] = value
    return made


def _merge(shape: Any, given: dict[str, Any]) -> Any:
    base = OmegaConf.structured(shape)
    OmegaConf.set_readonly(base, False)
    try:
        return OmegaConf.to_object(OmegaConf.merge(base, given))
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", "") or ""
        reason = None if isinstance(error, InterpolationResolutionError) else _wrong_kind(shape, given, key)
        reason = reason or _omegaconf_line(getattr(error, "msg", None) or error)
        reason = reason.replace("Recursive interpolation detected", "its reference ${...} leads back to itself")
        raise ConfigError(f"{key}: {reason}") from error


def _wrong_kind(shape: Any, given: Any, key: str) -> str | None:
    """That the value of `key`, such as `training.lr` or `ks[0]`, is not of the kind of its field; None where it is."""
    name, _, place = key.rstrip("]").partition("[")
    *parts, last = name.split(".")
    for part in parts:
        if not dataclasses.is_dataclass(shape) or not isinstance(given, dict):
            return None
        shape, given = getattr(shape, part, None), given.get(part)
    fields = dataclasses.fields(shape) if dataclasses.is_dataclass(shape) else ()
    kinds = {
        each.name: each.type.__name__ if each.type in (int, float, bool, str) else str(each.type) for each in fields
    }
    if last not in kinds or not isinstance(given, dict) or last not in given:
        return None
    kind, value = kinds[last], given[last]
    if place.isdecimal() and isinstance(value, list):
        kind, value = kind.removeprefix("list[").removesuffix("]"), value[int(place)]
    expected = KINDS.get(kind) or (f"a list, as in {key}=[a,b]" if kind.startswith("list") else "a group of keys")
    return f"{'null' if value is None else repr(value)} is not {expected}"


def _check_values(config: Any, prefix: str) -> None:
    for field in dataclasses.fields(config):
        key, value = f"{prefix}{field.name}", getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            _check_values(value, f"{key}.")
        elif isinstance(value, dict) and any(dataclasses.is_dataclass(part) for part in value.values()):
            for name, part in value.items():
                _check_values(part, f"{key}.{name}.")
        elif field.type not in (Any, "Any"):  # of those whoever reads them knows more
            _check_value(key, value, **field.metadata)
    try:
        getattr(config, "check", lambda: None)()
    except ConfigError as error:
        raise ConfigError(f"{prefix}{error}") from error


def _check_value(
    key: str,
    value: Any,
    help: str = "",
    choices: Mapping[str, Any] | Sequence[str] | None = None,
    required: bool = False,
    distinct: bool = False,
    bounds: Mapping[str, float] = MappingProxyType({}),
    uri: bool | Callable[[str], bool] = False,
) -> None:
    """Raises `ConfigError` when a value, or an entry of it, is not as its `option` says."""
    if required and not value:
        kind = "a value" if isinstance(value, str) else "at least one entry"
        raise ConfigError(f"{key}: {value!r}: empty; expected {kind}: {help}")
    entries = value if isinstance(value, list) else [*value.values()] if isinstance(value, dict) else [value]
    for place, entry in enumerate(entries):
        if isinstance(entry, float) and not math.isfinite(entry):
            raise ConfigError(f"{key}: {entry!r} is not a finite number")
        if choices is not None and entry not in choices:
            raise ConfigError(f"{key}: {entry!r} is not one of {', '.join(sorted(choices))}")
        if isinstance(value, list) and entry == "":
            raise ConfigError(f"{key}: {value!r}: '' is no entry")
        if distinct and entry in entries[:place]:
            raise ConfigError(f"{key}: {value!r}: {entry!r} is given twice")
        for name, bound in bounds.items():
            holds, relation = BOUNDS[name]
            if entry is not None and not holds(entry, bound):
                raise ConfigError(f"{key}: {entry!r} {relation} {bound}")


def _describe(config: Any, prefix: str, write: Callable[[str], None]) -> None:
    for field in dataclasses.fields(config):
        key, value = f"{prefix}{field.name}", getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            if "variants" in field.metadata:
                write(f"  {key}.name  {field.metadata['help']} ({', '.join(sorted(field.metadata['variants']))})")
            _describe(value, f"{key}.", write)
            continue
        choices = field.metadata.get("choices")
        shown = f"  {key}={value!r}  {field.metadata.get('help', '')}"
        write(f"{shown} ({', '.join(sorted(choices))})" if choices else shown)


def _omegaconf_line(error: object) -> str:
    return one_line(str(error).split("full_key:")[0])
