"""The config of VPT-NSP2."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from cl_prompts.methods.config import LAYER_INITS, PromptPoolConfig
from cl_prompts.methods.shared.field_checks import check_layers, choice, no_prompt_readout, not_negative, positive, share


@dataclass
class VPTNSP2Config(PromptPoolConfig):
    """VPT-NSP2: prompts in every block, whose steps are projected onto the null space of earlier tasks' features.

    Lu et al., "Visual Prompt Tuning in Null Space for Continual Learning", NeurIPS 2024. Defaults are those of the released
    code (zugexiaodui/VPTinNSforCL) for CIFAR-100 in ten tasks: Adam, learning rate 0.01, weight decay 5e-5. Twenty tasks:
    loss_temperature 25, eta 0.95; ImageNet-R: 30, 0.94; DomainNet: 30, 0.95.

    The images of each task are read once more after its training (`model.consolidate(images)`), and training must call
    `model.attach_optimizer(optimizer)`. With `save_statistics`, the default here, a file has the matrices that further
    tasks need, 4 * D * D bytes a layer.

    Args:
        prompt_length: number L of prompt tokens of a block.
        layers: prompted blocks, from 0; None: all.
        prompt_init: as in `L2PConfig`.
        eta1: weight of the null space of the features in the projection of steps; the identity has the rest.
        eta2: the same for the null space of the attention on the prompts.
        distribution_weight: weight of the terms that keep mean and standard deviation of each prompt.
    """

    method: str = "vpt_nsp2"
    prompt_length: int = 4
    layers: list[int] | None = None
    prompt_init: str = "uniform"
    eta1: float = 0.97
    eta2: float = 0.97
    distribution_weight: float = 1.0
    loss_temperature: float = 28.0
    save_statistics: bool = True

    papers: ClassVar[tuple[str, ...]] = ("https://arxiv.org/abs/2406.05658",)
    has_keys: ClassVar[bool] = False
    selects: ClassVar[bool] = False
    needs_optimizer: ClassVar[bool] = True
    freezes_old_rows: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, "prompt_length")
        choice(self, "prompt_init", LAYER_INITS)
        share(self, "eta1", "eta2")
        not_negative(self, "distribution_weight")
        no_prompt_readout(self)
        if self.layers is not None:
            check_layers(self)
        if self.diversity_weight:
            raise ValueError(f"diversity_weight={self.diversity_weight}: vpt_nsp2 has one prompt; leave it at 0")
