"""CODA-Prompt."""

from cl_prompts.methods.coda.config import CodaLayerArgmaxConfig, CodaPromptConfig
from cl_prompts.methods.coda.pool import CodaLayerArgmaxPool, CodaPool
from cl_prompts.methods.registry import register_prompt_method


__all__ = ["CodaLayerArgmaxConfig", "CodaLayerArgmaxPool", "CodaPool", "CodaPromptConfig"]

register_prompt_method("coda", CodaPromptConfig, CodaPool)
register_prompt_method("coda_layer_argmax", CodaLayerArgmaxConfig, CodaLayerArgmaxPool)
