"""L2P."""

from cl_prompts.methods.l2p.config import L2PConfig
from cl_prompts.methods.l2p.pool import L2PPool
from cl_prompts.methods.registry import register_prompt_method


__all__ = ["L2PConfig", "L2PPool"]

register_prompt_method("l2p", L2PConfig, L2PPool)
