"""Overlap of training data with benchmarks: shared tool names, and questions that share eight words in a row.

Benchmark files are read for their questions and tools alone: BFCL (`question`, `function`), API-Bank (dialogue lines,
or `user` and `answer`), ACEBench (`question` as one text), plain records. The benchmarks' n-grams are held in memory
(some 250 bytes per word); the training data is streamed.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from autotool_fast.errors import UserError
from autotool_fast.tasks.example import Example
from autotool_fast.tasks.sources.files import SUFFIXES, rows
from autotool_fast.tasks.sources.literal import read_value
from autotool_fast.tasks.sources.rows import RowError

N = 8
_WORD = re.compile("[\u3400-\u9fff]|[^\\W_\u3400-\u9fff]+")
_SPEAKER = re.compile(r"^(\w+):[ \t]*", re.MULTILINE)
_USER_BLOCK = re.compile(r"<user>(.*?)</user>", re.DOTALL)
_CROWD = 40  # files in one folder, from which on they are one benchmark together
_EXAMPLES_KEPT = 5  # training records named per benchmark question


@dataclass(frozen=True)
class Item:
    """One benchmark entry: what the user says, and the names of the tools that take part."""

    id: str
    queries: tuple[str, ...]
    tools: tuple[str, ...]


@dataclass
class Benchmark:
    """One benchmark file and what of it was met in the training data.

    Attributes:
        questions: number of entries with a user's text.
        tools: comparable name -> name as written.
        met: entry id -> ids of training records that share an n-gram with it (the first few).
        same: ids of entries of which one question is a training question, word for word.
        shared_tools: comparable names also offered in the training data.
        records: training records that share an n-gram.
    """

    name: str
    questions: int = 0
    tools: dict[str, str] = field(default_factory=dict)
    met: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    same: set[str] = field(default_factory=set)
    shared_tools: set[str] = field(default_factory=set)
    records: int = 0

    def to_json(self) -> dict[str, Any]:
        """As a JSON object."""
        return {
            "benchmark": self.name,
            "questions": self.questions,
            "questions_sharing_ngram": len(self.met),
            "questions_identical": len(self.same),
            "tools": len(self.tools),
            "tools_shared": len(self.shared_tools),
            "records_sharing_ngram": self.records,
            "shared_tool_names": sorted(self.tools[name] for name in self.shared_tools),
            "identical": sorted(self.same),
            "met": dict(sorted(self.met.items())),
        }


def words(text: str) -> list[str]:
    """Words for comparison: case folded, punctuation left out, one per Chinese character."""
    return _WORD.findall(text.casefold())


def ngrams(text: str, n: int = N) -> set[tuple[str, ...]]:
    """All runs of n words; a text with fewer words is one shorter run, which only an equal text has."""
    said = words(text)
    if len(said) < n:
        return {tuple(said)} if said else set()
    return {tuple(said[i : i + n]) for i in range(len(said) - n + 1)}


def comparable_name(name: str) -> str:
    """A tool's name for comparison: `getWeather`, `get_weather` and `Get Weather` are one."""
    return "".join(words(name))


class Audit:
    """Compares training records with benchmarks read beforehand."""

    def __init__(self, benchmarks: Iterable[tuple[str, Iterable[Item]]]) -> None:
        self.benchmarks: list[Benchmark] = []
        self.seen = 0
        self._entries: list[tuple[int, str]] = []  # (benchmark, entry id)
        self._grams: dict[int, list[int]] = defaultdict(list)  # hash of an n-gram -> entries
        self._wholes: dict[int, list[int]] = defaultdict(list)  # hash of a whole question -> entries
        self._tools: dict[str, list[int]] = defaultdict(list)
        for name, items in benchmarks:
            self._read(name, items)

    def _read(self, name: str, items: Iterable[Item]) -> None:
        benchmark, index = Benchmark(name), len(self.benchmarks)
        for item in items:
            benchmark.questions += any(map(words, item.queries))
            entry = len(self._entries)
            self._entries.append((index, item.id))
            for gram in {hash(gram) for query in item.queries for gram in ngrams(query)}:
                self._grams[gram].append(entry)
            for whole in {hash(tuple(words(query))) for query in item.queries if words(query)}:
                self._wholes[whole].append(entry)
            for tool in item.tools:
                if comparable_name(tool) not in benchmark.tools:
                    benchmark.tools[comparable_name(tool)] = tool
                    self._tools[comparable_name(tool)].append(index)
        self.benchmarks.append(benchmark)

    def add(self, example: Example) -> None:
        """Compare one training record."""
        self.seen += 1
        met: set[int] = set()
        for message in example.messages:
            if message["role"] == "user":
                for gram in ngrams(message["content"]):
                    met.update(self._grams.get(hash(gram), ()))
                for entry in self._wholes.get(hash(tuple(words(message["content"]))), ()):
                    index, name = self._entries[entry]
                    self.benchmarks[index].same.add(name)
        for entry in sorted(met):
            index, name = self._entries[entry]
            records = self.benchmarks[index].met[name]
            if len(records) < _EXAMPLES_KEPT:
                records.append(example.id)
        for index in {self._entries[entry][0] for entry in met}:
            self.benchmarks[index].records += 1
        for tool in example.tools:
            name = comparable_name(tool["function"]["name"])
            for index in self._tools.get(name, ()):
                self.benchmarks[index].shared_tools.add(name)

    def to_json(self) -> dict[str, Any]:
        """As a JSON object."""
        return {"records": self.seen, "n": N, "benchmarks": [one.to_json() for one in self.benchmarks]}

    def table(self) -> str:
        """One line per benchmark file."""
        head = ("benchmark", "questions", f"{N}-gram", "identical", "tools", "shared", "records hit")
        lines = [head]
        for one in self.benchmarks:
            lines.append(
                (
                    one.name,
                    str(one.questions),
                    _share(len(one.met), one.questions),
                    _share(len(one.same), one.questions),
                    str(len(one.tools)),
                    _share(len(one.shared_tools), len(one.tools)),
                    _share(one.records, self.seen),
                )
            )
        widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
        return "\n".join(
            "  ".join(cell.ljust(width) if i == 0 else cell.rjust(width) for i, (cell, width) in enumerate(pairs))
            for pairs in (list(zip(line, widths, strict=True)) for line in lines)
        )


