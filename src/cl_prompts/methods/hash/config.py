"""The config of Hash."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from cl_prompts.methods.config import LAYER_INITS
from cl_prompts.methods.shared.field_checks import (
    check_layers,
    check_top_k,
    choice,
    flag,
    not_negative,
    positive,
    scales_logits,
    splits_in_two,
)
from cl_prompts.methods.shared.task_inference_config import TaskInferenceConfig


@dataclass
class HashPromptConfig(TaskInferenceConfig):
    """Hash: one pool of prompts for all tasks, a router per task, and a history of how often prompts were used.

    Li et al., "Is Parameter Isolation Better for Prompt-Based Continual Learning?" (History-Aware prompt-SHaring), CVPR
    2026, arXiv 2601.20894. No code is public, and the paper does not state most sizes, the input of the router and which
    router is used at test. Those fields are our reading, and their defaults are ours, chosen on held-out training images
    (docs/results.md): pool sizes 10 to 40, delta 0.03 to 0.3 and the router at test made no difference (62.3 to 63.4, one
    seed); beta did (0.1: 63.4, 0.5: 65.4, no HGM: 66.4). As the formula stands (`router_scale=1`, `relative_delta=False`),
    trained routers mix four prompts evenly and choose nearly the same ones for all images.

    Args:
        pool_size: number of prompts M of a layer's pool. Ours.
        prompt_length: rows of one prompt; the first half is keys, the second half is values. Ours.
        top_k: number of prompts that are mixed for an image. Ours.
        layers: blocks that get prefixes, from 0. The paper's default is blocks 1-4.
        share_layers: one pool for all layers instead of one per layer. Ours.
        prompt_init: as in `L2PConfig`, or "lower_layer": each layer's prompts are those of the layer below plus noise.
            Ours.
        router_init: a new task's router starts as a copy of the "previous" one, or from "normal" noise (std 0.02). Ours.
        router_input: what a router reads: "block" (the block's input), or "normed" (its tokens after a layer norm without
            weights). Ours.
        router_scale: factor of the routing scores before the penalty; larger ones make the mixing weights less even. Ours.
        learn_router_scale: train that factor, one for each layer and task, from `router_scale` on. Ours.
        router_inference: router used at test. "average": the mean score of all routers. "prototype": the router of the task
            whose class statistics fit the un-prompted feature best (`task_statistics`). "confidence": one pass with each
            router; the most confident answer is taken. "last": the newest router. Ours.
        hdr: form of the routing penalty phi(H): "constant" (delta for the `history_top` most activated prompts; the
            paper's default), "log" delta * log(1 + H), "power" delta * H^alpha, or "none".
        delta: size of the routing penalty. Ours.
        relative_delta: delta is in units of the range of the image's scores, as SMoPE's epsilon. Ours.
        alpha: exponent of the "power" form. Ours.
        history_top: size of the most-activated set A_t. Ours.
        hgm: form of the update factor psi(H): "constant" (beta for the set A_t; the paper's default), "reciprocal"
            1 / (1 + zeta H), "exponential" exp(-zeta H), or "none".
        beta: factor of the "constant" form, in (0, 1]. Ours; 0.5 was chosen over 0.1 on held-out images.
        zeta: rate of the other two forms, and weight of `modulate="quadratic"`. Ours.
        modulate: what psi scales. "update": the optimizer's step (exact under Adam, in which a constant factor on a
            gradient cancels). "gradient": the gradient, as in the text. "quadratic": nothing; the loss term
            zeta / 2 * sum_e H_e |theta_e - theta_e^t|^2 is added instead.
        history_update: when counts enter the routing penalty: at the end of their "task", or with each "step", so that the
            penalty of a task has its own counts too. Updates (HGM) have those of earlier tasks. Ours.
        history_decay: factor on a task's counts for each later task; 1.0 is the paper's sum. With smaller values, prompts
            that were used only by early tasks are penalized less. Ours.
    """

    method: str = "hash"
    pool_size: int = 20
    prompt_length: int = 10
    top_k: int = 4
    layers: list[int] = field(default_factory=lambda: [0, 1, 2, 3])
    share_layers: bool = False
    prompt_init: str = "uniform"
    router_init: str = "previous"
    router_input: str = "block"
    router_scale: float = 10.0
    learn_router_scale: bool = False
    router_inference: str = "average"
    hdr: str = "constant"
    delta: float = 0.1
    relative_delta: bool = True
    alpha: float = 0.5
    history_top: int = 4
    hgm: str = "constant"
    beta: float = 0.5
    zeta: float = 0.01
    modulate: str = "update"
    history_update: str = "task"
    history_decay: float = 1.0

    papers: ClassVar[tuple[str, ...]] = ("https://arxiv.org/abs/2601.20894",)
    has_keys: ClassVar[bool] = False
    older_values: ClassVar[dict[str, Any]] = {"router_scale": 1.0, "relative_delta": False}
    infers_task_by: ClassVar[tuple[str, str] | None] = ("router_inference", "prototype")

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, "pool_size", "prompt_length", "top_k", "history_top")
        choice(self, "prompt_init", LAYER_INITS)
        choice(self, "router_init", ("previous", "normal"))
        choice(self, "router_input", ("block", "normed"))
        choice(self, "history_update", ("task", "step"))
        scales_logits(self, "router_scale")
        choice(self, "router_inference", ("average", "prototype", "confidence", "last"))
        choice(self, "hdr", ("constant", "log", "power", "none"))
        choice(self, "hgm", ("constant", "reciprocal", "exponential", "none"))
        choice(self, "modulate", ("update", "gradient", "quadratic"))
        not_negative(self, "delta", "alpha", "zeta", "beta", "history_decay")
        flag(self, "share_layers", "learn_router_scale", "relative_delta")
        check_top_k(self)
        check_layers(self)
        splits_in_two(self, "prompt_length")
        if self.history_top > self.pool_size:
            raise ValueError(f"history_top={self.history_top} is larger than pool_size={self.pool_size}")
        if not 0 < self.beta <= 1:
            raise ValueError(f"beta={self.beta} must lie in (0, 1]: 1 does not change updates")
        if not 0 <= self.history_decay <= 1:
            raise ValueError(f"history_decay={self.history_decay} must lie in [0, 1]")

    @property
    def needs_optimizer(self) -> bool:  # type: ignore[override]
        """Whether training must call `attach_optimizer`, because steps are scaled."""
        return self.hgm != "none" and self.modulate == "update"
