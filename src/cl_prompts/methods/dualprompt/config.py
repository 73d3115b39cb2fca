"""The config of DualPrompt."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from cl_prompts.methods.config import INITS, LAYER_INITS
from cl_prompts.methods.shared.field_checks import check_layers, choice, flag, not_negative, positive, splits_in_two
from cl_prompts.methods.shared.prefix_config import QueriedPrefixConfig
from cl_prompts.methods.shared.task_inference_config import TaskInferenceConfig


@dataclass
class DualPromptConfig(QueriedPrefixConfig, TaskInferenceConfig):
    """DualPrompt: G-prompts for all tasks in some layers, one E-prompt per task in others.

    Wang et al., "DualPrompt: Complementary Prompting for Rehearsal-free Continual Learning", ECCV 2022. Defaults are those
    of the released code for CIFAR-100 (google-research/l2p and JH-LEE-KR/dualprompt-pytorch), without its vote over the
    batch. Every `begin_task` adds an E-prompt, so the number of tasks is not fixed and no two tasks share one.

    Args:
        g_layers: blocks with G-prompts, from 0.
        e_layers: blocks with E-prompts, from 0. No block may be in both.
        g_length: number of keys, and of values, of a G-prompt. With `split`, number of its rows.
        e_length: number of keys, and of values, of an E-prompt (paper: 20). With `split`, number of its rows.
        split: split a prompt's rows along its length: the first half is keys, the second half is values (CODA-Prompt's
            repository, with g_length 6 and e_length 20).
        keys_per_layer: each E-layer has its own key per task (CODA-Prompt's repository) instead of one key for all.
        prompt_init: as in `L2PConfig`.
        key_init: as in `L2PConfig`.
        task_init: a task's E-prompt starts as a copy of the "previous" one (released code) or "fresh", by `prompt_init`.
            Keys start fresh.
        pull_coefficient: lambda, weight of the key loss.
        key_loss: "similarity" -lambda * cosine, mean over images (released), or "distance" lambda * (1 - cosine), summed
            over layers and batch (CODA-Prompt's repository).
        task_inference: which task's E-prompt is used at test. "keys": that of the nearest key (the paper). "prototype":
            that of the task whose class statistics fit the un-prompted feature best (`task_statistics`; after HiDe-Prompt).
            Training is the same, keys included. Ours.
        ensemble: at test, average the class probabilities of this many nearest E-prompts; 1 is the paper. Each costs a
            pass. Ours.
    """

    method: str = "dualprompt"
    g_layers: list[int] = field(default_factory=lambda: [0, 1])
    e_layers: list[int] = field(default_factory=lambda: [2, 3, 4])
    g_length: int = 5
    e_length: int = 5
    split: bool = False
    keys_per_layer: bool = False
    prompt_init: str = "uniform"
    key_init: str = "uniform"
    task_init: str = "previous"
    pull_coefficient: float = 1.0
    key_loss: str = "similarity"
    task_inference: str = "keys"
    ensemble: int = 1

    papers: ClassVar[tuple[str, ...]] = ("https://arxiv.org/abs/2204.04799",)
    infers_task_by: ClassVar[tuple[str, str] | None] = ("task_inference", "prototype")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_layers(self, "g_layers", "e_layers")
        both = sorted(set(self.g_layers) & set(self.e_layers))
        if both:
            raise ValueError(f"blocks {both} are in g_layers and in e_layers: a block has either G-prompts or E-prompts")
        positive(self, "g_length", "e_length", "ensemble")
        flag(self, "split", "keys_per_layer")
        if self.split:
            splits_in_two(self, "g_length", "e_length")
        choice(self, "prompt_init", LAYER_INITS)
        choice(self, "key_init", INITS)
        choice(self, "task_init", ("previous", "fresh"))
        choice(self, "key_loss", ("similarity", "distance"))
        choice(self, "task_inference", ("keys", "prototype"))
        if self.infers_task and self.one_stage:
            raise ValueError(
                'task_inference="prototype" reads the un-prompted pass, which one_stage=True leaves out: choose one of them'
            )
        not_negative(self, "pull_coefficient")
