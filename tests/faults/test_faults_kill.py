"""Kills, damage and races around checkpoints: the newest whole one is found, and nothing that was saved is lost."""

from __future__ import annotations

import os
import random
import select
import shutil
import signal
import struct
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from test_loop import TOKENIZER, Training, rows, same, tiny_model, weights

from autotool_fast import checkpoint, files
from autotool_fast.config import from_dict
from autotool_fast.errors import UserError
from autotool_fast.loop import Interrupted
from autotool_fast.runs import RunFolder

torch.set_num_threads(1)
SAVES = 200


def save(folder: Path, step: int, keep_last: int = 2) -> None:
    """A checkpoint all of whose parts tell its step."""
    model = tiny_model()
    model.get_input_embeddings().weight.data.fill_(step)
    tensors = {"moment": torch.full((3000,), float(step))}
    state = {"step": step, "seen": list(range(step))}
    checkpoint.save(folder, step, model=model, tokenizer=TOKENIZER, tensors=tensors, state=state, keep_last=keep_last)


def assert_is(found: checkpoint.Checkpoint, step: int) -> None:
    assert found.step == step
    assert found.state() == {"step": step, "seen": list(range(step))}
    assert torch.equal(found.tensors()["moment"], torch.full((3000,), float(step)))
    model = tiny_model()
    found.load_weights(model)
    assert bool((model.get_input_embeddings().weight == step).all())


