"""An engine that a transport under test loads when it is opened: what matters is that it can be missing."""

from __future__ import annotations

VERSION = "1.0"
