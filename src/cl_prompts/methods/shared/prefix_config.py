"""Config fields of methods with key/value prefixes."""

from __future__ import annotations

from dataclasses import dataclass

from cl_prompts.methods.config import PromptPoolConfig
from cl_prompts.methods.shared.field_checks import choice, flag, no_prompt_readout, not_negative


@dataclass
class PrefixPromptConfig(PromptPoolConfig):
    """Base of methods whose prompts are key/value prefixes inside attention.

    Args:
        prefix_space: "projected" (learned keys and values are used after the frozen projections, as in all published code)
            or "input" (prompts are projected by them, as in the formulas).
    """

    prefix_space: str = "projected"

    @property
    def inserts_tokens(self) -> bool:
        """Whether prompts are tokens of the sequence, whose outputs the classifier may read."""
        return False

    def __post_init__(self) -> None:
        super().__post_init__()
        choice(self, "prefix_space", ("projected", "input"))
        if not self.inserts_tokens:
            no_prompt_readout(self)


@dataclass
class QueriedPrefixConfig(PrefixPromptConfig):
    """Base of prefix methods that compare a query with keys, in two passes or in one stage.

    One stage is OS-Prompt's: Kim et al., "One-stage Prompt-based Continual Learning", ECCV 2024.

    Args:
        one_stage: the query of a layer is the CLS token of its input (the mean of the tokens without a CLS), without
            gradient. There is no un-prompted pass, so inference costs one pass.
        layer_query: in one stage, the query is the "cls" token of the layer's input or the "mean" of its tokens. Ours.
        query_regularization: lambda of OS-Prompt++, in training: the term lambda * sum over layers
            |softmax(cos(q_l, K_l)) - softmax(cos(r, K_l))|^2 with the un-prompted CLS feature r (published: 1e-4). Training
            then runs the un-prompted pass; inference does not.
    """

    one_stage: bool = False
    layer_query: str = "cls"
    query_regularization: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        flag(self, "one_stage")
        choice(self, "layer_query", ("cls", "mean"))
        if self.layer_query != "cls" and not self.one_stage:
            raise ValueError(
                f'layer_query={self.layer_query!r} is for one-stage queries: set one_stage=True, or query_pooling="mean" '
                "for the mean of the un-prompted pass"
            )
        not_negative(self, "query_regularization")
        if self.query_regularization and not self.one_stage:
            raise ValueError(
                f"query_regularization={self.query_regularization} regularizes one-stage queries: set one_stage=True, or "
                "leave it at 0"
            )
