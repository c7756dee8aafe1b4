"""PubTool out of local data sets: read, de-duplicate, down-sample, split, and write with a manifest.

The result is a function of the input files' content and the settings: every choice is made by a hash of the record's
own text, never by reading order (which decides only which of two duplicates stays). Output files are whole or absent.
An index of some hundred bytes per record is kept in memory; the records themselves wait in a spool file.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import IO, Any

from autotool_fast import __version__
from autotool_fast.errors import UserError
from autotool_fast.files import sync, write_json
from autotool_fast.matching import canonical_calls
from autotool_fast.tasks.example import Example
from autotool_fast.tasks.inspection import Tally, read_counted
from autotool_fast.tasks.sources.load import Input, find_inputs
from autotool_fast.tasks.sources.names import with_safe_names
from autotool_fast.tasks.sources.rows import Reject

FORMAT = "autotool_fast.data/1"
PARTS = ("sft", "rl", "test")
_SUSPICIOUS = ("answer_misses_required", "answer_type_mismatch")
_SPACES = re.compile(r"\s+")
_FEW = 20  # items below which a share of rejects says nothing


@dataclass(frozen=True)
class Settings:
    """What to prepare.

    Attributes:
        inputs: files and folders.
        out: folder to write.
        source: see `load.find_inputs`.
        take: source -> most records to keep of it; sources left out are kept whole.
        sft: records for warm-up.
        rl: records for RL.
        test_share: share of questions held out, in [0, 1).
        seed: of the down-sampling; the split does not depend on it.
        names: "as-is", or "safe" for names that every chat endpoint accepts.
        schema_valid: leave out answers that do not fit their tool's schema.
        max_rejects: largest share of rejects in one file, in [0, 1].
        overwrite: replace a prepared folder.
    """

    inputs: tuple[Path, ...]
    out: Path
    source: str = "auto"
    take: Mapping[str, int] = field(default_factory=dict)
    sft: int = 8200
    rl: int = 21000
    test_share: float = 0.05
    seed: int = 0
    names: str = "as-is"
    schema_valid: bool = False
    max_rejects: float = 0.25
    overwrite: bool = False

    def __post_init__(self) -> None:
        for name in ("sft", "rl"):
            if getattr(self, name) < 0:
                raise UserError("must be at least 0", where=f"--{name}")
        if not self.sft + self.rl:
            raise UserError("one of --sft and --rl must be above 0", where="--sft")
        if not 0 <= self.test_share < 1:
            raise UserError("must be at least 0 and less than 1", where="--test-share")
        if not 0 <= self.max_rejects <= 1:
            raise UserError("must be from 0 to 1", where="--max-rejects")


@dataclass(frozen=True)
class _Entry:
    """A record in the spool file."""

    source: str
    offset: int
    test: bool
    question: bytes  # orders whole dialogues, so that one is not spread over the parts
    order: bytes


def normalise(text: str) -> str:
    """A text for comparison: case folded, white space joined."""
    return _SPACES.sub(" ", text).strip().casefold()


def question_key(example: Example) -> str:
    """The dialogue's first question; all turns of a dialogue, and all copies of it, share it."""
    return normalise(next(message["content"] for message in example.messages if message["role"] == "user"))


def duplicate_key(example: Example) -> bytes:
    """Digest of (normalised queries, tool names), and of how far the dialogue has come."""
    queries = [normalise(message["content"]) for message in example.messages if message["role"] == "user"]
    tools = sorted({tool["function"]["name"] for tool in example.tools})
    steps = sum(message["role"] in ("assistant", "tool") for message in example.messages)
    return _digest([queries, tools, steps])


def in_test(example: Example, share: float) -> bool:
    """Whether the dialogue is held out; a function of its first question alone."""
    return int.from_bytes(_digest(question_key(example))[:8], "big") < share * 2**64


