"""The methods, one file each. Importing this package fills `POOLS`, method name -> pool class."""

from cl_prompts.pools import hash, l2p
from cl_prompts.pools.base import POOLS, Observation, PromptPool


__all__ = ["POOLS", "Observation", "PromptPool", "hash", "l2p"]
