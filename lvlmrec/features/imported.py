"""Published feature arrays as feature sets: one file of [items, dim] or [items, layers, dim].

A column is called `name/llm.3/imported`, where the tap is what the user calls the layer.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from lvlmrec import storage, tables, taps
from lvlmrec.columns import ERROR, ITEM_ID, MESSAGE, SOURCE, STAGE, URI
from lvlmrec.config import option
from lvlmrec.errors import ConfigError, InputError, one_line
from lvlmrec.features import lease, provenance, rounding, store
from lvlmrec.features.lease import Lease
from lvlmrec.features.model_recipe import MEDIA
from lvlmrec.features.recipe import DTYPES, Recipe, make
from lvlmrec.features.sources import IMPORTED, ArrayRecipe
from lvlmrec.tables import text_file
from lvlmrec.taps import Tap

COUNTED = {"from_zero": 0, "from_one": 1}  # item_ids without a file -> id of the first row
ARRAY_ENDINGS = (".npy", ".safetensors", ".pt", ".pth")
READABLE = (*DTYPES, "float64")
PART_BYTES = 64 << 20  # of one file of the feature set, in float32


@dataclass(frozen=True)
class ImportConfig:
    """The import_features job."""

    workspace: str = option("./workspace", "the tracking database lives here", required=True, uri=True)
    tracking_uri: str = option("sqlite:///${workspace}/mlflow.db", "MLflow tracking server or database", required=True)
    file: str = option(
        "", "the array [items, dim] or [items, layers, dim]: .npy, .safetensors, or .pt without code", uri=True
    )
    tensor: str = option("", "name of the tensor in a file of several")
    item_ids: str = option(
        "from_zero",
        "from_zero: row k is item k; from_one: item k + 1; else a .csv or .parquet (or folder of its parts) with "
        "item_id, or a .txt of one id per line, in the order of the rows",
        uri=lambda value: value not in COUNTED,
    )
    name: str = option(IMPORTED, "name of the feature set, and first part of its columns' names", required=True)
    layers: list[str] = option([], "names of the layers as taps, such as [llm.14, llm.28]; none: llm.0, llm.1, ...")
    dtype: str = option("float16", "dtype of the stored features", choices=DTYPES)
    store: str = option("${workspace}/features", "folder or prefix that holds feature sets", required=True, uri=True)


class Array(NamedTuple):
    """An array on disk: `rows(start, end)` reads [end - start, L, D] or [end - start, D]."""

    shape: tuple[int, ...]
    dtype: str
    rows: Callable[[int, int], Tensor]


def run(config: ImportConfig) -> dict[str, Any]:
    """Write the feature set and commit it; rows that are not finite are rejected. Rows written before stay.

    Raises `InputError` on an array, ids or layers that do not fit each other, on a value that overflows or a vector
    that vanishes, and when another job writes the same feature set.
    """
    if not config.file.endswith(ARRAY_ENDINGS):
        raise ConfigError(f"file: {config.file!r}: expected a file that ends in {', '.join(ARRAY_ENDINGS)}")
    if not storage.exists(config.file):
        raise InputError(f"file: {config.file!r}: no such file")
    with storage.local_copy(config.file) as path:
        array = open_array(path, config.tensor)
        item_ids = read_item_ids(config.item_ids, array.shape[0])
        recipe = recipe_of(config, array, _hash_of_file(path), item_ids)
        uri = store.locate(config.store, config.name, recipe)
        store.create(uri, recipe, ids_from=config.item_ids if config.item_ids in COUNTED else "file")
        with lease.hold(uri) as own_lease:
            if own_lease.after_break:
                store.adopt(uri, own_lease.number)
            written = _write(config, uri, recipe, array, item_ids, own_lease)
            own_lease.check()
            store.commit_parts(uri, written, own_lease.number, [_made_with()])
            index = store.finish(uri, own_lease.number)
            own_lease.finish()
    rejected, num_written = store.read_rejected(uri), sum(map(len, written.values()))
    return {
        "feature_set": uri,
        "items": len(item_ids),
        "written": num_written,
        "skipped": len(index) - num_written,
        "rejected": len(rejected),
        "rejected_items": rejected[ITEM_ID].slice(0, 10).to_pylist(),
        "features": len(recipe.feature_names),
        "columns": [str(name) for name in recipe.feature_names],
    }


def open_array(path: Path, tensor: str = "") -> Array:
    """The array in a file, memory-mapped. Nothing is unpickled but tensors. Raises `InputError`."""
    try:
        array = _OPEN[path.suffix](path, tensor)
    except InputError:
        raise
    except Exception as error:  # numpy, torch, pickle and safetensors each have their own
        message = one_line(f"{type(error).__name__}: {error}")
        raise InputError(f"file: {path.name}: not readable: {message[:300]}") from error
    if len(array.shape) not in (2, 3) or 0 in array.shape:
        raise InputError(f"file: {path.name}: shape {list(array.shape)}; expected [items, dim] or [items, layers, dim]")
    if array.dtype not in READABLE:
        raise InputError(f"file: {path.name}: holds {array.dtype}; expected {', '.join(READABLE)}")
    return array


def read_item_ids(source: str, rows: int) -> list[str]:
    """The item of each row. Raises `InputError` when they are not as many as the rows, empty or not distinct."""
    if source in COUNTED:
        return [str(COUNTED[source] + row) for row in range(rows)]
    ids = _ids_of_text(source) if source.endswith(".txt") else _ids_of_table(source)
    if len(ids) != rows:
        raise InputError(f"item_ids: {source!r} has {len(ids)} ids, the array {rows} rows")
    repeated = pd.Series(ids).duplicated()
    if repeated.any() or "" in ids:
        shown = "an empty id" if "" in ids else f"{ids[int(repeated.argmax())]!r} twice"
        raise InputError(f"item_ids: {source!r} has {shown}")
    return ids


def _ids_of_text(source: str) -> list[str]:
    label = f"item_ids: {source!r}: not readable"
    text = text_file.decode(label, text_file.read_bytes(source, label))
    return [line.strip() for line in text.removesuffix("\n").split("\n")]


def _ids_of_table(source: str) -> list[str]:
    label = f"item_ids: {source!r}: not readable"

    def choose(found: list[str]) -> list[str]:
        if ITEM_ID not in found:
            raise InputError(f"item_ids: {source!r}: no column {ITEM_ID}; columns found: {', '.join(found)}")
        return [ITEM_ID]

    if source.endswith(".csv"):
        rows = tables.read_csv(source, label, choose, [ITEM_ID])
    elif parts := (tables.parquet_files(source) if source.endswith(tables.PARQUET) or storage.is_dir(source) else []):
        rows = tables.read_parquet(parts, label, choose, [ITEM_ID])
    else:
        choices = f"{', '.join(COUNTED)}, a .csv, .parquet or folder of Parquet files with {ITEM_ID}, or a .txt"
        raise ConfigError(f"item_ids: {source!r}: choices: {choices}")
    if rows.malformed:  # without it, whose row is whose would be a guess
        raise InputError(f"item_ids: {source!r}: malformed, such as {rows.example}")
    return [item_id or "" for item_id in rows.table[ITEM_ID].to_pylist()]


def recipe_of(config: ImportConfig, array: Array, content: str, item_ids: Sequence[str]) -> Recipe:
    """The recipe of an array. Raises `ConfigError`."""
    if "/" in config.name or config.name in MEDIA or not config.name:
        raise ConfigError(f"name: {config.name!r}: expected a name without '/' that is not one of {', '.join(MEDIA)}")
    layers = _layers(config.layers, array.shape[1] if len(array.shape) == 3 else 1)
    order = hashlib.blake2b("\n".join(item_ids).encode(), digest_size=8).hexdigest()
    tensor = f" tensor:{config.tensor}" if config.tensor else ""
    source = ArrayRecipe(
        identity=f"{config.file.rsplit('/', 1)[-1]}{tensor} content:{content} items:{order}",
        dtype=array.dtype,
        name=config.name,
        layers=layers,
        width=array.shape[-1],
    )
    return make(source, config.dtype)


def _layers(names: Sequence[str], number: int) -> tuple[Tap, ...]:
    """The tap of each layer: language-model or text taps, each once, counted from 0. Raises `ConfigError`."""
    found = tuple(taps.parse(name) for name in names) or tuple(Tap("llm", layer) for layer in range(number))
    if len(found) != number:
        raise ConfigError(f"layers: {len(found)} names for {number} layers of the array")
    towers = {tap.tower for tap in found}
    if len(towers) > 1 or not towers <= {*taps.READS_TEXT} or len({*found}) < len(found):
        raise ConfigError(f"layers: {list(names)!r}: expected taps of one of {', '.join(taps.READS_TEXT)}, each once")
    if any(tap.layer < 0 for tap in found):
        raise ConfigError(f"layers: {list(names)!r}: a negative layer needs a model; count from 0")
    return found


def _write(
    config: ImportConfig, uri: str, recipe: Recipe, array: Array, item_ids: Sequence[str], own_lease: Lease
) -> dict[str, list[str]]:
    """Write the rows that are not there yet; the items of each part. Rows that are not finite are rejected."""
    known = (store.read_index(uri), store.read_rejected(uri))
    known_items = {item for table in known for item in table[ITEM_ID].to_pylist()}
    written: dict[str, list[str]] = {}
    names = [str(name) for name in recipe.feature_names]
    step = max(1, PART_BYTES // (4 * int(np.prod(array.shape[1:]))))
    for start in range(0, len(item_ids), step):
        ids = list(item_ids[start : start + step])
        if known_items.issuperset(ids):
            continue
        values = array.rows(start, start + len(ids)).reshape(len(ids), len(names), -1)
        finite = torch.isfinite(values).flatten(1).all(1)
        kept, values = [item for item, good in zip(ids, finite.tolist(), strict=True) if good], values[finite]
        _check_fits(config, kept, names, values)
        if bad := sorted({*ids} - {*kept} - known_items):
            store.write_rejected(uri, [_rejection(config, item) for item in bad], own_lease.number)
        if kept:
            columns = {name: values[:, layer] for layer, name in enumerate(names)}
            rows = store.feature_table(recipe, kept, [0] * len(kept), columns)
            written[store.write_part(uri, recipe, rows, own_lease.number, [_made_with()])] = kept
        own_lease.check()
    return written


def _made_with() -> str:
    """Values are copied and rounded, here."""
    return provenance.to_json({"device": "none", **provenance.versions(("torch", "numpy"))})


def _check_fits(config: ImportConfig, item_ids: Sequence[str], names: Sequence[str], values: Tensor) -> None:
    """Raises `InputError` when one of `values` [N, L, D] overflows, or a vector vanishes as `rounding` says."""
    stored = values.to(getattr(torch, config.dtype))
    fits = torch.isfinite(stored).flatten(1).all(1)
    if not fits.all():
        row = int((~fits).nonzero()[0])
        raise InputError(
            f"dtype: {config.dtype}: item {item_ids[row]!r} has {float(values[row].abs().max()):.4g}, which overflows; "
            "choices: bfloat16, float32"
        )
    if loss := rounding.first_loss(values.flatten(0, 1), stored.flatten(0, 1)):
        row, layer = divmod(loss.row, len(names))
        raise InputError(
            f"dtype: {config.dtype}: item {item_ids[row]!r}, column {names[layer]}: {loss}; "
            f"choices: {rounding.WIDER[config.dtype]}"
        )


def _rejection(config: ImportConfig, item_id: str) -> dict[str, str]:
    message = "a value of its row is not finite"
    return {ITEM_ID: item_id, URI: config.file, SOURCE: "", STAGE: "import", ERROR: "not_finite", MESSAGE: message}


def _hash_of_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


_NPY = b"\x93NUMPY"


def _open_npy(path: Path, tensor: str) -> Array:
    with path.open("rb") as file:
        if file.read(len(_NPY)) != _NPY:  # numpy would take it for a pickle, and advise to load that
            raise InputError(f"file: {path.name}: not readable: its first bytes are not those of a .npy file")
    array = np.load(path, mmap_mode="r", allow_pickle=False)
    if tensor:
        raise ConfigError(f"tensor: {tensor!r}: a .npy holds one array without a name")

    def rows(start: int, end: int) -> Tensor:
        return torch.from_numpy(np.array(array[start:end], dtype=array.dtype.newbyteorder("=")))

    return Array(array.shape, array.dtype.name, rows)


def _open_safetensors(path: Path, tensor: str) -> Array:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        name = _choose(tensor, list(file.keys()))
        part = file.get_slice(name)
        shape, dtype = tuple(part.get_shape()), file.get_slice(name)[:1].dtype

    def rows(start: int, end: int) -> Tensor:
        with safe_open(path, framework="pt") as file:
            return file.get_slice(name)[start:end]

    return Array(shape, str(dtype).removeprefix("torch."), rows)


def _open_pt(path: Path, tensor: str) -> Array:
    content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    if isinstance(content, dict):
        tensors = {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
        content = tensors[_choose(tensor, list(tensors))]
    if not isinstance(content, Tensor):
        raise InputError(f"file: {path.name}: holds a {type(content).__name__}; expected a tensor or a dict of tensors")
    return Array(tuple(content.shape), str(content.dtype).removeprefix("torch."), lambda start, end: content[start:end])


def _choose(tensor: str, names: Sequence[str]) -> str:
    if tensor in names or (not tensor and len(names) == 1):
        return tensor or names[0]
    raise ConfigError(f"tensor: {tensor!r}: choices: {', '.join(sorted(names)) or 'none, the file holds no tensor'}")


_OPEN: dict[str, Callable[[Path, str], Array]] = {
    ".npy": _open_npy,
    ".safetensors": _open_safetensors,
    ".pt": _open_pt,
    ".pth": _open_pt,
}
