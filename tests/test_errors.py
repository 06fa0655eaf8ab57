"""What the package's errors share."""

from __future__ import annotations

import pytest

from lvlmrec.errors import one_line


@pytest.mark.parametrize(
    ("error", "most", "line"),
    [
        (ValueError("first\n\tsecond  third\r\n"), None, "first second third"),
        (OSError(2, "no such file"), None, "[Errno 2] no such file"),
        ("a text\nof two lines", 6, "a text"),
        (ValueError(), None, ""),
    ],
)
def test_one_line_joins_the_lines_of_an_error(error: object, most: int | None, line: str) -> None:
    assert one_line(error, most) == line
