"""Errors a user can fix, and the user's wish to stop.

`UserError` carries what went wrong, where, and the remedy; the command line prints it as one line without a
traceback and exits with code 2. Anything else that escapes is a bug and keeps its traceback. A reader who leaves before
the output is over (`| head`) is no error.
"""

from __future__ import annotations

import os
import select
import sys
from collections.abc import Callable, Sequence
from functools import wraps
from typing import TextIO


class UserError(Exception):
    """A problem the user can fix.

    Args:
        what: what is wrong, one clause.
        where: the option, file or field it concerns.
        remedy: what to do about it, one clause.
    """

    exit_code = 2

    def __init__(self, what: str, *, where: str | None = None, remedy: str | None = None) -> None:
        self.what, self.where, self.remedy = what, where, remedy
        super().__init__(what)

    def __str__(self) -> str:
        line = f"{self.where}: {self.what}" if self.where else self.what
        line = f"{line}; {self.remedy}" if self.remedy else line
        return " ".join(line.splitlines())  # reasons taken over from libraries may have several


def cannot_write(error: Exception, where: object) -> UserError:
    """For a disk that is full, or a folder that is not to be written: what went wrong at `where`."""
    reason = getattr(error, "strerror", None) or error
    remedy = "free some space or check the permissions, then repeat the command with --resume"
    return UserError(f"cannot be written ({reason})", where=str(where), remedy=remedy)


class Interrupted(Exception):
    """The user pressed Ctrl-C, or the process was told to end, and the stage has saved what it had."""


def readers_may_leave(main: Callable[[Sequence[str] | None], int]) -> Callable[..., int]:
    """A command's `main` that ends quietly, with its own exit code or 0, when nobody reads its output any more."""

    @wraps(main)
    def run(argv: Sequence[str] | None = None) -> int:
        code = 0
        try:
            try:
                code = main(argv)
            finally:
                if sys.stdout is not None:  # closed from the start
                    sys.stdout.flush()
        except BrokenPipeError:
            if not _unread(sys.stdout):
                raise
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is still in the buffer
        return code

    return run


def _unread(stream: TextIO) -> bool:
    """Whether a stream leads into a pipe or terminal with nobody at its end."""
    poll = select.poll()
    poll.register(stream.fileno(), select.POLLOUT)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))
