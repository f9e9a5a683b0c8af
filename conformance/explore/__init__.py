"""Exhaustive search over the production machines. `python -m tensorferry.conformance.explore` tells more."""
