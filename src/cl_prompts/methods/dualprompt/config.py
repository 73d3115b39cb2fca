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
        g_layers: blocks with G-prompts, from 0; []: only E-prompts (ablation).
        e_layers: blocks with E-prompts, from 0; []: only G-prompts (ablation), then there is neither a query nor a key. No
            block may be in both.
        g_length: number of keys, and of values, of a G-prompt. With `split` or tokens, number of its rows.
        e_length: number of keys, and of values, of an E-prompt (paper: 20). With `split` or tokens, number of its rows.
        prompt_form: "prefix" (keys and values of the blocks), or "tokens": one G-prompt and one E-prompt are tokens in
            front of the sequence, [P_G; P_E; x], without a position embedding, and pass all blocks. They enter at block 0,
            so `g_layers` and `e_layers` become [0] unless they are empty. `readout="prompt"` reads their outputs.
        freeze_g: G-prompts are trained in the first task only; without tasks (`num_labels`) always. Ours.
        separation_weight: weight of the squared covariances between the rows of the G-prompts and of the current task's
            E-prompts, each over the D numbers of a row, averaged over the pairs of rows (L_separation). 0 is the paper.
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
    prompt_form: str = "prefix"
    freeze_g: bool = False
    separation_weight: float = 0.0
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
        choice(self, "prompt_form", ("prefix", "tokens"))
        check_layers(self, "g_layers", "e_layers", empty=True)
        if self.prompt_form == "tokens":
            self._check_tokens()
        else:
            both = sorted(set(self.g_layers) & set(self.e_layers))
            if both:
                raise ValueError(
                    f"blocks {both} are in g_layers and in e_layers: a block has either G-prompts or E-prompts"
                )
        if not self.g_layers and not self.e_layers:
            raise ValueError(
                'g_layers=[] and e_layers=[] leave no prompt: name blocks for one of them, or use method="none"'
            )
        positive(self, "g_length", "e_length", "ensemble")
        flag(self, "split", "keys_per_layer", "freeze_g")
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
        not_negative(self, "separation_weight")
        if not self.e_layers:
            self._check_only_g()
        if not self.g_layers and self.freeze_g:
            raise ValueError("freeze_g=True, but g_layers=[] leaves no G-prompt to freeze: set freeze_g=False")
        if self.separation_weight and not (self.g_layers and self.e_layers):
            raise ValueError(
                f"separation_weight={self.separation_weight} separates G-prompts from E-prompts: leave it at 0, or give "
                "both of them blocks"
            )

    def _check_tokens(self) -> None:
        for name, default in (("g_layers", [0, 1]), ("e_layers", [2, 3, 4])):
            layers = getattr(self, name)
            if layers not in ([], [0], default):
                raise ValueError(
                    f'{name}={layers}: with prompt_form="tokens" prompts enter at block 0; give [0], or [] for none'
                )
            setattr(self, name, [0] if layers else [])
        for name in ("split", "keys_per_layer", "one_stage"):
            if getattr(self, name):
                raise ValueError(f'{name}=True is for prefixes: leave it at False, or set prompt_form="prefix"')
        if self.prefix_space != "projected":
            raise ValueError(f'prefix_space={self.prefix_space!r} is for prefixes: leave it at "projected" with tokens')

    def _check_only_g(self) -> None:
        """Without E-prompts nothing is selected, and the fields of selection must be left alone."""
        for name, neutral in (
            ("ensemble", 1),
            ("one_stage", False),
            ("keys_per_layer", False),
            ("task_inference", "keys"),
        ):
            if getattr(self, name) != neutral:
                raise ValueError(
                    f"{name}={getattr(self, name)!r} needs E-prompts, and e_layers=[] leaves none: leave it at {neutral!r}"
                )

    @property
    def inserts_tokens(self) -> bool:
        """With `prompt_form="tokens"`."""
        return self.prompt_form == "tokens"

    @property
    def has_keys(self) -> bool:  # type: ignore[override]
        """Whether prompts have keys: E-prompts do."""
        return bool(self.e_layers)

    @property
    def selects(self) -> bool:  # type: ignore[override]
        """Whether a score selects among prompts: among E-prompts."""
        return bool(self.e_layers)
