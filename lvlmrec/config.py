"""Configuration: frozen dataclasses beside their components, YAML layers, dotted overrides.

    schema defaults  <  YAML layers in the order given  <  dotted.key=value

A value is written once, in the dataclass of the component that reads it; `option` adds its help text,
choices and bound, `variant` says that a part of the schema is chosen by its `name` from a table.
URIs are `str`: `pathlib` would turn `s3://bucket` into `s3:/bucket`.
"""

from __future__ import annotations

import dataclasses
import difflib
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lvlmrec.errors import ConfigError

T = TypeVar("T")
CONF = Path(__file__).resolve().parent.parent / "conf"


def option(
    default: Any,
    help: str,
    *,
    choices: Mapping[str, Any] | Sequence[str] | None = None,
    minimum: float | None = None,
) -> Any:
    """A documented dataclass field. A list, a dict or a class as default becomes a default factory."""
    metadata = {"help": help, "choices": choices, "minimum": minimum}
    if isinstance(default, type):
        return dataclasses.field(default_factory=default, metadata=metadata)
    if isinstance(default, list | dict):
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def variant(table: Mapping[str, type], default: str, help: str) -> Any:
    """A field whose dataclass is `table[name]`, where `name` is the part's own `name` key."""
    metadata = {"help": help, "variants": table}
    return dataclasses.field(default_factory=table[default], metadata=metadata)


def load(schema: type[T], layers: Sequence[str | Path | Mapping[str, Any]], overrides: Sequence[str] = ()) -> T:
    """The configuration that `layers` (YAML files or mappings) and `dotted.key=value` overrides describe.

    Raises `ConfigError` naming the key, the value and the choices.
    """
    raw = OmegaConf.create({})
    for layer in layers:
        raw = typing.cast(DictConfig, OmegaConf.merge(raw, _read_layer(layer)))
    for override in overrides:
        key, text = _split_override(override)
        OmegaConf.update(raw, key, _parse_value(text), merge=False, force_add=True)
    given = typing.cast(dict[str, Any], OmegaConf.to_container(raw))
    shape = _shape(schema, given, "")
    _check_keys(shape, given, "")
    resolved = _merge(shape, given)
    _check_values(resolved, "")
    return typing.cast(T, resolved)


def from_arguments(schema: type[T], arguments: Sequence[str], default_layer: str | Path) -> T:
    """The configuration of a job's command line: `[layer.yaml ...] [dotted.key=value ...]`."""
    layers = [a for a in arguments if "=" not in a]
    overrides = [a for a in arguments if "=" in a]
    for layer in layers:
        if not layer.endswith((".yaml", ".yml")):
            raise ConfigError(f"argument {layer!r}: neither a layer (a path that ends in .yaml) nor dotted.key=value")
    return load(schema, layers or [default_layer], overrides)


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


def _read_layer(layer: str | Path | Mapping[str, Any]) -> dict[str, Any]:
    if isinstance(layer, Mapping):
        return dict(layer)
    path = Path(layer)
    if not path.exists() and (CONF / path).exists():
        path = CONF / path
    if not path.exists():
        choices = ", ".join(sorted(str(p.relative_to(CONF)) for p in CONF.rglob("*.yaml")))
        raise ConfigError(f"layer {str(layer)!r}: no such file; layers of the project: {choices}")
    try:
        content = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"layer {str(layer)!r}: not readable as YAML: {_one_line(error)}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"layer {str(layer)!r}: holds a {type(content).__name__}, expected a mapping of keys")
    return content


def _split_override(override: str) -> tuple[str, str]:
    key, _, text = override.partition("=")
    if not key or key.startswith(".") or key.endswith(".") or ".." in key:
        raise ConfigError(f"argument {override!r}: {key!r} is not a dotted key")
    return key, text


def _parse_value(text: str) -> Any:
    """YAML, but a text that only looks like a mapping (`Describe: the video`) stays a text."""
    try:
        value = yaml.safe_load(text) if text else ""
    except yaml.YAMLError:
        return text
    if isinstance(value, dict) and not text.lstrip().startswith("{"):
        return text
    return value


def _shape(schema: type, given: Any, prefix: str) -> Any:
    """A default instance of `schema` with every variant replaced by the one that `given` names."""
    instance = schema()
    replaced = {}
    for field in dataclasses.fields(instance):
        value = getattr(instance, field.name)
        part = given.get(field.name, {}) if isinstance(given, dict) else {}
        if "variants" in field.metadata:
            name = part.get("name", value.name) if isinstance(part, dict) else value.name
            table = field.metadata["variants"]
            if name not in table:
                raise ConfigError(f"{prefix}{field.name}.name: {name!r} is not one of {', '.join(sorted(table))}")
            replaced[field.name] = _shape(table[name], part, f"{prefix}{field.name}.")
        elif dataclasses.is_dataclass(value):
            replaced[field.name] = _shape(type(value), part, f"{prefix}{field.name}.")
        elif isinstance(value, dict) and isinstance(given, dict) and isinstance(given.get(field.name), dict):
            replaced[field.name] = {}  # named things of a layer replace the default's, they do not join them
    return dataclasses.replace(instance, **replaced)


def _check_keys(shape: Any, given: Any, prefix: str) -> None:
    if not isinstance(given, dict):
        raise ConfigError(f"{prefix.rstrip('.')}: {given!r} is not a group of keys")
    names = [f.name for f in dataclasses.fields(shape)]
    for key, value in given.items():
        if key not in names:
            close = difflib.get_close_matches(str(key), names, n=1)
            hint = f"did you mean {prefix}{close[0]}? " if close else ""
            raise ConfigError(f"{prefix}{key}={value!r}: unknown key; {hint}choices: {', '.join(sorted(names))}")
        if dataclasses.is_dataclass(getattr(shape, key)):
            _check_keys(getattr(shape, key), value, f"{prefix}{key}.")


def _merge(shape: Any, given: dict[str, Any]) -> Any:
    base = OmegaConf.structured(shape)
    OmegaConf.set_readonly(base, False)
    try:
        return OmegaConf.to_object(OmegaConf.merge(base, given))
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", "") or ""
        raise ConfigError(f"{key}: {_one_line(getattr(error, 'msg', None) or error)}") from error


def _check_values(config: Any, prefix: str) -> None:
    for field in dataclasses.fields(config):
        key, value = f"{prefix}{field.name}", getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            _check_values(value, f"{key}.")
            continue
        if isinstance(value, dict) and all(dataclasses.is_dataclass(part) for part in value.values()):
            for name, part in value.items():
                _check_values(part, f"{key}.{name}.")
            continue
        choices, minimum = field.metadata.get("choices"), field.metadata.get("minimum")
        for entry in value if isinstance(value, list) else [value]:
            if choices is not None and entry not in choices:
                raise ConfigError(f"{key}: {entry!r} is not one of {', '.join(sorted(choices))}")
            if minimum is not None and entry is not None and entry < minimum:
                raise ConfigError(f"{key}: {entry!r} is below {minimum}")


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


def _one_line(error: object) -> str:
    return " ".join(str(error).split("full_key:")[0].split())
