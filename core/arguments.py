"""What callers pass in, as what the wire takes: plain ints from any kind of integer, bytes, text.

All else is refused by its name, before anything has changed.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable

from tensorferry.core.errors import BadCall, BadTensor, FerryError

INT64 = -(1 << 63)
"""`lowest` of a signed number: with `bits` 63, an int64."""


def integer(value: object, what: str, *, lowest: int = 0, bits: int = 63, kind: type[FerryError] = BadCall) -> int:
    """`value` as a plain int in [lowest, 2**bits): numpy's and torch's integers too, and neither a bool nor a float.

    Raises `kind`, naming `what`.
    """
    truth = isinstance(value, bool) or str(getattr(value, "dtype", "")) == "torch.bool"
    try:
        number = None if truth else operator.index(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, RuntimeError):  # torch says RuntimeError for some tensors that have no value
        number = None
    if number is None:
        raise kind(f"{what} is an integer, not {_told(value)}")
    if not lowest <= number < 1 << bits:
        low = "0" if lowest == 0 else f"-2**{bits}"
        raise kind(f"{what} {number} is not in [{low}, 2**{bits})")
    return number


def text(value: object, what: str, *, kind: type[FerryError] = BadCall) -> str:
    """`value`, a string that can be sent. Raises `kind`, naming `what`."""
    if not isinstance(value, str):
        raise kind(f"{what} is a string, not {_told(value)}")
    try:
        value.encode()
    except UnicodeEncodeError as problem:
        raise kind(f"{what} {value!r} cannot be encoded: {problem.reason}") from None
    return value


def sixteen_bytes(value: object, what: str) -> bytes:
    if not isinstance(value, bytes | bytearray | memoryview):
        raise BadCall(f"{what} is 16 bytes, not {_told(value)}", hint="Hash it to 128 bits")
    data = bytes(value)
    if len(data) != 16:
        raise BadCall(f"{what} has {len(data)} bytes, not 16", hint="Hash it to 128 bits")
    return data


def int64s(values: object, what: str, most: int) -> list[int]:
    """Up to `most` words, each as `integer` takes it."""
    try:
        words = list(values)  # type: ignore[call-overload]
    except TypeError:
        raise BadCall(f"{what} is a sequence of integers, not {_told(values)}") from None
    if len(words) > most:
        raise BadCall(f"{what} has {len(words)} words, there is room for {most}")
    return [integer(word, f"{what}[{k}]", lowest=INT64) for k, word in enumerate(words)]


def names(values: Iterable[str]) -> tuple[str, ...]:
    """Names of components. Raises BadTensor for anything else."""
    try:
        given = tuple(values)
    except TypeError:
        given = (None,)  # type: ignore[assignment]
    if isinstance(values, str) or not all(isinstance(name, str) for name in given):
        raise BadTensor(f"components are names of the layout's components, not {_told(values)}")
    return given


def _told(value: object) -> str:
    """A value in an error: its type, and the value itself if it is short."""
    shown = repr(value)
    return f"{shown} ({type(value).__name__})" if len(shown) <= 60 else f"a {type(value).__name__}"
