"""What runs beside API-Bank's own tools (see `worker`): a call executed on fresh databases and judged by the tool.

Its modules read files relative to their folder and import packages for translation and search that need a network;
those have stand-ins, and a call that needs one fails.
"""

import importlib
import importlib.abc
import importlib.machinery
import json
import os
import sys
import types

_ABSENT = ("googletrans", "nltk", "rank_bm25", "requests", "rouge", "sentence_transformers", "tqdm")


class _Anything:
    """Every attribute and call gives another one: enough to import with, and no result equals an expected one."""

    def __init__(self, *_, **__):
        pass

    def __call__(self, *_, **__):
        return _Anything()

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return _Anything()


class _StandIns(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds the absent packages and their modules; last on the path, so that installed ones win."""

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in _ABSENT:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        module = types.ModuleType(spec.name)
        module.__getattr__ = _Anything().__getattr__
        return module

    def exec_module(self, module):
        pass


def load(folder):
    """Import the tools; returns (operations, facts)."""
    os.chdir(folder)
    sys.path.insert(0, folder)
    sys.meta_path.append(_StandIns())
    manager = importlib.import_module("tool_manager").ToolManager
    return {"check": lambda name, arguments, expected: check(manager, name, arguments, expected)}, {}


def check(manager, name, arguments, expected):
    """Whether a call's result counts as the expected result, by the tool's own rule.

    Arguments are passed as the text a model writes in API-Bank's format; lists as JSON.
    """
    tools = manager()
    written = {
        key: str(value) if isinstance(value, (str, bool)) else json.dumps(value) for key, value in arguments.items()
    }
    result = tools.api_call(name, **written)
    return bool(tools.init_tool(name).check_api_call_correctness(result, expected))
