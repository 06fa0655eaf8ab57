"""Models on the Hugging Face hub: a commit that is asked for once, and its files in the hub's cache on this machine.

A hub out of reach is known after one request of a few seconds; what the cache holds of a commit needs no request.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lvlmrec.errors import one_line
from lvlmrec.lvlms.files.weight_files import INDEX, WEIGHTS, shards_of, sizes_of

QUOTED = 200  # characters of what the client raises
ANSWER_SECONDS = 5.0  # the hub's own client would wait for ever
COMMIT = re.compile(r"[0-9a-f]{40}")
SMALL = ("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "*.py")


def commit_of(model: str, revision: str) -> str:
    """The commit of a branch or tag, 40 hexadecimal digits: the hub's answer, or the cache's where it is out of reach.

    A commit is itself, whether there is such a one or not. Raises `OSError`.
    """
    if COMMIT.fullmatch(revision):
        return revision
    from huggingface_hub.errors import RevisionResolutionError

    try:
        return str(_api().resolve_revision(model, revision=revision or None).resolved)
    except RevisionResolutionError as error:
        raise OSError(_out_of_reach(error.__cause__ or error)) from error
    except Exception as error:  # whatever its client raises: no such model, no access, a proxy
        raise OSError(one_line(error, QUOTED)) from error


@functools.cache
def small_files(model: str, commit: str) -> Path:
    """The folder with the files of a commit, weights excepted. Raises `OSError`."""
    return _fetch(model, commit, SMALL)


@functools.cache
def all_files(model: str, commit: str) -> Path:
    """The folder with the files of a commit and the weights transformers reads. Raises `OSError`, `ValueError`."""
    folder = small_files(model, commit)
    names = listing(model, commit) or sizes_of(folder)
    weights = {WEIGHTS} if WEIGHTS in names or not (folder / INDEX).is_file() else shards_of(folder)
    return _fetch(model, commit, [*SMALL, *sorted(weights)])


def listing(model: str, commit: str) -> dict[str, int] | None:
    """The files of a commit with their sizes in bytes, as the hub once listed them; None where it was never asked."""
    from huggingface_hub import get_cached_repo_tree
    from huggingface_hub.errors import CachedRepoTreeNotFoundError

    try:
        return {file.path: file.size for file in get_cached_repo_tree(model, revision=commit)}
    except CachedRepoTreeNotFoundError:
        return None


def _fetch(model: str, commit: str, patterns: Sequence[str]) -> Path:
    from huggingface_hub import snapshot_download

    here = functools.partial(snapshot_download, model, revision=commit, allow_patterns=[*patterns])
    if listing(model, commit) is not None:
        try:
            return Path(here(local_files_only=True))
        except OSError:  # some are missing
            pass
    try:
        _api().repo_info(model, revision=commit)  # else each of the files would be asked for again and again
    except Exception as error:  # whatever its client raises
        try:
            return Path(here(local_files_only=True))
        except OSError:
            raise OSError(_out_of_reach(error)) from error
    try:
        return Path(here())
    except Exception as error:  # whatever its client raises: no access to the files, a connection that broke off
        raise OSError(one_line(error, QUOTED)) from error


def _api() -> Any:
    """The hub's client, one that does not wait for ever."""
    from huggingface_hub import HfApi

    class Api(HfApi):
        def repo_info(self, *arguments: Any, **options: Any) -> Any:
            return super().repo_info(*arguments, **options | {"timeout": ANSWER_SECONDS})

    return Api()


def _out_of_reach(error: BaseException) -> str:
    from huggingface_hub import constants

    cause = f"{type(error).__name__}: {one_line(error, QUOTED)}"
    return (
        f"{constants.ENDPOINT} cannot be reached, and the files are not in the cache {constants.HF_HUB_CACHE}: name a "
        f"local directory, or fill the cache where there is a network ({cause})"
    )
