"""The methods, one file each. Importing this package fills `POOLS`, method name -> pool class."""

from cl_prompts.pools import (
    coda,
    dualprompt,
    hash,
    hide,
    l2p,
    l2p_prefix,
    layer_grouped,
    no_prompts,
    norga,
    smope,
    vpt,
    vq_prompt,
)
from cl_prompts.pools.base import POOLS, Observation, PromptPool


__all__ = [
    "POOLS",
    "Observation",
    "PromptPool",
    "coda",
    "dualprompt",
    "hash",
    "hide",
    "l2p",
    "l2p_prefix",
    "layer_grouped",
    "no_prompts",
    "norga",
    "smope",
    "vpt",
    "vq_prompt",
]
