"""A server of short-lived processes for benchmark code. Run as a script: `worker.py SERVICE FOLDER FD DEADLINE`.

It loads one service (a file beside this one) and what the service imports, then forks one process per session: a
session starts in about a millisecond, shares no state with any other, and ends with its process. Requests and answers
are JSON lines on the session's own socket. Each request has a deadline that the kernel enforces, and each session
limits of CPU time, memory and file size.

This contains accidents, not attacks: the code runs as the user and could open a network connection. That model text is
never evaluated is the services' business.
"""

import array
import gc
import importlib.util
import json
import os
import resource
import signal
import socket
import sys
import traceback

MEMORY_BYTES = 4 << 30
CPU_SECONDS = 600


def load_service(name, folder):
    """Import the service file `name` and let it load `folder`; returns (operations by name, facts about it)."""
    path = os.path.join(os.path.dirname(os.path.abspath(__file__)), name + ".py")
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.load(folder)


def answer(operations, line):
    """The answer to one request line."""
    try:
        request = json.loads(line)
        value = operations[request["op"]](**request["args"])
        return json.dumps({"value": value})
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{os.path.basename(place.filename)}:{place.lineno}"
        return json.dumps({"error": f"{type(error).__name__}: {error} ({where})"})


def serve(connection, operations, deadline):
    """Answer requests until the other side closes. A request that takes too long kills the process."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    with connection, connection.makefile("rw", encoding="utf-8") as stream:
        for line in stream:
            signal.setitimer(signal.ITIMER_REAL, deadline)
            reply = answer(operations, line)
            signal.setitimer(signal.ITIMER_REAL, 0)
            stream.write(reply + "\n")
            stream.flush()


def receive_descriptor(control):
    """The next session's socket, or None when the parent is gone."""
    room = socket.CMSG_SPACE(array.array("i", [0]).itemsize)
    message, ancillary, _, _ = control.recvmsg(1, room)
    if not message:
        return None
    descriptor = array.array("i")
    descriptor.frombytes(ancillary[0][2])
    return socket.socket(fileno=descriptor[0])


def main(name, folder, descriptor, deadline):
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which closes the control socket
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # sessions are not waited for
    control = socket.socket(fileno=int(descriptor))
    try:
        operations, facts = load_service(name, folder)
        greeting = {"value": facts}
    except Exception as error:
        operations = None
        greeting = {"error": f"{type(error).__name__}: {error}", "missing": getattr(error, "name", None)}
    gc.freeze()  # a collection in a session would copy every page it shares with this process
    control.sendall(json.dumps(greeting).encode() + b"\n")
    while operations is not None:
        connection = receive_descriptor(control)
        if connection is None:
            return
        if os.fork() == 0:
            control.close()
            try:
                serve(connection, operations, float(deadline))
            finally:
                os._exit(0)
        connection.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
