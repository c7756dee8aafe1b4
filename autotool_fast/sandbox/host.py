"""Code that is not ours in processes of its own: the trainer's side of `worker`.

A `WorkerHost` is one server process per (service, argument), started on first use with an environment that holds no
secrets; `open` gives a `Session`, fresh processes forked from it. A session ends when it is closed or forgotten, at the
deadline of a request, or when its process is gone; closing the host ends them all. What a session may use is in
`Limits`; what that covers is in `worker`.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autotool_fast.errors import UserError

DEADLINE_S = 20.0
"""Seconds one request may take."""

_START_S = 120.0
_END_S = 3.0
_WORKER = Path(__file__).with_name("worker.py")


@dataclass(frozen=True)
class Limits:
    """What one session may use. All but the first and the last two hold for each of its processes.

    Attributes:
        deadline_s: seconds one request may take.
        cpu_s: seconds of processor time.
        memory_bytes: address space, that of the loaded service included.
        file_bytes: size of a file it writes; 0 forbids writing.
        open_files: file descriptors.
        processes: processes and threads of a session together; does not bind root (see `strict`).
        request_bytes, reply_bytes: size of a line.
        network: whether the network stays; closing it needs a kernel that allows namespaces.
        strict: run in an empty temporary folder, removed with the session, and as another user if the trainer is root.
        namespaces: ask the kernel for user, process and network namespaces.
    """

    deadline_s: float = DEADLINE_S
    cpu_s: int = 600
    memory_bytes: int = 4 << 30
    file_bytes: int = 0
    open_files: int = 256
    processes: int = 64
    request_bytes: int = 64 << 20
    reply_bytes: int = 64 << 20
    network: bool = False
    strict: bool = False
    namespaces: bool = True


class WorkerError(RuntimeError):
    """The service raised; the session goes on."""


class WorkerDied(RuntimeError):
    """The session is over.

    Attributes:
        reason: "deadline" (the request took too long), "too_large" (its answer), or "ended" (the process is gone).
    """

    def __init__(self, op: str, reason: str = "ended") -> None:
        words = {"deadline": "no answer within the deadline", "too_large": "the answer is too large"}
        super().__init__(f"{op}: {words.get(reason, 'the process has ended')}")
        self.reason = reason


class Session:
    """One family of processes. One request at a time; `close` may come from another thread, and ends it."""

    def __init__(self, connection: socket.socket, deadline_s: float) -> None:
        connection.settimeout(deadline_s + 10)  # the keeper has its own, shorter deadline
        self._connection = connection
        self._requests = 0

    def call(self, op: str, **args: Any) -> Any:
        """The value of one operation, all JSON.

        Raises:
            WorkerError: the operation raised.
            WorkerDied: there was no answer; the session is closed.
        """
        self._requests += 1
        request = json.dumps({"id": self._requests, "op": op, "args": args}) + "\n"
        try:
            self._connection.sendall(request.encode())
            reply = json.loads(self._read_line())
        except (OSError, ValueError, RecursionError):
            reply = {"lost": "ended"}
        if not isinstance(reply, dict) or reply.get("id") != self._requests:
            self.close()
            reason = reply.get("lost") if isinstance(reply, dict) else None
            raise WorkerDied(op, reason if isinstance(reason, str) else "ended")
        if "error" in reply:
            raise WorkerError(reply["error"])
        return reply.get("value")

    def _read_line(self) -> bytes:
        chunks = []
        while not (chunks and chunks[-1].endswith(b"\n")):
            chunk = self._connection.recv(1 << 16)
            if not chunk:
                break
            chunks.append(chunk)
        return b"".join(chunks)

    def close(self) -> None:
        """End the processes."""
        with suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)  # wakes a thread that waits for an answer
        self._connection.close()


class WorkerHost:
    """A server of sessions.

    Args:
        service: the Python file of the service.
        argument: what its `load` gets, usually a folder.
        limits: of each session.
        where: the option that named the argument, for messages.
        remedy: what to do when it cannot be loaded.
        start_s: seconds that loading may take.
    """

    def __init__(
        self,
        service: Path,
        argument: str,
        *,
        limits: Limits | None = None,
        where: str = "",
        remedy: str = "",
        start_s: float = _START_S,
    ) -> None:
        self.service, self.argument, self.limits = service, argument, limits or Limits()
        self._where, self._remedy, self._start_s = where or argument, remedy, start_s
        self._lock = threading.Lock()
        self._control: socket.socket | None = None
        self._greeting: dict[str, Any] = {}
        self._shared: Session | None = None

    @property
    def deadline_s(self) -> float:
        """Seconds one request may take."""
        return self.limits.deadline_s

    @property
    def facts(self) -> Any:
        """What the service says about itself."""
        return self._greeted()["value"]

    @property
    def network_closed(self) -> bool:
        """Whether the sessions are without a network."""
        return self._greeted()["network_closed"]

    def _greeted(self) -> dict[str, Any]:
        with self._lock:
            self._start()
            return self._greeting

    def open(self) -> Session:
        """A fresh session. A server that has died is started anew, without the sessions it left.

        Raises:
            UserError: the service cannot be loaded.
            WorkerDied: the new server does not start sessions either.
        """
        for _ in range(2):
            ours, theirs = socket.socketpair()
            ours.settimeout(self._start_s)
            with self._lock, theirs:
                self._start()
                asked = self._control
                with suppress(OSError):
                    socket.send_fds(asked, [b"+"], [theirs.fileno()])
            with suppress(OSError):
                if ours.recv(1):  # outside the lock: sessions start side by side
                    return Session(ours, self.deadline_s)
            ours.close()
            with self._lock:
                if self._control is asked:
                    self._stop()
        raise WorkerDied("open")

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
        os.chmod(scratch, 0o711)  # the folders of sessions are below it, and may belong to other users
        environment = {"PATH": os.defpath, "LANG": "C.UTF-8", "TZ": "UTC", "HOME": scratch, "TMPDIR": scratch}
        command = [sys.executable, "-I", "-B", str(_WORKER), str(self.service), self.argument]
        process = subprocess.Popen(
            [*command, str(theirs.fileno()), json.dumps(dataclasses.asdict(self.limits))],
            pass_fds=[theirs.fileno()],
            env=environment,
            cwd=scratch,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # its keepers are in its process group, and no signal of a terminal is
        )
        theirs.close()
        self._finalizer = weakref.finalize(self, _stop, control, process, scratch)
        self._control = control
        greeting = self._read_greeting(control)
        if "error" in greeting:
            self._stop()
            missing = greeting.get("missing")
            remedy = f"pip install {missing}" if missing and not missing.startswith("bfcl_eval") else self._remedy
            raise UserError(f"cannot be loaded ({greeting['error']})", where=self._where, remedy=remedy)
        self._greeting = greeting

    def _read_greeting(self, control: socket.socket) -> dict[str, Any]:
        control.settimeout(self._start_s)
        try:
            with control.makefile("r", encoding="utf-8") as stream:
                line = stream.readline()
        except OSError:
            return {"error": f"loading took more than {self._start_s:g} seconds"}
        return json.loads(line) if line else {"error": "its process ended while it was loading"}


def _stop(control: socket.socket, process: subprocess.Popen, scratch: str) -> None:
    control.close()  # the server ends its sessions one by one
    end = time.monotonic() + _END_S
    while process.poll() is None and time.monotonic() < end:
        time.sleep(0.005)
    if process.poll() is None:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # not yet waited for, so the number is still its own
        process.wait()
    with suppress(RecursionError):  # folders that a tool nested without end
        shutil.rmtree(scratch, ignore_errors=True)
