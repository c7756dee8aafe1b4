"""What a user reads when something is wrong, and that a reader who leaves is nothing wrong."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from autotool_fast.errors import UserError, readers_may_leave


@pytest.mark.parametrize(
    ("where", "remedy", "line"),
    [
        (None, None, "is wrong"),
        ("rl.lr", None, "rl.lr: is wrong"),
        (None, "change it", "is wrong; change it"),
        ("rl.lr", "change it", "rl.lr: is wrong; change it"),
    ],
)
def test_where_comes_first_and_the_remedy_last(where, remedy, line):
    assert str(UserError("is wrong", where=where, remedy=remedy)) == line


def test_a_reason_of_several_lines_becomes_one():
    assert str(UserError("the template fails: unexpected 'x'\n  line 3", where="a\nb")).splitlines() == [
        "a b: the template fails: unexpected 'x'   line 3"
    ]


@pytest.mark.parametrize(
    "command",
    [
        ["autotool_fast.train", "--dry-run"],
        ["autotool_fast.train", "--help"],
        ["autotool_fast.data", "--help"],
        ["autotool_fast.eval", "--help"],
        ["autotool_fast.chat", "--help"],
        ["autotool_fast.report", "--help"],
    ],
    ids=" ".join,
)
@pytest.mark.parametrize("buffered", [True, False])
def test_a_reader_who_leaves_is_no_error(command, buffered):
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, *(() if buffered else ("-u",)), "-m", *command]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, env=environment, text=True, check=False)
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_exit_code_stays_when_the_reader_leaves(tmp_path):
    script = tmp_path / "command.py"
    script.write_text(
        "import sys\n"
        "from autotool_fast.errors import readers_may_leave\n"
        "main = readers_may_leave(lambda argv: print('x') or 3)\n"
        "sys.exit(main())\n"
    )
    reading, writing = os.pipe()
    os.close(reading)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    command = [sys.executable, str(script)]
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, env=environment, text=True, check=False)
    os.close(writing)
    assert (done.returncode, done.stderr) == (3, "")


def test_a_pipe_that_breaks_elsewhere_is_an_error():
    def main(argv):
        raise BrokenPipeError("a server's")

    with pytest.raises(BrokenPipeError, match="a server's"):
        readers_may_leave(main)()
