"""The config of OnePrompt."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from cl_prompts.methods.config import LAYER_INITS
from cl_prompts.methods.shared.field_checks import check_layers, choice, positive, splits_in_two
from cl_prompts.methods.shared.prefix_config import PrefixPromptConfig


@dataclass
class OnePromptConfig(PrefixPromptConfig):
    """OnePrompt: one set of prefixes for all tasks and images. With `outlier_epochs` it is OVOR.

    Huang et al., "OVOR: OnePrompt with Virtual Outlier Regularization for Rehearsal-Free Class-Incremental Learning", ICLR
    2024. Defaults are those of the released code (jpmorganchase/ovor) without the regularization, which any method can use.

    Args:
        g_layers: blocks with prefixes of `g_length` rows, from 0.
        e_layers: blocks with prefixes of `e_length` rows. The two differ in length only.
        g_length: rows of a prefix in `g_layers`; the first half is keys, the second half is values.
        e_length: rows of a prefix in `e_layers`.
        prompt_init: as in `L2PConfig`, for each of the two.
    """

    method: str = "one_prompt"
    g_layers: list[int] = field(default_factory=lambda: [0, 1])
    e_layers: list[int] = field(default_factory=lambda: [2, 3, 4])
    g_length: int = 10
    e_length: int = 40
    prompt_init: str = "unit_uniform"

    papers: ClassVar[tuple[str, ...]] = ("https://arxiv.org/abs/2402.04129",)
    has_keys: ClassVar[bool] = False
    selects: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, "g_length", "e_length")
        splits_in_two(self, "g_length", "e_length")
        check_layers(self, "g_layers", "e_layers")
        choice(self, "prompt_init", LAYER_INITS)
        both = sorted(set(self.g_layers) & set(self.e_layers))
        if both:
            raise ValueError(f"blocks {both} are in g_layers and in e_layers: give each block one prefix")
        if self.diversity_weight:
            raise ValueError(f"diversity_weight={self.diversity_weight}: one_prompt has one prompt; leave it at 0")
