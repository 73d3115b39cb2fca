"""Hash."""

from cl_prompts.methods.hash.config import HashPromptConfig
from cl_prompts.methods.hash.pool import HashPool
from cl_prompts.methods.registry import register_prompt_method


__all__ = ["HashPool", "HashPromptConfig"]

register_prompt_method("hash", HashPromptConfig, HashPool)
