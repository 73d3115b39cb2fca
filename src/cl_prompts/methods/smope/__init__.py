"""SMoPE."""

from cl_prompts.methods.smope.config import SMoPEConfig
from cl_prompts.methods.smope.pool import SMoPEPool


__all__ = ["SMoPEConfig", "SMoPEPool"]