def prepare(settings: Settings) -> dict[str, Any]:
    """Write the folder; returns its manifest.

    Raises:
        UserError: an output that must not be replaced, unusable inputs, or too many rejects (which are then kept in a
            file beside the output).
    """
    out = settings.out
    _check_output(settings)
    inputs = _find(settings)
    scratch = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir()
        manifest = _build(settings, inputs, scratch)
        _publish(scratch, out)
    except OSError as error:
        raise UserError(f"cannot be written ({error.strerror})", where=str(error.filename or out)) from None
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return manifest


def _check_output(settings: Settings) -> None:
    out = settings.out
    for path in settings.inputs:
        if out.resolve() in (path.resolve(), *path.resolve().parents):
            raise UserError("holds an input", where=str(out), remedy="write to another folder")
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not settings.overwrite:
        raise UserError("exists already", where=str(out), remedy="give --overwrite to replace it, or another --out")
    try:
        ours = json.loads((out / "manifest.json").read_text(encoding="utf-8")).get("format") == FORMAT
    except (OSError, ValueError, AttributeError):
        ours = False
    if not ours:
        remedy = "remove it yourself, or give another --out"
        raise UserError("was not written by prepare", where=str(out), remedy=remedy)


def _find(settings: Settings) -> list[Input]:
    inputs: list[Input] = []
    for path in settings.inputs:
        inputs += find_inputs(path, settings.source).inputs
    taken: dict[tuple[str, str], Path] = {}
    for item in inputs:
        other = taken.setdefault((item.source, item.label), item.path)
        if other != item.path:
            raise UserError(f"would give the same ids as {other}", where=str(item.path), remedy="rename one of them")
    return list({item.path: item for item in inputs}.values())


def _build(settings: Settings, inputs: list[Input], folder: Path) -> dict[str, Any]:
    entries: list[_Entry] = []
    seen: dict[bytes, bytes] = {}
    ids: set[bytes] = set()
    dropped: Counter[str] = Counter()
    described = []
    spool_path = folder / "spool"
    with spool_path.open("wb") as spool, (folder / "rejects.jsonl").open("w", encoding="utf-8") as rejects:
        for item in inputs:
            tally = Tally()
            for example in read_counted(item, tally):
                if isinstance(example, Reject):
                    rejects.write(json.dumps(example.to_json(), ensure_ascii=False) + "\n")
                    continue
                example = _accept(settings, example, seen, ids, dropped)
                if example is not None:
                    entries.append(_spool(settings, example, spool))
            if tally.reject_share > settings.max_rejects and tally.rejects + tally.records >= _FEW:
                rejects.flush()
                raise _too_many(settings, item, tally, folder)
            described.append({**_fingerprint(item.path), "source": item.source, **tally.to_json()})
    sources = {entry.source for entry in entries}
    for name in settings.take:
        if name not in sources:
            remedy = f"use {', '.join(sorted(sources)) or 'other data'}"
            raise UserError(f"no record has the source '{name}'", where="--take", remedy=remedy)
    kept = _down_sample(entries, settings.take)
    dropped["not_taken"] += len(entries) - len(kept)
    parts, unused = _share_out(kept, settings)
    dropped["not_needed"] += unused
    if not kept:
        raise UserError("no record is left", where=str(settings.inputs[0]), remedy="look at it with inspect")
    with spool_path.open("rb") as spool:
        outputs = {f"{part}.jsonl": _write(folder / f"{part}.jsonl", parts[part], spool) for part in PARTS}
    spool_path.unlink()
    options = {name: value for name, value in asdict(settings).items() if name not in ("inputs", "out", "overwrite")}
    manifest = {
        "format": FORMAT,
        "version": __version__,
        "settings": {**options, "take": dict(settings.take)},
        "inputs": described,
        "dropped": {name: n for name, n in sorted(dropped.items()) if n},
        "outputs": outputs,
    }
    write_json(folder / "manifest.json", manifest)
    return manifest


