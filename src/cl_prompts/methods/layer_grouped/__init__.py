"""Layer-grouped prompts."""

from cl_prompts.methods.layer_grouped.config import LayerGroupedPromptConfig
from cl_prompts.methods.layer_grouped.pool import LayerGroupedPool


__all__ = ["LayerGroupedPool", "LayerGroupedPromptConfig"]
