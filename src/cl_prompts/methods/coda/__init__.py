"""CODA-Prompt."""

from cl_prompts.methods.coda.config import CodaLayerArgmaxConfig, CodaPromptConfig
from cl_prompts.methods.coda.pool import CodaLayerArgmaxPool, CodaPool


__all__ = ["CodaLayerArgmaxConfig", "CodaLayerArgmaxPool", "CodaPool", "CodaPromptConfig"]
