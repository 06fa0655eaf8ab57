"""Names that MLflow accepts: every name is encoded as one, different names as different ones.

MLflow accepts letters, digits, blanks and `_ - . : /`, at most 250 of them, and only normalised relative paths.
"""

from __future__ import annotations

import hashlib
import posixpath
import re

MAX_LENGTH = 250
REFUSED = re.compile(r"[^/\w.\- :]")
CODE = re.compile(r"_at_(?=\d)|_x([0-9a-f]*)_")


def encoded(name: str) -> str:
    """`name` with each character that MLflow refuses as `_x<code point>_`, but `hr@10` as `hr_at_10`.

    The end of a name that is too long is replaced by a digest of the whole.

    >>> encoded("SASRec+ID/hr@10")
    'SASRec_x2b_ID/hr_at_10'
    """
    made = REFUSED.sub(_code, re.sub(r"@(?=\d)", "_at_", name))
    if decoded(made) != name:  # the name contains what looks like an encoded character
        made = re.sub(r"[_\W]", _code, name)
    if posixpath.normpath(made) != made or made.startswith(("/", "..")) or made == ".":
        made = re.sub(r"[_/.]|^$", _code, name)
        made = REFUSED.sub(_code, made)
    if len(made) > MAX_LENGTH:
        digest = hashlib.blake2b(name.encode(), digest_size=8).hexdigest()
        made = f"{made[: MAX_LENGTH - len(digest) - 1]}_{digest}"
    return made


def decoded(name: str) -> str:
    """The name that `encoded` encoded, unless it was too long."""
    return CODE.sub(lambda match: "@" if match[1] is None else chr(int(match[1], 16)) if match[1] else "", name)


def _code(match: re.Match[str]) -> str:
    return f"_x{ord(match[0]):x}_" if match[0] else "_x_"
