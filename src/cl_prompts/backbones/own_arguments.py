"""Arguments of a prompted forward that the base model never gets, and their place in the base's signature.

`transformers.Trainer` asks the class of the base which arguments a `PeftModel` takes: columns of a data set that are no
argument are dropped, and without an argument `labels` there is neither a loss nor an evaluation.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from torch import nn


OWN_ARGUMENTS = ("labels", "query", "lower_blocks", "sample_ids", "num_items_in_batch")


class OwnSignature:
    """Until `remove`, the signature of a model's forward names `OWN_ARGUMENTS` too; the forward itself does not change.

    The class of the model, and of no other model, is replaced by a subclass of the same name, as torch's `fully_shard` and
    parametrizations do.

    Args:
        model: the base model.
    """

    kind: Any  # the model's class; mypy cannot hash classes of modules

    def __init__(self, model: Any) -> None:
        self.model = model
        self.kind = model.__class__
        model.__class__ = _with_own_arguments(self.kind)

    def remove(self) -> None:
        """Give the model its class back."""
        if type(self.model) is _with_own_arguments(self.kind):
            self.model.__class__ = self.kind


def with_signature(function: Callable[..., Any], like: Callable[..., Any]) -> Callable[..., Any]:
    """A `function` of any arguments with the signature of another one."""
    partial: Any = functools.partial(function)
    partial.__signature__ = inspect.signature(like)
    return partial


@functools.cache
def _with_own_arguments(kind: Any) -> Any:
    signature = inspect.signature(kind.forward)
    parameters = list(signature.parameters.values())
    # Keyword-only arguments stand before **kwargs.
    place = len(parameters) - any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)
    parameters[place:place] = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None)
        for name in OWN_ARGUMENTS
        if name not in signature.parameters
    ]

    @functools.wraps(kind.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return kind.forward(self, *args, **kwargs)

    forward.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    members = {
        "forward": forward,
        "accepts_loss_kwargs": True,  # Trainer then passes `num_items_in_batch`
        "__module__": kind.__module__,
        "__doc__": kind.__doc__,
        "__reduce_ex__": lambda self, protocol: (_new, (kind,), vars(self)),  # pickle finds classes by their names
    }
    return type(kind)(kind.__name__, (kind,), members)


def _new(kind: Any) -> Any:
    """An empty model, for copies and pickles."""
    subclass = _with_own_arguments(kind)
    return subclass.__new__(subclass)
