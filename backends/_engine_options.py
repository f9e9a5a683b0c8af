"""Options that mean the same to every engine."""

from __future__ import annotations

from typing import Annotated

import msgspec

MIB = 1 << 20

ContactTimeout = Annotated[
    float,
    msgspec.Meta(
        gt=0, le=3600, description="Seconds that a peer has to answer before a post to it; then the post fails."
    ),
]
CONTACT_S = 5.0
"""Its default."""
