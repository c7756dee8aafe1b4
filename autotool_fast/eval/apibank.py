"""API-Bank, levels 1 and 2, from the folder `api-bank` of its repository.

Each call of a dialogue is one task: the dialogue up to there is given, the call is wanted. Level 1 offers the tools
that the dialogue uses; level 2 offers the tool search and what it has found so far. Calls of the search itself are a
category of their own, since any sensible keywords will do. Tools are read from their source without running it.

Rules for `correct`: "match", any call of the reply has the name and the arguments, values compared as text (the data
writes every value as text); "execute", the tool runs on fresh databases and judges the result as the official evaluator
does, which part of the data's own calls do not pass. `strict` wants exactly that one call, values of the same type.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from autotool_fast.chat import ParsedReply, ToolCall
from autotool_fast.errors import UserError
from autotool_fast.eval.bfcl import expand
from autotool_fast.eval.records import Solution, Verdict, accuracies, call_message, weighted
from autotool_fast.eval.schemas import tool
from autotool_fast.matching import calls_match
from autotool_fast.sandbox.host import DEADLINE_S, Limits, WorkerDied, WorkerError, WorkerHost
from autotool_fast.tasks.record import Task

SERVICE = Path(__file__).with_name("apibank_service.py")
FOLDERS = {"level-1": "level-1-given-desc", "level-2": "level-2-toolsearcher"}
CATEGORIES = ("level-1", "level-2", "level-2-search")
RULES = ("match", "execute")
SEARCH = "ToolSearcher"
REMEDY = "give the folder api-bank of a checkout of AlibabaResearch/DAMO-ConvAI"
SYSTEM = {"role": "system", "content": "The year is 2023."}


class ApiBank:
    """API-Bank as tasks.

    Args:
        folder: the folder `api-bank`.
        categories: out of `CATEGORIES`; empty means all.
        rule: out of `RULES`.
        deadline_s: seconds one execution may take.
    """

    name = "apibank"
    quiet: frozenset[str] = frozenset()

    def __init__(
        self, folder: Path, categories: Sequence[str] = (), *, rule: str = "match", deadline_s: float = DEADLINE_S
    ) -> None:
        self.categories = expand(categories, CATEGORIES, {})
        self._samples = folder / "lv1-lv2-samples"
        if not self._samples.is_dir() or not (folder / "apis").is_dir():
            raise UserError("holds no lv1-lv2-samples and apis", where=f"--apibank {folder}", remedy=REMEDY)
        self._tools = read_tools(folder / "apis")
        self._rule = rule
        self._host = WorkerHost(
            SERVICE, str(folder.resolve()), limits=Limits(deadline_s), where=f"--apibank {folder}", remedy=REMEDY
        )

    def config(self) -> dict[str, Any]:
        """Categories and rule."""
        return {"benchmark": self.name, "categories": list(self.categories), "rule": self._rule}

    def tasks(self, limit: int | None = None) -> list[Task]:
        """One task per call, dialogues in the order of their file names."""
        kept: dict[str, list[Task]] = {name: [] for name in self.categories}
        for level, folder in FOLDERS.items():
            if not any(name.startswith(level) for name in self.categories):
                continue
            for path in sorted((self._samples / folder).glob("*.jsonl")):
                for task in self._dialogue(level, path):
                    if task.family in kept and (limit is None or len(kept[task.family]) < limit):
                        kept[task.family].append(task)
        return [task for tasks in kept.values() for task in tasks]

    def _dialogue(self, level: str, path: Path) -> list[Task]:
        lines = read_dialogue(path)
        used = sorted({line["api_name"] for line in lines if line["role"] == "API"})
        tasks = []
        for index, line in enumerate(lines):
            if line["role"] != "API":
                continue
            before = lines[:index]
            names = used if level == "level-1" else [SEARCH, *found_tools(before)]
            missing = [name for name in names if name not in self._tools]
            if missing:
                raise UserError(f"uses the tool {missing[0]}, which apis does not have", where=str(path), remedy=REMEDY)
            task = Task(
                id=f"{level}/{path.stem}/{index}",
                family=f"{level}-search" if line["api_name"] == SEARCH else level,
                difficulty=0,
                tools=tuple(self._tools[name] for name in names),
                messages=(SYSTEM, *messages(before)),
                spec={"name": line["api_name"], "arguments": line["param_dict"], "result": line["result"]},
                split="test",
                start=self._start,
            )
            tasks.append(task)
        return tasks

    def _start(self, task: Task) -> Call:
        execute = self._rule == "execute" and task.family != "level-2-search"
        return Call(task, self._host if execute else None)

    def aggregates(self, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Levels 1 and 2 by number of calls; the search is not part of it."""
        accuracy, counts = accuracies([row for row in rows if row["category"] in FOLDERS])
        total = sum(counts.values()) or 1
        weights = {name: counts.get(name, 0) / total for name in FOLDERS}
        return [weighted("levels 1 and 2", {name: accuracy.get(name) for name in FOLDERS}, weights)]

    def close(self) -> None:
        """End the worker, if one was needed."""
        self._host.close()


