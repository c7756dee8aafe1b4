"""Processes for code that is not ours: fresh state, limits, no secrets, one-line errors, nothing left behind."""

import dataclasses
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest
from eval_stand_ins import STAND_INS

from autotool_fast.errors import UserError
from autotool_fast.eval.bfcl import SERVICE
from autotool_fast.sandbox import host as host_module
from autotool_fast.sandbox.host import Limits, WorkerDied, WorkerError, WorkerHost

ENTRY = {
    "id": "multi_turn_base_0",
    "initial_config": {"House": {"lamps": {"hall": "off"}}},
    "involved_classes": ["House"],
}
KNOWN = ["switch", "look", "wait", "surroundings", "quit_process"]


@pytest.fixture
def host():
    made = WorkerHost(SERVICE, str(STAND_INS / "bfcl"), limits=Limits(1.0))
    yield made
    made.close()


def started(host):
    session = host.open()
    session.call("start", entry=ENTRY, known=KNOWN)
    return session


def descendants(pid: int) -> list[int]:
    """Processes below `pid`, itself left out."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(") ")[2].split()
        except OSError:
            continue
        if fields[0] != "Z":
            parents.setdefault(int(fields[1]), []).append(int(stat.parent.name))
    found, queue = [], [pid]
    while queue:
        children = parents.get(queue.pop(), [])
        found += children
        queue += children
    return found


def wait_for(condition, seconds=5.0):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    return condition()


def test_two_sessions_of_one_entry_share_no_state(host):
    first, second = started(host), started(host)
    assert first.call("execute", calls=[["switch", {"lamp": "hall"}]]) == ['{"lamp": "hall", "is": "on"}']
    assert second.call("execute", calls=[["look", {}]]) == ['{"hall": "off"}']
    assert first.call("execute", calls=[["look", {}]]) == ['{"hall": "on"}']


def test_a_call_that_takes_too_long_ends_its_session_only(host):
    slow, other = started(host), started(host)
    began = time.monotonic()
    with pytest.raises(WorkerDied):
        slow.call("execute", calls=[["wait", {"seconds": 60}]])
    assert time.monotonic() - began < 8
    with pytest.raises(WorkerDied):
        slow.call("execute", calls=[["look", {}]])
    assert other.call("execute", calls=[["look", {}]]) == ['{"hall": "off"}']


def test_the_deadline_is_of_each_request_not_of_the_session(host):
    session = started(host)
    for _ in range(3):
        assert session.call("execute", calls=[["wait", {"seconds": 0.5}]]) == ["waited"]


def test_a_process_that_ends_itself_is_reported(host):
    with pytest.raises(WorkerDied):
        started(host).call("execute", calls=[["quit_process", {}]])


def test_an_operation_that_raises_leaves_the_session_usable(host):
    session = started(host)
    with pytest.raises(WorkerError, match="FileNotFoundError"):
        session.call("entries", category="no_such")
    assert session.call("execute", calls=[["look", {}]]) == ['{"hall": "off"}']


def test_no_secret_of_the_environment_reaches_the_code(host, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "do not tell")
    (names,) = started(host).call("execute", calls=[["surroundings", {}]])
    assert "OPENAI_API_KEY" not in names
    assert "PATH" in names


def test_sessions_end_when_closed_or_forgotten_and_the_server_with_its_host(host):
    before = set(descendants(os.getpid()))
    sessions = [started(host) for _ in range(3)]
    mine = [pid for pid in descendants(os.getpid()) if pid not in before]
    assert len(mine) == 7  # the server, and of each session the keeper and the process that is kept
    sessions.pop().close()
    assert wait_for(lambda: len([p for p in mine if p in descendants(os.getpid())]) == 5)
    del sessions
    assert wait_for(lambda: len([p for p in mine if p in descendants(os.getpid())]) == 1)
    host.close()
    assert wait_for(lambda: not [p for p in mine if p in descendants(os.getpid())])


def test_a_keeper_that_was_stopped_does_not_outlive_the_server(host):
    before = set(descendants(os.getpid()))
    session = started(host)
    mine = set(descendants(os.getpid())) - before
    (server,) = mine & set(children_of(os.getpid()))
    for keeper in children_of(server):
        os.kill(keeper, signal.SIGSTOP)  # as a tool of the same user can, on a plain kernel
    host.close()
    session.close()
    assert wait_for(lambda: not mine & set(descendants(1)))


def test_a_server_that_cannot_load_says_why_in_one_line(tmp_path):
    host = WorkerHost(SERVICE, str(tmp_path), where="--bfcl x", remedy="do this")
    with pytest.raises(UserError) as caught:
        host.open()
    assert str(caught.value).startswith("--bfcl x: cannot be loaded (ModuleNotFoundError: No module named 'bfcl_eval'")
    assert str(caught.value).endswith("do this")


TOOLS = '''
import ctypes, json, os, resource, signal, socket, sys, threading, time
from typing import Any

seen: list[int] = []


def note(number: int) -> int:
    """Remember a number."""
    seen.append(number)
    return len(seen)

def sleep(seconds: float) -> str:
    """Sleep."""
    time.sleep(seconds)
    return "awake"

def spin() -> str:
    """Never return."""
    while True:
        pass

def deaf() -> str:
    """Never return, whatever signal comes."""
    for number in range(1, 32):
        if number not in (signal.SIGKILL, signal.SIGSTOP):
            signal.signal(number, signal.SIG_IGN)
    threading.Event().wait()

def orphan() -> str:
    """Leave a process in a session of its own behind."""
    child = os.fork()
    if child == 0:
        os.setsid()
        if os.fork() == 0:
            time.sleep(600)
        os._exit(0)
    os.waitpid(child, 0)
    return "left"

def bomb() -> int:
    """Fork until nothing more goes, in every child as well."""
    count = 0
    while True:
        try:
            if os.fork() == 0:
                continue
            count += 1
        except OSError:
            time.sleep(600)

def forks() -> int:
    """How many children can be had."""
    made = []
    try:
        while len(made) < 200:
            pid = os.fork()
            if pid == 0:
                time.sleep(600)
            made.append(pid)
    except OSError:
        pass
    for pid in made:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    return len(made)

def allocate() -> int:
    """Ask for memory until there is none."""
    kept = []
    while True:
        kept.append(bytearray(16 << 20))

def shout() -> str:
    """Print megabytes."""
    for _ in range(200):
        print("x" * 100_000)
        print("x" * 100_000, file=sys.stderr)
        os.write(1, b"x" * 100_000)
    return "done"

def huge() -> str:
    """Return megabytes."""
    return "a" * 1_000_000 + "z" * 4_000_000

def fail() -> str:
    """Raise."""
    open("/no/such/secret/place.txt")

def scream() -> str:
    """Raise what steers a terminal."""
    raise type("Loud\\nError", (Exception,), {})("\\x1b[31mred\\x00 \\ud800")

def leave() -> str:
    """Raise what most code does not catch."""
    sys.exit("bye")

def recurse() -> str:
    """Recurse without end."""
    return recurse()

def quit_at_once() -> str:
    """End the process."""
    os._exit(3)

def crash() -> str:
    """Crash the interpreter."""
    ctypes.string_at(0)

def kill_parent() -> str:
    """Kill the parent, and all of the server's that can be seen."""
    os.kill(os.getppid() or -1, signal.SIGKILL)
    for entry in os.listdir("/proc"):
        if entry.isdigit() and __file__.encode() in open(f"/proc/{entry}/cmdline", "rb").read():
            os.kill(int(entry), signal.SIGKILL)
    return "killed"

