"""Which units go: one file per method."""
