"""HiDe-Prompt."""

from cl_prompts.methods.hide.config import HiDePromptConfig
from cl_prompts.methods.hide.pool import HidePool
from cl_prompts.methods.registry import register_prompt_method


__all__ = ["HiDePromptConfig", "HidePool"]

register_prompt_method("hide", HiDePromptConfig, HidePool)
