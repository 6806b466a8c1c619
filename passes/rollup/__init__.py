"""One graph over all of time in the place of a loop over steps."""
