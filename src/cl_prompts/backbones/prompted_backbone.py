"""A frozen transformer that runs plain or prompted: every hook on it, and both passes.

The hooks are put on once and keep nothing between calls. What they do in a pass stands in the `PassPlan` of that pass
(`cl_prompts.backbones.plan`); outside a planned pass they do nothing. Any number of models may therefore share one base, in
any number of threads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

from cl_prompts.backbones import block_hooks, block_info, checkpointing, last_block, quantized, reuse, unmasked
from cl_prompts.backbones.own_arguments import OWN_ARGUMENTS, OwnSignature, with_signature
from cl_prompts.backbones.plan import RUNNING, STARTING, PassPlan, PassRecord, Reuse, RunningPass
from cl_prompts.backbones.prefix import attention_function
from cl_prompts.backbones.readout import read_feature
from cl_prompts.backbones.structure import Structure, find_structure
from cl_prompts.backbones.timm_models import HeldWrapper


_ATTRIBUTE = "_cl_prompted_backbone"


class PromptedBackbone:
    """The hooks on one base model; `PromptedBackbone.of(model, user)` gives those that the model has, or makes them.

    Args:
        model: any supported vision transformer, bare or with a head.

    Attributes:
        structure: where the model's parts are.
        users: who has asked for it, is still alive, and has not released it.
        copied: names of the model's own modules that a user has replaced by copies to train (`modules_to_save`).

    Raises:
        TypeError: the model is not supported.
        ValueError: the model is part of another one that has prompts.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.structure: Structure = find_structure(model)
        self.users: WeakSet[Any] = WeakSet()
        self.copied: list[str] = []
        self._exact: dict[Any, bool] = {}  # whether the last block may be narrowed, by attention function, dtype, device
        self._compiled: Callable[..., Any] | None = None
        if hasattr(model.get_submodule(self.structure.attentions[0]), "_cl_norm"):
            raise ValueError(
                f"the blocks of this {type(model).__name__} already have prompts, as part of another model: wrap that one, "
                "or load the base anew"
            )
        self._install()

    @staticmethod
    def existing(model: nn.Module) -> PromptedBackbone | None:
        """The hooks of a model; None for a model without hooks."""
        return vars(model).get(_ATTRIBUTE)

    @classmethod
    def of(cls, model: nn.Module, user: object) -> PromptedBackbone:
        """The hooks of a model for one more user; see `release`."""
        backbone = cls.existing(model)
        if backbone is None:
            backbone = cls(model)
            setattr(model, _ATTRIBUTE, backbone)
        backbone.users.add(user)
        return backbone

    def release(self, user: object) -> None:
        """One user less; with the last one the hooks leave the model."""
        self.users.discard(user)
        if not self.users and self.existing(self.model) is self:
            self._uninstall()
            delattr(self.model, _ATTRIBUTE)

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles of the model, which cannot hold weak references."""
        return vars(self) | {"users": list(self.users)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state | {"users": WeakSet(state["users"])})

    # ---- hooks -------------------------------------------------------------------------------------------------------

    def _install(self) -> None:
        model, structure = self.model, self.structure
        self._handles: list[Any] = [
            model.register_forward_pre_hook(self._begin_pass, with_kwargs=True),
            model.register_forward_hook(self._end_pass, with_kwargs=True, always_call=True),
            *quantized.install(model),
            OwnSignature(model),
            HeldWrapper(model),
        ]
        self._replaced = reuse.install(model, structure)
        self._unmasked = unmasked.install(model, structure)
        block_info.prepare(model, structure)
        self._block_handles = block_hooks.install(model, structure)
        self._recomputing = checkpointing.recomputing(model, structure)

    def move_hooks_behind(self) -> None:
        """Put the hooks on the blocks behind those that others have put there since."""
        for handle in self._block_handles:
            handle.remove()
        self._block_handles = block_hooks.install(self.model, self.structure)

    def _uninstall(self) -> None:
        for handle in (*self._handles, *self._block_handles):
            handle.remove()
        reuse.uninstall(self._replaced)
        if self._unmasked:
            unmasked.uninstall(self.model, self.structure)
        if self._compiled is not None:
            del self.model.forward
        block_info.restore(self.model, self.structure)

    # ---- passes ------------------------------------------------------------------------------------------------------

    @contextmanager
    def prompted(self, plan: PassPlan, answer: Callable[[bool], Any] | None = None) -> Iterator[None]:
        """Until the block ends, the next forward of the model runs under a plan.

        Args:
            plan: made for this pass.
            answer: what that forward returns in place of the model's output, given whether `return_dict` was asked for;
                called when the pass is done. None: the model's own output.
        """
        checkpointing.keep_plans(self._recomputing)
        checkpointing.refuse_checkpointed_sequence(self.model.get_submodule(self.structure.inner))
        before = STARTING.get(), RUNNING.get()
        STARTING.set(RunningPass(self, plan, answer))
        try:
            yield
        finally:
            STARTING.set(before[0])
            RUNNING.set(before[1])

    @torch.no_grad()
    def features(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], pooling: str, *, keep_below: int | None = None
    ) -> tuple[Tensor, Reuse | None]:
        """The un-prompted pass.

        Args:
            args, kwargs: of the model's forward.
            pooling: which feature, as in `read_feature`.
            keep_below: number of blocks that a prompted pass over the same images need not run again.

        Returns:
            The feature of each image, [B, D] or [B, 2 D], float32, without gradient; and what a prompted pass can reuse,
            None without `keep_below`.
        """
        plan = PassPlan(PassRecord(), read=self.readable(0, 1) if pooling == "cls" else None, keep_below=keep_below)
        with self.prompted(plan):
            self.model(*args, **kwargs)
        feature = read_feature(self.model, self.structure, plan.record, pooling)
        if keep_below is None:
            return feature, None
        return feature, reuse.reuse_of(plan, embeddings=reuse.shares_embeddings(self.model, self.structure))

    @torch.no_grad()
    def patch_embeddings(self, images: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """What enters block 0 for the patches of images, positions included: [patches of all images, D] float32."""
        plan = PassPlan(PassRecord(), keep_block_input=True)
        with self.prompted(plan):
            self.model(pixel_values=images, **kwargs)
        assert plan.record.block_input is not None
        patches = plan.record.block_input[:, self.structure.patches].float()
        real = kwargs.get("pixel_attention_mask")  # SigLIP 2 fills images up to one number of patches
        return patches.flatten(0, 1) if real is None else patches[real.bool()]

    def unprompted_blocks(self, lowest: int) -> int:
        """How many blocks below the lowest prompted one need not run again in a prompted pass."""
        return reuse.unprompted_blocks(self.model, self.structure, lowest) if lowest else 0

    def readable(self, start: int, length: int) -> tuple[int, int] | None:
        """`PassPlan.read` for these tokens; None where the last block must compute all of them."""
        weight = next(self.model.get_submodule(self.structure.blocks[-1]).parameters())
        attention: Any = self.model.get_submodule(self.structure.attentions[-1])
        situation = attention_function(attention), weight.dtype, weight.device.type
        if situation not in self._exact:
            if torch.compiler.is_compiling():
                return None
            self._exact[situation] = last_block.narrowing_is_exact(self.model, self.structure, self._run_last_block)
        return (start, length) if self._exact[situation] else None

    def _run_last_block(self, plan: PassPlan, hidden: Tensor, kwargs: dict[str, Any]) -> None:
        before = RUNNING.get()
        RUNNING.set(RunningPass(self, plan))
        try:
            self.model.get_submodule(self.structure.blocks[-1])(hidden, **kwargs)
        finally:
            RUNNING.set(before)

    def compile(self, **options: Any) -> None:
        """Compile the model's forward, which both passes run, with `torch.compile(**options)`."""
        forward = self.model.forward

        def planned(running: RunningPass | None, *args: Any, **kwargs: Any) -> Any:
            before = RUNNING.get()
            RUNNING.set(running)
            try:
                return forward(*args, **kwargs)
            finally:
                RUNNING.set(before)

        self._compiled = torch.compile(planned, **options)
        self.model.forward = with_signature(self._forward_compiled, forward)

    def _forward_compiled(self, *args: Any, **kwargs: Any) -> Any:
        assert self._compiled is not None
        running = RUNNING.get()
        if running is not None and running.plan is not None and running.plan.probe is not None:
            return type(self.model).forward(self.model, *args, **kwargs)  # a probe is no part of a graph
        return self._compiled(running and RunningPass(self, running.plan), *args, **kwargs)  # the answer is given behind it

    # ---- beginning and end of a forward of the model -------------------------------------------------------------------

    def _begin_pass(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        starting, outer = STARTING.get(), RUNNING.get()
        if starting is None or starting.plan is None or starting.backbone is not self:
            if outer is not None:
                RUNNING.set(RunningPass(self, outer=outer))  # a plain forward inside a planned pass
            return None
        STARTING.set(None)
        RUNNING.set(replace(starting, outer=outer))
        return self._base_arguments(starting.plan, args, kwargs)

    def _end_pass(self, model: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        running = RUNNING.get()
        if running is None or running.backbone is not self:
            return None
        RUNNING.set(running.outer)
        if running.answer is None or output is None:  # None: the forward has raised
            return None
        return running.answer(kwargs.get("return_dict") is not False)

    def _base_arguments(self, plan: PassPlan, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        """The arguments without our own, with all patches in order, and each image as often as it has passes."""
        images: Tensor = kwargs["pixel_values"] if "pixel_values" in kwargs else args[0]
        kwargs = {**plan.arguments, **{name: v for name, v in kwargs.items() if name not in OWN_ARGUMENTS}}
        kwargs |= unmasked.in_order_noise(self.model, self.structure, kwargs, images)
        if plan.repeats == 1:
            return args, kwargs
        batch_size = images.shape[0]

        def repeat(value: Any) -> Any:
            per_image = isinstance(value, Tensor) and value.dim() and value.shape[0] == batch_size
            return value.repeat_interleave(plan.repeats, 0) if per_image else value

        return tuple(repeat(value) for value in args), {name: repeat(value) for name, value in kwargs.items()}
