"""Command line and presets: `--rl.lr 3e-4 --arm none --preset smoke` -> `TrainConfig`.

tyro reads the values and prints the help text. Before it runs, names and values are checked here, so that a
typing error is one line naming the nearest option. Lists may be separated by commas or blanks. Nothing heavy
is imported: the help text and every message appear at once.
"""

from __future__ import annotations

import contextlib
import copy
import difflib
import sys
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from autotool_fast import schema
from autotool_fast.config import TrainConfig, from_dict
from autotool_fast.errors import UserError

PRESETS = Path(__file__).parent / "presets"
PROGRAM = "python -m autotool_fast.train"
SHORT_FORMS = {"--model": "--model.path", "--data": "--data.path", "--environment": "--environment.kind"}


def parse(argv: Sequence[str] | None = None) -> TrainConfig:
    """Settings from `argv` (default: the process's); see `config.parse_args`."""
    import tyro

    options = _read_options(list(sys.argv[1:] if argv is None else argv))
    preset = next((values[0] for name, values in reversed(options) if name == "--preset"), "mini")
    arguments = [token for name, values in options for token in (name, *values)]
    return tyro.cli(TrainConfig, args=arguments, default=load_preset(preset, _named(options)), prog=PROGRAM)


def _named(options: list[tuple[str, list[str]]]) -> dict[str, Any]:
    """The options whose values are names (a model, data, stages), as nested settings."""
    known, named = _known_options(), {}
    for name, values in options:
        kind = known[name]
        items = typing.get_args(kind)[0] if typing.get_origin(kind) is tuple else kind
        if name == "--preset" or not (items is str or typing.get_origin(items) is typing.Literal):
            continue
        section, _, leaf = name.lstrip("-").replace("-", "_").rpartition(".")
        value = values if items is not kind else values[0]
        _lay(named, {section: {leaf: value}} if section else {leaf: value})
    return named


def load_preset(name: str, given: dict[str, Any] | None = None) -> TrainConfig:
    """The settings of a preset: a name in `presets/`, or the path of a .toml file.

    A preset may start from another with `extends = "name"`; its own settings come on top. One that needs `given`
    settings from outside (a model) to be valid has them.

    Raises:
        UserError: no such preset, invalid TOML, an unknown key, a bad value, or presets that extend each other.
    """
    path = _preset_path(name, "--preset")
    values: dict[str, Any] = {}
    for source, layer in reversed(_layers(path)):
        _lay(values, layer)
        try:
            config = from_dict({**values, "preset": name}, source=str(source))
        except UserError as error:
            if given:
                with contextlib.suppress(UserError):
                    whole = copy.deepcopy({**values, "preset": name})
                    _lay(whole, given)
                    config = from_dict(whole)
                    continue
            if error.where == str(source):
                raise
            raise UserError(f"{error.where}: {error.what}", where=str(source), remedy=error.remedy) from None
    return config


def preset_settings(name: str) -> dict[str, Any]:
    """What a preset and those it extends set, as nested dicts; not checked, and without the defaults.

    Raises:
        UserError: no such preset, invalid TOML, or presets that extend each other.
    """
    values: dict[str, Any] = {}
    for _, layer in reversed(_layers(_preset_path(name, "--preset"))):
        _lay(values, layer)
    return values


def _preset_path(name: str, where: str) -> Path:
    path = Path(name) if name.endswith(".toml") or "/" in name else PRESETS / f"{name}.toml"
    if path.parent == PRESETS and not path.is_file():
        names = sorted(p.stem for p in PRESETS.glob("*.toml"))
        guess = difflib.get_close_matches(name, names, n=1)
        choices = f"did you mean '{guess[0]}'?" if guess else f"use one of {', '.join(names)}, or a .toml file"
        raise UserError(f"no preset '{name}'", where=where, remedy=choices)
    return path


