"""APT."""

from cl_prompts.methods.apt.config import APTConfig
from cl_prompts.methods.apt.pool import APTPool
from cl_prompts.methods.registry import register_prompt_method


__all__ = ["APTConfig", "APTPool"]

register_prompt_method("apt", APTConfig, APTPool)
