"""What runs beside ACEBench's own code (see `worker`): its checkers and the simulators of multi-step tasks.

Calls arrive as parsed JSON. Simulators are called directly, methods by name with keyword arguments; no text is
evaluated.
"""

import ast
import importlib
import os
import sys


def load(folder):
    """Import the checkers; returns (operations, facts)."""
    sys.path.insert(0, folder)
    module("checker")
    source = os.path.join(folder, "model_inference", "apimodel_inference.py")
    simulation = Simulation(constants(source)["SAVED_CLASS"])
    prompts = {}
    for language in ("en", "zh"):
        path = os.path.join(folder, "model_inference", f"prompt_{language}.py")
        prompts[language] = constants(path).get(f"SYSTEM_PROMPT_FOR_SPECIAL_DATA_{language.upper()}", "")
    operations = {
        "check_normal": check_normal,
        "check_state": check_state,
        "start": simulation.start,
        "execute": simulation.execute,
        "state": simulation.state,
    }
    return operations, {"special_prompts": prompts}


_PLACES = {
    "checker": "model_eval.checker",
    "simulators": "model_inference.multi_step.multi_step_utils",
}


def module(name):
    """One of the checkout's modules."""
    return importlib.import_module(_PLACES[name])


def constants(path):
    """Top-level literals of a Python file, which is not run."""
    with open(path, encoding="utf-8") as file:
        tree = ast.parse(file.read())
    found = {}
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            try:
                found[node.targets[0].id] = ast.literal_eval(node.value)
            except ValueError:
                continue
    return found


def check_normal(category, functions, calls, answers, question):
    """Whether the calls pass ACEBench's checker for one of the accepted answers."""
    verdict = {"valid": False}
    for answer in answers:
        made = [{name: arguments} for name, arguments in calls]
        try:
            verdict = module("checker").normal_checker(functions, made, answer, question, category)
        except (KeyError, TypeError, AttributeError, IndexError) as error:
            # The checker indexes into what it was given; calls of an unexpected shape are wrong calls.
            verdict = {"valid": False, "error": repr(error), "error_type": "checker_raised"}
        if verdict["valid"]:
            break
    error = str(verdict.get("error", ""))[:500]
    return {"valid": verdict["valid"], "reason": verdict.get("error_type"), "error": error}


def check_state(state, expected):
    """Whether the objects' state is the expected one, class by class."""
    if len(state) != len(expected):
        return {"valid": False, "reason": "wrong_classes", "error": ""}
    for wanted in expected:
        for made in state:
            if set(made) == set(wanted):
                verdict = module("checker").agent_checker(made, wanted)
                if not verdict["valid"]:
                    return {"valid": False, "reason": "wrong_state", "error": str(verdict["error"])[:500]}
                break
    return {"valid": True, "reason": None, "error": ""}


class Simulation:
    """The simulators of this process's one episode."""

    def __init__(self, saved):
        self.saved, self.objects, self.ran = saved, {}, False

    def start(self, classes, config, language):
        """Make the objects of an entry."""
        simulators = module("simulators")
        paths = getattr(simulators, f"CLASS_FILE_PATH_MAPPING_{language.upper()}")
        for name in classes:
            made = getattr(importlib.import_module(paths[name]), name)()
            for part in (config.get(name, {}), config.get("BaseApi", {})):
                made._load_scenario(part, long_context=False)
            self.objects[name] = made

    def execute(self, name, arguments):
        """Call the method on every object that has it, as ACEBench does; the last one's result."""
        owners = [] if name.startswith("_") else [o for o in self.objects.values() if callable(getattr(o, name, None))]
        self.ran = True
        if not owners:
            return f"Error during execution: name '{name}' is not defined"
        try:
            for owner in owners:
                result = getattr(owner, name)(**arguments)
        except Exception as error:
            return f"Error during execution: {error}"
        return result

    def state(self):
        """The attributes that are compared, class by class; nothing if no call was made."""
        if not self.ran:
            return []
        return [
            {name: {key: value for key, value in vars(made).items() if key in self.saved[name]}}
            for name, made in self.objects.items()
        ]
