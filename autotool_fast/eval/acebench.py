"""ACEBench (normal, special, agent multi-step) from a checkout, through its own checkers and simulators.

They run in processes of their own (see `sandbox`, `acebench_service`) and get parsed calls. `correct` is ACEBench's
verdict on the calls as they were made. `strict` differs in the multi-turn dialogues: there ACEBench takes all white
space out of a reply before it reads it, and so does `strict`: a list of words inside an object cannot pass there.

What differs from the official run, alike for every policy: the prompt (chat messages and tools; special tasks get the
checkout's own instructions, which name the sentences that are looked for), and that a reply without a call ends a
multi-step task. The multi-turn agent tasks need a model that plays the user and are not run.
"""

from __future__ import annotations

import json
import re
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from autotool_fast.chat import ParsedReply
from autotool_fast.errors import UserError
from autotool_fast.eval import acebench_answers
from autotool_fast.eval.bfcl import expand
from autotool_fast.eval.records import Solution, Verdict, accuracies, mean, weighted
from autotool_fast.eval.schemas import tool
from autotool_fast.sandbox.host import DEADLINE_S, Limits, Session, WorkerDied, WorkerError, WorkerHost
from autotool_fast.tasks.record import Task

SERVICE = Path(__file__).with_name("acebench_service.py")
ATOMS = ("bool", "enum", "number", "list", "object_deep", "object_short")
ADJUSTED = ("normal_multi_turn_user_adjust", "normal_multi_turn_user_switch")
NORMAL = (
    "normal_single_turn_single_function",
    "normal_single_turn_parallel_function",
    *ADJUSTED,
    "normal_similar_api",
    "normal_preference",
    *(f"normal_atom_{kind}" for kind in ATOMS),
)
SPECIAL = ("special_incomplete", "special_error_param", "special_irrelevant")
MULTI_STEP = "agent_multi_step"
CATEGORIES = (*NORMAL, *SPECIAL, MULTI_STEP)
GROUPS = {"normal": NORMAL, "special": SPECIAL, "agent": (MULTI_STEP,)}
WEIGHTS = {"normal": 0.578, "special": 0.2676, "agent": 0.1545}
REPLY_LIMIT = 20  # of a multi-step task: ACEBench plays 40 messages, every other one the agent's
REMEDY = "give a checkout of chenchen0103/ACEBench"
_SPEAKER = re.compile(r"^(user|system|assistant|tool):", re.MULTILINE)
_AGENT = "Do the task with the functions, step by step. When it is done, say so without calling a function."


