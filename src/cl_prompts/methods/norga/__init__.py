"""NoRGa."""

from cl_prompts.methods.norga.config import NoRGaConfig
from cl_prompts.methods.norga.pool import NorgaPool


__all__ = ["NoRGaConfig", "NorgaPool"]
