"""Embeddings and blocks below the lowest prompt run once for both passes.

They are frozen, in eval mode and get the same images in both passes, so the prompted pass takes their outputs from the
un-prompted one. Their `forward` is replaced once, when the hooks are installed; whether it runs the module or returns an
earlier output is decided by the plan of the pass.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor, nn

from cl_prompts.backbones.attention_products import forward_with_prefix
from cl_prompts.backbones.plan import PassPlan, Reuse, running_plan
from cl_prompts.backbones.structure import Structure


EMBEDDINGS = -1  # position of the embeddings module; blocks count from 0


def forward_or_reuse(module: Any, *args: Any, **kwargs: Any) -> Any:
    """The forward of an embeddings module or block: the output that the plan reuses, else that of the module."""
    plan, position = running_plan(), module._cl_position
    if plan is not None and plan.reuse is not None:
        reuse = plan.reuse
        if position == EMBEDDINGS and reuse.embeddings is not None:
            return reuse.embeddings
        if 0 <= position == reuse.below - 1:
            return reuse.lower_blocks
        if 0 <= position < reuse.below:
            hidden: Tensor = args[0] if args else kwargs["hidden_states"]
            return (hidden,) if isinstance(reuse.lower_blocks, tuple) else hidden
    output = type(module).forward(module, *args, **kwargs)
    if plan is not None and plan.keep_below is not None:
        if position == EMBEDDINGS:
            plan.record.embeddings = output
        elif position == plan.keep_below - 1:
            plan.record.lower_blocks = output
    return output


def install(model: nn.Module, structure: Structure) -> list[nn.Module]:
    """Replace the forward of embeddings and blocks, except where it is replaced already; returns these modules."""
    modules = [_embeddings(model, structure), *(model.get_submodule(name) for name in structure.blocks)]
    replaced = []
    for position, module in enumerate(modules, EMBEDDINGS):
        if "forward" not in vars(module):
            module._cl_position = position  # type: ignore[assignment]
            module.forward = partial(forward_or_reuse, module)
            replaced.append(module)
    return replaced


def uninstall(modules: list[nn.Module]) -> None:
    """Give the modules their own forward back."""
    for module in modules:
        if is_own_forward(module):
            del module.forward
        del module._cl_position


def is_own_forward(module: nn.Module) -> bool:
    """Whether the instance's `forward` is the one that `install` sets."""
    return getattr(vars(module).get("forward"), "func", None) is forward_or_reuse


def runs_as_defined(module: nn.Module) -> bool:
    """Whether nobody else has replaced a module's forward, as Accelerate and `torch.compile` do."""
    function = getattr(vars(module).get("forward"), "func", None)
    return "forward" not in vars(module) or function in (forward_or_reuse, forward_with_prefix)


def unprompted_blocks(model: nn.Module, structure: Structure, lowest: int) -> int:
    """How many blocks both passes compute alike.

    Args:
        model: the base model.
        structure: where its parts are.
        lowest: number of the lowest prompted block.

    Returns:
        `lowest`, or 0 where something below that block is trained, compiled or hooked.
    """
    behind = {id(p) for name in structure.blocks[lowest:] for p in model.get_submodule(name).parameters()}
    backbone = model.get_submodule(structure.inner)
    trained = any(p.requires_grad and id(p) not in behind for p in backbone.parameters())
    lower = [model.get_submodule(name) for name in structure.blocks[:lowest]]
    replaced = not runs_as_defined(model) or not all(is_own_forward(block) for block in lower)
    return 0 if trained or replaced else lowest


def shares_embeddings(model: nn.Module, structure: Structure) -> bool:
    """Whether the embeddings are frozen, and neither they nor the model compiled or hooked."""
    embeddings = _embeddings(model, structure)
    trained = any(p.requires_grad for p in embeddings.parameters())
    as_defined = all(runs_as_defined(module) for module in (model, *embeddings.modules()))
    return not trained and as_defined and is_own_forward(embeddings)


def reuse_of(plan: PassPlan, *, embeddings: bool) -> Reuse:
    """What the pass of a plan with `keep_below` has kept, for the next pass over the same images."""
    assert plan.keep_below is not None
    record = plan.record
    return Reuse(plan.keep_below, record.embeddings if embeddings else None, record.lower_blocks)


def reuse_of_states(hidden: Any, model: nn.Module, structure: Structure, lowest: int, images: int) -> Reuse | None:
    """What a prompted pass reuses of hidden states that a caller has kept.

    Args:
        hidden: hidden states [B, N, D] behind the blocks below the lowest prompted one; None: nothing is reused.
        model: the base model.
        structure: where its parts are.
        lowest: number of the lowest prompted block.
        images: number of images of the pass.

    Raises:
        ValueError: there is no block to leave out, or the states are not those of as many images.
    """
    if hidden is None:
        return None
    below = unprompted_blocks(model, structure, lowest) if lowest else 0
    if not below:
        raise ValueError("lower_blocks: prompts enter this model at its first block, so that all blocks run: leave it out")
    if not isinstance(hidden, Tensor) or hidden.dim() != 3 or len(hidden) != images:
        shape = list(hidden.shape) if isinstance(hidden, Tensor) else type(hidden).__name__
        raise ValueError(f"lower_blocks is {shape}, expected [{images}, tokens, width] from extract_lower_blocks")
    return Reuse(below, None, hidden.detach())


def _embeddings(model: nn.Module, structure: Structure) -> nn.Module:
    return model.get_submodule(structure.embeddings)
