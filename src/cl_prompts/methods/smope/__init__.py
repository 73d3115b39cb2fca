"""SMoPE."""

from cl_prompts.methods.registry import register_prompt_method
from cl_prompts.methods.smope.config import SMoPEConfig
from cl_prompts.methods.smope.pool import SMoPEPool


__all__ = ["SMoPEConfig", "SMoPEPool"]

register_prompt_method("smope", SMoPEConfig, SMoPEPool)
