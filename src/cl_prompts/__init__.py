"""cl_prompts: prompt-based continual learning for any frozen Hugging Face vision transformer, PEFT-native.

The PEFT type `PROMPT_POOL` is registered when both this package and PEFT are imported, in either order. The names below are
imported on first use, so that `import cl_prompts` itself takes no time.
"""

from importlib import import_module
from threading import RLock
from typing import TYPE_CHECKING, Any

from cl_prompts.runtime.after_import import call_after_import
from cl_prompts.runtime.peft_type import enter_peft_type
from cl_prompts.version import __version__


if TYPE_CHECKING:
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
        default_config,
    )
    from cl_prompts.model import PromptPoolModel, extract_features, get_prompt_pool_model
    from cl_prompts.outputs import PromptPoolOutput
    from cl_prompts.pipeline import PromptPoolPipeline
    from cl_prompts.tuner import PromptPoolTuner


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
    "default_config",
    "extract_features",
    "get_prompt_pool_model",
]

# Where a name is defined; all others are of `cl_prompts.methods`.
_MODULES = {
    "AutoPromptPoolModel": "auto",
    "PromptPoolModel": "model",
    "PromptPoolOutput": "outputs",
    "PromptPoolPipeline": "pipeline",
    "PromptPoolTuner": "tuner",
    "extract_features": "model",
    "get_prompt_pool_model": "model",
}

# The libraries behind the names import each other in circles, which fails in two threads at once.
_LOCK = RLock()


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    with _LOCK:
        value = getattr(import_module(f"{__name__}.{_MODULES.get(name, 'methods')}"), name)
    globals()[name] = value  # the next access does not come here
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _register_peft_type() -> None:
    from cl_prompts.tuner.registration import register_peft_type

    register_peft_type()


call_after_import("peft", lambda: enter_peft_type(import_module("peft.mapping"), _register_peft_type))
