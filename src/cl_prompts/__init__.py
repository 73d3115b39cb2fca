"""cl_prompts: prompt-based continual learning for any frozen Hugging Face vision transformer, PEFT-native.

Importing it registers the PEFT type `PROMPT_POOL`; do so before loading an adapter with PEFT's own classes.
"""

from cl_prompts.auto import AutoPromptPoolModel
from cl_prompts.methods import (
    APTConfig,
    CodaLayerArgmaxConfig,
    CodaPromptConfig,
    CPGConfig,
    DualPromptConfig,
    HashPromptConfig,
    HiDePromptConfig,
    L2PConfig,
    L2PPrefixConfig,
    LayerGroupedPromptConfig,
    NoPromptsConfig,
    NoRGaConfig,
    OnePromptConfig,
    PromptPoolConfig,
    SMoPEConfig,
    VPTConfig,
    VPTNSP2Config,
    VQPromptConfig,
)
from cl_prompts.model import PromptPoolModel, extract_features, get_prompt_pool_model
from cl_prompts.outputs import PromptPoolOutput
from cl_prompts.pipeline import PromptPoolPipeline
from cl_prompts.tuner.tuner import PromptPoolTuner
from cl_prompts.version import __version__


__all__ = [
    "APTConfig",
    "AutoPromptPoolModel",
    "CPGConfig",
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
    "OnePromptConfig",
    "PromptPoolConfig",
    "PromptPoolModel",
    "PromptPoolOutput",
    "PromptPoolPipeline",
    "PromptPoolTuner",
    "SMoPEConfig",
    "VPTConfig",
    "VPTNSP2Config",
    "VQPromptConfig",
    "__version__",
    "extract_features",
    "get_prompt_pool_model",
]