def child_of(work: Callable[[], None]) -> int:
    """Start `work` in a child process; returns its number."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    return child


@pytest.mark.slow
def test_two_hundred_saves_and_kill_9_at_random_points_lose_nothing(tmp_path):
    rng = random.Random(0)
    save(tmp_path, 1)
    begin = time.perf_counter()
    save(tmp_path, 1)
    duration = time.perf_counter() - begin
    returned = kept = 1
    kills = 0
    while returned <= SAVES:
        reader, writer = os.pipe()

        def go_on(first: int = kept + 1, writer: int = writer) -> None:
            for step in range(first, first + 12):
                for _ in range(1 + (step % 3 == 0)):  # every third one again, over itself
                    save(tmp_path, step)
                    os.write(writer, struct.pack("i", step))

        child = child_of(go_on)
        os.close(writer)
        time.sleep(rng.uniform(0.2, 6.0) * duration)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        told = b""
        while part := os.read(reader, 4096):
            told += part
        os.close(reader)
        kills += 1
        done = [step for (step,) in struct.iter_unpack("i", told)]
        last = done[-1] if done else kept
        returned += len(done)
        lines: list[str] = []
        found = checkpoint.latest(tmp_path, lines.append)
        assert lines == []
        assert found is not None
        assert last <= found.step <= last + 1  # one that got its name in time counts too
        assert_is(found, found.step)
        kept = found.step
    assert kills > 20
    save(tmp_path, kept + 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"step-{kept + i:08}" for i in (0, 1)]


def parts_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def test_every_file_cut_flipped_or_missing_is_refused_by_name_and_the_one_before_is_used(tmp_path):
    rng = random.Random(0)
    save(tmp_path, 1)
    save(tmp_path, 2)
    newest = tmp_path / "step-00000002"
    harmed = 0
    for path in parts_of(newest):
        whole = path.read_bytes()
        # The newline that ends the manifest is no part of its value.
        bits = [rng.randrange(8 * (len(whole) - 1)) for _ in range(12)]
        harms = [whole[: bit // 8] + bytes([whole[bit // 8] ^ 1 << bit % 8]) + whole[bit // 8 + 1 :] for bit in bits]
        harms += [whole[: rng.randrange(len(whole) - 1)] for _ in range(4)] + [b""]
        harms += [whole + b"}"]
        for harm in [*harms, None]:
            path.unlink() if harm is None else path.write_bytes(harm)
            lines: list[str] = []
            found = checkpoint.latest(tmp_path, lines.append)
            assert found is not None
            assert found.step == 1, (path, harm)
            assert len(lines) == 1
            assert lines[0].startswith(f"{newest}: ")
            if path.name != checkpoint.MANIFEST:
                assert path.relative_to(newest).as_posix() in lines[0]
            harmed += 1
        path.write_bytes(whole)
    assert harmed > 100
    assert_is(checkpoint.latest(tmp_path), 2)


@pytest.mark.slow
def test_looking_while_another_process_saves_always_finds_a_whole_one_and_never_an_older(tmp_path):
    save(tmp_path, 1, keep_last=1)

    def work() -> None:
        for step in range(2, 40):
            for _ in range(1 + (step % 3 == 0)):
                save(tmp_path, step, keep_last=1)

    child = child_of(work)
    before, looks = 1, 0
    lines: list[str] = []
    while os.waitpid(child, os.WNOHANG) == (0, 0):
        found = checkpoint.latest(tmp_path, lines.append)
        assert found is not None
        assert found.step >= before
        before, looks = found.step, looks + 1
    assert lines == []
    assert looks > 20
    assert_is(checkpoint.latest(tmp_path), 39)


def test_of_processes_that_start_together_one_gets_the_run_folder(tmp_path):
    """Again and again: exactly one holds the folder, the others are told its number, and all of the file is there."""
    config = from_dict({"out": str(tmp_path / "run")})
    for turn in range(12):
        go_reader, go_writer = os.pipe()
        reader, writer = os.pipe()

        def start(go: int = go_reader, ready: int = go_writer, writer: int = writer, resume: bool = turn > 0) -> None:
            os.close(ready)
            select.select([go], [], [])  # until the parent closes its end
            try:
                folder = RunFolder.create(from_dict({"out": config.out, "resume": resume}))
            except UserError as error:
                os.write(writer, b"u" if "in use by process" in str(error) or "already holds" in str(error) else b"?")
                return
            os.write(writer, b"h")
            time.sleep(0.1)
            folder.close()

        children = [child_of(start) for _ in range(4)]
        for descriptor in (go_reader, go_writer, writer):
            os.close(descriptor)
        assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0] * 4
        answers = os.read(reader, 100)
        os.close(reader)
        assert sorted(answers) == sorted(b"huuu"), (turn, answers)


class Killed(BaseException):
    """What stands for kill -9 in this process: nothing of the dead one may run any more."""


class Kill:
    """Ends the process at its n-th touch of the disk inside a save."""

    def __init__(self, at: int) -> None:
        self.left, self.dead = at, False

    def wrap(self, work: Callable) -> Callable:
        def touched(*args, **options):
            if self.dead:
                return None
            self.left -= 1
            if self.left < 0:
                self.dead = True
                raise Killed
            return work(*args, **options)

        return touched

    def installed(self, patch: pytest.MonkeyPatch) -> None:
        for module, name in ((os, "replace"), (files, "sync"), (shutil, "rmtree"), (checkpoint, "_write_contents")):
            patch.setattr(module, name, self.wrap(getattr(module, name)))


STEPS = 6


class SaveResumeKill(RuleBasedStateMachine):
    """A stage that is stopped, killed and damaged in any order ends as one that was left alone.

    `durable` is the step of the newest checkpoint that may be relied on.
    """

    @initialize()
    def begin(self) -> None:
        self.folder = Path(PLACE[0]) / str(len(list(Path(PLACE[0]).iterdir())))
        self.durable, self.started, self.lines = 0, False, []

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints" / "base"

    def run(self, every: int, **options) -> None:
        training = Training(**options)
        resume, self.started = self.started, True
        training.run(self.folder, STEPS, resume=resume, every=every)
        self.finished = training

    @rule(after=st.integers(0, STEPS - 2))
    def stopped(self, after: int) -> None:
        found = checkpoint.latest(self.checkpoints, lambda line: None)
        step = max(after, found.step if found else 0)
        if step > STEPS - 2:
            return
        with pytest.raises(Interrupted):
            self.run(0, stop_at=step)
        self.durable = step + 1

    @rule(every=st.integers(1, 3), at=st.integers(0, 60))
    def killed(self, every: int, at: int) -> None:
        kill, save = Kill(at), checkpoint.save

        def counted(folder, step, **options):
            found = save(folder, step, **options)
            self.durable = step
            return found

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(checkpoint, "save", counted)
            run_folder = RunFolder.create

            def create(config):
                folder = run_folder(config)
                kill.installed(patch)
                return folder

            patch.setattr(RunFolder, "create", create)
            with suppress(Killed):
                self.run(every)

    @rule(data=st.data())
    def damaged(self, data) -> None:
        found = sorted(self.checkpoints.glob("step-*")) if self.checkpoints.is_dir() else []
        if not found:
            return
        path = data.draw(st.sampled_from(parts_of(found[-1])))
        path.write_bytes(path.read_bytes()[: data.draw(st.integers(0, path.stat().st_size - 2))])
        self.durable = int(found[-2].name.removeprefix("step-")) if len(found) > 1 else 0

    @invariant()
    def nothing_saved_is_lost(self) -> None:
        found = checkpoint.latest(self.checkpoints, lambda line: None)
        step = found.step if found else 0
        assert step >= self.durable
        if found:
            assert found.state()["extra"]["seen"] == list(range(step))

    def teardown(self) -> None:
        if not self.started:
            return
        self.run(0)
        assert self.finished.state.extra["seen"] == list(range(STEPS))
        assert same(weights(self.finished.state.model), weights(REFERENCE[0].state.model))
        assert rows(self.folder) == rows(Path(PLACE[1]))


PLACE: list[Path] = []
REFERENCE: list[Training] = []


@pytest.mark.slow
def test_stops_kills_and_damage_in_any_order_change_nothing(tmp_path):
    machines, straight = tmp_path / "machines", tmp_path / "straight"
    machines.mkdir()
    PLACE[:] = [machines, straight]
    REFERENCE[:] = [Training()]
    REFERENCE[0].run(straight, STEPS)
    machine = SaveResumeKill.TestCase()
    machine.settings = settings(
        max_examples=8, stateful_step_count=6, deadline=None, database=None, phases=[Phase.generate]
    )
    machine.runTest()