def close_all() -> str:
    """Close every file descriptor."""
    os.closerange(0, 64)
    return "closed"

def forge() -> str:
    """Write an answer of its own to whoever listens."""
    os.write(3, b\'{"id": 99, "value": "forged"}\\n\' * 3)
    return "honest"

def flood() -> str:
    """Write to the keeper without end."""
    while True:
        os.write(3, b"x" * 65536)

def not_json() -> Any:
    """Return a set."""
    return {1, 2}

def not_a_number() -> float:
    """Return NaN."""
    return float("nan")

def circular() -> list:
    """Return a list that holds itself."""
    loop = []
    loop.append(loop)
    return loop

def deep() -> list:
    """Return something nested deeply."""
    value = []
    for _ in range(100_000):
        value = [value]
    return value

def surroundings() -> dict:
    """What can be seen from here."""
    return {
        "variables": sorted(os.environ), "files": sorted(int(n) for n in os.listdir("/proc/self/fd")),
        "folder": os.getcwd(), "empty": os.listdir("."), "user": os.getuid(),
        "processes": sum(name.isdigit() for name in os.listdir("/proc")),
    }

def connect(port: int) -> str:
    """Open a connection to this machine."""
    socket.create_connection(("127.0.0.1", port), timeout=2).close()
    return "connected"

def write(size: int) -> str:
    """Write a file."""
    with open("note.txt", "wb") as file:
        file.write(b"x" * size)
    return str(os.path.getsize("note.txt"))

def nest() -> str:
    """Make folders in folders."""
    for _ in range(1200):
        os.mkdir("d")
        os.chdir("d")
    return "deep"

def open_many() -> int:
    """Open files until nothing more goes."""
    kept = []
    try:
        while True:
            kept.append(open("/dev/null"))
    except OSError:
        return len(kept)

def add(a: int, b: int = 0) -> int:
    """Add.

    Args:
        a: one number
        b: another
    """
    return a + b
'''
FUNCTIONS = Path(host_module.__file__).with_name("functions.py")
TIGHT = Limits(
    1.0, cpu_s=20, memory_bytes=256 << 20, file_bytes=1 << 20, open_files=32, processes=16, reply_bytes=1 << 20,
    strict=True,
)  # fmt: skip


@pytest.fixture(scope="module", params=["namespaces", "plain kernel"])
def tools(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("tools") / "tools.py"
    path.write_text(TOOLS)
    limits = dataclasses.replace(TIGHT, namespaces=request.param == "namespaces")
    made = WorkerHost(FUNCTIONS, json.dumps({"path": str(path), "result_chars": 400}), limits=limits)
    made.facts  # noqa: B018 - starts it
    yield made
    made.close()


def use(host, name, **arguments):
    """The text of one call in an episode of its own, which is then closed."""
    session = host.open()
    try:
        return session.call("call", name=name, arguments=arguments)["text"]
    finally:
        session.close()


def family(host):
    return [pid for pid in descendants(1) if host.argument in command(pid)]


def children_of(pid):
    return [int(n) for n in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def command(pid):
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_text()
    return ""


@pytest.fixture
def untouched(tools):
    """Another episode goes on as before, the next one works, and no process is left, whatever the test does."""
    other = tools.open()
    assert other.call("call", name="note", arguments={"number": 1})["text"] == "1"
    yield tools
    assert other.call("call", name="note", arguments={"number": 2})["text"] == "2"
    assert use(tools, "add", a=1, b=2) == "3"
    other.close()
    assert wait_for(lambda: len(family(tools)) == 1)  # the server


ERRORS = {
    "fail": "Error: fail: FileNotFoundError: [Errno 2] No such file or directory: 'place.txt'",
    "leave": "Error: leave: SystemExit: bye",
    "scream": "Error: scream: Loud Error: ?[31mred? ?",
    "recurse": "Error: recurse: RecursionError: maximum recursion depth exceeded",
    "not_json": "Error: not_json: ValueError: the result is not JSON (Object of type set is not JSON serializable)",
    "not_a_number": "Error: not_a_number: ValueError: the result is not JSON (Out of range float values",
    "circular": "Error: circular: ValueError: the result is not JSON (Circular reference detected)",
    "deep": "Error: deep: ValueError: the result is not JSON (nested too deeply)",
    "allocate": "Error: allocate: MemoryError",
}


@pytest.mark.parametrize("name", list(ERRORS))
def test_a_tool_that_fails_gives_one_line_and_its_episode_goes_on(untouched, name):
    session = untouched.open()
    answer = session.call("call", name=name, arguments={})
    assert answer["text"].startswith(ERRORS[name])
    assert "\n" not in answer["text"]
    assert not answer["ran"]
    assert session.call("call", name="add", arguments={"a": 2})["text"] == "2"
    session.close()


LOST = {
    "spin": "deadline", "deaf": "deadline", "bomb": "deadline", "quit_at_once": "ended", "crash": "ended",
    "close_all": "ended", "flood": "too_large",
}  # fmt: skip


@pytest.mark.parametrize("name", list(LOST))
def test_a_tool_that_is_beyond_help_ends_its_own_episode_in_time(untouched, name):
    began = time.monotonic()
    session = untouched.open()
    with pytest.raises(WorkerDied) as caught:
        session.call("call", name=name, arguments={})
    assert caught.value.reason == LOST[name]
    assert time.monotonic() - began < 8  # its deadline is one second
    with pytest.raises(WorkerDied):
        session.call("call", name="add", arguments={"a": 1})


def test_a_tool_that_kills_its_parent_harms_its_own_episode_at_most(tools):
    trainer = os.getpid()
    session = tools.open()
    with suppress(WorkerDied):
        session.call("call", name="kill_parent", arguments={})
    session.close()
    assert os.getpid() == trainer
    assert use(tools, "add", a=1) == "1"  # the server is there, or was started anew
    assert wait_for(lambda: len(family(tools)) == 1)


def test_a_process_that_a_tool_leaves_behind_ends_with_its_episode(untouched):
    session = untouched.open()
    assert session.call("call", name="orphan", arguments={})["text"] == "left"
    assert wait_for(lambda: len(family(untouched)) == 6)  # the server, two sessions of two, and the one left behind
    session.close()
    assert wait_for(lambda: len(family(untouched)) == 3)


def test_an_answer_that_a_tool_forges_is_not_taken_for_one(untouched):
    with pytest.raises(WorkerDied):
        use(untouched, "forge")


def test_megabytes_that_are_printed_go_nowhere_and_those_returned_are_cut_in_the_middle(untouched):
    assert use(untouched, "shout") == "done"
    text = use(untouched, "huge")
    assert len(text) == 400
    assert text.startswith("aaa")
    assert text.endswith("zzz")
    note = re.search(r" \.\.\. (\d+) characters left out \.\.\. ", text)
    assert int(note.group(1)) == 5_000_000 - (400 - len(note.group()))


def test_children_are_limited(untouched):
    assert 1 < int(use(untouched, "forks")) <= TIGHT.processes


def test_a_tool_sees_no_secret_no_file_of_the_trainer_and_an_empty_folder_of_its_own(untouched, monkeypatch, tmp_path):
    with (tmp_path / "open.txt").open("w"):
        first, second = (json.loads(use(untouched, "surroundings")) for _ in range(2))
    assert set(first["variables"]) <= {"PATH", "LANG", "TZ", "HOME", "TMPDIR", "LC_CTYPE"}
    assert first["files"] == [0, 1, 2, 3, 4]  # null three times, the keeper's, and the folder that is listed
    assert first["empty"] == []
    assert first["folder"] != second["folder"]
    assert wait_for(lambda: not Path(first["folder"]).exists())
    assert first["user"] != 0
    assert (first["processes"] == 1) == untouched.limits.namespaces


def test_there_is_no_network_where_the_kernel_allows_it(untouched):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        text = use(untouched, "connect", port=listener.getsockname()[1])
    assert untouched.network_closed == untouched.limits.namespaces
    assert (text == "connected") is not untouched.network_closed


def test_files_are_limited_in_size_and_number(untouched):
    assert use(untouched, "write", size=1000) == "1000"
    assert "OSError: [Errno 27] File too large" in use(untouched, "write", size=2 << 20)
    assert 10 < int(use(untouched, "open_many")) < TIGHT.open_files


def test_folders_nested_without_end_do_not_end_the_server(untouched):
    (server,) = [pid for pid in family(untouched) if pid in children_of(os.getpid())]
    assert use(untouched, "nest") == "deep"
    for _ in range(3):
        assert use(untouched, "add", a=1) == "1"
    assert server in family(untouched)
    scratch = Path(f"/proc/{server}/cwd").resolve()
    assert wait_for(lambda: not list(scratch.glob("session-*/d")))


def test_arguments_are_checked_before_a_tool_runs(untouched):
    session = untouched.open()
    for arguments, words in (
        ({"a": "1"}, "Error: add: a: '1' is not of type 'integer'"),
        ({}, "Error: add: 'a' is a required property"),
        ({"a": 1, "c": 2}, "Error: add: unknown argument 'c'; the arguments are: a, b"),
    ):
        assert session.call("call", name="add", arguments=arguments) == {"text": words, "ran": False}
    session.close()


def test_a_session_closed_from_another_thread_ends_the_call_at_once(untouched):
    session = untouched.open()
    timer = threading.Timer(0.2, session.close)
    timer.start()
    began = time.monotonic()
    with pytest.raises(WorkerDied):
        session.call("call", name="spin", arguments={})
    assert time.monotonic() - began < 0.9


def test_a_trainer_that_is_killed_leaves_no_process_behind(tmp_path):
    path = tmp_path / "tools.py"
    path.write_text(TOOLS)
    script = f"""
import json, sys
from pathlib import Path
from autotool_fast.sandbox import host as host_module
from autotool_fast.sandbox.host import Limits, WorkerHost
host = WorkerHost(Path({str(FUNCTIONS)!r}), json.dumps({{"path": {str(path)!r}, "result_chars": 400}}))
session = host.open()
session.call("call", name="orphan", arguments={{}})
print("ready", flush=True)
session.call("call", name="spin", arguments={{}})
"""
    trainer = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
    assert trainer.stdout.readline() == b"ready\n"
    everyone = [pid for pid in descendants(trainer.pid) if str(path) in command(pid)]
    assert len(everyone) >= 4  # server, keeper, its process, and the one left behind
    scratch = Path(f"/proc/{everyone[0]}/cwd").resolve()
    assert scratch.name.startswith("autotool-worker-")
    trainer.kill()
    trainer.wait()
    assert wait_for(lambda: not [pid for pid in descendants(1) if str(path) in command(pid)])
    assert not scratch.exists()
