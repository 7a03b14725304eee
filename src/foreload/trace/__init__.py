"""Routing recorded, and replayed."""
