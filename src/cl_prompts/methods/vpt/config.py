"""The config of visual prompt tuning."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from cl_prompts.methods.config import INITS, PromptPoolConfig
from cl_prompts.methods.shared.field_checks import check_layers, choice, flag, no_prompt_readout, positive


@dataclass
class VPTConfig(PromptPoolConfig):
    """Visual prompt tuning: one prompt for all tasks, the papers' "single prompt". It protects nothing from forgetting.

    Jia et al., "Visual Prompt Tuning", ECCV 2022. Defaults are those of the released code (KMnP/vpt), whose options of
    dropout and a projection for prompts are not here.

    Args:
        deep: False: prompt tokens join the sequence before block 0 (VPT-shallow). True: every block has prompt tokens of
            its own, in place of the last block's prompt outputs (VPT-deep).
        prompt_length: prompt tokens P, of a block where `deep`. Published: chosen for each data set; 10 is ours.
        layers: blocks with prompt tokens, from 0; None: all. Only with `deep`.
        prompt_init: "xavier" U(-r, r) with r = sqrt(3 / D), or as in `L2PConfig`. Published: r = sqrt(6 / (3 p^2 + D)) for
            patches of p x p pixels, which is the same where 3 p^2 = D, as in ViT-B/16.
        position: where the tokens go, as in `L2PConfig`. Only without `deep`, where no order is seen.
        add_cls_position_embedding: add CLS's position embedding to each token; the released code adds none. Only without
            `deep`. Ours.
    """

    method: str = "vpt"
    deep: bool = False
    prompt_length: int = 10
    layers: list[int] | None = None
    prompt_init: str = "xavier"
    position: str = "after_cls"
    add_cls_position_embedding: bool = False

    papers: ClassVar[tuple[str, ...]] = ("https://arxiv.org/abs/2203.12119",)
    has_keys: ClassVar[bool] = False
    selects: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        flag(self, "deep", "add_cls_position_embedding")
        positive(self, "prompt_length")
        choice(self, "prompt_init", ("xavier", *INITS))
        choice(self, "position", ("after_cls", "front"))
        if self.layers is not None:
            check_layers(self)
            if not self.deep:
                raise ValueError(f"layers={self.layers}: tokens that join before block 0 pass every block; set deep=True")
        if self.deep:
            no_prompt_readout(self)
            if self.position != "after_cls" or self.add_cls_position_embedding:
                raise ValueError(
                    f"position={self.position!r}, add_cls_position_embedding={self.add_cls_position_embedding}: with "
                    'deep=True prompts have no place in the sequence; leave them at "after_cls" and False'
                )
        if self.diversity_weight:
            raise ValueError(f"diversity_weight={self.diversity_weight}: vpt has one prompt; leave it at 0")
