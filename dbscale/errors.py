"""What users are told: one exception per wing, the "did you mean" clause of their messages, and where logs go.

Every message says what is wrong, where, which value was found, and what to do about it. What goes on all the same is
logged under the module's name: a warning where something was skipped, INFO for what is done on the way.
"""

from __future__ import annotations

import difflib
import logging
import os
import sys
from collections.abc import Iterable

VERBOSITY = "DBSCALE_VERBOSE"
"""Environment variable in which a job finds how much the command that started it logs."""


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


def log_to_stderr(verbose: int | None = None) -> None:
    """Show on stderr what libraries and dbscale's own rooms log: warnings; with 1 what is done, with 2 everything.

    Child processes that call it without a number log as much as this one. Programs that import dbscale need not call
    it: theirs is the choice of what to show.
    """
    if verbose is None:
        told = os.environ.get(VERBOSITY, "")
        verbose = int(told) if told.isdigit() else 0  # a site's own value is no reason to fail
    elif verbose:
        os.environ[VERBOSITY] = str(verbose)
    level = (logging.WARNING, logging.INFO, logging.DEBUG)[min(verbose, 2)]
    logging.basicConfig(level=logging.WARNING, format="%(name)s: %(message)s", stream=sys.stderr)
    logging.getLogger("dbscale").setLevel(level)
