"""BFCL (v4 data) through the data, checkers and simulators of the `bfcl-eval` package.

The package is found installed or unzipped in a folder; it is never imported here but in processes of its own (see
`sandbox`, `bfcl_service`), which get parsed calls and no text of a model. Single-turn, live and multi-turn categories;
the agentic ones need a network or an embedding model and are not run.

`correct` is BFCL's verdict. `strict` also wants every reply to be well formed and, in multi-turn, no call in a turn
that wants none.

A malformed reply ends a single-turn episode; in multi-turn it ends the user's turn, as it does in BFCL.

Multi-turn tasks are a training environment as well (see `environment`): their episodes hold a process with the
simulators' state. Training on a benchmark's own entries makes its scores meaningless; give the
environment a folder with other entries of the same form.
"""

from __future__ import annotations

import importlib.util
import json
import time
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from autotool_fast.chat import ParsedReply, ToolCall
from autotool_fast.errors import UserError
from autotool_fast.eval import bfcl_scores
from autotool_fast.eval.bfcl_answers import multi_turn_calls, single_turn_calls
from autotool_fast.eval.records import Solution, Verdict, accuracies
from autotool_fast.eval.schemas import tool
from autotool_fast.sandbox.host import DEADLINE_S, Limits, Session, WorkerDied, WorkerError, WorkerHost
from autotool_fast.tasks.record import Task

SERVICE = Path(__file__).with_name("bfcl_service.py")
VERSIONS = ("2026.3.23",)
NON_LIVE = ("simple_python", "simple_java", "simple_javascript", "multiple", "parallel", "parallel_multiple")
LIVE = ("live_simple", "live_multiple", "live_parallel", "live_parallel_multiple")
MULTI_TURN = ("multi_turn_base", "multi_turn_miss_func", "multi_turn_miss_param", "multi_turn_long_context")
CATEGORIES = (*NON_LIVE, "irrelevance", *LIVE, "live_irrelevance", "live_relevance", *MULTI_TURN)
GROUPS = {
    "single_turn": tuple(name for name in CATEGORIES if name not in MULTI_TURN),
    "non_live": (*NON_LIVE, "irrelevance"),
    "live": (*LIVE, "live_irrelevance", "live_relevance"),
    "multi_turn": MULTI_TURN,
}
NO_FUNCTION = "None of the functions fits."


def install(option: str) -> str:
    """How to get the package, for people who would name its folder with `option`."""
    version = VERSIONS[-1]
    return (
        f"run: pip download --no-deps bfcl-eval=={version} -d DIR && unzip -q DIR/bfcl_eval-*.whl -d DIR, "
        f"then pass {option} DIR"
    )


def locate(folder: Path | None, option: str = "--bfcl") -> tuple[Path, str]:
    """The folder that holds the package, and its version. `option` is the one that names the folder, for messages.

    Raises:
        UserError: it is not there, or of another version.
    """
    if folder is None:
        spec = importlib.util.find_spec("bfcl_eval")
        if spec is None or not spec.submodule_search_locations:
            raise UserError("the package bfcl-eval is not installed", where=option, remedy=install(option))
        folder = Path(next(iter(spec.submodule_search_locations))).parent
    root = folder.parent if folder.name == "bfcl_eval" else folder
    if not (root / "bfcl_eval" / "data").is_dir():
        problem = "holds no folder bfcl_eval with data" if root.is_dir() else "no such folder"
        raise UserError(problem, where=f"{option} {folder}", remedy=install(option))
    found = sorted(path.name for path in root.glob("bfcl_eval-*.dist-info"))
    version = found[-1].removeprefix("bfcl_eval-").removesuffix(".dist-info") if found else "unknown"
    if version not in VERSIONS:
        raise UserError(f"bfcl-eval is of version {version}", where=f"{option} {folder}", remedy=install(option))
    return root, version


