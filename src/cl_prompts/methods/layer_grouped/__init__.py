"""Layer-grouped prompts."""

from cl_prompts.methods.layer_grouped.config import LayerGroupedPromptConfig
from cl_prompts.methods.layer_grouped.pool import LayerGroupedPool
from cl_prompts.methods.registry import register_prompt_method


__all__ = ["LayerGroupedPool", "LayerGroupedPromptConfig"]

register_prompt_method("layer_grouped", LayerGroupedPromptConfig, LayerGroupedPool)
