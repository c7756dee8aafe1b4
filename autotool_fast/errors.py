"""Errors a user can fix, and the user's wish to stop.

`UserError` carries what went wrong, where, and the remedy; the command line prints it as one line without a
traceback and exits with code 2. Anything else that escapes is a bug and keeps its traceback.
"""

from __future__ import annotations


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
