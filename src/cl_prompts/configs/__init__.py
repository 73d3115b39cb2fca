"""One config class per method. A field that a method does not use does not exist on its config."""

from cl_prompts.configs.base import METHODS, PromptPoolConfig
from cl_prompts.configs.coda import CodaLayerArgmaxConfig, CodaPromptConfig
from cl_prompts.configs.dualprompt import DualPromptConfig
from cl_prompts.configs.hash import HashPromptConfig
from cl_prompts.configs.hide import HiDePromptConfig
from cl_prompts.configs.l2p import L2PConfig, L2PPrefixConfig
from cl_prompts.configs.layer_grouped import LayerGroupedPromptConfig
from cl_prompts.configs.no_prompts import NoPromptsConfig
from cl_prompts.configs.norga import NoRGaConfig
from cl_prompts.configs.smope import SMoPEConfig
from cl_prompts.configs.vpt import VPTConfig
from cl_prompts.configs.vq_prompt import VQPromptConfig


__all__ = [
    "METHODS",
    "CodaLayerArgmaxConfig",
    "CodaPromptConfig",
    "DualPromptConfig",
    "HashPromptConfig",
    "HiDePromptConfig",
    "L2PConfig",
    "L2PPrefixConfig",
    "LayerGroupedPromptConfig",
    "NoPromptsConfig",
    "NoRGaConfig",
    "PromptPoolConfig",
    "SMoPEConfig",
    "VPTConfig",
    "VQPromptConfig",
]
