"""Runnable configurations; every one is parsed by a test."""
