"""Hash."""

from cl_prompts.methods.hash.config import HashPromptConfig
from cl_prompts.methods.hash.pool import HashPool


__all__ = ["HashPool", "HashPromptConfig"]
