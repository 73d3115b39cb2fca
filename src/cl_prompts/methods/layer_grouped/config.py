"""The config of layer-grouped prompts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from cl_prompts.methods.config import INITS
from cl_prompts.methods.shared.field_checks import check_layers, choice, not_negative, positive, positive_number
from cl_prompts.methods.shared.prefix_config import PrefixPromptConfig


@dataclass
class LayerGroupedPromptConfig(PrefixPromptConfig):
    """Layer-grouped prompts: a task's prompts in all layers are made from one root prompt, group of layers by group.

    Jiang et al., "Teaching Prompts to Coordinate: Hierarchical Layer-Grouped Prompt Tuning", arXiv 2511.12090. Our reading
    of its abstract and of summaries: no code is public, and its equations were not at hand. Told are the grouping, the root
    of length 10 and how it starts, generators carried over, a position embedding per layer, and soft task matching at
    test; everything else is a field with a default of ours. With these a task of ViT-B/16 has fewer parameters than a
    prompt in each of 12 layers would have (108,336 to 184,320), as the paper says of itself.

    Args:
        prompt_length: keys, and as many values, of the root prompt, and so of every layer's.
        num_groups: number of groups; each is of consecutive `layers`, sizes differ by at most one, larger groups first.
            Ours.
        layers: blocks that get prefixes, from 0; None: all. Ours.
        bottleneck: width of the hidden layer of a group's generator. Ours.
        prompt_init: how the first task's root starts, as in `L2PConfig`. Published: Gaussian; its width is ours.
        generator_init: how the generators' up-projections start, likewise. With "zeros" a fresh generator changes nothing.
            Ours.
        position_init: how the position embeddings start, likewise. Ours.
        key_init: how every task's key starts, likewise. Ours.
        temperature: tau; at test the tasks' prompts are mixed by softmax(cosine(query, key) / tau). Ours.
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
    selects: ClassVar[bool] = False  # in training an image has its own task's prompt

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, "prompt_length", "num_groups", "bottleneck")
        if self.layers is not None:
            check_layers(self)
        for name in ("prompt_init", "generator_init", "position_init", "key_init"):
            choice(self, name, INITS)
        positive_number(self, "temperature")
        not_negative(self, "pull_coefficient")
