"""Calls before and after each step of an optimizer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from cl_prompts.learner.optimizer_hook import inner_optimizer
from cl_prompts.runtime.precision import without_autocast


class StepHooks:
    """Two functions around the steps of one optimizer. A skipped step (gradient scaler, accumulation) calls neither."""

    def __init__(self) -> None:
        self._handles: list[Any] = []

    def __deepcopy__(self, memo: dict[int, Any]) -> StepHooks:
        return StepHooks()  # a copy of the model is not trained by the original's optimizer

    def attach(self, optimizer: Any, before: Callable[[], None], after: Callable[[], None]) -> None:
        """Call `before` and `after` around each step of `optimizer`, in place of the one attached before, without gradient.

        Raises:
            TypeError: it is no optimizer.
        """
        self.detach()
        inner = inner_optimizer(optimizer)

        @torch.no_grad()
        @without_autocast()
        def pre(*_: Any) -> None:
            before()

        @torch.no_grad()
        @without_autocast()
        def post(*_: Any) -> None:
            after()

        self._handles = [inner.register_step_pre_hook(pre), inner.register_step_post_hook(post)]

    def detach(self) -> None:
        """Remove the hooks from the attached optimizer."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
