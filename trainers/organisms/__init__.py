"""Organisms: shipped adapters that make the bundled model fake alignment, for research on oversight."""