class AceBench:
    """ACEBench as tasks.

    Args:
        folder: a checkout.
        categories: out of `CATEGORIES` or `GROUPS`; empty means all.
        language: "en" or "zh".
        deadline_s: seconds one call of a simulator may take.
    """

    name = "acebench"
    quiet: frozenset[str] = frozenset()

    def __init__(
        self, folder: Path, categories: Sequence[str] = (), *, language: str = "en", deadline_s: float = DEADLINE_S
    ) -> None:
        self.categories = expand(categories, CATEGORIES, GROUPS)
        self._where = f"--acebench {folder}"
        self._data = folder / "data_all" / f"data_{language}"
        if not self._data.is_dir():
            raise UserError(f"holds no data_all/data_{language}", where=self._where, remedy=REMEDY)
        self.language = language
        self.host = WorkerHost(
            SERVICE, str(folder.resolve()), limits=Limits(deadline_s), where=self._where, remedy=REMEDY
        )

    def config(self) -> dict[str, Any]:
        """Categories and language."""
        return {"benchmark": self.name, "categories": list(self.categories), "language": self.language}

    def tasks(self, limit: int | None = None) -> list[Task]:
        """The entries of every category as tasks."""
        result = []
        for category in self.categories:
            entries = read_rows(self._data / f"data_{category}.json", ("id", "question", "function"))
            answers = read_rows(self._data / "possible_answer" / f"data_{category}.json", ("id", "ground_truth"))
            if [entry["id"] for entry in entries] != [answer["id"] for answer in answers]:
                problem = f"prompts and answers of {category} do not belong together"
                raise UserError(problem, where=self._where, remedy="check it out again")
            result += [self._task(category, *pair) for pair in list(zip(entries, answers, strict=True))[:limit]]
        return result

    def _task(self, category: str, entry: dict[str, Any], answer: dict[str, Any]) -> Task:
        functions = [with_parameters(function) for function in entry["function"]]
        return Task(
            id=entry["id"],
            family=category,
            difficulty=0,
            tools=tuple(tool(f["name"], f.get("description", ""), f["parameters"]) for f in functions),
            messages=tuple(self._messages(category, entry)),
            spec={"entry": entry, "functions": functions, "answer": answer},
            split="test",
            start=self._start,
        )

    def _messages(self, category: str, entry: Mapping[str, Any]) -> list[dict]:
        if category == MULTI_STEP:
            return [{"role": "system", "content": _AGENT}, {"role": "user", "content": entry["question"]}]
        notes = [str(entry[name]).strip() for name in ("time", "profile") if entry.get(name)]
        if category in SPECIAL:
            prompt = self.host.facts["special_prompts"][self.language]
            shown = json.dumps([function["name"] for function in entry["function"]], ensure_ascii=False)
            notes = [prompt.replace("{time}", "\n".join(notes)).replace("{function}", shown)] if prompt else notes
        system = [{"role": "system", "content": "\n".join(notes)}] if notes else []
        return [*system, *dialogue(entry["question"])]

    def _start(self, task: Task) -> Answered | MultiStep:
        return (MultiStep if task.family == MULTI_STEP else Answered)(task, self)

    def aggregates(self, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """ACEBench's overall score: means over categories; of the dialogues, those right in every turn count."""
        accuracy, _ = accuracies(rows)
        for category in ADJUSTED:
            if category in accuracy:
                accuracy[category] = whole_dialogues([row for row in rows if row["category"] == category])
        step = accuracy.get(MULTI_STEP)
        parts = {
            "normal": mean(accuracy.get(name) for name in NORMAL),
            "special": mean(accuracy.get(name) for name in SPECIAL),
            "agent multi-step": step,
            "agent multi-turn": None,
        }
        half = WEIGHTS["agent"] / 2
        weights = {"normal": WEIGHTS["normal"], "special": WEIGHTS["special"]}
        return [weighted("overall", parts, {**weights, "agent multi-step": half, "agent multi-turn": half})]

    def close(self) -> None:
        """End the worker."""
        self.host.close()


def read_rows(path: Path, fields: Sequence[str]) -> list[dict[str, Any]]:
    """The rows of a JSON-lines file, which must have the fields."""
    if not path.is_file():
        raise UserError("no such file", where=str(path), remedy=REMEDY)
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            for name in fields:
                row[name]
        except (ValueError, KeyError, TypeError):
            raise UserError(f"line {number} is no entry", where=str(path), remedy="check it out again") from None
        rows.append(row)
    return rows


def with_parameters(function: Mapping[str, Any]) -> dict[str, Any]:
    """A function whose schema is under `parameters`, whatever the data calls it."""
    schema = next((function[key] for key in ("parameters", "arguments", "_arguments") if key in function), {})
    return {**function, "parameters": schema}


def dialogue(text: str) -> list[dict]:
    """A flattened dialogue as chat messages; text before the first speaker is the user's."""
    parts = _SPEAKER.split(text)
    turns = [("user", parts[0])] if parts[0].strip() else []
    turns += list(zip(parts[1::2], parts[2::2], strict=True))
    roles = {"user": "user", "tool": "user", "system": "assistant", "assistant": "assistant"}
    return [{"role": roles[who], "content": said.strip()} for who, said in turns]


def whole_dialogues(rows: Sequence[Mapping[str, Any]]) -> float:
    """Share of dialogues (ids that differ in the last number) whose rows are all correct."""
    whole: dict[str, bool] = {}
    for row in rows:
        name = row["id"].rpartition("_")[0]
        whole[name] = whole.get(name, True) and row["correct"]
    return sum(whole.values()) / len(whole)


class Answered:
    """One reply: calls for normal tasks, a sentence for special ones."""

    def __init__(self, task: Task, benchmark: AceBench) -> None:
        self._task, self._host = task, benchmark.host
        self.tools = list(task.tools)
        self._reply: ParsedReply | None = None

    def step(self, reply: ParsedReply) -> None:
        """Take the reply; the episode is over."""
        self._reply = reply

    def score(self) -> bool:
        """ACEBench's verdict."""
        return self.verdict().correct

    def solution(self) -> Solution:
        """The first accepted answer."""
        answer = self._task.spec["answer"]["ground_truth"]
        if self._task.family in SPECIAL:
            return Solution(text=acebench_answers.sentence(self._task.family, answer))
        return Solution(acebench_answers.calls(answer))

    def verdict(self) -> Verdict:
        """By the kind of task."""
        answer = self._task.spec["answer"]["ground_truth"]
        reply = self._reply
        if self._task.family in SPECIAL:
            reason = acebench_answers.special_problem(self._task.family, answer, reply.text if reply else "")
            return Verdict(reason is None, reason is None, reason)
        if reply is None or not reply.calls:
            return Verdict(False, False, "no_call_made")
        calls = [[call.name, call.arguments] for call in reply.calls]
        try:
            made = self._check(calls)
            stripped = self._check(acebench_answers.without_blanks(calls)) if self._task.family in ADJUSTED else made
        except (WorkerError, WorkerDied) as error:
            return Verdict(False, False, "checker_failed", {"error": str(error)})
        correct = made["valid"] or stripped["valid"]
        details = {} if correct else {"error": made["error"]}
        return Verdict(correct, stripped["valid"], None if correct else made["reason"], details)

    def _check(self, calls: list) -> dict[str, Any]:
        answer = self._task.spec["answer"]["ground_truth"]
        return self._host.call(
            "check_normal",
            category=self._task.family,
            functions=self._task.spec["functions"],
            calls=calls,
            answers=answer if isinstance(answer, list) else [answer],
            question=self._task.spec["entry"]["question"],
        )

    def record(self) -> dict[str, Any]:
        """Nothing beyond the row."""
        return {}

    def close(self) -> None:
        """Nothing to give back."""


class MultiStep:
    """A task on simulators: calls until a reply without one. Judged by the state that is left.

    `details.process` is the share of the milestones that were called in order, 1 where the state is right, as ACEBench
    counts it; milestones and calls are compared without blanks and quotes.
    """

    def __init__(self, task: Task, benchmark: AceBench) -> None:
        self._task, self._host, self._language = task, benchmark.host, benchmark.language
        self.tools = list(task.tools)
        self._made: list[str] = []
        self._session: Session | None = None
        self._lost = False
        self._verdict: Verdict | None = None
        self._planned = acebench_answers.milestone_calls(task.spec["answer"]["mile_stone"])

    def step(self, reply: ParsedReply) -> list[dict] | None:
        """Run the calls in order."""
        if not reply.calls:
            return None
        self._made.append(acebench_answers.call_text(reply.calls))
        messages = [{"role": "tool", "content": self._execute(call.name, call.arguments)} for call in reply.calls]
        return None if len(self._made) >= REPLY_LIMIT else messages

    def _execute(self, name: str, arguments: dict[str, Any]) -> str:
        if self._lost:
            return "Error during execution: the environment has stopped"
        try:
            if self._session is None:
                entry = self._task.spec["entry"]
                self._session = self._host.open()
                self._finalizer = weakref.finalize(self, self._session.close)
                self._session.call(
                    "start", classes=entry["involved_classes"], config=entry["initial_config"], language=self._language
                )
            result = self._session.call("execute", name=name, arguments=arguments)
        except WorkerDied:
            self._lost = True
            return "Error during execution: the call took too long"
        except WorkerError as error:
            return f"Error during execution: {error}"
        return result if isinstance(result, str) else json.dumps(result, ensure_ascii=False)

    def score(self) -> bool:
        """Whether the state is the expected one."""
        return self.verdict().correct

    def solution(self) -> Solution:
        """The milestones one after the other."""
        if len(self._made) < len(self._planned):
            return Solution(self._planned[len(self._made)])
        return Solution(text="The task is done.")

    def verdict(self) -> Verdict:
        """The state at this point, and the milestones."""
        if self._verdict is None:
            self._verdict = self._judge()
        return self._verdict

    def _judge(self) -> Verdict:
        answer = self._task.spec["answer"]
        process = acebench_answers.milestone_share(answer["mile_stone"], self._made)
        if self._session is None or self._lost:
            reason = "call_deadline" if self._lost else "no_call_made"
            return Verdict(False, False, reason, {"process": process})
        try:
            state = self._session.call("state")
            judged = self._host.call("check_state", state=state, expected=answer["ground_truth"])
        except (WorkerError, WorkerDied) as error:
            return Verdict(False, False, "checker_failed", {"process": process, "error": str(error)})
        if judged["valid"]:
            return Verdict(True, True, None, {"process": 1.0})
        return Verdict(False, False, judged["reason"], {"process": process, "error": judged["error"]})

    def record(self) -> dict[str, Any]:
        """The calls made, reply by reply, as ACEBench writes them."""
        return {"process": self._made}

    def close(self) -> None:
        """End the simulators' process."""
        if self._session is not None:
            self._finalizer()
