"""NoRGa."""

from cl_prompts.methods.norga.config import NoRGaConfig
from cl_prompts.methods.norga.pool import NorgaPool
from cl_prompts.methods.registry import register_prompt_method


__all__ = ["NoRGaConfig", "NorgaPool"]

register_prompt_method("norga", NoRGaConfig, NorgaPool)
