"""A server of short-lived processes for code that is not ours. Run as a script: `worker.py SERVICE ARGUMENT FD LIMITS`.

It loads one service (a Python file with `load(argument) -> (operations, facts)`) and what the service imports, then
forks two processes per session: a keeper, and under it the process that runs the operations. A session starts in some
milliseconds and shares no state with any other. Requests and answers are JSON lines on the session's own socket, which
only the keeper holds: it relays them, keeps the deadline of each request, and ends the whole family of processes when
the deadline passes, an answer is too large, the process is gone, or the trainer hangs up.

Covered: time, processor time, memory, file size, open files and processes are limited; nothing but its end of a socket
pair to the keeper is open; the environment holds no secrets; where the kernel allows namespaces there is no network, no
other process to be seen, and none that outlives the session.
Not covered: the code can read every file that the user can read, and write where the user can (strict sessions of root
have a user of their own, who may write where anyone may), fill a disk with many files, use sockets that are files, and
attack the kernel. Without namespaces it can also signal the user's processes, read their environment, and use the
network. This contains accidents and careless code, not an attacker. That model text is never evaluated is the services'
business.
"""

import gc
import importlib.util
import json
import os
import select
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback

SWEEP_S = 1.0


def load_file(path, name):
    """Import a Python file by its path."""
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


contain = load_file(os.path.join(os.path.dirname(os.path.abspath(__file__)), "contain.py"), "contain")


def answer(operations, line):
    """The answer to one request line."""
    number = None
    try:
        request = json.loads(line)
        number = request["id"]
        value = operations[request["op"]](**request["args"])
        return json.dumps({"id": number, "value": value})
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{os.path.basename(place.filename)}:{place.lineno}"
        return json.dumps({"id": number, "error": f"{type(error).__name__}: {error} ({where})"})


def serve(end, operations):
    """Answer requests until the keeper closes."""
    with end, end.makefile("rw", encoding="utf-8") as stream:
        for line in stream:
            stream.write(answer(operations, line) + "\n")
            stream.flush()


