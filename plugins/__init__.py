"""How a transport is found, judged and chosen."""
