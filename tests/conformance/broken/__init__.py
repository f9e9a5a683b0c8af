"""Transports that are broken in one way each, and what the suite has to say about every one of them."""
