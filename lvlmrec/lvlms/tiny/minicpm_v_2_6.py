"""A tiny MiniCPM-V 2.6."""

from __future__ import annotations

from pathlib import Path

from lvlmrec.lvlms.tiny import minicpm_v


def write(directory: Path, seed: int) -> None:
    """Write a random model with the published names and files."""
    minicpm_v.write_version("2.6", directory, seed)
