"""metrics.jsonl, timings and the progress display."""

import contextlib
import io
import json
import math
import os

import numpy as np
import pytest

from autotool_fast.errors import UserError
from autotool_fast.metrics import MetricsWriter, Progress, Timer, phase, read_rows, strip_timings


def test_rows_are_on_disk_as_soon_as_they_are_written(tmp_path):
    with MetricsWriter(tmp_path / "m.jsonl") as writer:
        row = writer.write("rl", 1, {"reward/mean": 0.5}, seconds=2.0, timings={"rollout": 12.5})
        assert read_rows(tmp_path / "m.jsonl") == [row]
    assert row == {"stage": "rl", "step": 1, "seconds": 2.0, "time/rollout": 12.5, "reward/mean": 0.5}


def test_key_order_and_number_format_do_not_depend_on_the_caller(tmp_path):
    one, two = tmp_path / "1", tmp_path / "2"
    with MetricsWriter(one) as writer:
        writer.write("rl", 1, {"b": np.float32(0.1), "a": 1}, seconds=1.0)
    with MetricsWriter(two) as writer:
        writer.write("rl", 1, {"a": 1, "b": float(np.float32(0.1))}, seconds=1.0)
    assert one.read_bytes() == two.read_bytes()
    assert np.float32(read_rows(one)[0]["b"]) == np.float32(0.1)


def test_equal_runs_differ_only_in_timings(tmp_path):
    for name, clock in (("1", 1.0), ("2", 2.0)):
        with MetricsWriter(tmp_path / name) as writer:
            writer.write("rl", 1, {"x": 1 / 3}, seconds=clock, timings={"rollout": clock})
    rows = [read_rows(tmp_path / name)[0] for name in "12"]
    assert rows[0] != rows[1]
    stripped = [json.dumps(strip_timings(row)) for row in rows]
    assert stripped[0] == stripped[1] == '{"stage": "rl", "step": 1, "x": 0.333333333}'


def test_non_finite_numbers_stay_valid_json(tmp_path):
    with MetricsWriter(tmp_path / "m") as writer:
        writer.write("rl", 1, {"nan": math.nan, "inf": math.inf}, seconds=0.0)
    assert read_rows(tmp_path / "m")[0] | {"nan": None, "inf": None} == read_rows(tmp_path / "m")[0]


def write_steps(writer, first, last, offset=0.0):
    with writer:
        for step in range(first, last + 1):
            writer.write("rl", step, {"x": step / 7 + offset}, seconds=0.0)


def test_a_resumed_file_equals_an_uninterrupted_one(tmp_path):
    write_steps(MetricsWriter(tmp_path / "whole"), 1, 6)
    write_steps(MetricsWriter(tmp_path / "parts"), 1, 3)
    # Steps after the checkpoint, to be repeated, and a row that a crash cut short.
    write_steps(MetricsWriter(tmp_path / "parts"), 4, 5, offset=1.0)
    with (tmp_path / "parts").open("a") as file:
        file.write('{"stage": "rl", "st')
    write_steps(MetricsWriter.open(tmp_path / "parts", lambda row: row["step"] <= 3), 4, 6)
    assert (tmp_path / "parts").read_bytes() == (tmp_path / "whole").read_bytes()


@pytest.mark.parametrize("tail", ['{"stage": "r', '{"stage": "r\n', "\0\0\0\n", "17\n"])
def test_a_torn_last_line_is_dropped(tmp_path, tail):
    write_steps(MetricsWriter(tmp_path / "m"), 1, 2)
    with (tmp_path / "m").open("a") as file:
        file.write(tail)
    assert [row["step"] for row in read_rows(tmp_path / "m")] == [1, 2]


def test_a_broken_line_in_the_middle_is_named(tmp_path):
    (tmp_path / "m").write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(UserError, match="line 2"):
        MetricsWriter.open(tmp_path / "m", lambda row: True)


@pytest.mark.parametrize("broken", [b'{"a": "\xed\xa0\x80"}', b'{"a": ' + b"[" * 5000, b"\xff"])
def test_a_line_that_cannot_be_decoded_is_named_like_a_broken_one(tmp_path, broken):
    (tmp_path / "m").write_bytes(b'{"step": 1}\n' + broken + b'\n{"step": 3}\n')
    with pytest.raises(UserError, match="line 2"):
        MetricsWriter.open(tmp_path / "m", lambda row: True)


