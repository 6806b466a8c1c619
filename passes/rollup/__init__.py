"""Roll an unrolled loop over steps up into one graph over all of time."""
