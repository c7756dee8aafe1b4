"""Data stays data: text of users, tools and descriptions cannot become control tokens.

A chat template mixes its own markup with strings from outside. Before it runs, every control text in those strings
(`<|im_end|>`, `</tool_response>`, ...) is covered by a private-use character; after it ran, control text still in sight
is the template's own. Stretches with covered text are then encoded without matching any added token.

Guarantees: text without control text gets exactly the ids of encoding the whole at once; control text in data is made
of ordinary tokens, in the ids that the tokenizer's model gives the whole stretch between two control tokens. Decoding
the ids gives back the text in both cases. What is rendered, and by which template, is left to `rendering`.
"""

from __future__ import annotations

import re
from functools import cached_property
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_FIRST_COVER = 0xF0000  # a private-use plane: JSON, trimming and templates leave it alone
_TEMPLATE_MARKUP = re.compile(r"<\|[^<>|\s]+\|>")
_SURROGATE = re.compile("[\ud800-\udfff]")  # half a pair: no tokenizer takes it
_NOTHING = re.compile(r"(?!)")


def _any_of(texts: list[str]) -> re.Pattern[str]:
    longest_first = sorted(texts, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first))) if texts else _NOTHING


def _strings(value: Any) -> list[str]:
    """Every string in a JSON value, keys included."""
    found, pending = [], [value]
    while pending:
        item = pending.pop()
        if isinstance(item, str):
            found.append(item)
        elif isinstance(item, dict):
            pending += item.keys()
            pending += item.values()
        elif isinstance(item, (list, tuple)):
            pending += item
    return found


class DataGuard:
    """Covers control text in data and encodes what was rendered from it.

    Control texts are the tokenizer's special tokens, `<|...|>` markup in the template, and those of `tags` or of the
    template's text that are single added tokens.

    Args:
        tokenizer: a Hugging Face tokenizer.
        template: the text of its chat template.
        tags: tags of the reply format.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: str, tags: tuple[str, ...]) -> None:
        self._tokenizer = tokenizer
        added = [token for token in tokenizer.added_tokens_decoder.values() if len(token.content.strip()) > 1]
        special = {token.content for token in added if token.special} | set(_TEMPLATE_MARKUP.findall(template))
        markup = {token.content for token in added if token.content in template or token.content in tags} - special
        self._texts = sorted(special) + sorted(markup)
        self._covers = {text: chr(_FIRST_COVER + i) for i, text in enumerate(self._texts)}
        self._escape = chr(_FIRST_COVER + len(self._texts))
        reserved = f"[{chr(_FIRST_COVER)}-{self._escape}]"
        self._reserved = re.compile(f"{self._escape}({reserved})|{reserved}")
        self._special = re.compile(f"{_any_of(sorted(special)).pattern}|{reserved}")
        self._control = re.compile(f"{_any_of(self._texts).pattern}|{reserved}")
        self._suspect = re.compile(f"{self._control.pattern}|{_SURROGATE.pattern}")

    def cover(self, value: Any, *, keep_tags: bool = False) -> Any:
        """`value` (any JSON value) with the control text in its strings and keys covered.

        `keep_tags` covers special tokens alone: in a reply, the tags are the format's own.
        """
        if not self._suspect.search("\n".join(_strings(value))):
            return value
        return self._cover_in(value, self._special if keep_tags else self._control)

    def _cover_in(self, value: Any, pattern: re.Pattern[str]) -> Any:
        if isinstance(value, str):
            return pattern.sub(self._cover, _SURROGATE.sub("\ufffd", value))
        if isinstance(value, dict):
            return {self._cover_in(key, pattern): self._cover_in(item, pattern) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [self._cover_in(item, pattern) for item in value]
        return value

    def _cover(self, match: re.Match[str]) -> str:
        return self._covers.get(match.group()) or self._escape + match.group()

    def reveal(self, text: str) -> str:
        """The text as it was before covering."""
        return self._reserved.sub(lambda m: m.group(1) or self._texts[ord(m.group()) - _FIRST_COVER], text)

    def encode(self, text: str) -> list[int]:
        """Token ids of rendered text, control text that is still covered as ordinary tokens."""
        if not self._holds_covers(text):
            return self._encode(self.reveal(text))
        ids: list[int] = []
        run = ""
        for piece in self._markup.split(text):
            if self._holds_covers(piece):
                ids += self._encode(run) + self._encode_inert(self.reveal(piece))
                run = ""
            else:
                run += self.reveal(piece)
        return ids + self._encode(run)

    def _holds_covers(self, text: str) -> bool:
        return any(not match.group(1) for match in self._reserved.finditer(text))

    def _encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False) if text else []

    @cached_property
    def _control_words(self) -> dict[str, int]:
        """Every word of the vocabulary that holds a control text (a word-level one may add a role to it)."""
        control = _any_of(self._texts)
        return {word: index for word, index in self._tokenizer.get_vocab().items() if control.search(word)}

    @cached_property
    def _control_ids(self) -> frozenset[int]:
        return frozenset(self._control_words.values()) - {self._tokenizer.unk_token_id}

    @cached_property
    def _markup(self) -> re.Pattern[str]:
        return re.compile(f"({_any_of([*self._texts, *self._control_words]).pattern})")

    def _encode_inert(self, text: str) -> list[int]:
        """Ids of text in which nothing is control text."""
        ids = self._encode_without_added(text)
        hit = _any_of(self._texts).search(text)
        if hit is None or self._control_ids.isdisjoint(ids):
            return ids
        cut = hit.start() + 1  # a word-level vocabulary may hold the control text as a word: break the word
        return self._encode_inert(text[:cut]) + self._encode_inert(text[cut:])

    def _encode_without_added(self, text: str) -> list[int]:
        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        if backend is None:
            return self._tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
        if backend.normalizer is not None:
            text = backend.normalizer.normalize_str(text)
        words = [text]
        if backend.pre_tokenizer is not None:
            words = [word for word, _ in backend.pre_tokenizer.pre_tokenize_str(text)]
        return [token.id for word in words for token in backend.model.tokenize(word)]
