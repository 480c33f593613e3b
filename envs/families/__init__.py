"""Families of scenarios, one YAML file each."""
