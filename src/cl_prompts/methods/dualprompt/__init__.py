"""DualPrompt."""

from cl_prompts.methods.dualprompt.config import DualPromptConfig
from cl_prompts.methods.dualprompt.pool import DualPromptPool


__all__ = ["DualPromptConfig", "DualPromptPool"]
