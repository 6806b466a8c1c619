"""From a module to an FX graph over all time steps."""
