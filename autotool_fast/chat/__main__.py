"""`python -m autotool_fast.chat --checkpoint DIR`: talk to a trained model in the terminal.

The command line and the tools file are checked before torch is loaded. What the user can fix is one line on stderr and
exit code 2; Ctrl-D leaves with 0, Ctrl-C with 130. With `--prompt` the exit code is 1 when the reply is malformed.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from autotool_fast.chat.formats import FORMAT_NAMES, FORMATS
from autotool_fast.chat.reply import MODES
from autotool_fast.errors import UserError, readers_may_leave

WORLD = "world"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(message, remedy="see --help")


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = _Parser(
        prog="python -m autotool_fast.chat",
        description="Talk to a trained model: shows the mode it chose, its thinking, its calls and the tools' answers.",
        epilog="In the chat, /new starts a new conversation and Ctrl-D leaves.",
    )
    parser.add_argument(
        "--checkpoint", metavar="DIR", type=Path, required=True, help="model folder, such as runs/mini/models/rl"
    )
    parser.add_argument("--mode", choices=("auto", *MODES), default="auto", help="auto: the model chooses (default)")
    parser.add_argument(
        "--tools",
        metavar="FILE",
        help=f"JSON list of tool schemas, whose answers you type; '{WORLD}' for the embedded world's tools, which are "
        "executed (default for the embedded model, otherwise no tools)",
    )
    parser.add_argument("--prompt", metavar="TEXT", help="one request, then leave; for scripts")
    parser.add_argument("--system", metavar="TEXT", help="system message")
    parser.add_argument("--max-new-tokens", metavar="N", type=_positive, default=1024, help="of one reply (1024)")
    parser.add_argument("--context", metavar="N", type=_positive, default=8192, help="most tokens of all turns (8192)")
    parser.add_argument("--temperature", metavar="T", type=_temperature, default=0.0, help="0 is greedy (default)")
    parser.add_argument("--seed", metavar="N", type=int, default=0, help="of the sampling")
    parser.add_argument("--chat-format", metavar="NAME", default="auto", help=f"auto (default), {', '.join(FORMATS)}")
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return value


def _temperature(text: str) -> float:
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError("must be a number of at least 0")
    return value


def find_model(checkpoint: Path) -> Path:
    """The model folder that `checkpoint` is, or holds as `model/`.

    Raises:
        UserError: there is none.
    """
    for folder in (checkpoint, checkpoint / "model"):
        if (folder / "config.json").is_file() and not (folder / "models").is_dir():
            return folder
    if not checkpoint.is_dir():
        raise UserError("there is no such folder", where=str(checkpoint), remedy="check --checkpoint")
    models = sorted(path.parent for path in checkpoint.glob("models/*/config.json"))
    remedy = f"give one of its models, such as {models[-1]}" if models else "give a folder with config.json"
    raise UserError("holds no model", where=str(checkpoint), remedy=remedy)


def read_tools(path: Path) -> list[dict]:
    """Tool schemas from a JSON file, in the form chat templates take.

    Takes a list of `{"type": "function", "function": {...}}` or of the inner objects.

    Raises:
        UserError: the file cannot be read, is not such a list, or names a tool twice.
    """
    where = str(path)
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot be read ({error.strerror})", where=where, remedy="check --tools") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"is not valid JSON ({error})", where=where) from None
    if not isinstance(entries, list):
        raise UserError("is not a JSON list of tool schemas", where=where)
    tools: list[dict] = []
    for number, entry in enumerate(entries, 1):
        function = entry.get("function", entry) if isinstance(entry, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
            raise UserError(f"entry {number} has no tool name", where=where, remedy="give each a 'name'")
        if not isinstance(function.get("parameters", {}), dict):
            raise UserError(f"the parameters of {function['name']!r} are not a JSON schema", where=where)
        if any(tool["function"]["name"] == function["name"] for tool in tools):
            raise UserError(f"the tool {function['name']!r} is there twice", where=where)
        tools.append({"type": "function", "function": {"description": "", "parameters": {}, **function}})
    return tools


@readers_may_leave
def main(argv: Sequence[str] | None = None) -> int:
    """Run the chat; returns the exit code."""
    try:
        options = build_parser().parse_args(argv)
        if options.chat_format not in FORMAT_NAMES:
            problem = f"no chat format {options.chat_format!r}"
            raise UserError(problem, where="--chat-format", remedy=f"choose from {', '.join(FORMAT_NAMES)}")
        options.model = find_model(options.checkpoint)
        options.schemas = read_tools(Path(options.tools)) if options.tools not in (None, WORLD) else None

        from autotool_fast.chat.terminal import run

        return run(options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except EOFError:
        print()
        return 0
    except KeyboardInterrupt:
        print()
        return 130


if __name__ == "__main__":
    sys.exit(main())
