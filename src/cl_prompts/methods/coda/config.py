"""The configs of CODA-Prompt and of its variant with one component per layer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from cl_prompts.methods.shared.field_checks import check_layers, flag, not_negative, positive, splits_in_two
from cl_prompts.methods.shared.prefix_config import QueriedPrefixConfig


@dataclass
class CodaPromptConfig(QueriedPrefixConfig):
    """CODA-Prompt: the sum of all prompt components, weighted by the query's attention to them.

    Smith et al., "CODA-Prompt: COntinual Decomposed Attention-based Prompting for Rehearsal-Free Continual Learning", CVPR
    2023. Defaults are those of the released scripts: 100 components for ten tasks (10 per task), length 8, blocks 0-4.

    Args:
        components_per_task: components that each task adds to a layer (M / T in the released code).
        prompt_length: rows of a component; the first half is keys, the second half is values.
        layers: blocks that get prefixes, from 0.
        orthogonality_weight: mu (paper 0.1; 0 in the released scripts, which start new components by Gram-Schmidt).
        adaptive_orthogonality: the penalty between components of two tasks is multiplied by 1 - s, where s in [0, 1] is the
            cosine of the tasks' mean queries (0 if negative), so that components of similar tasks may resemble each other.
            The means are saved, D numbers a task. Without tasks (`num_labels`) it changes nothing. Ours.
    """

    method: str = "coda"
    components_per_task: int = 10
    prompt_length: int = 8
    layers: list[int] = field(default_factory=lambda: [0, 1, 2, 3, 4])
    orthogonality_weight: float = 0.0
    adaptive_orthogonality: bool = False

    papers: ClassVar[tuple[str, ...]] = ("https://arxiv.org/abs/2211.13218",)

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, "components_per_task", "prompt_length")
        splits_in_two(self, "prompt_length")
        check_layers(self)
        not_negative(self, "orthogonality_weight")
        flag(self, "adaptive_orthogonality")
        if self.adaptive_orthogonality and not self.orthogonality_weight:
            raise ValueError(
                "adaptive_orthogonality=True weights the penalty, which orthogonality_weight=0 leaves out: set that, for "
                "example to 0.1"
            )
        if self.adaptive_orthogonality and self.one_stage:
            raise ValueError(
                "adaptive_orthogonality=True reads the un-prompted pass, which one_stage=True leaves out: choose one"
            )


@dataclass
class CodaLayerArgmaxConfig(CodaPromptConfig):
    """CODA-Prompt as some texts describe it: each layer uses the one component with the best score for its own CLS token.

    After Smith et al., CVPR 2023, but not the released method; results are not comparable with the paper's. It needs one
    pass. `entropy_weight` is the diversity loss on the selection.
    """

    method: str = "coda_layer_argmax"
    one_stage: bool = True
    entropy_weight: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.one_stage:
            raise ValueError('one_stage=False: the query of coda_layer_argmax is each layer\'s own CLS; use method="coda"')
