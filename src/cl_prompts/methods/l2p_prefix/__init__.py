"""L2P with key/value prefixes."""

from cl_prompts.methods.l2p_prefix.config import L2PPrefixConfig
from cl_prompts.methods.l2p_prefix.pool import L2PPrefixPool
from cl_prompts.methods.registry import register_prompt_method


__all__ = ["L2PPrefixConfig", "L2PPrefixPool"]

register_prompt_method("l2p_prefix", L2PPrefixConfig, L2PPrefixPool)
