"""Spoils a file a little: bytes anywhere, or values where it is JSON."""

import json
from random import Random
from typing import Any

# Values that programmers do not think of.
VALUES = (
    None, True, False, 0, -1, 3, 1.5, float("nan"), float("inf"), 1e300, 10**30, -(10**30), 2**31, 2**63, "", " ", "a",
    "<image>", "1.png", "..", "../x", "/etc/hostname", "\x00", "\ud800", "é" * 50, "a" * 5000, [], [1], ["a"], [None],
    [[]], {}, {"a": 1}, {"type": "image"}, {"from": "human"},
)  # fmt: skip
TEXTS = (b"{", b"[", b"]", b"}", b'"', b",", b":", b"null", b"NaN", b"-", b"1e999", b"\\ud800", b"\xff", b"\xc3",
         b"\x00", b"\n", b"{%", b"{{", b"%}", b"&a [*a]", b"!!python/name:os.system", b"9" * 40)  # fmt: skip


def spoil_value(value: Any, draw: Random, depth: int = 0) -> Any:
    """Returns a value of JSON with some of it replaced, left out, doubled or shuffled."""
    if depth and draw.random() < 0.06:
        return draw.choice(VALUES)
    if isinstance(value, dict):
        value = {key: spoil_value(inner, draw, depth + 1) for key, inner in value.items()}
        if value and draw.random() < 0.06:
            del value[draw.choice(list(value))]
        if value and draw.random() < 0.04:
            value[draw.choice([*value, "x"])] = draw.choice(VALUES)
    elif isinstance(value, list):
        value = [spoil_value(inner, draw, depth + 1) for inner in value]
        if draw.random() < 0.06:
            value.append(draw.choice([*VALUES, *value]))
        if draw.random() < 0.03:
            draw.shuffle(value)
    return value


def spoil_bytes(content: bytes, draw: Random) -> bytes:
    """Returns bytes with some of them changed, left out, inserted, doubled or cut off."""
    spoiled = bytearray(content)
    for _ in range(draw.choice((1, 1, 1, 2, 4, 16))):
        place = draw.randrange(len(spoiled) + 1)
        length = min(1 + int(draw.expovariate(0.2)), len(spoiled) - place)
        kind = draw.randrange(6)
        if kind == 0 and place < len(spoiled):
            spoiled[place] = draw.randrange(256)
        elif kind == 1 and place < len(spoiled):
            spoiled[place] ^= 1 << draw.randrange(8)
        elif kind == 2:
            del spoiled[place : place + length]
        elif kind == 3:
            spoiled[place:place] = draw.choice(TEXTS)
        elif kind == 4:
            spoiled[place:place] = spoiled[place : place + length] * draw.choice((1, 2, 50))
        elif draw.random() < 0.3:
            del spoiled[place:]
    return bytes(spoiled)


def spoil(content: bytes, draw: Random) -> bytes:
    """Returns a file with something wrong in it, now and then still right."""
    if content[:1] in (b"{", b"[") and draw.random() < 0.6:
        try:
            values = [json.loads(line) for line in content.splitlines()]
        except ValueError:
            values = None
        if values is not None:
            # Half of a surrogate pair is escaped.
            content = b"\n".join(json.dumps(spoil_value(value, draw)).encode() for value in values)
            if draw.random() < 0.8:
                return content
    return spoil_bytes(content, draw)
