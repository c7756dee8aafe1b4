"""Benchmark code in processes of its own: the parent's side of `worker`.

A `WorkerHost` is one server process per (service, folder), started on first use with an environment that holds no
secrets; `open` gives a `Session`, a fresh process forked from it. A session ends when it is closed or forgotten, in the
middle of a request at its deadline; closing the host ends them all at once.
"""

from __future__ import annotations

import array
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import weakref
from contextlib import suppress
from pathlib import Path
from typing import Any

from autotool_fast.errors import UserError

DEADLINE_S = 20.0
"""Seconds one request may take."""

_START_S = 120.0
_WORKER = Path(__file__).with_name("worker.py")


class WorkerError(RuntimeError):
    """The service raised; the session goes on."""


class WorkerDied(RuntimeError):
    """The session's process is gone: the request passed its deadline or a limit."""


class Session:
    """One process. Not for use by two threads at once."""

    def __init__(self, connection: socket.socket, deadline_s: float) -> None:
        connection.settimeout(deadline_s + 10)  # the process has its own, shorter deadline
        self._connection = connection
        self._stream = connection.makefile("rw", encoding="utf-8")

    def call(self, op: str, **args: Any) -> Any:
        """The value of one operation, all JSON.

        Raises:
            WorkerError: the operation raised.
            WorkerDied: there was no answer; the session is closed.
        """
        try:
            self._stream.write(json.dumps({"op": op, "args": args}) + "\n")
            self._stream.flush()
            line = self._stream.readline()
        except (OSError, ValueError) as error:
            self.close()
            raise WorkerDied(f"{op}: {error}") from None
        if not line:
            self.close()
            raise WorkerDied(f"{op}: no answer within the deadline")
        reply = json.loads(line)
        if "error" in reply:
            raise WorkerError(reply["error"])
        return reply["value"]

    def close(self) -> None:
        """End the process."""
        for stream in (self._stream, self._connection):
            with suppress(OSError):
                stream.close()


class WorkerHost:
    """A server of sessions.

    Args:
        service: name of a service file beside this one, without its ending.
        folder: what the service loads.
        deadline_s: seconds one request may take.
        where: the option that named the folder, for messages.
        remedy: what to do when the folder cannot be loaded.
    """

    def __init__(
        self, service: str, folder: Path, *, deadline_s: float = DEADLINE_S, where: str = "", remedy: str = ""
    ) -> None:
        self.service, self.folder, self.deadline_s = service, folder.resolve(), deadline_s
        self._where, self._remedy = where or str(folder), remedy
        self._lock = threading.Lock()
        self._control: socket.socket | None = None
        self._facts: dict[str, Any] = {}
        self._shared: Session | None = None

    @property
    def facts(self) -> dict[str, Any]:
        """What the service says about itself."""
        with self._lock:
            self._start()
        return self._facts

    def open(self) -> Session:
        """A fresh process. A server that has died is started anew, without the sessions it left."""
        ours, theirs = socket.socketpair()
        with self._lock, theirs:
            self._start()
            try:
                self._request_session(theirs)
            except OSError:
                self._stop()
                self._start()
                self._request_session(theirs)
        return Session(ours, self.deadline_s)

    def _request_session(self, end: socket.socket) -> None:
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [end.fileno()]))]
        self._control.sendmsg([b"+"], rights)

    def call(self, op: str, **args: Any) -> Any:
        """One operation that keeps no state, on a session kept for such calls; see `Session.call`."""
        if self._shared is None:
            self._shared = self.open()
        try:
            return self._shared.call(op, **args)
        except WorkerDied:
            self._shared = None
            raise

    def close(self) -> None:
        """End the server and every session."""
        self._stop()

    def _stop(self) -> None:
        if self._shared is not None:
            self._shared.close()
        if self._control is not None:
            self._finalizer()
        self._shared = self._control = None

    def _start(self) -> None:
        if self._control is not None:
            return
        control, theirs = socket.socketpair()
        scratch = tempfile.mkdtemp(prefix="autotool-worker-")
        environment = {"PATH": os.defpath, "LANG": "C.UTF-8", "TZ": "UTC", "HOME": scratch, "TMPDIR": scratch}
        command = [sys.executable, "-I", "-B", str(_WORKER), self.service, str(self.folder)]
        process = subprocess.Popen(
            [*command, str(theirs.fileno()), str(self.deadline_s)],
            pass_fds=[theirs.fileno()],
            env=environment,
            cwd=scratch,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # its sessions are in its process group, and no signal of a terminal is
        )
        theirs.close()
        self._finalizer = weakref.finalize(self, _stop, control, process, scratch)
        self._control = control
        control.settimeout(_START_S)
        try:
            with control.makefile("r", encoding="utf-8") as stream:
                line = stream.readline()
        except OSError as error:
            line = json.dumps({"error": str(error)})
        greeting = json.loads(line) if line else {"error": "its process ended while it was loading"}
        if "error" in greeting:
            self._stop()
            missing = greeting.get("missing")
            remedy = f"pip install {missing}" if missing and not missing.startswith("bfcl_eval") else self._remedy
            raise UserError(f"cannot be loaded ({greeting['error']})", where=self._where, remedy=remedy)
        self._facts = greeting["value"]


def _stop(control: socket.socket, process: subprocess.Popen, scratch: str) -> None:
    control.close()
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # not yet waited for, so the number is still its own
    process.wait()
    shutil.rmtree(scratch, ignore_errors=True)