def _share(part: int, whole: int) -> str:
    return f"{part} ({part / whole:.1%})" if whole else "0"


def read_benchmarks(path: Path) -> list[tuple[str, list[Item]]]:
    """(name, entries) of every benchmark at a path: a file, or a folder of one file per dialogue.

    Files without questions and tools are left out.

    Raises:
        UserError: nothing there, or nothing that looks like a benchmark.
    """
    if not path.exists():
        raise UserError("no such file or folder", where=str(path), remedy="give the benchmark's question files")
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.suffix in SUFFIXES and p.is_file())
    crowded = Counter(file.parent for file in files)
    found: dict[str, list[Item]] = defaultdict(list)
    for file in files:
        items = list(benchmark_items(file))
        if not any(item.queries or item.tools for item in items):
            continue
        if crowded[file.parent] > _CROWD:  # a file per dialogue
            items = [replace(item, id=f"{file.stem}/{item.id}") for item in items]
            found[str(file.parent.relative_to(path.parent))] += items
        else:
            found[file.stem if path.is_file() else str(file.relative_to(path).with_suffix(""))] += items
    if not found:
        remedy = "give question files of BFCL, API-Bank or ACEBench"
        raise UserError("no questions or tools found", where=str(path), remedy=remedy)
    return list(found.items())


def benchmark_items(path: Path) -> Iterator[Item]:
    """The entries of one file of questions; rows of other shapes give entries without content.

    Raises:
        UserError: when the file cannot be read.
    """
    for position, row in rows(path):
        if isinstance(row, dict):
            identity = row.get("id")
            name = str(identity) if isinstance(identity, (str, int)) else str(position)
            yield Item(name, tuple(_queries(row)), tuple(_tool_names(row)))


def _queries(row: dict[str, Any]) -> Iterator[str]:
    if row.get("role") == "User" and isinstance(row.get("text"), str):
        yield row["text"]
    for key in ("question", "messages", "query"):
        value = row.get(key)
        if isinstance(value, str):
            yield from _spoken(value)
        elif isinstance(value, list):
            yield from _user_contents(value)
    if isinstance(row.get("user"), str):
        yield from (_USER_BLOCK.findall(row["user"]) or [row["user"]])


def _spoken(text: str) -> Iterator[str]:
    """The user's parts of a text with a speaker before each, or the whole text when it has none."""
    marks = list(_SPEAKER.finditer(text))
    if not any(mark[1].casefold() == "user" for mark in marks):
        yield text
        return
    for mark, after in zip(marks, [*marks[1:], None], strict=True):
        if mark[1].casefold() == "user":
            yield text[mark.end() : after.start() if after else len(text)]


def _user_contents(value: Any) -> Iterator[str]:
    if isinstance(value, list):
        for part in value:
            yield from _user_contents(part)
    elif isinstance(value, dict) and value.get("role") == "user" and isinstance(value.get("content"), str):
        yield value["content"]


def _tool_names(row: dict[str, Any]) -> Iterator[str]:
    for key in ("function", "functions", "tools"):
        value = row.get(key)
        if isinstance(value, str):
            try:
                value = read_value(value)
            except RowError:
                continue
        for tool in value if isinstance(value, list) else [value]:
            tool = tool.get("function", tool) if isinstance(tool, dict) else None
            if isinstance(tool, dict) and isinstance(tool.get("name"), str):
                yield tool["name"]
    if isinstance(row.get("api_name"), str):
        yield row["api_name"]
    if isinstance(row.get("name"), str) and isinstance(row.get("parameters"), dict):
        yield row["name"]
    answer = row.get("answer")
    for call in answer if isinstance(answer, list) else [answer]:
        if isinstance(call, dict) and isinstance(call.get("name"), str):
            yield call["name"]
