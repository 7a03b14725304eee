"""Arithmetic without state: what an expert computes, in torch."""
