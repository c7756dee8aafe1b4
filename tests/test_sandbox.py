"""Worker processes: fresh state, deadlines, no secrets, one-line errors, nothing left behind."""

import os
import time
from pathlib import Path

import pytest
from eval_stand_ins import STAND_INS

from autotool_fast.errors import UserError
from autotool_fast.eval.bfcl import SERVICE
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


def test_a_server_that_cannot_load_says_why_in_one_line(tmp_path):
    host = WorkerHost(SERVICE, str(tmp_path), where="--bfcl x", remedy="do this")
    with pytest.raises(UserError) as caught:
        host.open()
    assert str(caught.value).startswith("--bfcl x: cannot be loaded (ModuleNotFoundError: No module named 'bfcl_eval'")
    assert str(caught.value).endswith("do this")
