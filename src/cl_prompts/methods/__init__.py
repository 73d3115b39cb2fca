"""Prompt methods, one folder each. Importing a folder registers its method, importing this package all of them."""

from cl_prompts.methods.apt import APTConfig, APTPool
from cl_prompts.methods.coda import CodaLayerArgmaxConfig, CodaLayerArgmaxPool, CodaPool, CodaPromptConfig
from cl_prompts.methods.config import PromptPoolConfig
from cl_prompts.methods.cpg import CPGConfig, CPGPool
from cl_prompts.methods.default import default_config
from cl_prompts.methods.dualprompt import DualPromptConfig, DualPromptPool
from cl_prompts.methods.hash import HashPool, HashPromptConfig
from cl_prompts.methods.hide import HidePool, HiDePromptConfig
from cl_prompts.methods.l2p import L2PConfig, L2PPool
from cl_prompts.methods.l2p_prefix import L2PPrefixConfig, L2PPrefixPool
from cl_prompts.methods.layer_grouped import LayerGroupedPool, LayerGroupedPromptConfig
from cl_prompts.methods.no_prompts import NoPrompts, NoPromptsConfig
from cl_prompts.methods.norga import NoRGaConfig, NorgaPool
from cl_prompts.methods.one_prompt import OnePromptConfig, OnePromptPool
from cl_prompts.methods.pool import Observation, PromptPool, TaskStatistics
from cl_prompts.methods.registry import METHODS, PromptMethod, register_prompt_method
from cl_prompts.methods.smope import SMoPEConfig, SMoPEPool
from cl_prompts.methods.vpt import VPTConfig, VPTPool
from cl_prompts.methods.vpt_nsp2 import VPTNSP2Config, VPTNSP2Pool
from cl_prompts.methods.vq_prompt import VQPromptConfig, VQPromptPool


__all__ = [
    "METHODS",
    "APTConfig",
    "APTPool",
    "CPGConfig",
    "CPGPool",
    "CodaLayerArgmaxConfig",
    "CodaLayerArgmaxPool",
    "CodaPool",
    "CodaPromptConfig",
    "DualPromptConfig",
    "DualPromptPool",
    "HashPool",
    "HashPromptConfig",
    "HiDePromptConfig",
    "HidePool",
    "L2PConfig",
    "L2PPool",
    "L2PPrefixConfig",
    "L2PPrefixPool",
    "LayerGroupedPool",
    "LayerGroupedPromptConfig",
    "NoPrompts",
    "NoPromptsConfig",
    "NoRGaConfig",
    "NorgaPool",
    "Observation",
    "OnePromptConfig",
    "OnePromptPool",
    "PromptMethod",
    "PromptPool",
    "PromptPoolConfig",
    "SMoPEConfig",
    "SMoPEPool",
    "TaskStatistics",
    "VPTConfig",
    "VPTNSP2Config",
    "VPTNSP2Pool",
    "VPTPool",
    "VQPromptConfig",
    "VQPromptPool",
    "default_config",
    "register_prompt_method",
]
