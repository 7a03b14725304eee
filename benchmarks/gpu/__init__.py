"""Checks and times the device path on a machine with a CUDA device, stage by stage."""
