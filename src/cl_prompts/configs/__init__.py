"""One config class per method. A field that a method does not use does not exist on its config."""

from cl_prompts.configs.base import METHODS, PromptPoolConfig
from cl_prompts.configs.hash import HashPromptConfig
from cl_prompts.configs.l2p import L2PConfig


__all__ = ["METHODS", "HashPromptConfig", "L2PConfig", "PromptPoolConfig"]
