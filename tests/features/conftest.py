"""Feature sets of random vectors in the test's own folder."""

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from tests.feature_sets import recipe_of, write_set


@pytest.fixture
def make_set(tmp_path: Path) -> Callable[..., str]:
    """Write a feature set in parts of the given items; committed unless told otherwise."""

    def make(
        parts: Sequence[Sequence[str]],
        dtype: str = "float16",
        commit: bool = True,
        poolings: Sequence[str] = ("visual_mean",),
    ) -> str:
        return write_set(tmp_path / "store", parts, recipe_of(dtype, poolings), commit)

    return make
