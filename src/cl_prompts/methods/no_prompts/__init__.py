"""No prompts: the frozen features alone."""

from cl_prompts.methods.no_prompts.config import NoPromptsConfig
from cl_prompts.methods.no_prompts.pool import NoPrompts
from cl_prompts.methods.registry import register_prompt_method


__all__ = ["NoPrompts", "NoPromptsConfig"]

register_prompt_method("none", NoPromptsConfig, NoPrompts)
