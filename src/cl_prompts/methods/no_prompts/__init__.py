"""No prompts: the frozen features alone."""

from cl_prompts.methods.no_prompts.config import NoPromptsConfig
from cl_prompts.methods.no_prompts.pool import NoPrompts


__all__ = ["NoPrompts", "NoPromptsConfig"]
