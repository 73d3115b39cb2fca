"""VPT-NSP2."""

from cl_prompts.methods.registry import register_prompt_method
from cl_prompts.methods.vpt_nsp2.config import VPTNSP2Config
from cl_prompts.methods.vpt_nsp2.pool import VPTNSP2Pool


__all__ = ["VPTNSP2Config", "VPTNSP2Pool"]

register_prompt_method("vpt_nsp2", VPTNSP2Config, VPTNSP2Pool)
