"""DualPrompt."""

from cl_prompts.methods.dualprompt.config import DualPromptConfig
from cl_prompts.methods.dualprompt.pool import DualPromptPool
from cl_prompts.methods.registry import register_prompt_method


__all__ = ["DualPromptConfig", "DualPromptPool"]

register_prompt_method("dualprompt", DualPromptConfig, DualPromptPool)
