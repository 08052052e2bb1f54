"""The one exception that bad tables raise, with the nearest-name helper that its messages share."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class LawError(ValueError):
    """A table, law or option that cannot be fitted. The message says what, where, the value and the fix."""


class NotEnoughData(LawError):
    """The law is well posed, but the table has too few distinct points for it."""


def nearest(name: str, known: Iterable[str]) -> str:
    """`did you mean 'x'? known: …` for an unknown name."""
    known = [str(k) for k in known]
    close = difflib.get_close_matches(str(name), known, n=1, cutoff=0.4)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}known: {', '.join(known) or '(none)'}"
