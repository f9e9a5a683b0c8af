"""What the dynamic loader says of a shared library that does not load: missing, too old, or there and of no use."""

from __future__ import annotations

import ctypes
import re

_LIBRARY = r"((?:\S*/)?(lib[\w+.-]+\.so[\w.]*))"
_MISSING = re.compile(rf"{_LIBRARY}: cannot open shared object file(?:: No such|$)")
_OLD = re.compile(rf"{_LIBRARY}: version `([\w.]+)' not found")
_NAMED = re.compile(rf"{_LIBRARY}: ")


def refused(library: str) -> str:
    """Why it does not load, in the loader's own words; "" where it does, and is loaded now."""
    try:
        ctypes.CDLL(library)
    except OSError as error:
        return str(error)
    return ""


def missing(text: str) -> str:
    """The library that the words call missing, or "". The loader names the first one alone."""
    found = _MISSING.search(text)
    return found[2] if found else ""


def too_old(text: str) -> tuple[str, str, str]:
    """(the library, the file that was found, what it would have to have), or three times ""."""
    found = _OLD.search(text)
    return (found[2], found[1], found[3]) if found else ("", "", "")


def useless(text: str) -> str:
    """The library that is there and does not load: cut off, for another processor, not to be read. Or ""."""
    found = None if missing(text) else _NAMED.search(text)
    return found[2] if found else ""


def replace(library: str, package: str) -> str:
    """What helps against `useless`. `package`: the Debian package that has it, or ""."""
    return "Install anew the package that has it" + (f": apt-get install --reinstall {package}" if package else "")
