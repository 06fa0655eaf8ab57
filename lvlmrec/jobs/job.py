"""What every job script does around its body: configuration, tracking, exit status, the last line of stdout."""

from __future__ import annotations

import gc
import json
import logging
import signal
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any, TypeVar

from lvlmrec import config, storage, tracking
from lvlmrec.errors import FULL, InputError, JobFailed, error_number, one_line
from lvlmrec.jobs import places
from lvlmrec.tracking import Run

C = TypeVar("C")

REPEAT_SECONDS = 10.0  # a signal so soon after another is the same one

# Importing packages makes objects that stay. At its own threshold of 700 Python's collector looks through them again
# and again, and a job takes longer to start.
gc.set_threshold(10_000, 10, 10)


def main(name: str, schema: type[C], body: Callable[[C, Run], dict[str, Any]]) -> int:
    """Run a job from the command line and return its exit status.

    0: the last line of stdout is one JSON object. 2: configuration or input is wrong, one line on stderr says what.
    1: the run failed. `body(config, run)` returns what the job made and measured.
    """
    arguments = sys.argv[1:]
    if {"-h", "--help"} & set(arguments):
        print(f"usage: python rayjobs/{name}.py [layer.yaml ...] [dotted.key=value ...]\n\nkeys and defaults:")
        print(config.describe(schema))
        return 0
    for noisy in ("ray.data", "ray.train", "ray.tune", "mlflow", "alembic"):
        logging.getLogger(noisy).setLevel(logging.WARNING)  # the job's own lines say how it goes
    interrupt = _interrupt()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, interrupt)
    try:
        resolved: Any = config.from_arguments(schema, arguments, config.CONF / f"{name}.yaml")
        places.check(resolved)
        resolved = config.with_uris(resolved, storage.absolute)
        with tracking.tracked(resolved.tracking_uri, resolved.workspace, name, config.to_dict(resolved)) as run:
            result = body(resolved, run)
    except (InputError, JobFailed) as error:
        print(f"{name}: {one_line(error)}", file=sys.stderr)
        return 2 if isinstance(error, InputError) else 1
    except OSError as error:
        if error_number(error) not in FULL:
            traceback.print_exc()
        else:  # of a temporary file, or of a library's
            print(f"{name}: {one_line(error)}", file=sys.stderr)
        return 1
    except (KeyboardInterrupt, SystemExit) as error:
        where = error.args[0] if isinstance(error, KeyboardInterrupt) and error.args else "where it stopped"
        print(f"{name}: interrupted; the same command goes on {where}", file=sys.stderr)
        return 1
    except Exception:
        traceback.print_exc()
        return 1
    sys.stderr.flush()
    print(json.dumps({"job": name, "run_id": run.id, **result}), flush=True)
    return 0


def _interrupt() -> Callable[[int, Any], None]:
    """A handler of signals that breaks the job off, once.

    `timeout` signals its child and then the child's group, a user presses Ctrl-C again: what is being closed by then
    must not be broken off too.
    """
    last = -REPEAT_SECONDS

    def handle(number: int, frame: Any) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= REPEAT_SECONDS:
            last = now
            raise KeyboardInterrupt

    return handle
