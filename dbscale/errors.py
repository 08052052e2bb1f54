"""What users are told: one exception per wing, and the "did you mean" clause that their messages share.

Every message says what is wrong, where, which value was found, and what to do about it.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ConfigError(ValueError):
    """What the user wrote cannot be used: the message says where, which value, and what is allowed."""


class FileError(ValueError):
    """A file or folder cannot be written, read or locked."""


class StoreError(FileError):
    """A store holds something other than it should."""


class DataError(ValueError):
    """A dataset, shard, subset or loader request that cannot be honoured."""


class TrainingError(ValueError):
    """A cell cannot be trained as asked."""


class LawError(ValueError):
    """A table, law or option that cannot be fitted."""


class NotEnoughData(LawError):
    """The law is well posed, but the table has too few distinct points for it."""


class TableError(ValueError):
    """A table cannot be used: says which line, column and value, and what would be right."""


def nearest(name: object, known: Iterable[object]) -> str:
    """`did you mean 'x'? known: x, y` for an unknown name."""
    names = sorted(map(str, known))
    close = difflib.get_close_matches(str(name), names, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}known: {', '.join(names) or '(none)'}"
