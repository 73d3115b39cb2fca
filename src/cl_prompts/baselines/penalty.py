"""A quadratic penalty that keeps parameters near where they were, each as much as it mattered: EWC and SI share it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from cl_prompts.continual.checkpointing.checkpoint import below, prefixed


class QuadraticPenalty:
    """strength * sum of importance * (theta - centre)^2.

    A head that has grown has more rows than the penalty knows; the new ones are free.

    Args:
        strength: its weight in the loss.

    Attributes:
        importance, centre: by parameter name, of the sizes that the parameters had when they were set; empty at first.
    """

    def __init__(self, strength: float) -> None:
        self.strength = strength
        self.importance: dict[str, Tensor] = {}
        self.centre: dict[str, Tensor] = {}

    def value(self, parameters: Mapping[str, nn.Parameter]) -> Tensor:
        """The penalty, a scalar with gradient."""
        terms = [
            (weight * (known_rows(parameters[name], weight) - self.centre[name]).square()).sum()
            for name, weight in self.importance.items()
        ]
        return self.strength * torch.stack(terms).sum()

    def gradient(self, name: str, parameter: Tensor) -> Tensor:
        """Its derivative by one parameter, of the parameter's size."""
        found = torch.zeros_like(parameter)
        if name in self.importance:
            weight = self.importance[name]
            known_rows(found, weight).copy_(
                2 * self.strength * weight * (known_rows(parameter, weight) - self.centre[name])
            )
        return found

    def tensors(self) -> dict[str, Tensor]:
        """All it knows, by name."""
        return prefixed("importance.", self.importance) | prefixed("centre.", self.centre)

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take back what `tensors` gave."""
        self.importance, self.centre = below("importance.", tensors), below("centre.", tensors)


def known_rows(values: Tensor, older: Tensor) -> Tensor:
    """The rows of a grown tensor that an older one has: all of it where it has not grown."""
    return values if values.shape == older.shape else values[: len(older)]


def grown_like(values: Tensor | None, newer: Tensor) -> Tensor:
    """A tensor with zeros for the rows that a newer one has beyond it; zeros for None."""
    grown = torch.zeros_like(newer)
    if values is not None:
        known_rows(grown, values).copy_(values)
    return grown
