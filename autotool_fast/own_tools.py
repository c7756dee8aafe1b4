"""A user's own tools as a training environment: a Python file of functions, a JSONL file of problems, episodes on them.

The file runs in the sandbox alone, loaded once by a server process and forked for each episode; nothing but the setting
`environment.tools` ever names code to run. In an episode the model's calls are checked against the tools' schemas and
run, each under a deadline, and their results go back to it until it replies without a call. Success is told by the
problem (`tasks.problem_file`) or by the file's `score`. An episode whose process is gone is over and wrong.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from autotool_fast.chat import ParsedReply, ToolCall
from autotool_fast.config import EnvironmentConfig
from autotool_fast.environment import Mixed
from autotool_fast.errors import UserError
from autotool_fast.matching import calls_match
from autotool_fast.sandbox.host import Limits, Session, WorkerDied, WorkerError, WorkerHost
from autotool_fast.tasks.example import call_message
from autotool_fast.tasks.problem_file import Problem, read_problems, says, split_problems
from autotool_fast.tasks.record import Task, Wait

SERVICE = Path(__file__).parent / "sandbox" / "functions.py"
_START_S = 60.0


class OwnTools:
    """The tools' file, loaded in the sandbox, and the problems read.

    Attributes:
        host: starts sessions.
        schemas: tool name -> its description.
        defaults: tool name -> argument -> default.
        scores: whether the file has a `score`.
        problems: all of them.

    Raises:
        UserError: a file cannot be read or loaded, or something in it is not as it should be.
    """

    def __init__(self, config: EnvironmentConfig) -> None:
        path = Path(config.tools)
        where = f"environment.tools ({config.tools})"
        if not path.is_file():
            raise UserError("is no file", where=where, remedy="give a Python file of functions; see docs/tools.md")
        argument = json.dumps({"path": str(path.resolve()), "result_chars": config.result_chars})
        self.host = WorkerHost(
            SERVICE, argument, limits=session_limits(config), where=where, remedy="see docs/tools.md", start_s=_START_S
        )
        try:
            facts = self.host.facts
            self.schemas: dict[str, dict] = {tool["function"]["name"]: tool for tool in facts["tools"]}
            self.defaults: dict[str, dict[str, Any]] = facts["defaults"]
            self.scores: bool = facts["scores"]
            self.problems = read_problems(Path(config.problems), self.schemas, scored=self.scores)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End the server and every session."""
        self.host.close()


def session_limits(config: EnvironmentConfig) -> Limits:
    """What an episode of the user's tools may use."""
    return Limits(
        deadline_s=config.call_deadline_s,
        cpu_s=600,
        memory_bytes=config.memory_mib << 20,
        file_bytes=16 << 20,
        open_files=64,
        processes=32,
        request_bytes=16 << 20,
        reply_bytes=max(1 << 20, 16 * config.result_chars),
        network=config.network,
        strict=True,
    )


def inspect(config: EnvironmentConfig) -> str:
    """Load and check both files as a run would; returns a line about them.

    Raises:
        UserError: see `OwnTools`.
    """
    tools = OwnTools(config)
    try:
        parts = split_problems(tools.problems, config.test_share)
        for split, use in (("train", "train on"), ("test", "hold out")):
            if not parts[split]:
                remedy = "give at least two, with another split, or none"
                raise UserError(f"has no problem to {use}", where=config.problems, remedy=remedy)
        closed = config.network or tools.host.network_closed
        network = "" if closed else "; the kernel does not let their network be closed"
    finally:
        tools.close()
    names = ", ".join(tools.schemas)
    return f"{len(parts['train'])} problems to train on, {len(parts['test'])} held out; tools {names}{network}"


class ToolProblems(Mixed):
    """Problems on a user's tools.

    A task's family is own/<family>, or own; its difficulty the problem's.

    Args:
        config: the files, deadlines and shares.
        unusable: why a task's prompt cannot be used, or None.
        options: of `Mixed`.

    Raises:
        UserError: see `OwnTools`; or a side of the split has no usable problem.
    """

    lost_what = "their tools"

    def __init__(
        self, config: EnvironmentConfig, seed: int, *, unusable: Callable[[Task], str | None], **options: Any
    ) -> None:
        super().__init__(config, seed, **options)
        self.tools = OwnTools(config)
        try:
            left_out: Counter[str] = Counter()
            for split, problems in split_problems(self.tools.problems, config.test_share).items():
                for problem in problems:
                    task = self._task(problem, split)
                    if reason := unusable(task):
                        left_out[reason] += 1
                    else:
                        self._parts[split].append(task)
            self._use(left_out)
        except BaseException:
            self.close()
            raise

    def _task(self, problem: Problem, split: str) -> Task:
        names = list(self.tools.schemas) if problem.tools is None else problem.tools
        return Task(
            id=problem.id,
            family="own" if problem.family == "own" else f"own/{problem.family}",
            difficulty=problem.difficulty,
            tools=tuple(self.tools.schemas[name] for name in names),
            messages=problem.messages,
            spec={"state": problem.state},
            split=split,
            start=lambda task: ToolEpisode(task, problem, self),
        )

    def close(self) -> None:
        """End every session, and say how many episodes were lost."""
        super().close()
        self.tools.close()


