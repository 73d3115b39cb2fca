"""The config of CPG."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from cl_prompts.methods.config import LAYER_INITS, PromptPoolConfig
from cl_prompts.methods.shared.field_checks import (
    check_layers,
    check_top_k,
    choice,
    no_prompt_readout,
    not_negative,
    positive,
    share,
)


@dataclass
class CPGConfig(PromptPoolConfig):
    """CPG: a mixture of experts generates each block's prompts; steps are projected onto the null space of earlier tasks.

    Lu et al., "Training Consistent Mixture-of-Experts-Based Prompt Generator for Continual Learning", AAAI 2025. Defaults
    are those of the released code (zugexiaodui/ConsistentMoEPromptGenerator) for CIFAR-100: Adam, learning rate 0.01,
    weight decay 5e-5. ImageNet-R and DomainNet: loss_temperature 30; DomainNet: top_k 16. The paper's gate noise is an
    option: the released training never runs it.

    The images of each task are read once more after its training (`model.consolidate(images)`), and training must call
    `model.attach_optimizer(optimizer)`. With `save_statistics`, the default here, a file has the matrices that further
    tasks need, 4 * D * D bytes a layer.

    Args:
        pool_size: number of experts M of a block.
        prompt_length: rows L of an expert's prompt.
        top_k: experts that are mixed for an image.
        layers: prompted blocks, from 0; None: all, as released. In block 0 the CLS token is the same for all images.
        prompt_init: initial values of the experts, as in `L2PConfig`.
        router_init: initial values of the gates; released: "zeros".
        balance_weight: weight of the balance losses.
        gate_noise: add noise to the gates in training, with a trained size, and balance the experts' expected loads, as in
            the paper.
        eta1: weight of the null space of the queries in the projection of the gates' steps; the identity has the rest.
        eta2: the same for the experts' steps and the gate values.
    """

    method: str = "cpg"
    pool_size: int = 36
    prompt_length: int = 4
    top_k: int = 4
    layers: list[int] | None = None
    prompt_init: str = "uniform"
    router_init: str = "zeros"
    balance_weight: float = 0.05
    gate_noise: bool = False
    eta1: float = 1.0
    eta2: float = 0.99
    loss_temperature: float = 28.0
    save_statistics: bool = True

    papers: ClassVar[tuple[str, ...]] = ("https://github.com/zugexiaodui/ConsistentMoEPromptGenerator",)
    has_keys: ClassVar[bool] = False
    needs_optimizer: ClassVar[bool] = True
    freezes_old_rows: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, "pool_size", "prompt_length", "top_k")
        check_top_k(self)
        choice(self, "prompt_init", LAYER_INITS)
        choice(self, "router_init", ("zeros", "normal"))
        share(self, "eta1", "eta2")
        not_negative(self, "balance_weight")
        no_prompt_readout(self)
        if self.layers is not None:
            check_layers(self)
