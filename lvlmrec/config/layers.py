"""What users write: YAML layers and `dotted.key=value` arguments, as plain dicts, lists and scalars."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from lvlmrec.errors import ConfigError, one_line

CONF = Path(__file__).resolve().parents[2] / "conf"


class _Loader(yaml.SafeLoader):
    """YAML, but words that version 1.1 takes for dates, octal numbers, minutes or truth stay texts: 010, 12:30, yes.

    A key that stands twice in a mapping is an error: YAML's own rule, that PyYAML does not hold.
    """

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if twice := next((key for place, key in enumerate(keys) if key in keys[:place]), None):
            raise yaml.YAMLError(f"key {twice!r} is given twice, at line {node.start_mark.line + 1} and after")
        return node


_KINDS = {
    "bool": r"true|True|TRUE|false|False|FALSE",
    "int": r"[-+]?(0|[1-9][0-9]*)",
    "float": r"[-+]?([0-9]+\.[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
}
_Loader.yaml_implicit_resolvers = {
    letter: [(tag, pattern) for tag, pattern in found if tag.rpartition(":")[2] not in (*_KINDS, "timestamp")]
    for letter, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _kind, _pattern in _KINDS.items():
    _Loader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_kind}", re.compile(f"^(?:{_pattern})$"), list("tTfF-+.0123456789")
    )


def read_layer(layer: str | Path | Mapping[str, Any]) -> dict[str, Any]:
    """The keys of a layer: of a YAML file, which may lie in conf/, or as given. Raises `ConfigError`."""
    if isinstance(layer, Mapping):
        return dict(layer)
    path = Path(layer)
    if not path.exists() and (CONF / path).exists():
        path = CONF / path
    if not path.exists():
        choices = ", ".join(sorted(str(p.relative_to(CONF)) for p in CONF.rglob("*.yaml")))
        raise ConfigError(f"layer {str(layer)!r}: no such file; layers of the project: {choices}")
    try:
        content = _parsed(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        reason = one_line(error).replace(' in "<unicode string>",', " at")
        raise ConfigError(f"layer {str(layer)!r}: not readable as YAML: {reason}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"layer {str(layer)!r}: holds a {type(content).__name__}, expected a mapping of keys")
    return content


def _parsed(text: str) -> Any:
    """The content of a YAML text. Raises `yaml.YAMLError`, also where it has no end or no bottom."""
    try:
        content = yaml.load(text, _Loader)
        json.dumps(content, default=str, skipkeys=True)
    except ValueError as error:
        raise yaml.YAMLError("an anchor (&name) holds an alias of itself (*name)") from error
    except RecursionError as error:
        raise yaml.YAMLError("it is nested too deeply") from error
    return content


def split_override(override: str) -> tuple[str, str]:
    """Key and value of an argument. Raises `ConfigError` on what is no dotted key."""
    key, _, text = override.partition("=")
    if "[" in key or "]" in key:
        whole = key.partition("[")[0] or "KEY"
        raise ConfigError(
            f"argument {override!r}: {key!r} is not a dotted key; a list is set as a whole: {whole}=[a,b]"
        )
    if not all(key.split(".")):
        raise ConfigError(f"argument {override!r}: {key!r} is not a dotted key")
    return key, text


def parse_value(text: str) -> Any:
    """YAML, but a text that only looks like a mapping (`Describe: the video`) or a comment (`my #1`) stays a text."""
    try:
        value = _parsed(text) if text else ""
    except yaml.YAMLError:
        return text
    if isinstance(value, str) and text[:1] not in "'\"":
        return text
    is_field = isinstance(value, dict) and value and all(part is None for part in value.values())  # {title}
    if is_field or (isinstance(value, dict) and not text.lstrip().startswith("{")):
        return text
    return value
