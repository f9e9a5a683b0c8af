"""The suite that every transport has to pass."""
