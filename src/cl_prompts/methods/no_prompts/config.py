"""The config of the method without prompts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from cl_prompts.methods.config import PromptPoolConfig
from cl_prompts.methods.shared.field_checks import no_prompt_readout


@dataclass
class NoPromptsConfig(PromptPoolConfig):
    """A classifier on the frozen, un-prompted features: a baseline for every prompt method.

    With head="linear" it is sequential training of a linear classifier; with head="ridge", RanPAC without its first-session
    adaptation (McDonnell et al., NeurIPS 2023); with head="discriminant", FeCAM's setting (Goswami et al., NeurIPS 2023).
    Features do not change, so a closed-form head needs to see each image once.
    """

    method: str = "none"

    papers: ClassVar[tuple[str, ...]] = ("https://arxiv.org/abs/2307.02251",)
    has_keys: ClassVar[bool] = False
    selects: ClassVar[bool] = False
    trains_prompts: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        no_prompt_readout(self)
        if self.diversity_weight:
            raise ValueError(f"diversity_weight={self.diversity_weight}: there are no prompts; leave it at 0")
