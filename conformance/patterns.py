"""Bytes to write and to look for, and words for where they differ."""

from __future__ import annotations

import random

GUARD = 0xAA
"""What targets are filled with. No pattern contains it: a byte that still has it was not written."""

SEAL = 0x5C
"""What is put over bytes that nothing may write to any more. No pattern contains it either."""

_CLEAN = bytes(0x55 if byte in (GUARD, SEAL) else byte for byte in range(256))


def pattern(seed: object, nbytes: int) -> bytes:
    """`nbytes` random bytes, the same for the same seed, without GUARD and SEAL."""
    return random.Random(str(seed)).randbytes(nbytes).translate(_CLEAN)


def difference(found: bytes | memoryview, expected: bytes | memoryview, start: int = 0) -> str:
    """Where two pieces of the same length differ first, in words; empty where they do not.

    `start`: the offset of the first byte, for the words.
    """
    found, expected = bytes(found), bytes(expected)  # to compare a memoryview takes ten times as long
    if found == expected:
        return ""
    if len(found) != len(expected):
        return f"{len(found)} bytes instead of {len(expected)}"
    first = _first(found, expected)
    last = first + 1
    while last < len(found) and found[last] != expected[last]:
        last += 1
    more = sum(a != b for a, b in zip(found[last : last + 65536], expected[last : last + 65536], strict=True))
    text = f"bytes [{start + first}, {start + last}): found {_shown(found[first:last])}"
    text += f", expected {_shown(expected[first:last])}"
    return text + (" (and more after them)" if more else "")


def _first(found: bytes, expected: bytes) -> int:
    low, high = 0, len(found)
    while high - low > 1:  # the first half that differs, again and again
        middle = (low + high) // 2
        if found[low:middle] != expected[low:middle]:
            high = middle
        else:
            low = middle
    return low


def _shown(piece: bytes) -> str:
    values = set(piece[:4096])
    if len(values) == 1:
        return f"0x{piece[0]:02x}"
    return "0x" + piece[:8].hex() + ("…" if len(piece) > 8 else "")
