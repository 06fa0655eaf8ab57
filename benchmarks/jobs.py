"""Running the project's jobs as a user does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


def run(job: str, *arguments: str) -> dict[str, Any]:
    """The JSON of a job's last line. Raises `CalledProcessError` when it fails."""
    command = [sys.executable, str(ROOT / "rayjobs" / f"{job}.py"), *arguments]
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()[-1])


def real_data() -> Path:
    """The folder of real datasets: LVLMREC_DATA, or shared/data beside the repository."""
    folder = Path(os.environ.get("LVLMREC_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        sys.exit(f"real data: {folder} is not there; set LVLMREC_DATA")
    return folder
