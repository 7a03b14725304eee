"""Benchmarks: models, arms, measurement, tables and figures."""