class Bfcl:
    """BFCL as tasks.

    Args:
        folder: an unzipped wheel; None looks for an installed package.
        categories: out of `CATEGORIES` or `GROUPS`; empty means all.
        deadline_s: seconds one call of a simulator may take.
        option: the one that names the folder, for messages.
    """

    name = "bfcl"
    quiet = frozenset({"irrelevance", "live_irrelevance"})

    def __init__(
        self,
        folder: Path | None = None,
        categories: Sequence[str] = (),
        *,
        deadline_s: float = DEADLINE_S,
        option: str = "--bfcl",
    ) -> None:
        self.categories = expand(categories, CATEGORIES, GROUPS)
        root, self.version = locate(folder, option)
        self._option = option
        limits, remedy = Limits(deadline_s), install(option)
        self.host = WorkerHost(SERVICE, str(root.resolve()), limits=limits, where=option, remedy=remedy)

    def config(self) -> dict[str, Any]:
        """Version and categories."""
        return {"benchmark": self.name, "version": self.version, "categories": list(self.categories)}

    def tasks(self, limit: int | None = None) -> list[Task]:
        """The entries of every category as tasks."""
        result = []
        for category in self.categories:
            try:
                items = self.host.call("entries", category=category)
            except WorkerError as error:
                problem = f"the data of {category} cannot be read ({error})"
                raise UserError(problem, where=self._option, remedy=install(self._option)) from None
            result += [self._task(category, item) for item in items[:limit]]
        return result

    def _task(self, category: str, item: dict[str, Any]) -> Task:
        entry = item["entry"]
        tools = tuple(tool(f["name"], f["description"], f["parameters"]) for f in entry["function"])
        several = category in MULTI_TURN
        return Task(
            id=entry["id"],
            family=category,
            difficulty=len(entry["question"]) if several else 0,
            tools=tools,
            messages=tuple(_messages(entry["question"][0])),
            spec=item,
            split="test",
            start=self._start_multi_turn if several else self._start_single_turn,
        )

    def _start_single_turn(self, task: Task) -> SingleTurn:
        return SingleTurn(task, self.host)

    def _start_multi_turn(self, task: Task) -> MultiTurn:
        return MultiTurn(task, self.host)

    def aggregates(self, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """The v3-style and the v4-style overall score."""
        return bfcl_scores.aggregates(*accuracies(rows))

    def close(self) -> None:
        """End the worker."""
        self.host.close()


def expand(names: Sequence[str], categories: Sequence[str], groups: Mapping[str, Sequence[str]]) -> tuple[str, ...]:
    """Categories out of names of categories and groups, in the order of `categories`; empty means all."""
    chosen = {name for given in names for name in groups.get(given, (given,))}
    unknown = sorted(chosen - set(categories))
    if unknown:
        known = ", ".join([*groups, *categories])
        raise UserError(f"unknown category '{unknown[0]}'", where="--categories", remedy=f"choose from {known}")
    return tuple(name for name in categories if not names or name in chosen)


def _messages(turn: Sequence[dict]) -> list[dict]:
    return [{"role": message["role"], "content": message["content"]} for message in turn]


def _pairs(calls: Sequence[ToolCall]) -> list[list]:
    return [[call.name, call.arguments] for call in calls]


def _verdict(correct: bool, strict: bool, answer: dict[str, Any]) -> Verdict:
    details = {"error": answer["error"]} if not correct else {}
    return Verdict(correct, correct and strict, answer["reason"], details)


class SingleTurn:
    """One reply, judged by its calls."""

    def __init__(self, task: Task, host: WorkerHost) -> None:
        self._task, self._host = task, host
        self.tools = list(task.tools)
        self._reply: ParsedReply | None = None

    def step(self, reply: ParsedReply) -> None:
        """Take the reply; the episode is over."""
        self._reply = reply

    def score(self) -> bool:
        """BFCL's verdict."""
        return self.verdict().correct

    def solution(self) -> Solution:
        """Accepted calls; any call where relevance is all that counts."""
        category, spec = self._task.family, self._task.spec
        if category in Bfcl.quiet:
            return Solution(text=NO_FUNCTION)
        if category == "live_relevance":
            return Solution((ToolCall(self.tools[0]["function"]["name"], {}),))
        return Solution(single_turn_calls(category, spec["functions"], spec["answer"]))

    def verdict(self) -> Verdict:
        """Relevance asks only whether there is a call; the rest is the package's checker."""
        category, spec, well_formed = self._task.family, self._task.spec, self._reply is not None
        calls = self._reply.calls if self._reply is not None else ()
        if "relevance" in category:
            correct = bool(calls) == (category not in Bfcl.quiet)
            reason = None if correct else "call_made" if calls else "no_call_made"
            return Verdict(correct, correct and well_formed, reason)
        if not calls:
            return Verdict(False, False, "no_call_made")
        try:
            answer = self._host.call(
                "check_calls",
                category=category,
                functions=spec["functions"],
                calls=_pairs(calls),
                answer=spec["answer"],
            )
        except (WorkerError, WorkerDied) as error:
            return Verdict(False, False, "checker_failed", {"error": str(error)})
        return _verdict(answer["valid"], well_formed, answer)

    def record(self) -> dict[str, Any]:
        """The result as BFCL's files hold it."""
        return {"result": bfcl_scores.result_text(self._reply)}

    def close(self) -> None:
        """Nothing to give back."""


class MultiTurn:
    """Several user turns on simulators, each of as many replies as the policy takes, with BFCL's cap.

    The simulators live in a process that starts with the first call and ends with the episode, or when the episode is
    forgotten. A call that passes its deadline or crashes them ends the process: that call and all later ones answer
    with an error.

    Attributes:
        lost: why the process is gone ("call_deadline" or "simulator_crashed"), or None.
    """

    def __init__(self, task: Task, host: WorkerHost) -> None:
        self._task, self._host = task, host
        entry = task.spec["entry"]
        self.tools = list(task.tools)
        self._entry = {key: entry[key] for key in ("id", "initial_config", "involved_classes")}
        self._held_out: dict[str, list] = entry.get("missed_function", {})
        documents = [*entry["function"], *(doc for docs in self._held_out.values() for doc in docs)]
        self._documents = documents
        self._questions = entry["question"]
        self._turns: list[list[list[ToolCall]]] = [[]]
        self._results: list[list[str]] = [[]]
        self._over: str | None = None
        self._session: Session | None = None
        self.lost: str | None = None
        self._well_formed = True
        self._verdict: Verdict | None = None

    def step(self, reply: ParsedReply) -> list[dict] | None:
        """Run the calls; a reply without calls ends the user's turn."""
        self._results[-1].append(bfcl_scores.result_text(reply))
        if reply.calls:
            self._turns[-1].append(list(reply.calls))
            texts = self._execute(reply.calls)
            if len(self._turns[-1]) > self._host.facts["step_limit"]:
                self._over = "step_limit"
                return None
            return [{"role": "tool", "content": text} for text in texts]
        return self._end_turn()

    def malformed(self, reply: ParsedReply) -> list[dict] | None:
        """What BFCL makes of a reply it cannot decode: nothing runs, and the user's turn is over."""
        self._well_formed = False
        self._results[-1].append("")  # calls that stand beside the broken one are not made
        return self._end_turn()

    def _end_turn(self) -> list[dict] | None:
        if len(self._turns) == len(self._questions):
            self._over = "finished"
            return None
        turn = len(self._turns)
        self._turns.append([])
        self._results.append([])
        return self._open_turn(turn)

    def _open_turn(self, turn: int) -> list[dict]:
        held_out = self._held_out.get(str(turn))
        if not held_out:
            return _messages(self._questions[turn])
        self.tools += [tool(f["name"], f["description"], f["parameters"]) for f in held_out]
        functions = "\n".join(json.dumps(document) for document in held_out)
        prompt = self._host.facts["added_functions_prompt"].format(functions=functions)
        return [{"role": "user", "content": prompt}]

    def _execute(self, calls: Sequence[ToolCall]) -> list[str]:
        if self.lost is not None:
            return ["Error during execution: the environment has stopped"] * len(calls)
        began = time.monotonic()
        try:
            if self._session is None:
                self._session = self._host.open()
                # The driver forgets an episode that it cuts; its process must not outlive it.
                self._finalizer = weakref.finalize(self, self._session.close)
                self._session.call("start", entry=self._entry, known=self._known)
            return self._session.call("execute", calls=_pairs(calls))
        except (WorkerDied, WorkerError):
            late = time.monotonic() - began >= self._host.deadline_s
            self.lost = "call_deadline" if late else "simulator_crashed"
            self.close()
            words = "the call took too long" if late else "the environment has crashed"
            return [f"Error during execution: {words}"] * len(calls)

    @property
    def _known(self) -> list[str]:
        return [document["name"] for document in self._documents]

    def score(self) -> bool:
        """BFCL's verdict."""
        return self.verdict().correct

    def solution(self) -> Solution:
        """All calls of the turn in one reply, then a word to end the turn."""
        answer = self._task.spec["answer"][len(self._turns) - 1]
        if self._turns[-1] or not answer:
            return Solution(text="Done." if self._turns[-1] else NO_FUNCTION)
        return Solution(multi_turn_calls(answer, self._documents))

    def verdict(self) -> Verdict:
        """The package's checker on fresh simulators: state after each turn, and the results of the expected calls."""
        if self._verdict is None:
            self._verdict = self._judge()
        return self._verdict

    def _judge(self) -> Verdict:
        if self._over == "step_limit" or self.lost is not None:
            return Verdict(False, False, self.lost or "step_limit")
        missing = len(self._questions) - len(self._turns)
        turns = [[_pairs(step) for step in turn] for turn in self._turns] + [[]] * missing
        session = self._host.open()
        try:
            answer = session.call(
                "check_turns", entry=self._entry, known=self._known, turns=turns, answer=self._task.spec["answer"]
            )
        except (WorkerError, WorkerDied) as error:
            return Verdict(False, False, "checker_failed", {"error": str(error)})
        finally:
            session.close()
        strict = answer["quiet"] and self._over == "finished" and self._well_formed
        return _verdict(answer["valid"], strict, answer)

    def record(self) -> dict[str, Any]:
        """The result as BFCL's files hold it: a list of steps for each turn; turns not reached are empty."""
        missing = 0 if self._over == "step_limit" else len(self._questions) - len(self._results)
        return {"result": self._results + [[]] * missing}

    def close(self) -> None:
        """End the simulators' process."""
        if self._session is not None:
            self._finalizer()