def confine(end, limits, apart, user):
    """Make this process ready for code that is not ours; returns its end of the socket pair, all else is closed."""
    os.setsid()
    for number in (signal.SIGINT, signal.SIGCHLD, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    kept = os.dup2(end.detach(), 3)
    os.closerange(4, os.sysconf("SC_OPEN_MAX"))
    if apart:
        contain.hide_processes()
    if user is not None:
        contain.become(user)
    contain.die_with_parent()
    contain.limit(limits)
    return socket.socket(fileno=kept)


def receive(stream, seconds, size, stop=None):
    """A line from a socket as (bytes, None), or (None, why not): "deadline", "ended", "too_large", "closed".

    `stop` is another socket; when it can be read, which it cannot while all is well, the answer is "closed".
    """
    end = None if seconds is None else time.monotonic() + seconds
    line = bytearray()
    watched = [stream] if stop is None else [stream, stop]
    while not line.endswith(b"\n"):
        left = None if end is None else end - time.monotonic()
        if left is not None and left <= 0:
            return None, "deadline"
        ready, _, _ = select.select(watched, [], [], left)
        if stop in ready:
            return None, "closed"
        if stream in ready:
            chunk = stream.recv(1 << 16)
            if not chunk:
                return None, "ended"
            line += chunk
            if len(line) > size:
                return None, "too_large"
    return bytes(line), None


def relay(connection, process, limits):
    """Pass requests on and answers back until one of the two sides is gone or breaks a rule."""
    while True:
        request, reason = receive(connection, None, limits["request_bytes"])
        if reason is not None:
            return
        if select.select([process], [], [], 0)[0]:  # it speaks without being asked, or is gone
            reason = "ended"
        else:
            try:
                process.settimeout(limits["deadline_s"])
                process.sendall(request)
                reply, reason = receive(process, limits["deadline_s"], limits["reply_bytes"], connection)
            except OSError:
                reason = "ended"
        if reason == "closed":
            return
        connection.sendall(json.dumps({"lost": reason}).encode() + b"\n" if reason else reply)
        if reason:
            return


def keep(connection, operations, limits, folder):
    """Run a session in a process below this one, and leave nothing of it behind."""
    contain.adopt_orphans()
    root = os.geteuid() == 0
    user, alone = contain.session_user(os.getpid()) if folder and root else (None, False)
    if folder:
        os.chdir(folder)
        os.environ.update(HOME=folder, TMPDIR=folder)
        tempfile.tempdir = None
        if user is not None:
            os.chown(folder, user, contain.NOBODY)
    apart = False
    if limits["namespaces"]:
        apart = contain.leave(contain.NEW_PID if root else contain.NEW_USER | contain.NEW_PID)
    if not alone and (root or not apart):  # the limit of processes counts all of the user's
        limits = {**limits, "processes": limits["processes"] + contain.tasks_of(os.geteuid() if user is None else user)}
    ours, theirs = socket.socketpair()
    pid = os.fork()
    if pid == 0:
        try:
            serve(confine(theirs, limits, apart, user), operations)
        finally:
            os._exit(0)
    theirs.close()
    try:
        connection.sendall(b"+")  # the session is there
        relay(connection, ours, limits)
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        contain.end_family(pid)


def remove(folder):
    """Remove a folder, however deeply a tool nested others in it."""
    try:
        shutil.rmtree(folder, ignore_errors=True)
    except RecursionError:
        os.spawnvp(os.P_WAIT, "rm", ["rm", "-rf", "--", folder])


class Server:
    """The sessions of one service."""

    def __init__(self, control, operations, limits):
        self.control, self.operations, self.limits = control, operations, limits
        self.keepers = {}  # process -> its folder

    def run(self):
        """Start a session for every socket that arrives, until the trainer is gone."""
        while True:
            ready, _, _ = select.select([self.control], [], [], SWEEP_S)
            self.sweep()
            if ready:
                _, descriptors, _, _ = socket.recv_fds(self.control, 1, 1)
                if not descriptors:
                    break
                self.start(socket.socket(fileno=descriptors[0]))
        for keeper in self.keepers:
            os.kill(keeper, signal.SIGTERM)
        end = time.monotonic() + 2.0
        while self.keepers and time.monotonic() < end:
            time.sleep(0.005)
            self.sweep()
        for keeper in self.keepers:  # one that its tool has stopped; what is below it is a stray then
            os.kill(keeper, signal.SIGKILL)
            os.waitpid(keeper, 0)
        self.keepers.clear()
        contain.end_strays()

    def start(self, connection):
        """Fork a keeper."""
        folder = None
        if self.limits["strict"]:
            folder = tempfile.mkdtemp(prefix="session-")
        pid = os.fork()
        if pid == 0:
            self.control.close()
            signal.signal(signal.SIGTERM, lambda *_: sys.exit())
            try:
                keep(connection, self.operations, self.limits, folder)
            finally:
                os._exit(0)
        self.keepers[pid] = folder
        connection.close()

    def sweep(self):
        """Forget keepers that are done, remove their folders, and kill what a keeper that was killed left behind."""
        try:
            while pid := os.waitpid(-1, os.WNOHANG)[0]:
                folder = self.keepers.pop(pid, None)
                if folder:
                    remove(folder)
        except ChildProcessError:
            return
        for stray in set(contain.children()) - set(self.keepers):
            os.kill(stray, signal.SIGKILL)


def main(service, argument, descriptor, limits):
    limits = json.loads(limits)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the trainer, which closes the control socket
    contain.adopt_orphans()
    cut_off = False
    if limits["namespaces"] and not limits["network"]:
        cut_off = contain.leave(contain.NEW_NET) or contain.leave(contain.NEW_USER | contain.NEW_NET)
    control = socket.socket(fileno=int(descriptor))
    operations = None
    try:
        operations, facts = load_file(service, "service").load(argument)
        greeting = {"value": facts, "network_closed": cut_off}
    except Exception as error:
        greeting = {"error": f"{type(error).__name__}: {error}", "missing": getattr(error, "name", None)}
    gc.freeze()  # a collection in a session would copy every page it shares with this process
    control.sendall(json.dumps(greeting).encode() + b"\n")
    if operations is not None:
        Server(control, operations, limits).run()
    remove(os.environ["TMPDIR"])  # a trainer that was killed cannot


if __name__ == "__main__":
    main(*sys.argv[1:])