def read_tools(folder: Path) -> dict[str, dict]:
    """The tools that the classes in a folder describe, by name. The source is parsed, not run."""
    tools = {}
    for path in sorted(folder.glob("*.py")):
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, ValueError) as error:
            raise UserError(f"is not Python ({error})", where=str(path), remedy=REMEDY) from None
        for node in tree.body:
            described = _description(node) if isinstance(node, ast.ClassDef) else {}
            if "input_parameters" in described:
                properties = described["input_parameters"]
                schema = {"type": "dict", "properties": properties}
                tools[node.name] = tool(node.name, described.get("description", ""), schema)
    return tools


def _description(node: ast.ClassDef) -> dict[str, Any]:
    found = {}
    for statement in node.body:
        if isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name):
            name = statement.targets[0].id
            if name in ("description", "input_parameters"):
                found[name] = ast.literal_eval(statement.value)
    return found


def read_dialogue(path: Path) -> list[dict[str, Any]]:
    """The lines of a dialogue."""
    lines = []
    for number, text in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not text.strip():
            continue
        try:
            line = json.loads(text)
            fields = ("api_name", "param_dict", "result") if line["role"] == "API" else ("text",)
            for name in fields:
                line[name]
        except (ValueError, KeyError, TypeError):
            remedy = "the file is damaged; check it out again"
            raise UserError(f"line {number} is no dialogue line", where=str(path), remedy=remedy) from None
        lines.append(line)
    return lines


def messages(lines: Sequence[Mapping[str, Any]]) -> list[dict]:
    """Dialogue lines as chat messages; a call belongs to the assistant's words before it."""
    result: list[dict] = []
    for line in lines:
        if line["role"] == "API":
            said = ""
            if result and result[-1]["role"] == "assistant" and "tool_calls" not in result[-1]:
                said = result.pop()["content"]
            result.append(call_message(said, [ToolCall(line["api_name"], line["param_dict"])]))
            result.append({"role": "tool", "content": json.dumps(line["result"].get("output"), ensure_ascii=False)})
        else:
            result.append({"role": "user" if line["role"] == "User" else "assistant", "content": line["text"]})
    return result


def found_tools(lines: Sequence[Mapping[str, Any]]) -> list[str]:
    """Names of the tools that searches in these lines gave back, each once."""
    names: dict[str, None] = {}
    for line in lines:
        if line["role"] == "API" and line["api_name"] == SEARCH:
            output = line["result"].get("output")
            for item in output if isinstance(output, list) else [output]:
                if isinstance(item, dict) and "name" in item:
                    names[item["name"]] = None
    return list(names)


def as_text(value: Any) -> Any:
    """A value as the data would write it: numbers, booleans and lists as text, ends trimmed."""
    if isinstance(value, dict):
        return {key: as_text(item) for key, item in value.items()}
    if isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        return json.dumps(value)
    text = value.strip()
    if text.startswith("["):  # lists are written as Python literals
        try:
            return json.dumps(ast.literal_eval(text))
        except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
            return text
    return text


class Call:
    """One reply, of which one call is wanted. With a `host`, calls of the right name are executed."""

    def __init__(self, task: Task, host: WorkerHost | None) -> None:
        self._task, self._host = task, host
        self.tools = list(task.tools)
        self._reply: ParsedReply | None = None

    def step(self, reply: ParsedReply) -> None:
        """Take the reply; the episode is over."""
        self._reply = reply

    def score(self) -> bool:
        """Whether the reply has the call."""
        return self.verdict().correct

    def solution(self) -> Solution:
        """The call of the dialogue."""
        return Solution((self._expected(),))

    def _expected(self) -> ToolCall:
        return ToolCall(self._task.spec["name"], self._task.spec["arguments"])

    def verdict(self) -> Verdict:
        """See the module for the rules."""
        calls = self._reply.calls if self._reply is not None else ()
        named = [call for call in calls if call.name == self._task.spec["name"]]
        if not named:
            return Verdict(False, False, "wrong_tool" if calls else "no_call_made")
        if self._task.family == "level-2-search":
            correct = any(str(call.arguments.get("keywords") or "").strip() for call in named)
        elif self._host is not None:
            correct = any(self._passes(call) for call in named)
        else:
            wanted = as_text(self._task.spec["arguments"])
            correct = any(as_text(call.arguments) == wanted for call in named)
        exact = calls_match(calls, [self._expected()], strict=True)
        return Verdict(correct, correct and exact, None if correct else "wrong_arguments")

    def _passes(self, call: ToolCall) -> bool:
        spec = self._task.spec
        try:
            return self._host.call("check", name=call.name, arguments=call.arguments, expected=spec["result"])
        except (WorkerError, WorkerDied):
            return False

    def record(self) -> dict[str, Any]:
        """Nothing beyond the row."""
        return {}

    def close(self) -> None:
        """Nothing to give back."""
