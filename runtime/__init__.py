"""Everything that running a compressed pipeline needs."""
