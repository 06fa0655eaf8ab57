"""What an entry of `POOLINGS` declares.

Legend: B items, S sequence positions, C of what prompts share, Q of a prompt's own end, D the tap's width, K tokens.
Nothing here imports torch: a job that only plans reads the table too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

# which tokens of a sequence a pooling reads
VISUAL = "visual"  # those of the video or cover
ALL = "all"  # the prompt's, with its video
ANSWER = "answer"  # those that the model generated
ANSWER_END = "answer end"  # the end-of-sequence token behind an answer
PROMPT_END = "prompt end"  # the end-of-sequence token behind a prompt without an answer
CLASS = "class"  # the class token of a text or vision encoder; no token of an LVLM is one

WIDTH = -1  # in the shape of a column: the width of its tap
SIZES = ".sizes"  # behind the name of a column of merged tokens: how many tokens each of them stands for
VECTOR = {"": (WIDTH,)}


@dataclass(frozen=True)
class Pooling:
    """How the tokens of one hidden state become the columns of a feature.

    reads    the tokens: `visual`, `all`, `answer`, `answer end`, `prompt end` or `class`
    pool     hidden state [B, S, D] and bool [B, S], which tokens to read -> one float32 [B, D] or [B, K * D] per column
    columns  the end of each column's name -> the shape of an item's value, `WIDTH` for D
    begin    of a pooling of all tokens, what it needs of a beginning that several prompts share, from the hidden state
             [B, C, D] and bool [B, C]
    join     one tensor per column, from what `begin` gave and from the rest, [B, Q, D] and bool [B, Q]. Where a pooling
             of all tokens has no `join`, each prompt is read by itself, as a whole.
    """

    reads: str
    pool: Callable[[Tensor, Tensor], tuple[Tensor, ...]]
    columns: Mapping[str, tuple[int, ...]]
    begin: Callable[[Tensor, Tensor], Any] | None = None
    join: Callable[[Any, Tensor, Tensor], tuple[Tensor, ...]] | None = None

    def applies(self, shows: str, max_new_tokens: int) -> bool:
        """Whether a prompt that shows `video`, `cover` or `text` alone, and its answer, have such tokens."""
        has_tokens = {
            VISUAL: shows != "text",
            ANSWER: max_new_tokens > 0,
            ANSWER_END: max_new_tokens > 0,
            PROMPT_END: max_new_tokens == 0,
        }
        return has_tokens.get(self.reads, True)

    @property
    def shares_beginning(self) -> bool:
        """Whether prompts that begin alike may be read together."""
        return self.reads != ALL or self.join is not None


def shape(symbolic: tuple[int, ...], width: int) -> tuple[int, ...]:
    """The shape of an item's value at a tap of this width."""
    return tuple(width if size == WIDTH else size for size in symbolic)
