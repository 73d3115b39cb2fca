"""L2P."""

from cl_prompts.methods.l2p.config import L2PConfig
from cl_prompts.methods.l2p.pool import L2PPool


__all__ = ["L2PConfig", "L2PPool"]
