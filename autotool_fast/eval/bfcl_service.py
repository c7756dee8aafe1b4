"""What runs beside BFCL's own code (see `worker`): its data loader, its checkers, its simulators.

Calls arrive as parsed JSON and are rebuilt here as `name(key=literal)`, with the name out of the entry's own functions
and keys that are identifiers: BFCL evaluates such strings, so nothing else may reach it.
"""

import importlib
import json
import keyword
import os
import sys
import types

UNKNOWN_CALL = "unknown_function()"  # raises NameError inside BFCL, as any unknown name does

_LANGUAGES = {"simple_java": "JAVA", "simple_javascript": "JAVASCRIPT"}


def load(folder):
    """Put `folder` on the path and import the package; returns (operations, facts)."""
    os.environ["BFCL_PROJECT_ROOT"] = os.getcwd()  # the package makes folders there when it is imported
    sys.path.insert(0, folder)
    _stub_model_registry()
    for name in ("ast_checker", "multi_turn_checker", "multi_turn_utils", "utils", "default_prompts", "enums"):
        module(name)
    for path in module("executable_backend_config").CLASS_FILE_PATH_MAPPING.values():
        if not any(word in path for word in ("memory", "web_search")):
            importlib.import_module(path)  # before the fork, so that sessions start at once
    prompts = module("default_prompts")
    facts = {
        "step_limit": prompts.MAXIMUM_STEP_LIMIT,
        "added_functions_prompt": prompts.DEFAULT_USER_PROMPT_FOR_ADDITIONAL_FUNCTION_PROMPTING,
        "added_functions_note": prompts.DEFAULT_USER_PROMPT_FOR_ADDITIONAL_FUNCTION_FC,
    }
    simulation = Simulation()
    operations = {"entries": entries, "check_calls": check_calls, "check_turns": check_turns}
    operations.update(start=simulation.start, execute=simulation.execute)
    return operations, facts


_PLACES = {
    "ast_checker": "bfcl_eval.eval_checker.ast_eval.ast_checker",
    "multi_turn_checker": "bfcl_eval.eval_checker.multi_turn_eval.multi_turn_checker",
    "multi_turn_utils": "bfcl_eval.eval_checker.multi_turn_eval.multi_turn_utils",
    "utils": "bfcl_eval.utils",
    "default_prompts": "bfcl_eval.constants.default_prompts",
    "enums": "bfcl_eval.constants.enums",
    "executable_backend_config": "bfcl_eval.constants.executable_backend_config",
}


def module(name):
    """One of the package's modules, by the last part of its name."""
    return importlib.import_module(_PLACES[name])


def _stub_model_registry():
    """Stand in for the one module that imports every vendor's SDK; the checkers ask it about dots in names only."""

    class Settings:
        underscore_to_dot = False

    class Registry(dict):
        def __missing__(self, name):
            return Settings()

    stub = types.ModuleType("bfcl_eval.constants.model_config")
    stub.MODEL_CONFIG_MAPPING = Registry()
    sys.modules[stub.__name__] = stub


def entries(category):
    """The prompts of a category with their answers: `entry` as a model sees it, `functions` as the checker does.

    The checker of multi-turn entries asks for no functions, so they have none.
    """
    utils = module("utils")
    shown = utils.load_dataset_entry(category, include_prereq=False)
    functions = [None] * len(shown)
    if "multi_turn" not in category:
        plain = utils.load_dataset_entry(category, include_prereq=False, include_language_specific_hint=False)
        functions = [entry["function"] for entry in plain]
    answers = [None] * len(shown)
    if "relevance" not in category:
        answers = [answer["ground_truth"] for answer in utils.load_ground_truth_entry(category)]
    return [
        {"entry": entry, "functions": typed, "answer": answer}
        for entry, typed, answer in zip(shown, functions, answers, strict=True)
    ]


def check_calls(category, functions, calls, answer):
    """BFCL's verdict on single-turn calls `[[name, arguments], ...]`."""
    language = getattr(module("enums").Language, _LANGUAGES.get(category, "PYTHON"))
    made = [{name: arguments} for name, arguments in calls]
    verdict = module("ast_checker").ast_checker(functions, made, answer, language, category, "policy")
    reason = None if verdict["valid"] else verdict.get("error_type")
    return {"valid": verdict["valid"], "reason": reason, "error": str(verdict.get("error", ""))[:500]}


def call_text(name, arguments, known):
    """A call as the Python text that BFCL runs: literals only."""
    if name not in known or not all(key.isidentifier() and not keyword.iskeyword(key) for key in arguments):
        return UNKNOWN_CALL
    return f"{name}({', '.join(f'{key}={value!r}' for key, value in arguments.items())})"


class Simulation:
    """The simulators of this process's one episode."""

    def __init__(self):
        self.entry, self.known = None, frozenset()

    def start(self, entry, known):
        """Make the classes of an entry; `known` are the names that may be called."""
        self.entry, self.known = entry, frozenset(known)
        self.execute([])

    def execute(self, calls):
        """Run `[[name, arguments], ...]`; one result text each."""
        results, _ = module("multi_turn_utils").execute_multi_turn_func_call(
            func_call_list=[call_text(name, arguments, self.known) for name, arguments in calls],
            initial_config=self.entry["initial_config"],
            involved_classes=self.entry["involved_classes"],
            model_name=f"episode_{os.getpid()}",
            test_entry_id=self.entry["id"],
            long_context="long_context" in self.entry["id"],
            is_evaL_run=False,
        )
        return results


def check_turns(entry, known, turns, answer):
    """BFCL's verdict on `turns[turn][step] = [[name, arguments], ...]`, every turn given."""
    known = frozenset(known)
    made = [[[call_text(n, a, known) for n, a in step] for step in turn if step] for turn in turns]
    checker = module("multi_turn_checker")
    name = f"check_{os.getpid()}"
    verdict = checker.multi_turn_checker(made, answer, entry, entry["id"].rsplit("_", 1)[0], name)
    if verdict["valid"] and hasattr(checker, "multi_turn_irrelevance_checker"):
        strict = checker.multi_turn_irrelevance_checker(made, answer)["valid"]
    else:
        strict = verdict["valid"]
    return {
        "valid": verdict["valid"],
        "quiet": strict,
        "reason": None if verdict["valid"] else verdict.get("error_type"),
        "error": json.dumps(verdict.get("error_message", ""))[:500],
    }
