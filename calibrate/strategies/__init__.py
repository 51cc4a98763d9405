"""Which calls of a run are kept, one strategy per file."""
