"""Stage label: sample every prompt in both modes, decide by `labeling` what it teaches, write the demonstrations.

Finished parts are kept in label.partial.jsonl until the stage is done: batches of prompts in one mode, chunks of a
teacher's lessons. A stage that was stopped, or that lost its teacher, goes on behind the last of them and ends with the
labels of one that was not. Who the teacher is, is `teacher`'s business.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

from autotool_fast import distributed, files
from autotool_fast.chat import parse_reply
from autotool_fast.errors import Interrupted
from autotool_fast.eval.harness import fingerprint
from autotool_fast.labeling import Outcome, label, label_table
from autotool_fast.metrics import phase
from autotool_fast.partial import PartialResults
from autotool_fast.rollout.ranks import rollout_over_ranks
from autotool_fast.rollout.records import Trajectory
from autotool_fast.tasks.record import Task
from autotool_fast.teacher import Lesson, Teacher, make_teacher
from autotool_fast.warmup import Demonstration, demonstrate, imitate

if TYPE_CHECKING:
    from autotool_fast.pipeline import Pipeline

PROMPTS_AT_ONCE = 2500
"""Prompts that stage label samples side by side. A part of it that is stopped starts again, and a smaller part spends
more of its time waiting for its longest samples."""


def label_prompts(p: Pipeline) -> dict[str, Any]:
    """Write labels.jsonl: counts, label and both demonstrations of every prompt; returns their table.

    Raises:
        UserError: from the teacher, or for partial results of other prompts.
        Interrupted: a stop was asked for.
    """
    config, progress = p.config.label, p.context.progress
    teacher = make_teacher(
        config,
        seed=p.config.seed,
        max_len=p.config.model.max_positions,
        max_new_tokens=p.limits.max_new_tokens,
        device=p.config.device,
    )
    tasks = p.problems.training(config.prompts, "label")
    per_mode = len(tasks) * config.k
    kept = PartialResults(
        p.run.path / "label.partial.jsonl",
        {"prompts": fingerprint(tasks), "number": len(tasks), "k": config.k, "seed": p.config.seed},
    )
    if kept:
        progress.say(f"label: {len(kept)} parts were done before")
    progress.start("label", 2 * per_mode)

    def sampled(done: int) -> None:
        progress.update(done)
        if p.context.stop.requested:
            raise Interrupted

    engine = cache(lambda: p.engine(p.load("base")))

    def samples(mode: str, number: int, read: Callable[[list[Trajectory]], Any]) -> list[Any]:
        """`read` of every prompt's k samples."""
        values: list[Any] = []
        for first in range(0, len(tasks), PROMPTS_AT_ONCE):
            part, before = tasks[first : first + PROMPTS_AT_ONCE], number * per_mode + first * config.k

            # A stop at the very end of a part waits until the part is kept.
            def sample(first: int = first, part: Sequence[Task] = part, before: int = before) -> list[Any]:
                with p.context.timer.phase("rollout"):
                    trajectories = rollout_over_ranks(
                        engine(),
                        part,
                        chat=p.chat,
                        group_size=config.k,
                        seed=p.config.seed,
                        step=number,
                        groups=range(first, first + len(part)),
                        mode=mode,
                        limits=p.limits,
                        on_progress=lambda done, total: sampled(before + done) if done < total else None,
                    )
                return [read(trajectories[i : i + config.k]) for i in range(0, len(trajectories), config.k)]

            values += kept.part(f"{mode}/{first}-{first + len(part)}", sample)
            progress.update(before + len(part) * config.k)
            p.context.stop.check()
        return values

    def thought(group: list[Trajectory]) -> list[Any]:
        trace = next((_demo_json(imitate(t, p.chat)) for t in group if t.correct), None)
        return [sum(t.correct for t in group), trace]

    short = samples("no_think", 0, lambda group: sum(t.correct for t in group))
    if teacher is None:
        long, traces = map(list, zip(*samples("think", 1, thought), strict=True))
    else:
        lessons = _writable(_taught(teacher, tasks, lambda done: sampled(per_mode + done), kept), p)
        long = [lesson.correct for lesson in lessons]
        traces = [
            None if lesson.replies is None else _demo_json(demonstrate(task, lesson.replies, p.chat))
            for task, lesson in zip(tasks, lessons, strict=True)
        ]
    progress.finish()
    for notice in teacher.notices if teacher else ():
        progress.say(f"label: {notice}")
    rule = (p.config.label_rule, config.threshold, config.unsolved)
    outcomes = [Outcome(t.difficulty, *counts, config.k) for t, *counts in zip(tasks, short, long, strict=True)]
    rows = [
        {
            "id": task.id,
            "family": task.family,
            "difficulty": task.difficulty,
            "no_think_correct": outcome.no_think_correct,
            "think_correct": outcome.think_correct,
            "label": label(outcome.no_think_correct, outcome.think_correct, config.k, *rule),
            "short": _demo_json(demonstrate(task, p.problems.answer(task), p.chat)),
            "long": trace,
        }
        for task, outcome, trace in zip(tasks, outcomes, traces, strict=True)
    ]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    distributed.on_main(lambda: files.write_text(p.run.path / "labels.jsonl", text))
    kept.remove()
    table = label_table(outcomes, *rule)
    return {"rule": p.config.label_rule, "k": config.k, "table": [vars(row) for row in table]}


def _taught(
    teacher: Teacher, tasks: Sequence[Task], on_sample: Callable[[int], None], kept: PartialResults
) -> list[Lesson]:
    """A teacher's lessons. One process asks it for all of them: a server has its own parallelism."""

    def teach() -> list[Lesson] | None:
        try:
            return teacher.teach(tasks, on_sample, kept.part)
        except Interrupted:
            return None

    with phase("rollout"):
        lessons = distributed.on_main(teach)
    if lessons is None:
        raise Interrupted
    return lessons


def _writable(lessons: Sequence[Lesson], p: Pipeline) -> list[Lesson]:
    """The lessons; one whose replies have no form in the trained model's chat format teaches nothing."""
    left_out: Counter[str] = Counter()
    kept = []
    for lesson in lessons:
        replies = map(parse_reply, lesson.replies or ())
        reason = next(filter(None, (p.chat.unwritable(reply.calls, reply.text) for reply in replies)), None)
        left_out.update([reason] if reason else [])
        kept.append(Lesson(0, None) if reason else lesson)
    for reason, count in left_out.items():
        p.context.progress.say(f"label: {count} long answers of the teacher left out, {reason}")
    return kept


def _demo_json(demo: Demonstration) -> dict[str, list[int]]:
    return {"ids": demo.ids.tolist(), "trained": demo.trained.astype(int).tolist()}
