"""Visual prompt tuning."""

from cl_prompts.methods.registry import register_prompt_method
from cl_prompts.methods.vpt.config import VPTConfig
from cl_prompts.methods.vpt.pool import VPTPool


__all__ = ["VPTConfig", "VPTPool"]

register_prompt_method("vpt", VPTConfig, VPTPool)
