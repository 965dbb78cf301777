"""Broken variants of a file: bytes that are flipped, lost, repeated or spelt, and JSON whose parts are replaced, lost or moved."""

import json
import random
from collections.abc import Sequence
from typing import Any

TOKENS = [
    *(b"null", b"NaN", b"Infinity", b"-1e999", b"1e999", b"true", b"9" * 5000, b"-0", b"0x10", b'"', b"'", b"\\", b"\\u0000", b"\\ud800"),
    *(
        b"\x00",
        b"\xff\xfe",
        b"\xef\xbb\xbf",
        b"\r\n",
        b"\n\n",
        b"\xe2\x80\xa8",
        b"\t",
        b"[",
        b"]",
        b"{",
        b"}",
        b"[" * 3000,
        b'{"a":' * 1500,
    ),
    *(
        b"- ",
        b": ",
        b"? ",
        b"&a [*a]",
        b"*a",
        b"<<: *a",
        b"!!python/object:os.system",
        b"2026-11-27",
        b"1:30",
        b"yes",
        b"|",
        b">-",
        b"%YAML 9",
    ),
    *(b",", b'""', b"''", b"{question}", b"{reply}", b"ANSWER: ", b"4 or 5", b"</think>", b"<think>", b"{{", b"}}", b"{%", b"%}"),
    *(b"{% for m in messages %}", b"{% endfor %}", b"m.content", b"m['x']", b" or 1/0", b"|tojson", b".__class__", b" ~ messages"),
]
VALUES: list[Any] = [
    *(
        None,
        True,
        False,
        0,
        -1,
        1,
        7,
        2**31,
        2**63,
        -(2**70),
        10**400,
        0.5,
        -0.0,
        1e308,
        float("nan"),
        float("inf"),
        "",
        " ",
        "x",
        "5",
        "NaN",
    ),
    *("\ud800", "\u202e", "\x00", "a\nb", "true", "/", "../..", "[" * 50, "word " * 400, "é", "\U0001f600"),
    *(
        [],
        {},
        [None],
        [[]],
        [{}],
        {"": None},
        {"a": {"a": {"a": []}}},
        ["x", 1, None],
        [1, 2, 3],
        [0.5, "x"],
        {"text": "x", "type": "text"},
    ),
    *({"role": "user", "content": "x"}, [{"role": "assistant", "content": None}], {"parts": ["x"], "content_type": "text"}),
]


class Mutator:
    """Draws variants of seeds, the same ones for the same seed of its own."""

    def __init__(self, seeds: Sequence[bytes], seed: int, *, structured: bool) -> None:
        self.seeds, self.draw = list(seeds), random.Random(seed)
        self.values = [_values_in(text) for text in seeds] if structured else []

    def __call__(self) -> bytes:
        """One variant; of structured seeds (JSON, or JSON lines) half are changed as bytes and half as values, some both ways."""
        text = self.draw.choice(self.seeds)
        if self.values and self.draw.random() < 0.7:
            text = self._values_changed()
            if self.draw.random() < 0.8:
                return text
        for _ in range(self.draw.choice((1, 1, 1, 2, 3, 8))):
            text = self._bytes_changed(text)
        return text

    def _bytes_changed(self, text: bytes) -> bytes:
        draw = self.draw
        start = draw.randint(0, len(text))
        end = min(len(text), start + draw.choice((0, 1, 1, 2, 4, 16, 200)))
        kind = draw.randrange(7)
        if kind == 0 and start < len(text):
            return text[:start] + bytes([text[start] ^ (1 << draw.randrange(8))]) + text[start + 1 :]
        if kind == 1:
            return text[:start] + text[end:]
        if kind == 2:
            return text[:start] + text[start:end] * draw.choice((2, 3, 50)) + text[end:]
        if kind == 3:
            return text[:start]
        if kind == 4:
            other = draw.choice(self.seeds)
            return text[:start] + other[draw.randint(0, len(other)) :]
        if kind == 5:
            return text[:start] + bytes(draw.randrange(256) for _ in range(draw.randint(1, 6))) + text[end:]
        return text[:start] + draw.choice(TOKENS) + text[end:]

    def _values_changed(self) -> bytes:
        lines = list(self.draw.choice(self.values))
        for _ in range(self.draw.choice((1, 1, 2, 4))):
            index = self.draw.randrange(len(lines))
            lines[index] = self._value_changed(lines[index])
        if self.draw.random() < 0.05:
            lines.append(self.draw.choice(lines))
        return "\n".join(json.dumps(line) for line in lines).encode()

    def _value_changed(self, value: Any) -> Any:
        """The value with one node of it replaced, lost, repeated, renamed or exchanged."""
        draw = self.draw
        if not isinstance(value, (dict, list)) or not value or draw.random() < 0.15:
            return draw.choice(VALUES)
        keys: list[Any] = list(value) if isinstance(value, dict) else list(range(len(value)))
        key, other, kind = draw.choice(keys), draw.choice(keys), draw.randrange(8)
        changed: Any = dict(value) if isinstance(value, dict) else list(value)
        if kind == 0:
            del changed[key]
        elif kind == 1:
            changed[key], changed[other] = changed[other], changed[key]
        elif kind == 2 and isinstance(changed, list):
            changed.insert(key, changed[other])
        elif kind == 2:
            changed[draw.choice(("x", "", "id", "system", key.upper(), "\x00"))] = changed.pop(key)
        elif kind == 3:
            changed[key] = draw.choice(VALUES)
        else:
            changed[key] = self._value_changed(changed[key])
        return changed


def _values_in(text: bytes) -> list[Any]:
    """The one value of a JSON file, or those of its lines."""
    try:
        return [json.loads(text)]
    except ValueError:
        return [json.loads(line) for line in text.splitlines()]
