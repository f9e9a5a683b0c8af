"""`python -m tensorferry` is the `tensorferry` command."""

from __future__ import annotations

import sys

from tensorferry.cli import main

if __name__ == "__main__":
    sys.exit(main())