class ToolEpisode:
    """One attempt at a problem, in a process of its own from its first reply to its end."""

    def __init__(self, task: Task, problem: Problem, problems: ToolProblems) -> None:
        self._task, self._problem, self._problems, self._tools = task, problem, problems, problems.tools
        self._offered = {tool["function"]["name"] for tool in task.tools}
        self._transcript: list[dict[str, Any]] = list(task.messages)
        self._made: list[ToolCall] = []  # those that the tool answered without an error
        self._tried = False
        self._session: Session | None = None
        self._closed = False
        self._correct = False
        self._lost: tuple[str, str] | None = None  # why the episode is not to be blamed on the model, and in words

    def begin(self, reply: ParsedReply) -> Future[list[dict] | None]:
        """`step` in a thread."""
        return self._problems.pool.submit(self.step, reply)

    def waited(self, idle_s: float, waits: Sequence[Wait]) -> None:
        """Told when a rollout has nothing to do but wait for tools; see `Mixed.waited`."""
        self._problems.waited(idle_s, waits)

    def step(self, reply: ParsedReply) -> list[dict] | None:
        """Run the calls; a reply without calls is the answer, which is judged."""
        self._transcript.append(call_message(reply.text, reply.calls))
        self._tried |= bool(reply.calls)
        try:
            if not reply.calls:
                self._correct = self._judge(reply.text)
                self.close()
                return None
            results = [{"role": "tool", "content": self._run(call)} for call in reply.calls]
        except WorkerDied as error:
            self._lose("call_deadline" if error.reason == "deadline" else "tools_crashed", str(error))
            return None
        except (WorkerError, _SetupError) as error:
            self._lose("setup_failed", str(error))
            return None
        self._transcript += results
        return results

    def _run(self, call: ToolCall) -> str:
        if call.name not in self._offered:
            return f"Error: there is no tool {call.name!r}; the tools are: {', '.join(sorted(self._offered))}"
        answer = _ask(self._start(), call.name, "call", name=call.name, arguments=call.arguments)
        if not (isinstance(answer, dict) and isinstance(answer.get("text"), str)):
            raise WorkerDied(call.name)  # a tool wrote to the keeper
        if answer.get("ran"):
            self._made.append(call)
        return answer["text"]

    def _start(self) -> Session:
        if self._session is None:
            session = self._session = self._tools.host.open()
            if self._closed:
                session.close()
            problem = _ask(session, "setup", "start", given=self._problem.state)
            if problem is not None:
                raise _SetupError(problem)
        return self._session

    def _judge(self, text: str) -> bool:
        problem = self._problem
        if problem.expected is None and problem.answer is None:
            return self._score()
        right = problem.answer is None or says(text, problem.answer)
        if problem.expected == ():
            return right and not self._tried
        if right and problem.expected is not None:
            right = calls_match(self._made, problem.expected, defaults=self._tools.defaults)
        return right

    def _score(self) -> bool:
        answer = self._start().call("score", transcript=self._transcript)
        value = answer.get("value") if isinstance(answer, dict) else None
        if not isinstance(value, float):
            self._lose("score_failed", str(answer.get("error")) if isinstance(answer, dict) else "")
            return False
        return value >= 1.0

    def _lose(self, reason: str, words: str) -> None:
        self._lost = (reason, words)
        self.close()

    def score(self) -> bool:
        """Whether the problem is solved."""
        if self._lost is not None:
            reason, words = self._lost
            self._lost = None
            self._problems.report(reason, self._task, words)
        return self._correct

    def close(self) -> None:
        """End the session's processes; a call under way in another thread ends with them."""
        self._closed = True
        if self._session is not None:
            self._session.close()


def _ask(session: Session, function: str, op: str, /, **args: Any) -> Any:
    """`Session.call` that runs a function of the user's, which is named where it goes wrong."""
    try:
        return session.call(op, **args)
    except WorkerDied as error:
        raise WorkerDied(function, error.reason) from None


class _SetupError(Exception):
    """The file's `setup` failed."""
