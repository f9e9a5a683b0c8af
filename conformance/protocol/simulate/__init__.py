"""The production machines in a simulated world: one seed, one schedule, the same every time."""
