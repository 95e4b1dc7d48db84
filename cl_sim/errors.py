"""Errors a user may see: each says what came, what is allowed, and what to do next."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ClSimError(Exception):
    """A mistake that the user can mend. The command line prints its one line and no traceback."""


class UnknownName(ClSimError):
    """A name that nothing is registered under; suggests the nearest one.

    `kind` is the noun of the thing ('strategy'), `listing` the command that lists all names.
    """

    def __init__(self, kind: str, name: str, known: Iterable[str], listing: str) -> None:
        near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
        hint = f"; did you mean '{near[0]}'?" if near else "."
        super().__init__(f"no {kind} is called '{name}'{hint} All of them: {listing}")


class BadConfig(ClSimError):
    """A setting that does not exist, has the wrong type, or a value that is not allowed."""


class BadData(ClSimError):
    """A data set that is missing or damaged; names the file, and the row where there is one."""


class BadCheckpoint(ClSimError):
    """A checkpoint that is damaged, or that another run wrote."""


class Diverged(ClSimError):
    """A loss that became NaN or infinite."""


class RunBusy(ClSimError):
    """A run folder that another process is writing to."""
