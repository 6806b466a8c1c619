"""Choice of each tensor's layout by a minimum cut, and the conversions between layouts."""
