"""What a safetensors file holds, as a layout: the tensors' names, dtypes and shapes per token, and their text form.

The text is what `tensorferry send` puts into the command line for the other side,
`input_embeds:bfloat16:3584,fill_ids:int32`: a tensor's name, its dtype and the dimensions of one token's entry, joined
by `x` (none for a scalar). Names are percent-encoded, so that the text needs no quotes in any shell.

A tensor may have any name. Components may not (they are keyword arguments), so a name that cannot be a component's
travels under one made from its hash; both sides make the same one. No torch here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from urllib.parse import quote, unquote

import xxhash

from tensorferry.commands.output import BadFlag
from tensorferry.core.errors import ConfigError
from tensorferry.core.layout import Component, Layout

DTYPES = {
    "I64": "int64",
    "F64": "float64",
    "F32": "float32",
    "I32": "int32",
    "BF16": "bfloat16",
    "F16": "float16",
    "I16": "int16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}
"""safetensors' names of the dtypes that travel, in the order in which safetensors lays tensors out: widest first."""

HASH_CHUNK = 16 << 20
"""Bytes hashed in one call: between two of them Ctrl-C is heard and other threads have their turn."""


@dataclass(frozen=True)
class Column:
    """One tensor of a file: `[n, *shape]` of `dtype` (a layout's name)."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @cached_property
    def component(self) -> Component:
        """What it travels as. Raises ConfigError for a shape or dtype that does not travel."""
        return Component(_component_name(self.name), self.dtype, self.shape)

    def __str__(self) -> str:
        parts = [quote(self.name, safe="/"), self.dtype]
        return ":".join([*parts, "x".join(map(str, self.shape))] if self.shape else parts)


@dataclass(frozen=True)
class Table:
    """The tensors of a file without their rows, sorted by name."""

    columns: tuple[Column, ...]

    def __init__(self, columns: Iterable[Column]) -> None:
        object.__setattr__(self, "columns", tuple(sorted(columns, key=lambda column: column.name)))

    @cached_property
    def layout(self) -> Layout:
        return Layout(column.component for column in self.columns)

    def __str__(self) -> str:
        return ",".join(map(str, self.columns))

    def digest(self, tokens: int, rows: Mapping[str, memoryview]) -> bytes:
        """16 bytes over names, dtypes, shapes, length and every byte; `rows` by the tensors' own names."""
        state = xxhash.xxh3_128(f"{self};{tokens}\n".encode())
        for column in self.columns:
            view = rows[column.name]
            for start in range(0, len(view), HASH_CHUNK):
                state.update(view[start : start + HASH_CHUNK])
        return state.digest()


def _component_name(name: str) -> str:
    try:
        return Component(name, "uint8").name
    except ConfigError:
        return f"t_{xxhash.xxh3_64_hexdigest(name.encode())}"


def parse(text: str) -> Table:
    """The table of its text form. Raises BadFlag that says what a good one looks like."""
    hint = "Take it from the command that `tensorferry send` prints, such as input_embeds:bfloat16:3584,fill_ids:int32"
    columns = []
    for part in text.split(","):
        name, *rest = part.strip().split(":")
        if len(rest) not in (1, 2):
            raise BadFlag(f"--layout: {part!r} is not NAME:DTYPE or NAME:DTYPE:DIMENSIONS", hint=hint)
        try:
            shape = tuple(int(n) for n in rest[1].split("x")) if len(rest) == 2 else ()
        except ValueError:
            raise BadFlag(f"--layout: the dimensions {rest[1]!r} are not numbers joined by x", hint=hint) from None
        columns.append(Column(unquote(name), rest[0], shape))
    table = Table(columns)
    try:
        table.layout  # noqa: B018  made here, so that whatever is wrong with it is this flag's fault
    except ConfigError as error:
        raise BadFlag(f"--layout: {error.cause}", hint=error.hint or hint) from error
    return table


def told(digest: bytes) -> str:
    """A digest for people and for JSON."""
    return f"xxh3_128:{digest.hex()}"