def _layers(path: Path) -> list[tuple[Path, dict[str, Any]]]:
    """A preset file and those it extends, nearest first, each with its own settings."""
    layers: list[tuple[Path, dict[str, Any]]] = []
    while True:
        values = _read_toml(path)
        if "preset" in values:
            remedy = "remove the key 'preset', or write extends = ..."
            raise UserError("a preset cannot name itself", where=str(path), remedy=remedy)
        parent = values.pop("extends", None)
        layers.append((path, values))
        if parent is None:
            return layers
        if not isinstance(parent, str):
            raise UserError("must be the name of a preset", where=f"{path}: extends")
        path = _preset_path(parent, f"{path}: extends")
        if path in [seen for seen, _ in layers]:
            raise UserError(f"goes round in circles at '{parent}'", where=f"{layers[-1][0]}: extends")


def _lay(values: dict[str, Any], layer: dict[str, Any]) -> None:
    """Put a layer's settings over `values`, section by section."""
    for key, value in layer.items():
        if isinstance(value, dict) and isinstance(values.get(key), dict):
            values[key] = {**values[key], **value}
        else:
            values[key] = value


def _read_toml(path: Path) -> dict[str, Any]:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        problem, remedy = f"cannot be read ({error.strerror})", "check --preset"
        raise UserError(problem, where=str(path), remedy=remedy) from None
    except ValueError as error:  # besides bad TOML: no UTF-8, a number with thousands of digits
        raise UserError(f"is not valid TOML: {error}", where=str(path)) from None
    except RecursionError:
        raise UserError("is not valid TOML: nested too deeply", where=str(path)) from None


def _read_options(argv: list[str]) -> list[tuple[str, list[str]]]:
    """Split `argv` into (option, its values), with every name and value checked and comma lists split.

    Raises:
        UserError: an unknown option, a value that does not fit, a value too many or too few.
    """
    known = _known_options()
    options: list[tuple[str, list[str]]] = []
    for token in argv:
        if token.startswith("-") and not _is_number(token):
            spelling, equals, value = token.partition("=")
            name = "--help" if spelling == "-h" else spelling.replace("_", "-")
            name = SHORT_FORMS.get(name, name)
            if name not in known:
                guess = schema.nearest(name.lstrip("-"), [n.lstrip("-") for n in known])
                remedy = f"did you mean --{guess}?" if guess else "see --help"
                raise UserError(f"unknown option {spelling}", remedy=remedy)
            options.append((name, []))
            token = value if equals else None
        if token is None:
            continue
        if not options:
            raise UserError(f"unexpected argument '{token}'", remedy="options start with --; see --help")
        name, values = options[-1]
        _take_value(name, values, token, known[name])
    for name, values in options:
        if known[name] is not bool and not values:
            raise UserError("needs a value", where=name)
    return options


def _take_value(name: str, values: list[str], token: str, hint: Any) -> None:
    """Append `token` to an option's `values`, if the option (of type `hint`) can take it."""
    is_list = typing.get_origin(hint) is tuple
    if hint is bool:
        raise UserError(f"unexpected argument '{token}'", remedy=f"{name} is a switch and takes no value")
    if values and not is_list:
        raise UserError(f"unexpected argument '{token}'", remedy=f"{name} takes one value")
    items = [item for item in token.split(",") if item] if is_list else [token]
    for item in items:
        schema.check_text(item, hint, name)
    values += items


def _known_options() -> dict[str, Any]:
    """Every option -> its type; a switch also has its `no-` form, spelled as tyro does."""
    known: dict[str, Any] = {"--help": bool}
    for path, hint in schema.leaf_paths(TrainConfig).items():
        parent, dot, leaf = path.replace("_", "-").rpartition(".")
        known[f"--{parent}{dot}{leaf}"] = hint
        if hint is bool:
            known[f"--{parent}{dot}no-{leaf}"] = hint
    return known


def _is_number(token: str) -> bool:
    try:
        float(token)
    except ValueError:
        return False
    return True
