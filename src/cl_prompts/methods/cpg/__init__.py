"""CPG."""

from cl_prompts.methods.cpg.config import CPGConfig
from cl_prompts.methods.cpg.pool import CPGPool
from cl_prompts.methods.registry import register_prompt_method


__all__ = ["CPGConfig", "CPGPool"]

register_prompt_method("cpg", CPGConfig, CPGPool)
