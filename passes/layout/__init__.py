"""Which layout each tensor takes: the graph, its minimum cut, and the conversions."""