def test_half_a_surrogate_pair_is_kept_as_it_was_written(tmp_path):
    (tmp_path / "m").write_text('{"step": 1, "\\ud800": 2}\n')
    MetricsWriter.open(tmp_path / "m", lambda row: True).close()
    assert (tmp_path / "m").read_text() == '{"step": 1, "\\ud800": 2}\n'


def test_opening_a_missing_file_starts_one(tmp_path):
    MetricsWriter.open(tmp_path / "m", lambda row: True).close()
    assert (tmp_path / "m").read_bytes() == b""


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def test_a_moment_counts_for_the_innermost_phase_alone():
    times = iter([0.0, 1.0, 3.0, 3.0, 4.0, 10.0])
    timer = Timer(lambda: next(times))
    with timer.current(), timer.phase("rollout"):
        for _ in range(2):
            with phase("tools"):
                pass
    assert timer.take() == {"rollout": 7000.0, "tools": 3000.0}
    assert timer.totals == {("rollout",): (1, 7.0), ("rollout", "tools"): (2, 3.0)}


def test_without_a_timer_in_use_a_phase_is_nothing():
    timer = Timer()
    with timer.current():
        pass
    with phase("tools"):
        pass
    assert timer.take() == {}


def test_timer_adds_up_phases_and_starts_over():
    clock = Clock()
    timer = Timer(clock)
    for _ in range(2):
        with timer.phase("rollout"):
            clock.now += 0.25
    with contextlib.suppress(KeyError), timer.phase("update"):
        clock.now += 1.0
        raise KeyError
    assert timer.take() == {"rollout": 500.0, "update": 1000.0}
    assert timer.take() == {}


def plain_lines(seconds_per_step: float, steps: int, stop: int | None = None, **options) -> list[str]:
    clock, stream = Clock(), io.StringIO()
    with Progress(stream, clock=clock) as progress:
        progress.start("rl", steps, **options)
        for step in range(1, (stop or steps) + 1):
            clock.now += seconds_per_step
            progress.update(step, {"reward": step / 8})
        if step == steps:
            assert f" {steps}/{steps} " in stream.getvalue()  # at once, not at the end of the block
    return stream.getvalue().splitlines()


def test_slow_steps_have_a_line_each():
    lines = plain_lines(2.0, 4)
    assert lines[1] == "rl       2/4  eta 0:04  reward 0.25"
    assert len(lines) == 4


def test_fast_steps_have_a_line_per_second_with_the_first_and_the_last():
    # 0.125 s is exact in binary, so the clock does not drift: a line at step 1 and then every 8 steps.
    counters = [int(line.split()[1].split("/")[0]) for line in plain_lines(0.125, 28)]
    assert counters == [1, 9, 17, 25, 28]


def test_a_stage_of_steps_has_a_line_for_every_step_however_fast():
    assert len(plain_lines(0.125, 28, every_step=True)) == 28


def test_an_interrupted_stage_still_shows_its_last_step():
    assert plain_lines(0.125, 100, stop=4)[-1].split()[1] == "4/100"


def test_a_resumed_stage_estimates_from_its_own_steps():
    clock, stream = Clock(), io.StringIO()
    with Progress(stream, clock=clock) as progress:
        progress.start("rl", 100, done=90)
        clock.now += 3.0
        progress.update(91)
    assert stream.getvalue() == "rl        91/100  eta 0:27\n"


def test_a_terminal_gets_a_live_display():
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    stream = Terminal()
    with Progress(stream) as progress:
        progress.start("base", 2)
        progress.update(1, {"loss": 0.5})
        progress.say("a note [think]")
        progress.update(2, {"loss": 0.25})
        progress.start("rl", 1)
        progress.update(1)
    text = stream.getvalue()
    for part in ("base", "2/2", "loss 0.25", "a note [think]", "rl"):
        assert part in text


def test_a_reader_that_is_gone_costs_the_lines_and_not_the_run():
    reader, writer = os.pipe()
    os.close(reader)
    stream = os.fdopen(writer, "w")
    with Progress(stream) as progress:
        progress.start("rl", 2, every_step=True)
        progress.update(1, {"reward/mean": 0.5})
        progress.say("alarm")
        progress.update(2)
    with contextlib.suppress(BrokenPipeError):
        stream.close()
