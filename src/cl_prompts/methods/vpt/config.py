"""The config of visual prompt tuning."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from cl_prompts.methods.config import INITS, PromptPoolConfig
from cl_prompts.methods.shared.field_checks import check_layers, choice, flag, no_prompt_readout, positive


@dataclass
class VPTConfig(PromptPoolConfig):
    """Visual prompt tuning: one prompt for all tasks, the "single prompt" of papers. Nothing protects it from forgetting.

    Jia et al., "Visual Prompt Tuning", ECCV 2022. Defaults are those of the released code (KMnP/vpt), without its
    options of dropout and of a projection for prompts.

    Args:
        deep: False: prompt tokens are inserted before block 0 (VPT-shallow). True: every block has its own prompt tokens,
            which replace the prompt outputs of the block before (VPT-deep).
        prompt_length: number P of prompt tokens, per block if `deep`. Published: chosen for each data set; 10 is ours.
        layers: blocks with prompt tokens, from 0; None: all. Only with `deep`.
        prompt_init: "xavier" U(-r, r) with r = sqrt(3 / D), or as in `L2PConfig`. Published: r = sqrt(6 / (3 p^2 + D)) for
            patches of p x p pixels, which is the same where 3 p^2 = D, as in ViT-B/16.
        position: where tokens are inserted, as in `L2PConfig`. Only without `deep`, whose tokens have no position.
        add_cls_position_embedding: add CLS's position embedding to each token; the released code does not. Only without
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
                raise ValueError(
                    f"layers={self.layers}: tokens that are inserted before block 0 pass every block; set deep=True"
                )
        if self.deep:
            no_prompt_readout(self)
            if self.position != "after_cls" or self.add_cls_position_embedding:
                raise ValueError(
                    f"position={self.position!r}, add_cls_position_embedding={self.add_cls_position_embedding}: with "
                    'deep=True prompts have no position in the sequence; leave them at "after_cls" and False'
                )
        if self.diversity_weight:
            raise ValueError(f"diversity_weight={self.diversity_weight}: vpt has one prompt; leave it at 0")
