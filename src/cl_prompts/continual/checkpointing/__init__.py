"""Checkpoints of a run and how it goes on from one."""
