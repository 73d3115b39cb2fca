"""What an adapter keeps while it is trained: the link to its optimizer and the images it has counted."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cl_prompts.runtime.distributed import gather_over_processes, world_size


def inner_optimizer(optimizer: Any) -> torch.optim.Optimizer:
    """The torch optimizer inside wrappers like Accelerate's.

    Raises:
        TypeError: there is none.
    """
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"expected a torch optimizer, got {type(optimizer).__name__}")
    return optimizer


class UpdateScaler:
    """Scales the steps that an optimizer takes on the rows a method protects.

    After a step, theta <- before + factor * (theta - before) where factor < 1: exact for SGD, Adam and AdamW, whose
    constant factors on gradients would cancel. A skipped step (gradient scaler, accumulation) does not run the hooks.
    """

    def __init__(self) -> None:
        self._handles: list[Any] = []
        self._known: set[int] = set()
        self._before: dict[str, Tensor] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> UpdateScaler:
        return UpdateScaler()  # a copy of the model is not trained by the original's optimizer

    @property
    def attached(self) -> bool:
        """Whether an optimizer is attached."""
        return bool(self._known)

    def attach(self, optimizer: Any, module: nn.Module, factors: Mapping[str, Tensor], prefix: str) -> None:
        """Hook into an optimizer (Accelerate's wrapper included) that trains the parameters of `module`."""
        self.detach()
        optimizer = inner_optimizer(optimizer)
        self._known = {id(p) for group in optimizer.param_groups for p in group["params"]}
        parameters = {name: module.get_parameter(prefix + name) for name in factors}
        factors = {name: f.to(parameters[name].device) for name, f in factors.items()}

        def remember(*_: Any) -> None:
            self._before = {name: p.detach().clone() for name, p in parameters.items()}

        @torch.no_grad()
        def scale(*_: Any) -> None:
            for name, before in self._before.items():
                parameter, factor = parameters[name], factors[name]
                scaled = before + factor * (parameter - before)
                parameter.copy_(torch.where(factor < 1, scaled, parameter))
            self._before = {}

        if any(bool((factor < 1).any()) for factor in factors.values()):
            self._handles = [optimizer.register_step_pre_hook(remember), optimizer.register_step_post_hook(scale)]

    def detach(self) -> None:
        """Let go of the optimizer."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._known, self._before = [], set(), {}

    def check_trains(self, parameters: Iterable[tuple[str, Tensor]]) -> None:
        """Raise ValueError if the attached optimizer lacks a trainable parameter."""
        if self._known:
            missing = [name for name, p in parameters if p.requires_grad and id(p) not in self._known]
            if missing:
                raise ValueError(
                    f"the attached optimizer does not train {missing}: begin_task adds parameters and grow_pool "
                    "replaces them, so build a new optimizer from model.parameter_groups(...) after it and attach that"
                )


class SampleCounter:
    """Which images of the current task were counted, so that epochs and padding count no image twice."""

    def __init__(self, seen: Iterable[int] = ()) -> None:
        self._seen = set(seen)

    @property
    def seen(self) -> list[int]:
        """Numbers of the images counted in the current task, ascending."""
        return sorted(self._seen)

    def clear(self) -> None:
        """Forget all images; a new task begins."""
        self._seen = set()

    def fresh(self, sample_ids: Sequence[int] | Tensor | None, counted: Tensor) -> Tensor:
        """Which images [B] are real and not counted before, the same on every process.

        Args:
            sample_ids: a number per image [B], the same in every epoch; negative for padding. None: every forward counts.
            counted: True for real images [B].
        """
        if sample_ids is None:
            return counted
        if len(sample_ids) != len(counted):
            raise ValueError(f"{len(sample_ids)} sample_ids for {len(counted)} images: give one per image")
        try:
            own = torch.as_tensor(sample_ids, device="cpu")
        except (ValueError, TypeError, RuntimeError) as error:
            raise TypeError(f"sample_ids must be integers, one per image ({error})") from error
        if own.dim() != 1 or own.is_floating_point():
            raise TypeError(f"sample_ids must be integers, one per image, got {own.dtype} of shape {list(own.shape)}")
        own = own.long()
        own = own.masked_fill(~counted.cpu(), -1)
        rank = torch.distributed.get_rank() if world_size() > 1 else 0
        mine: list[bool] = []
        for process, ids in enumerate(gather_over_processes(own)):
            for i in ids.tolist():
                new = i >= 0 and i not in self._seen
                if new:
                    self._seen.add(i)
                if process == rank:
                    mine.append(new)
        return torch.tensor(mine, device=counted.device)
