"""One module per engine; each is imported only when its transport is asked for."""
