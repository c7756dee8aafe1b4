"""Training data that a small model learns in seconds: requests to switch a lamp, in the shape of three data sets."""

from __future__ import annotations

import json
from pathlib import Path

LAMPS = ("red", "blue", "green", "pink", "white", "black")
TOOL = {
    "name": "switch",
    "description": "A lamp.",
    "parameters": {"type": "object", "properties": {"lamp": {"type": "string"}}, "required": ["lamp"]},
}
FORM = '{"name": "switch", "arguments": {"lamp": "%s"}}'


def write_lamp_data(folder: Path) -> list[str]:
    """Files of the three kinds; returns them. Two requests in seven are none that the tool can serve."""
    toolace, xlam, hermes = [], [], []
    for number, lamp in enumerate(LAMPS):
        system = f"Here is a list of functions in JSON format that you can invoke:\n{json.dumps([TOOL])}"
        for words in ("Switch {} on.", "Please switch {}."):
            asked, made = words.format(lamp), f'[switch(lamp="{lamp}")]'
            talk = [{"from": "user", "value": asked}, {"from": "assistant", "value": made}]
            toolace.append({"system": system, "conversations": talk})
        for words, answer in (("Light {}.", [json.loads(FORM % lamp)]), ("Who is {}?", []), ("Is {} nice?", [])):
            row = {"query": words.format(lamp), "answers": json.dumps(answer), "tools": json.dumps([TOOL])}
            xlam.append({"id": len(xlam), **row})
        for words in ("Lamp {} on!", "Now {} please."):
            told = f"Tools: <tools>\n{json.dumps([{'type': 'function', 'function': TOOL}])}\n</tools>"
            said = {"human": words.format(lamp), "gpt": f"<tool_call>\n{FORM % lamp}\n</tool_call>"}
            talk = [{"from": who, "value": text} for who, text in {"system": told, **said}.items()]
            rest = dict.fromkeys(("category", "subcategory", "task"), "")
            hermes.append({"id": f"{number}-{words}", "conversations": talk, **rest})
    files = []
    for name, rows in (("data", toolace), ("xlam", xlam), ("func-calling", hermes)):
        files.append(folder / f"{name}.json")
        files[-1].write_text(json.dumps(rows))
    return [str(file) for file in files]


def corpus() -> list[str]:
    """Texts whose words the prompts and replies are made of."""
    words = ("Switch on.", "Please switch.", "Light", "Who is?", "Is nice?", "Lamp on!", "Now please.")
    replies = [FORM % lamp for lamp in LAMPS] + ["None of the tools on offer can do this."]
    return [*words, *(f" {lamp}" for lamp in LAMPS), *replies, json.dumps(TOOL)]
