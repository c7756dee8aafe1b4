"""What a data set holds: counts by kind, calls, turn, language, note and reason, and a few samples as text.

A `Tally` counts examples and rejects one at a time; nothing but the counts and the samples is kept.
"""

from __future__ import annotations

import hashlib
import heapq
import json
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from autotool_fast.tasks.example import KINDS, Example
from autotool_fast.tasks.sources.load import Input, read_input
from autotool_fast.tasks.sources.rows import NOTES, REASONS, Reject, shorten

_WIDTH = 100
_EVERY = 5  # seconds between two lines of progress


@dataclass
class Tally:
    """Counts of one data set.

    Attributes:
        rows: rows read.
        records: examples; a row of a dialogue gives several.
        rejects: rows or turns that gave none.
    """

    rows: int = 0
    records: int = 0
    rejects: int = 0
    kinds: Counter[str] = field(default_factory=Counter)
    calls: Counter[int] = field(default_factory=Counter)
    turns: Counter[int] = field(default_factory=Counter)
    languages: Counter[str] = field(default_factory=Counter)
    notes: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)

    def add(self, item: Example | Reject) -> None:
        """Count one item."""
        if isinstance(item, Reject):
            self.rejects += 1
            self.reasons[item.reason] += 1
            return
        self.records += 1
        self.kinds[item.kind] += 1
        self.calls[len(item.answer)] += 1
        self.turns[item.meta["turn"]] += 1
        self.languages[item.meta["language"]] += 1
        self.notes.update(item.meta["notes"])

    @property
    def reject_share(self) -> float:
        """Rejects among all items, in [0, 1]; 0 when there is none."""
        return self.rejects / max(1, self.rejects + self.records)

    def to_json(self) -> dict:
        """As a JSON object; counts in ascending order of their keys."""
        named = ("kinds", "calls", "turns", "languages", "notes", "reasons")
        counts = {name: {str(key): n for key, n in sorted(getattr(self, name).items())} for name in named}
        return {"rows": self.rows, "records": self.records, "rejects": self.rejects, **counts}


class Samples:
    """A sample that does not depend on the order of reading: the examples with the smallest hashes."""

    def __init__(self, count: int, seed: int = 0) -> None:
        self._count, self._seed = count, seed
        self._heap: list[tuple[int, int, Example]] = []
        self._offered = 0

    def add(self, example: Example) -> None:
        """Offer one example."""
        digest = hashlib.sha256(f"{self._seed}/{example.id}".encode()).digest()
        self._offered += 1
        entry = (-int.from_bytes(digest[:8], "big"), self._offered, example)
        if len(self._heap) < self._count:
            heapq.heappush(self._heap, entry)
        elif self._count:
            heapq.heappushpop(self._heap, entry)

    def __iter__(self) -> Iterator[Example]:
        return iter([example for _, _, example in sorted(self._heap, key=lambda entry: entry[:2])])


class Progress:
    """A line on stderr every few seconds while a long file is read."""

    def __init__(self, label: str) -> None:
        self._label, self._next = label, time.monotonic() + _EVERY

    def __call__(self, tally: Tally) -> None:
        """Report, if it is time."""
        if time.monotonic() >= self._next:
            self._next = time.monotonic() + _EVERY
            counts = f"{tally.rows} rows, {tally.records} records, {tally.rejects} rejects"
            print(f"{self._label}: {counts}", file=sys.stderr, flush=True)


def read_counted(input: Input, tally: Tally) -> Iterator[Example | Reject]:
    """`read_input`, counted into `tally` and reported on stderr."""
    progress = Progress(str(input.path))

    def on_row(position: int) -> None:
        tally.rows += 1
        progress(tally)

    for item in read_input(input, on_row):
        tally.add(item)
        yield item


def describe(title: str, tally: Tally) -> str:
    """The counts as text; reasons and notes with what they mean."""
    items = tally.records + tally.rejects
    lines = [
        title,
        f"  {tally.rows} rows, {tally.records} records, {tally.rejects} rejects ({tally.reject_share:.1%} of {items})",
        f"  kind      {_counts((kind, tally.kinds[kind]) for kind in KINDS)}",
        f"  calls     {_counts(sorted(tally.calls.items()))}",
        f"  turn      {_counts(sorted(tally.turns.items()))}",
        f"  language  {_counts(tally.languages.most_common())}",
    ]
    for name, counts, meanings in (("notes", tally.notes, NOTES), ("rejects", tally.reasons, REASONS)):
        for i, (code, n) in enumerate(sorted(counts.items(), key=lambda item: (-item[1], item[0]))):
            lines.append(f"  {name if i == 0 else '':<9} {n:>6} {code}: {meanings.get(code, 'noted by the file')}")
    return "\n".join(lines)


def describe_example(example: Example) -> str:
    """One example as a few short lines."""
    tools = ", ".join(tool["function"]["name"] for tool in example.tools)
    lines = [f"{example.id}  ({example.kind})", f"  tools      {shorten(tools, _WIDTH)}"]
    for message in example.messages[-3:]:
        calls = [_call(call["function"]) for call in message.get("tool_calls", ())]
        text = " ".join([message["content"], *calls]).strip()
        lines.append(f"  {message['role']:<10} {shorten(text, _WIDTH)}")
    said = [_call({"name": call.name, "arguments": call.arguments}) for call in example.answer] or [example.text]
    lines += [f"  -> answer  {shorten(text, _WIDTH)}" for text in said]
    return "\n".join(lines)


def _call(call: dict) -> str:
    return f"{call['name']} {json.dumps(call['arguments'], ensure_ascii=False)}"


def _counts(items: Iterable[tuple[object, int]]) -> str:
    return "  ".join(f"{key}: {n}" for key, n in items if n) or "none"
