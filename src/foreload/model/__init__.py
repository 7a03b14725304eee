"""The bridge to transformers: loading, attaching, and what happens at one MoE layer."""
