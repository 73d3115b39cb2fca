"""OnePrompt."""

from cl_prompts.methods.one_prompt.config import OnePromptConfig
from cl_prompts.methods.one_prompt.pool import OnePromptPool
from cl_prompts.methods.registry import register_prompt_method


__all__ = ["OnePromptConfig", "OnePromptPool"]

register_prompt_method("one_prompt", OnePromptConfig, OnePromptPool)
