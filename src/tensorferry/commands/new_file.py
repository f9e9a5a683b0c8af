"""A file that appears under its name when it is complete, and not before.

Where the system can, the file has no name at all until then (O_TMPFILE), so that even a process that is killed leaves
nothing. Elsewhere it is `.NAME.XXXXXXXX.part` beside the result, which goes away with every end but a kill.
"""

from __future__ import annotations

import errno
import os
import secrets
from contextlib import suppress
from typing import ClassVar, Self

from tensorferry.core.errors import Fault, FerryError

CHUNK = 8 << 20
"""Bytes written in one call: between two of them Ctrl-C is heard."""


class CannotWrite(FerryError):
    """The output file cannot be written: no such folder, no permission, no space."""

    code: ClassVar[str] = "cannot_write"
    fault: ClassVar[Fault] = Fault.CALLER


class OutputExists(CannotWrite):
    """The output file exists."""

    code: ClassVar[str] = "output_exists"


class NewFile:
    """A context: `write`, then `publish`; without `publish` nothing is left.

    Raises CannotWrite before anything is written where the folder cannot take a file, OutputExists where the name is
    taken and `force` is not given. A name that is a link stands for the file that it points to.
    """

    def __init__(self, path: str, *, force: bool = False) -> None:
        self.shown = path
        self.published = False
        """Whether the file has its name. Known when the context is left, however that comes about."""
        self._path = os.path.realpath(path)
        self._folder, self._name = os.path.split(self._path)
        self._force = force
        self._part = ""  # the name that it has meanwhile; none with O_TMPFILE
        self._fd = -1

    def __enter__(self) -> Self:
        if os.path.isdir(self._path):
            raise CannotWrite(f"{self.shown} is a directory", hint="Name a file in it")
        if os.path.lexists(self._path):
            if not self._force:
                raise self._exists()
            if not os.path.isfile(self._path):
                raise CannotWrite(f"{self.shown} is no regular file", hint="Name another one")
        try:
            self._fd = self._open()
        except OSError as error:
            raise CannotWrite(
                f"no file can be made in {self._folder}: {error.strerror}", hint="Name a folder that you can write to"
            ) from error
        return self

    def __exit__(self, *exc: object) -> None:
        if self._fd >= 0:
            self.published = self._has_its_name()
            os.close(self._fd)
            self._fd = -1
        if self._part:
            with suppress(FileNotFoundError):
                os.unlink(self._part)
            self._part = ""

    def reserve(self, nbytes: int) -> None:
        """Raises CannotWrite at once where `nbytes` will not fit."""
        with suppress(OSError):  # a file system that does not tell: the writing will
            found = os.fstatvfs(self._fd)
            free = found.f_bavail * found.f_frsize
            if found.f_blocks and free < nbytes:
                raise self._full(nbytes, free)

    def write(self, data: memoryview | bytes) -> None:
        view = memoryview(data)
        try:
            while view:
                view = view[os.write(self._fd, view[:CHUNK]) :]
        except OSError as error:
            raise self._failed(error) from error

    def publish(self) -> None:
        """Make it durable and give it its name; it is the whole file or none that others see."""
        try:
            os.fsync(self._fd)
            if self._force:
                if not self._part:
                    self._part = self._spare_name()
                    self._link(self._part)
                os.replace(self._part, self._path)
                self._part = ""
            else:
                self._link(self._path)
            _sync_folder(self._folder)
        except FileExistsError as error:
            raise self._exists() from error
        except OSError as error:
            raise self._failed(error) from error

    def _has_its_name(self) -> bool:
        """Asked of the system: an interrupt can come between the call that gives the name and any note of it."""
        try:
            return os.path.samestat(os.stat(self._path), os.fstat(self._fd))
        except OSError:
            return False

    def _open(self) -> int:
        if os.path.exists("/proc/self/fd"):  # the way back from an open file to a name
            try:
                return os.open(self._folder, os.O_TMPFILE | os.O_WRONLY | os.O_CLOEXEC, 0o666)
            except OSError as error:
                if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL):
                    raise
        part = self._spare_name()
        fd = os.open(part, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o666)
        self._part = part
        return fd

    def _spare_name(self) -> str:
        # 200: with what is added a long name would exceed the 255 bytes that file systems allow.
        kept = self._name.encode()[:200].decode(errors="ignore")
        return os.path.join(self._folder, f".{kept}.{secrets.token_hex(4)}.part")

    def _link(self, name: str) -> None:
        """Give the open file another name; FileExistsError where it is taken, with no moment in between."""
        if not self._part or self._part == name:
            # `src_dir_fd` is what makes Python call linkat, which can follow the link in /proc.
            os.link(f"/proc/self/fd/{self._fd}", name, src_dir_fd=self._fd, follow_symlinks=True)
            return
        try:
            os.link(self._part, name)
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.EOPNOTSUPP):
                raise
            if os.path.lexists(name):  # a file system without links has no better way
                raise FileExistsError(name) from None
            os.replace(self._part, name)
            self._part = ""

    def _exists(self) -> OutputExists:
        return OutputExists(f"{self.shown} exists", hint="Give another name, or --force to replace it")

    def _full(self, nbytes: int, free: int) -> CannotWrite:
        return CannotWrite(
            f"{self.shown} needs {nbytes} bytes, and {self._folder} has {free} free",
            hint="Free some space, or give a name on another disk; then run the command again",
        )

    def _failed(self, error: OSError) -> CannotWrite:
        hint = ""
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            hint = "Free some space, or give a name on another disk; then run the command again"
        return CannotWrite(f"{self.shown} cannot be written: {error.strerror}", hint=hint)


def _sync_folder(folder: str) -> None:
    with suppress(OSError):  # some file systems cannot sync a folder; the name is there all the same
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
