"""A safetensors file as something that `tensorferry send` can send: opened, judged, and mapped, not read.

The rows stay where the file is mapped, and a transport reads them there. So the file must not change meanwhile: whoever
writes to it would change what is sent, and whoever shortens it would end the process that sends.
"""

from __future__ import annotations

import json
import os
import stat
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

from tensorferry.commands.table import DTYPES, Column, Table
from tensorferry.core.errors import BadTensor, ConfigError, Fault, FerryError
from tensorferry.core.layout import MAX_COMPONENTS
from tensorferry.core.memory import Memory

if TYPE_CHECKING:
    import torch


class BadFile(FerryError):
    """The file cannot be read, or is not a safetensors file."""

    code: ClassVar[str] = "bad_file"
    fault: ClassVar[Fault] = Fault.CALLER


_REMEDY = "Every tensor of the file needs the same first dimension, one row a token"


@dataclass(frozen=True)
class TokenFile:
    """`tensors` by their names in the file, mapped; `metadata` is the file's `__metadata__`."""

    path: str
    table: Table
    tokens: int
    tensors: dict[str, torch.Tensor]
    metadata: dict[str, str]
    identity: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return self.tokens * self.table.layout.token_bytes

    @property
    def components(self) -> dict[str, Any]:
        """The tensors as a send takes them."""
        return {column.component.name: self.tensors[column.name] for column in self.table.columns}

    @cached_property
    def digest(self) -> bytes:
        """Reads the whole file, once."""
        return self.table.digest(self.tokens, {name: bytes_of(tensor) for name, tensor in self.tensors.items()})

    def check_unchanged(self) -> None:
        """Raises BadFile where somebody has written to the file since it was opened."""
        if _identity(self.path, os.stat(self.path) if os.path.exists(self.path) else None) != self.identity:
            raise BadFile(f"{self.path} has changed since it was opened", hint="Send the file again as it is now")


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous tensor in host memory; the view keeps it alive."""
    return Memory(tensor.data_ptr(), tensor.numel() * tensor.element_size(), owner=tensor).view()


def open_file(path: str) -> TokenFile:
    """Map the file and judge every tensor. Raises BadFile for the file as a whole, BadTensor for one tensor in it."""
    identity = _identity(path, _looked_at(path))
    shapes, metadata = _header(path)
    if not shapes:
        raise BadFile(f"{path} holds no tensors", hint="There is nothing to send")
    if len(shapes) > MAX_COMPONENTS:
        raise BadFile(
            f"{path} holds {len(shapes)} tensors, and at most {MAX_COMPONENTS} travel together",
            hint="Split the file, or stack tensors of one dtype",
        )
    table = Table(_column(path, name, dtype, shape) for name, (dtype, shape) in shapes.items())
    tokens = _tokens(path, {name: shape for name, (_, shape) in shapes.items()})
    return TokenFile(path, table, tokens, _mapped(path, shapes), metadata, identity)


def table_of(path: str) -> Table:
    """The table of an example file, which may be of any length; raises as `open_file`."""
    _looked_at(path)
    return Table(_column(path, name, dtype, shape) for name, (dtype, shape) in _header(path)[0].items())


def _looked_at(path: str) -> os.stat_result:
    try:
        found = os.stat(path)
        if not stat.S_ISREG(found.st_mode):
            kind = "a directory" if stat.S_ISDIR(found.st_mode) else "not a regular file"
            raise BadFile(f"{path} is {kind}", hint="Only a regular file can be mapped into memory")
        with open(path, "rb"):
            return found
    except OSError as error:
        raise BadFile(f"{path} cannot be read: {error.strerror}") from error


def _identity(path: str, found: os.stat_result | None) -> tuple[int, ...]:
    return () if found is None else (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)


def _opened(path: str) -> Any:
    from safetensors import safe_open

    return safe_open(path, framework="pt")


def _header(path: str) -> tuple[dict[str, tuple[str, tuple[int, ...]]], dict[str, str]]:
    """(dtype as safetensors names it, shape) by name, and the metadata. No row is read."""
    from safetensors import SafetensorError

    try:
        with _opened(path) as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  not a mapping
            shapes = {name: (str(part.get_dtype()), tuple(part.get_shape())) for name, part in slices.items()}
            return shapes, dict(file.metadata() or {})
    except SafetensorError as error:
        raise BadFile(
            f"{path} is not a whole safetensors file: {error}",
            hint="Write it with safetensors.torch.save_file; if it was copied here, copy it again",
        ) from error
    except (OSError, RuntimeError) as error:
        raise BadFile(f"{path} cannot be mapped: {error}") from error


def _mapped(path: str, names: Any) -> dict[str, torch.Tensor]:
    try:
        with _opened(path) as file:
            return {name: file.get_tensor(name) for name in names}
    except Exception as error:  # torch, safetensors and the system each raise their own
        raise BadFile(f"{path} cannot be mapped: {error}") from error


def _column(path: str, name: str, dtype: str, shape: tuple[int, ...]) -> Column:
    if not shape:
        raise BadTensor(f"{path}: tensor {name!r} is a scalar: it has no tokens", hint=f"{_REMEDY}; leave it out")
    if dtype not in DTYPES:
        raise BadTensor(
            f"{path}: tensor {name!r} has dtype {dtype}, which does not travel",
            hint=f"Convert it to one of {', '.join(DTYPES.values())}",
        )
    column = Column(name, DTYPES[dtype], shape[1:])
    try:
        column.component  # noqa: B018  judged here, where the file's name for it is known
    except ConfigError:
        raise BadTensor(
            f"{path}: tensor {name!r} has shape {list(shape)}: a token's part of it needs dimensions of at least 1, "
            "and less than 2 GiB",
            hint="Leave it out of the file, or cut it",
        ) from None
    return column


def _tokens(path: str, shapes: dict[str, tuple[int, ...]]) -> int:
    """The common length. The tensor that differs is the one that is in the minority."""
    lengths = [shape[0] for shape in shapes.values()]
    tokens = max(lengths, key=lengths.count)
    for name, shape in shapes.items():
        if shape[0] != tokens:
            others = ", ".join(other for other in shapes if shapes[other][0] == tokens)
            hint = f"{_REMEDY}; leave it out, or cut it"
            if tokens in shape:
                hint = f"{_REMEDY}: give it token-major, .transpose(0, {shape.index(tokens)}).contiguous()"
            raise BadTensor(
                f"{path}: tensor {name!r} has {shape[0]} rows (shape {list(shape)}), and {others} {tokens}", hint=hint
            )
    if tokens == 0:
        raise BadTensor(f"{path}: tensor {next(iter(shapes))!r} has no rows: there are no tokens to send")
    return tokens


def header(table: Table, tokens: int, metadata: dict[str, str]) -> tuple[bytes, list[str]]:
    """A safetensors file's beginning, and the order in which the tensors' bytes follow: as safetensors lays them out,
    widest dtype first, so that each tensor is aligned."""
    widest_first = list(DTYPES.values())
    known = {ours: theirs for theirs, ours in DTYPES.items()}
    columns = sorted(table.columns, key=lambda column: (widest_first.index(column.dtype), column.name))
    entries: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    at = 0
    for column in columns:
        nbytes = tokens * column.component.token_bytes
        shape = [tokens, *column.shape]
        entries[column.name] = {"dtype": known[column.dtype], "shape": shape, "data_offsets": [at, at + nbytes]}
        at += nbytes
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, [column.name for column in columns]
