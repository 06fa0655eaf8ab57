"""Whether a model's files hold weights that can be read, and nothing beside them that would change them unnoticed."""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Mapping
from pathlib import Path

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
ADAPTER = "adapter_config.json"
POINTER, POINTER_BYTES = b"version https://git-lfs.github.com/spec/", 1024
PICKLED = (
    "pickled, and nothing is unpickled here",
    "take a revision with safetensors, or save the model again with transformers' save_pretrained where you trust it",
)
ORIGINAL = (
    "in the layout of the authors' own code",
    "take the repository with transformers' layout, often named -hf, or convert them with transformers' script",
)
OTHERS = {
    "consolidated*": ORIGINAL,
    "*.gguf": ("GGUF, which llama.cpp reads", "take the repository or folder that they were made of, in safetensors"),
    "*.bin": PICKLED,
    "*.ckpt": PICKLED,
    "*.pth": PICKLED,
    "*.pt": PICKLED,
    "*.h5": ("TensorFlow's", "save the model again with transformers' save_pretrained from PyTorch"),
    "*.msgpack": ("Flax's", "save the model again with transformers' save_pretrained from PyTorch"),
}
NO_WEIGHTS = ("training_args.bin", "scheduler.pt", "optimizer.pt", "rng_state*.pth")


def sizes_of(folder: Path) -> dict[str, int]:
    """The files right in a folder with their sizes in bytes."""
    return {path.name: path.stat().st_size for path in folder.iterdir() if path.is_file()}


def shards_of(folder: Path) -> set[str]:
    """The files that an index names. Raises `ValueError`."""
    tree = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    names = tree.get("weight_map") if isinstance(tree, dict) else None
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise ValueError(f"{INDEX} has no weight_map from tensors to files: copy or download it again")
    return {*names.values()}


def fault(folder: Path, sizes: Mapping[str, int]) -> str:
    """What is wrong with the files of a model and the way out, in one line; empty if nothing is.

    `sizes` are its files' in bytes, of a hub id also of those that are not in `folder` yet. No weights at all are no
    fault: a configuration says what a model is without them. Raises `ValueError` or `OSError` on a broken file.
    """
    sizes = {name: size for name, size in sizes.items() if "/" not in name}
    if ADAPTER in sizes:
        return _adapter(folder, sizes)
    wanted = {WEIGHTS} & {*sizes}
    if not wanted and INDEX in sizes:
        shards = shards_of(folder)
        if missing := sorted(shards - {*sizes}):
            return f"{INDEX} names {len(shards)} files, of which {len(missing)} are missing, first {missing[0]}: " + (
                "copy or download the model again"
            )
        wanted = shards
    if not wanted and (other := _other(sizes)):
        return other
    if empty := [name for name in sorted(wanted) if not sizes[name]]:
        return f"{empty[0]} is empty, 0 bytes: copy or download it again"
    return _pointer(folder, sizes)


def _adapter(folder: Path, sizes: Mapping[str, int]) -> str:
    merged = "with peft's merge_and_unload, save_pretrained it into a folder, and name that"
    if "config.json" in sizes:
        return (
            f"{ADAPTER} is an adapter (LoRA) beside the model, which transformers would apply where peft is installed "
            f"and leave out where it is not: merge it into the weights {merged}, or name a folder without {ADAPTER}"
        )
    tree = json.loads((folder / ADAPTER).read_text(encoding="utf-8"))
    base = tree.get("base_model_name_or_path") if isinstance(tree, dict) else None
    return f"{ADAPTER} and no config.json: an adapter (LoRA) of {base or 'a model'} alone; merge it into that {merged}"


def _other(sizes: Mapping[str, int]) -> str:
    names = [name for name in sorted(sizes) if not any(fnmatch.fnmatch(name, pattern) for pattern in NO_WEIGHTS)]
    for pattern, (what, remedy) in OTHERS.items():
        for name in fnmatch.filter(names, pattern):
            return f"its weights ({name}) are {what}; expected {WEIGHTS} or {INDEX}: {remedy}"
    return ""


def _pointer(folder: Path, sizes: Mapping[str, int]) -> str:
    for name in sorted(sizes):
        path = folder / name
        if sizes[name] < POINTER_BYTES and path.is_file() and path.read_bytes().startswith(POINTER):
            return f"{name} is a Git LFS pointer, not the file: run `git lfs pull` in the folder, or download it again"
    return ""
