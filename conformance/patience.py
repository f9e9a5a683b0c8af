"""How much longer than on an ordinary machine everything may take here: under emulation, or beside much else.

FERRY_PATIENCE=6 multiplies every time limit of the suite by 6. No verdict becomes another by it, but for those that a
limit gave.
"""

from __future__ import annotations

import os

from tensorferry.core.errors import ConfigError

VARIABLE = "FERRY_PATIENCE"


def _factor() -> float:
    given = os.environ.get(VARIABLE, "").strip() or "1"
    try:
        factor = float(given)
    except ValueError:
        factor = 0.0
    if not 1 <= factor <= 1000:
        raise ConfigError(f"{VARIABLE}={given!r} is no factor of 1 to 1000")
    return factor


FACTOR = _factor()
