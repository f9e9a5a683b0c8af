"""The protocol: layout, ledger, pool, messages, the two state machines and their drivers."""
