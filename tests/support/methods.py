"""Every method, small enough for the tiny models of families.py (three blocks). A new method adds one line."""

from collections.abc import Callable, Sequence

import pytest
from _pytest.mark import ParameterSet

from cl_prompts import (
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


METHODS: dict[str, Callable[..., PromptPoolConfig]] = {
    "l2p": lambda **more: L2PConfig(top_k=3, **more),
    "hash": lambda **more: HashPromptConfig(pool_size=6, top_k=2, history_top=2, layers=[0, 2], **more),
    "dualprompt": lambda **more: DualPromptConfig(g_layers=[0], e_layers=[1, 2], **more),
    "dualprompt one-stage": lambda **more: DualPromptConfig(
        g_layers=[0], e_layers=[1, 2], one_stage=True, query_regularization=1e-2, ensemble=2, **more
    ),
    "dualprompt prototype": lambda **more: DualPromptConfig(
        g_layers=[0], e_layers=[1, 2], task_inference="prototype", task_statistics="covariance", **more
    ),
    "coda": lambda **more: CodaPromptConfig(components_per_task=3, layers=[0, 2], orthogonality_weight=0.1, **more),
    "coda one-stage": lambda **more: CodaPromptConfig(
        components_per_task=2, layers=[0, 1], one_stage=True, query_regularization=1e-2, **more
    ),
    "coda_layer_argmax": lambda **more: CodaLayerArgmaxConfig(components_per_task=2, layers=[0, 1], **more),
    "l2p_prefix": lambda **more: L2PPrefixConfig(pool_size=5, prompt_length=4, top_k=2, layers=[0, 1], **more),
    "l2p_prefix one-stage": lambda **more: L2PPrefixConfig(
        pool_size=5, prompt_length=4, top_k=2, layers=[0, 1], one_stage=True, **more
    ),
    "vq_prompt": lambda **more: VQPromptConfig(pool_size=5, prompt_length=4, layers=[0, 2], **more),
    "smope": lambda **more: SMoPEConfig(
        pool_size=6, top_k=2, layers=[0, 2], router_weight=1e-2, prototype_weight=1e-2, **more
    ),
    "hide": lambda **more: HiDePromptConfig(layers=[0, 1], **more),
    "layer_grouped": lambda **more: LayerGroupedPromptConfig(num_groups=2, **more),
    "vpt": lambda **more: VPTConfig(prompt_length=3, **more),
    "vpt deep": lambda **more: VPTConfig(deep=True, prompt_length=3, **more),
    "one_prompt": lambda **more: OnePromptConfig(g_layers=[0], e_layers=[1, 2], g_length=4, e_length=6, **more),
    "apt": lambda **more: APTConfig(**more),
    "vpt_nsp2": lambda **more: VPTNSP2Config(prompt_length=3, **more),
    "cpg": lambda **more: CPGConfig(pool_size=5, prompt_length=3, top_k=2, layers=[1, 2], **more),
    "none": lambda **more: NoPromptsConfig(**more),
    "norga": lambda **more: NoRGaConfig(layers=[0, 1], ensemble=2, task_statistics="covariance", **more),
}

# Fields of a method that change what its pool computes or keeps.
VARIANTS: dict[str, Callable[..., PromptPoolConfig]] = {
    "l2p variants": lambda **more: L2PConfig(
        top_k=2, pool_size=4, key_width=6, key_loss="squared_distance", grow_by=2, max_size=7, **more
    ),
    "l2p pools": lambda **more: L2PConfig(top_k=2, pool_size=4, num_pools=2, **more),
    "dualprompt tokens": lambda **more: DualPromptConfig(
        prompt_form="tokens", freeze_g=True, separation_weight=0.1, ensemble=2, **more
    ),
    "dualprompt only G": lambda **more: DualPromptConfig(g_layers=[0, 1], e_layers=[], **more),
    "dualprompt only E": lambda **more: DualPromptConfig(g_layers=[], e_layers=[1, 2], **more),
    "coda adaptive": lambda **more: CodaPromptConfig(
        components_per_task=2, layers=[1], orthogonality_weight=0.1, adaptive_orthogonality=True, **more
    ),
    "l2p_prefix tokens": lambda **more: L2PPrefixConfig(
        pool_size=5, prompt_length=3, top_k=2, layers=[0, 1], one_stage=True, layer_query="mean", as_tokens=True, **more
    ),
}

# What answers instead of the trained head, on any method.
WITH_CLASSIFIER: dict[str, Callable[..., PromptPoolConfig]] = {
    "hash discriminant": lambda **more: HashPromptConfig(
        **{"pool_size": 6, "top_k": 2, "history_top": 2, "layers": [0, 2], "head": "discriminant", "loss_head": "cosine"}
        | more
    ),
    "l2p analytic": lambda **more: L2PConfig(
        **{"top_k": 3, "head": "analytic", "projection_size": 40, "save_statistics": True} | more
    ),
    "coda aligned": lambda **more: CodaPromptConfig(
        **{"components_per_task": 3, "layers": [0, 2], "alignment": "covariance", "save_statistics": True} | more
    ),
    "none analytic": lambda **more: NoPromptsConfig(
        **{"head": "analytic", "projection_size": 40, "save_statistics": True, "readout": "cls_mean"} | more
    ),
}

EVERYWHERE = ("l2p", "hash", "coda")  # tokens, routed prefixes, attended prefixes


def cells(families: Sequence[str]) -> list[ParameterSet]:
    """Methods x families, and the variants on the first family, for `parametrize`.

    One worker has all tests of a cell, so that a model they only read is trained once.
    """
    names = [(method, family) for method in METHODS for family in families] + [(name, families[0]) for name in VARIANTS]
    return [
        pytest.param(method, family, marks=pytest.mark.xdist_group(f"{method}-{family}"), id=f"{method}-{family}")
        for method, family in names
    ]
