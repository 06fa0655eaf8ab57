"""The dated Markdown file that a benchmark leaves in benchmarks/results/ when asked to."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Sequence
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

RESULTS = Path(__file__).parent / "results"


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def versions(packages: Sequence[str]) -> str:
    """Installed versions in one line; `absent` for what is not installed."""
    found = []
    for package in packages:
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            found.append(f"{package} absent")
    return ", ".join([f"Python {platform.python_version()}", *found])


def load() -> float:
    """Load average of the last minute; every result says it, for a busy machine spoils a timing."""
    return round(os.getloadavg()[0], 2)


def save(name: str, title: str, packages: Sequence[str], loads: Sequence[float], body: str) -> Path:
    """Write `<date>-<name>-<n>.md`: command, machine, versions, load at start and end, `body`. Returns the file."""
    header = [
        f"# {title}",
        "",
        f"- Date: {date.today().isoformat()}",
        f"- Command: `python -m benchmarks.{name} {' '.join(sys.argv[1:])}`",
        f"- Machine: {_cpu()}, {os.cpu_count()} logical CPUs, {platform.system()} {platform.machine()}",
        f"- Versions: {versions(packages)}",
        f"- Load average (1 min): {' at the start, '.join(map(str, loads))} at the end",
    ]
    RESULTS.mkdir(exist_ok=True)
    stem = f"{date.today().isoformat()}-{name}"
    number = 1 + len(list(RESULTS.glob(f"{stem}-*.md")))  # a run never replaces another, whichever looks better
    path = RESULTS / f"{stem}-{number}.md"
    path.write_text("\n".join([*header, "", body]) + "\n")
    return path


def _cpu() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "unknown CPU"