def _accept(
    settings: Settings, example: Example, seen: dict[bytes, bytes], ids: set[bytes], dropped: Counter[str]
) -> Example | None:
    """The example as it is to be written, or None when it is left out, which is counted."""
    if example.kind == "summary":
        dropped["summary"] += 1
        return None
    if settings.schema_valid and any(note in example.meta["notes"] for note in _SUSPICIOUS):
        dropped["schema_invalid"] += 1
        return None
    key = duplicate_key(example)
    answer = _digest(sorted(canonical_calls(example.answer).elements()))[:8]
    if key in seen:
        dropped["duplicate" if seen[key] == answer else "duplicate_with_another_answer"] += 1
        return None
    seen[key] = answer
    identity = _digest(example.id)[:8]
    if identity in ids:
        raise UserError(f"two different records have the id {example.id}", remedy="give records ids of their own")
    ids.add(identity)
    split = "test" if in_test(example, settings.test_share) else "train"
    example = replace(example, meta={**example.meta, "split": split})
    return with_safe_names(example) if settings.names == "safe" else example


def _spool(settings: Settings, example: Example, spool: IO[bytes]) -> _Entry:
    entry = _Entry(
        source=example.source,
        offset=spool.tell(),
        test=example.meta["split"] == "test",
        question=_digest([settings.seed, question_key(example)]),
        order=_digest([settings.seed, duplicate_key(example).hex()]),
    )
    spool.write(example.to_line().encode("utf-8"))
    return entry


def _down_sample(entries: list[_Entry], take: Mapping[str, int]) -> list[_Entry]:
    kept: list[_Entry] = []
    for source in sorted({entry.source for entry in entries}):
        own = sorted((entry for entry in entries if entry.source == source), key=lambda e: (e.question, e.order))
        kept += own[: take.get(source, len(own))]
    return kept


def _share_out(entries: list[_Entry], settings: Settings) -> tuple[dict[str, list[_Entry]], int]:
    """The parts, each in its final order, and how many records none of them needs.

    When there are fewer records than asked for, sft and rl get them in the ratio in which they were asked for.
    """
    train = sorted((entry for entry in entries if not entry.test), key=lambda e: (e.question, e.order))
    wanted = settings.sft + settings.rl
    sft = settings.sft if len(train) >= wanted else round(len(train) * settings.sft / wanted)
    rl = settings.rl if len(train) >= wanted else len(train) - sft
    parts = {"sft": train[:sft], "rl": train[sft : sft + rl], "test": [entry for entry in entries if entry.test]}
    parts = {name: sorted(members, key=lambda e: e.order) for name, members in parts.items()}
    return parts, len(train) - sft - rl


def _write(path: Path, entries: list[_Entry], spool: IO[bytes]) -> dict[str, Any]:
    digest = hashlib.sha256()
    sources: Counter[str] = Counter()
    kinds: Counter[str] = Counter()
    with path.open("wb") as file:
        for entry in entries:
            spool.seek(entry.offset)
            line = spool.readline()
            file.write(line)
            digest.update(line)
            sources[entry.source] += 1
            kinds["no_call" if json.loads(line)["no_call"] else "call"] += 1
    sync(path)
    return {
        "records": len(entries),
        "sources": dict(sorted(sources.items())),
        "kinds": dict(sorted(kinds.items())),
        "sha256": digest.hexdigest(),
    }


def _too_many(settings: Settings, item: Input, tally: Tally, folder: Path) -> UserError:
    kept = settings.out.with_name(settings.out.name + ".rejects.jsonl")
    os.replace(folder / "rejects.jsonl", kept)
    reason, count = tally.reasons.most_common(1)[0]
    return UserError(
        f"{tally.reject_share:.0%} of its records are rejected, most of them ({count}) for {reason}",
        where=str(item.path),
        remedy=f"see {kept}, or raise --max-rejects",
    )


def _fingerprint(path: Path) -> dict[str, Any]:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return {"file": str(path), "bytes": path.stat().st_size, "sha256": digest.hexdigest()}


def _publish(folder: Path, out: Path) -> None:
    """Put the finished folder in the place of `out`; between the two renames the old one is hidden beside it."""
    sync(folder)
    old = out.with_name(f".{out.name}.{os.getpid()}.old")
    if out.exists():
        os.replace(out, old)
    os.replace(folder, out)
    sync(out.parent)
    shutil.rmtree(old, ignore_errors=True)


def _digest(value: Any) -> bytes:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).digest()[:16]
