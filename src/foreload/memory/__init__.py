"""Where experts lie and how they get there: checkpoint, cache, transfers, tiers."""
