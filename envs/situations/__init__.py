"""Situation texts: `short` for small models, `full` for large ones; two renderings each."""
