"""A quadratic penalty on the distance of parameters from earlier values, weighted by importance. EWC and SI use it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from cl_prompts.learner.nested_tensors import below, prefixed


class QuadraticPenalty:
    """strength * sum of importance * (theta - center)^2.

    A head that has grown has more rows than the penalty knows; the new ones are free.

    Args:
        strength: its weight in the loss.

    Attributes:
        importance, center: by parameter name, of the sizes that the parameters had when they were set; empty at first.
    """

    def __init__(self, strength: float) -> None:
        self.strength = strength
        self.importance: dict[str, Tensor] = {}
        self.center: dict[str, Tensor] = {}

    def value(self, parameters: Mapping[str, nn.Parameter]) -> Tensor:
        """The penalty, a scalar with gradient."""
        terms = [
            (weight * (known_rows(parameters[name], weight) - self.center[name]).square()).sum()
            for name, weight in self.importance.items()
        ]
        return self.strength * torch.stack(terms).sum()

    def gradient(self, name: str, parameter: Tensor) -> Tensor:
        """Its derivative by one parameter, of the parameter's size."""
        found = torch.zeros_like(parameter)
        if name in self.importance:
            weight = self.importance[name]
            known_rows(found, weight).copy_(
                2 * self.strength * weight * (known_rows(parameter, weight) - self.center[name])
            )
        return found

    def state_dict(self) -> dict[str, Tensor]:
        """Importance and center of every parameter."""
        return prefixed("importance.", self.importance) | prefixed("centre.", self.center)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue from a `state` that `state_dict` returned."""
        self.importance, self.center = below("importance.", state), below("centre.", state)


def known_rows(values: Tensor, older: Tensor) -> Tensor:
    """The rows of a grown tensor that an older one has: all of it where it has not grown."""
    return values if values.shape == older.shape else values[: len(older)]


def grown_like(values: Tensor | None, newer: Tensor) -> Tensor:
    """A tensor with zeros for the rows that a newer one has beyond it; zeros for None."""
    grown = torch.zeros_like(newer)
    if values is not None:
        known_rows(grown, values).copy_(values)
    return grown
