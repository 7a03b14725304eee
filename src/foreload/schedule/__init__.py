"""Decisions: what to prefetch and when prefetching pays."""
