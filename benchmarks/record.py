"""Dated results: what was run, on what machine, what came out."""

from __future__ import annotations

import datetime
import os
import platform
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from lvlmrec.tracking import git_revision

FOLDER = Path(__file__).parent / "results"
PACKAGES = ("ray", "torch", "transformers", "av", "numpy", "torchcodec")


def save(name: str, about: str, text: str) -> Path:
    """Write `results/<date>_<name>.md`: machine, versions, command, then `text` (Markdown). Returns its path."""
    shown = ["FOLDER" if Path(argument).is_absolute() else argument for argument in sys.argv[1:]]
    command = " ".join([f"python benchmarks/{Path(sys.argv[0]).name}", *shown])
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    lines = [
        f"# {name}, {datetime.date.today().isoformat()}",
        "",
        about.strip().split("\n")[0],
        "",
        f"- command: `{command}`",
        f"- machine: {os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}; load {load}",
        f"- versions: {', '.join(_versions())}; revision {git_revision()[:12]}",
        "",
        text.strip("\n"),
        "",
    ]
    stem = f"{datetime.date.today().isoformat()}_{name}"
    number = len(list(FOLDER.glob(f"{stem}*.md")))  # a run never replaces another, whichever looks better
    path = FOLDER / (f"{stem}_{number + 1}.md" if number else f"{stem}.md")
    path.write_text("\n".join(lines))
    return path


def fenced(text: str) -> str:
    """Plain text as a Markdown block."""
    return f"```\n{text}\n```"


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def _versions() -> list[str]:
    found = []
    for package in PACKAGES:
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    return found
