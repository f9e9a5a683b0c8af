"""How the text of a setting becomes its value. A reader takes a number or text, and raises ValueError with the rest of
a sentence that begins with the setting's name."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from decimal import Decimal, DecimalException
from difflib import get_close_matches

MAX_COUNT = 2**31 - 1
"""Largest count of tokens, blocks, rooms or bumps: they travel as unsigned 32-bit numbers or less."""

MAX_BYTES = 2**63 - 1


def count(minimum: int, maximum: int = MAX_COUNT) -> Callable[[object], int]:
    def read(value: object) -> int:
        number = _integer(value)
        if not minimum <= number <= maximum:
            raise ValueError(f"must lie between {minimum} and {maximum}")
        return number

    return read


def _integer(value: object) -> int:
    if isinstance(value, str) and re.fullmatch(r"[+-]?\d+(_\d+)*", value.strip()):
        return int(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    raise ValueError("must be a whole number")


def _number(value: object) -> float:
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            value = math.nan
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError("must be a finite number")
    return float(value)


_BYTE_UNITS = {"": 1, "b": 1} | {
    f"{prefix}{suffix}": base**power
    for power, prefix in enumerate("kmgt", start=1)
    for suffix, base in (("b", 1000), ("ib", 1024), ("i", 1024))
}
_SECOND_UNITS = {"": 1.0, "s": 1.0, "ms": 1e-3, "min": 60.0, "h": 3600.0}
_QUANTITY = re.compile(r"\s*([+-]?[\d._]+(?:e[+-]?\d+)?)\s*([a-z]*)\s*", re.IGNORECASE)


def byte_count(value: object) -> int:
    """4294967296, "4GiB" (1024-based), "512MB" (1000-based)."""
    if not isinstance(value, str):
        exact = Decimal(_integer(value))
    else:
        match = _QUANTITY.fullmatch(value)
        if match is None or match[2].lower() not in _BYTE_UNITS:
            raise ValueError("must be a number of bytes such as 4294967296, 4GiB or 512MB")
        try:
            exact = Decimal(match[1]) * _BYTE_UNITS[match[2].lower()]
        except DecimalException:
            raise ValueError("must be a number of bytes such as 4294967296, 4GiB or 512MB") from None
    if not 1 <= exact <= MAX_BYTES:
        raise ValueError(f"must lie between 1 and {MAX_BYTES} bytes")
    if exact != int(exact):
        raise ValueError("must be a whole number of bytes")
    return int(exact)


def seconds(value: object) -> float:
    """300, 0.5, "300s", "500ms", "5min"."""
    if isinstance(value, str):
        match = _QUANTITY.fullmatch(value)
        if match is None or match[2].lower() not in _SECOND_UNITS:
            raise ValueError("must be a time such as 300, 90s, 500ms or 5min")
        value = _number(match[1]) * _SECOND_UNITS[match[2].lower()]
    number = _number(value)
    if number <= 0:
        raise ValueError("must be longer than 0 seconds")
    return number


def positive(value: object) -> float:
    number = _number(value)
    if number <= 0:
        raise ValueError("must be larger than 0")
    return number


def one_of(*choices: str) -> Callable[[object], str]:
    def read(value: object) -> str:
        if isinstance(value, str) and value.strip().lower() in choices:
            return value.strip().lower()
        raise ValueError(
            f"must be one of {', '.join(choice or 'empty' for choice in choices)}{did_you_mean(value, choices)}"
        )

    return read


def window(value: object) -> str | int:
    if isinstance(value, str) and value.strip().lower() in ("auto", "rounds"):
        return value.strip().lower()
    try:
        return count(1)(value)
    except ValueError:
        raise ValueError("must be auto, rounds, or a number of blocks of at least 1") from None


def plain_name(value: object) -> str:
    if isinstance(value, str) and re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", value.strip()):
        return value.strip()
    raise ValueError("must be a name")


def url(value: object) -> str:
    """SCHEME://..., or empty for none."""
    if isinstance(value, str) and re.fullmatch(r"([a-z][a-z0-9+.-]*://[!-~]+)?", value.strip()):
        return value.strip()
    raise ValueError("must be a URL such as etcd://HOST:2379")


def place(value: object) -> str:
    """cpu, cuda, or cuda:N."""
    if isinstance(value, str) and re.fullmatch(r"cpu|cuda(:(0|[1-9]\d{0,3}))?", value.strip().lower()):
        return value.strip().lower()
    raise ValueError("must be cpu, cuda, or cuda:N for the GPU of that number")


def did_you_mean(given: object, known: tuple[str, ...]) -> str:
    """`; did you mean X?` for the nearest of `known`, or nothing."""
    text = str(given)
    near = get_close_matches(text.upper() if text.isupper() else text.lower().replace("-", "_"), known, n=1)
    return f"; did you mean {near[0]}?" if near else ""
