"""The config of layer-grouped prompts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from cl_prompts.methods.config import INITS
from cl_prompts.methods.shared.field_checks import check_layers, choice, not_negative, positive, scales_logits
from cl_prompts.methods.shared.prefix_config import PrefixPromptConfig


@dataclass
class LayerGroupedPromptConfig(PrefixPromptConfig):
    """Layer-grouped prompts: a task's prompts are generated from one root prompt, with one generator per group of layers.

    Jiang et al., "Teaching Prompts to Coordinate: Hierarchical Layer-Grouped Prompt Tuning", arXiv 2511.12090. Our reading
    of its abstract and of summaries: no code is public, and we do not have its equations. These state the grouping, the
    root of length 10 and its initialization, generators carried over between tasks, a position embedding per layer, and
    soft task matching at test. All other fields and defaults are ours. With the defaults a task of ViT-B/16 has fewer
    parameters than a prompt in each of 12 layers (108,336 against 184,320), as the paper says of its method.

    Args:
        prompt_length: number of keys, and of values, of the root prompt and of every layer's prompt.
        num_groups: number of groups of consecutive `layers`. Their sizes differ by at most one; larger groups come first.
            Ours.
        layers: blocks that get prefixes, from 0; None: all. Ours.
        bottleneck: width of the hidden layer of a group's generator. Ours.
        prompt_init: initial values of the first task's root, as in `L2PConfig`. Published: Gaussian; its std is ours.
        generator_init: initial values of the generators' up-projections, as in `L2PConfig`. With "zeros" a new generator is
            the identity. Ours.
        position_init: initial values of the position embeddings, as in `L2PConfig`. Ours.
        key_init: initial values of each task's key, as in `L2PConfig`. Ours.
        temperature: tau; at test the prompts of all tasks are mixed with weights softmax(cosine(query, key) / tau). Ours.
        pull_coefficient: lambda, weight of the cosine between the query and the current task's key. Ours.
    """

    method: str = "layer_grouped"
    prompt_length: int = 10
    num_groups: int = 3
    layers: list[int] | None = None
    bottleneck: int = 16
    prompt_init: str = "normal"
    generator_init: str = "zeros"
    position_init: str = "zeros"
    key_init: str = "uniform"
    temperature: float = 0.1
    pull_coefficient: float = 1.0

    papers: ClassVar[tuple[str, ...]] = ("https://arxiv.org/abs/2511.12090",)
    selects: ClassVar[bool] = False  # training uses the current task's prompt

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, "prompt_length", "num_groups", "bottleneck")
        if self.layers is not None:
            check_layers(self)
        for name in ("prompt_init", "generator_init", "position_init", "key_init"):
            choice(self, name, INITS)
        scales_logits(self, "temperature")
        not_negative(self, "pull_coefficient")
