"""Scaling and projection of the steps that an optimizer takes on protected parameters, by hooks on the optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from cl_prompts.runtime.precision import without_autocast


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
    """Scales or projects the updates of the parameters that a method protects.

    After a step, theta <- before + factor * (theta - before) where factor < 1, or theta <- before + map(theta - before).
    This is exact for SGD, Adam and AdamW; a constant factor on the gradient would cancel in Adam, and a projected gradient
    would not give a projected step. A step that is skipped (gradient scaler, accumulation) runs no hook. There is nothing
    to save: factors and maps follow from the model, and hooks belong to one optimizer object.
    """

    def __init__(self) -> None:
        self._handles: list[Any] = []
        self._trained: set[int] = set()

    def __deepcopy__(self, memo: dict[int, Any]) -> UpdateScaler:
        return UpdateScaler()  # a copy of the model is not trained by the original's optimizer

    @property
    def attached(self) -> bool:
        """Whether an optimizer is attached."""
        return bool(self._trained)

    def attach(
        self,
        optimizer: Any,
        module: nn.Module,
        factors: Mapping[str, Tensor],
        projections: Mapping[str, Callable[[Tensor], Tensor]],
    ) -> None:
        """Scale and project the steps of an optimizer, in place of the one attached before.

        Args:
            optimizer: a torch optimizer or a wrapper of one, like Accelerate's.
            module: whose parameters it trains.
            factors: factors in [0, 1] by name of the parameter in `module`, broadcast to the parameter.
            projections: linear maps of a step by name of the parameter.

        Raises:
            TypeError: it is no optimizer.
        """
        self.detach()
        optimizer = inner_optimizer(optimizer)
        self._trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
        factors = {name: f for name, f in factors.items() if bool((f < 1).any())}
        parameters = {name: module.get_parameter(name) for name in {**factors, **projections}}
        factors = {name: f.to(parameters[name].device) for name, f in factors.items()}
        before: dict[str, Tensor] = {}

        def remember(*_: Any) -> None:
            before.update({name: p.detach().clone() for name, p in parameters.items()})

        @torch.no_grad()
        @without_autocast()
        def scale(*_: Any) -> None:
            for name, value in before.items():
                parameter = parameters[name]
                if name in projections:
                    parameter.copy_(value + projections[name](parameter - value))
                if name in factors:
                    scaled = value + factors[name] * (parameter - value)
                    parameter.copy_(torch.where(factors[name] < 1, scaled, parameter))
            before.clear()

        if parameters:
            self._handles = [optimizer.register_step_pre_hook(remember), optimizer.register_step_post_hook(scale)]

    def detach(self) -> None:
        """Remove the hooks from the attached optimizer."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._trained = [], set()

    def check_trains(self, parameters: Iterable[tuple[str, Tensor]]) -> None:
        """Check that the attached optimizer, if any, trains these parameters.

        Args:
            parameters: of the model, with their names; those without `requires_grad` are left out.

        Raises:
            ValueError: it lacks one.
        """
        if self._trained:
            missing = [name for name, p in parameters if p.requires_grad and id(p) not in self._trained]
            if missing:
                raise ValueError(
                    f"the attached optimizer does not train {missing}: begin_task adds parameters and grow_pool "
                    "replaces them, so build a new optimizer from model.parameter_groups(...) after it and attach that"
                )
