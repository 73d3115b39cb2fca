"""The config of HiDe-Prompt."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from cl_prompts.methods.config import LAYER_INITS
from cl_prompts.methods.shared.field_checks import check_layers, choice, not_negative, positive, scales_logits
from cl_prompts.methods.shared.task_inference_config import TaskInferenceConfig


@dataclass
class HiDePromptConfig(TaskInferenceConfig):
    """HiDe-Prompt's prompted stage: one prompt per task, without keys, and a contrastive loss term on the features.

    Wang et al., "Hierarchical Decomposition of Prompt-Based Continual Learning: Rethinking Obscured Sub-optimality",
    NeurIPS 2023. Defaults are those of the released code (thu-ml/HiDe-Prompt) for CIFAR-100, which trains the head with a
    tenth of the prompts' learning rate: `parameter_groups(learning_rate, head=0.1 * learning_rate)`.

    Args:
        prompt_length: number of keys, and of values, of a prompt. ImageNet-R: 20.
        layers: blocks that get prefixes, from 0.
        prompt_init: as in `L2PConfig`, or "lower_layer" (`HashPromptConfig`).
        task_init: a task's prompt starts as a copy of the "previous" one (released code) or "fresh".
        prompt_momentum: tau in [0, 1]; the prompt of a task is (1 - tau) * its own values + tau * the mean of the earlier
            tasks' prompts, in training and afterwards.
        contrastive_weight: weight of the contrastive term. ImageNet-R: 0.5.
        temperature: divides the dot products of the contrastive term.
        ensemble: at test, average the class probabilities with the prompts of this many nearest tasks; 1 is the paper. Each
            costs a pass. Ours.
    """

    method: str = "hide"
    prompt_length: int = 5
    layers: list[int] = field(default_factory=lambda: [0, 1, 2, 3, 4])
    prompt_init: str = "uniform"
    task_init: str = "previous"
    prompt_momentum: float = 0.01
    contrastive_weight: float = 0.1
    temperature: float = 0.8
    ensemble: int = 1

    papers: ClassVar[tuple[str, ...]] = ("https://arxiv.org/abs/2310.07234",)
    has_keys: ClassVar[bool] = False
    selects: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, "prompt_length", "ensemble")
        check_layers(self)
        choice(self, "prompt_init", LAYER_INITS)
        choice(self, "task_init", ("previous", "fresh"))
        not_negative(self, "prompt_momentum", "contrastive_weight")
        scales_logits(self, "temperature")
        if self.prompt_momentum > 1:
            raise ValueError(f"prompt_momentum={self.prompt_momentum} must lie in [0, 1]: 0 uses no earlier prompts")
        if self.readout == "cls_mean":
            raise ValueError('readout="cls_mean": the contrastive term compares features of width D; use "cls" or "mean"')
