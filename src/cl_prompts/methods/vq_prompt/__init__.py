"""VQ-Prompt."""

from cl_prompts.methods.registry import register_prompt_method
from cl_prompts.methods.vq_prompt.config import VQPromptConfig
from cl_prompts.methods.vq_prompt.pool import VQPromptPool


__all__ = ["VQPromptConfig", "VQPromptPool"]

register_prompt_method("vq_prompt", VQPromptConfig, VQPromptPool)
