"""How good, small and fast pipelines are, side by side."""
