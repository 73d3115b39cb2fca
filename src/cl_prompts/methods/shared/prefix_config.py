"""Fields that methods with key/value prefixes share."""

from __future__ import annotations

from dataclasses import dataclass

from cl_prompts.methods.config import PromptPoolConfig
from cl_prompts.methods.shared.field_checks import choice, flag, no_prompt_readout, not_negative


@dataclass
class PrefixPromptConfig(PromptPoolConfig):
    """Base of methods whose prompts are key/value prefixes inside attention.

    Args:
        prefix_space: "projected" (keys and values are learned behind the frozen projections, as all published code does)
            or "input" (prompts go through them, as the formulas read).
    """

    prefix_space: str = "projected"

    def __post_init__(self) -> None:
        super().__post_init__()
        choice(self, "prefix_space", ("projected", "input"))
        no_prompt_readout(self)


@dataclass
class QueriedPrefixConfig(PrefixPromptConfig):
    """Base of prefix methods that compare a query with keys, in two passes or in one.

    One stage is OS-Prompt's: Kim et al., "One-stage Prompt-based Continual Learning", ECCV 2024.

    Args:
        one_stage: the query of a layer is the CLS token that enters it (the tokens' mean where there is no CLS), without
            gradient; there is no un-prompted pass, and inference costs one pass.
        query_regularization: OS-Prompt++'s lambda, in training: pulls each layer's selection towards that of the
            un-prompted CLS feature, lambda * sum over layers |softmax(cos(q_l, K_l)) - softmax(cos(r, K_l))|^2 (published
            1e-4). Training then runs the un-prompted pass, inference does not.
    """

    one_stage: bool = False
    query_regularization: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        flag(self, "one_stage")
        not_negative(self, "query_regularization")
        if self.query_regularization and not self.one_stage:
            raise ValueError(
                f"query_regularization={self.query_regularization} regularises one-stage queries: set one_stage=True, or "
                "leave it at 0"
            )
