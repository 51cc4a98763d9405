"""Searches cache plans: `dacc search-cache`."""
