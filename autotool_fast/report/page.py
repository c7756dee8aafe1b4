"""From a template and its values to a self-contained HTML file.

Guarantees: no external resource; a Content-Security-Policy in the page allows only its own style sheet and script, by
hash; values are escaped unless a template says otherwise; a file is replaced in one step.
"""

from __future__ import annotations

import base64
import hashlib
import os
from datetime import datetime, timezone
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2

from autotool_fast.errors import UserError


def fill(template: str, **values: Any) -> str:
    """The page that `template` (a file beside this one) makes of the values."""
    css, script = _asset("style.css"), _asset("script.js")
    return (
        _environment()
        .get_template(template)
        .render(
            css=css,
            css_hash=_csp_hash(css),
            script=script,
            script_hash=_csp_hash(script),
            written=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
            **values,
        )
    )


def write_page(path: Path, page: str) -> Path:
    """Replace `path` by the page.

    Raises:
        UserError: it cannot be written there.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        # "replace": a token may hold half a surrogate pair, which UTF-8 cannot encode
        temporary.write_bytes(page.encode("utf-8", "replace"))
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UserError(
            f"cannot write the report: {error.strerror or error}",
            where=str(path),
            remedy="check the folder, its permissions and its free space, or choose another file with --out",
        ) from error
    return path


@cache
def _asset(name: str) -> str:
    return resources.files("autotool_fast.report").joinpath(name).read_text(encoding="utf-8")


@cache
def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.FunctionLoader(_asset),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _csp_hash(text: str) -> str:
    return "'sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() + "'"
