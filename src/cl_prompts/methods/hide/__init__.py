"""HiDe-Prompt."""

from cl_prompts.methods.hide.config import HiDePromptConfig
from cl_prompts.methods.hide.pool import HidePool


__all__ = ["HiDePromptConfig", "HidePool"]
