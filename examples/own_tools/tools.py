"""Tools of a small shop: a calculator, and an inventory that every episode has to itself."""

from typing import Any, Literal


def setup(given: dict[str, Any] | None) -> dict[str, int]:
    """An episode's state: what is in stock, as its problem says."""
    return dict(given or {})


def calculate(left: float, operation: Literal["plus", "minus", "times"], right: float) -> float:
    """Compute with two numbers.

    Args:
        left: the first number
        operation: what to do with them
        right: the second number
    """
    results = {"plus": left + right, "minus": left - right, "times": left * right}
    return round(results[operation], 6)


def stock(state: dict[str, int], item: str) -> int:
    """How many of an item are in stock.

    Args:
        item: the item's name
    """
    return state[item]


def order(state: dict[str, int], item: str, count: int = 1) -> dict[str, Any]:
    """Order more of an item.

    Args:
        item: the item's name
        count: how many
    """
    if count < 1:
        raise ValueError("count must be at least 1")
    state[item] = state.get(item, 0) + count
    return {"item": item, "in stock": state[item]}


def score(state: dict[str, int], transcript: list[dict[str, Any]]) -> bool:
    """For problems that name neither calls nor an answer: nothing may be short in the end."""
    return min(state.values()) >= 3
