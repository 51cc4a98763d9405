"""Values and rules that every command shares."""
