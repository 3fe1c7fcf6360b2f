"""DEEM itself: one causal model that reads and draws pictures between its texts."""
