"""Parts of a checkpoint whose objects have no `state_dict`, or one with keys or contents that a checkpoint cannot hold."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from cl_prompts.continual.streams.stream import Stream
from cl_prompts.learner.protocol import Learner
from cl_prompts.runtime.distributed import gather_over_processes, world_size


class Stateful(Protocol):
    """A part of a run that is saved in its checkpoints.

    The state is a nested dict of tensors and JSON-able values; keys are strings. With several processes all of them call
    both methods.
    """

    def state_dict(self) -> Mapping[str, Any]:
        """The current state."""

    def load_state_dict(self, state: Any) -> Any:
        """Load a state from `state_dict`."""


class LearnerState:
    """The training state of a learner. Unlike `nn.Module.state_dict` it does not contain the frozen backbone.

    Args:
        learner: the learner, not wrapped.
    """

    def __init__(self, learner: Learner) -> None:
        self.learner = learner

    def state_dict(self) -> dict[str, Any]:
        """The learner's `training_state_dict`, after its check of labels: a resumed run would not report them.

        All processes must call it.
        """
        self.learner.check_labels()
        self.learner.gather_statistics()
        return self.learner.training_state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load a training state. Parameters are replaced, so optimizers must be built afterwards."""
        self.learner.load_training_state_dict(state)


class OptimizerState:
    """The state of a torch optimizer with strings as keys.

    Args:
        optimizer: any torch optimizer.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer

    def state_dict(self) -> dict[str, Any]:
        """The optimizer's state; keys are numbers of parameters, as strings."""
        state = self.optimizer.state_dict()
        return {**state, "state": {str(number): entries for number, entries in state["state"].items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load a state into an optimizer over the same parameters."""
        by_number = {int(number): entries for number, entries in state["state"].items()}
        self.optimizer.load_state_dict({**state, "state": by_number})


class RandomState:
    """State of the random number generators of every process: torch, its CUDA devices, numpy and Python.

    Args:
        device: device for gathering over processes.
        rank: number of this process.
    """

    def __init__(self, device: torch.device, rank: int) -> None:
        self.device, self.rank = device, rank

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """Tensors by process and generator, the same on every process."""
        states: dict[str, dict[str, Tensor]] = {str(rank): {} for rank in range(world_size())}
        for name, tensor in _generator_states().items():
            for rank, gathered in enumerate(gather_over_processes(tensor.to(self.device))):
                states[str(rank)][name] = gathered
        return states

    def load_state_dict(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Set the generators of this process."""
        own = {name: tensor.cpu() for name, tensor in state[str(self.rank)].items()}
        torch.set_rng_state(own["torch"])
        cuda = [own[f"cuda.{i}"] for i in range(sum(name.startswith("cuda.") for name in own))]
        if cuda and torch.cuda.is_available():
            torch.cuda.set_rng_state_all(cuda)
        *keys, position, has_gauss, cached = own["numpy"].tolist()
        np.random.set_state(("MT19937", np.array(keys, dtype=np.uint32), position, has_gauss, _float_of(cached)))
        version, *numbers, gauss = own["python"].tolist()
        random.setstate((version, tuple(numbers), None if np.isnan(_float_of(gauss)) else _float_of(gauss)))


def _generator_states() -> dict[str, Tensor]:
    """State of each generator of this process: a tensor of integers each."""
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    assert kind == "MT19937"
    version, numbers, gauss = random.getstate()
    states = {
        "torch": torch.get_rng_state(),
        "numpy": torch.tensor([*np.asarray(keys).tolist(), int(position), int(has_gauss), _bits_of(float(cached))]),
        "python": torch.tensor([version, *numbers, _bits_of(float("nan") if gauss is None else gauss)]),
    }
    if torch.cuda.is_available():
        states |= {f"cuda.{i}": state for i, state in enumerate(torch.cuda.get_rng_state_all())}
    return states


def _bits_of(number: float) -> int:
    """The bits of a float64 as an integer. Not every device supports float64."""
    return int(np.float64(number).view(np.int64))


def _float_of(bits: int) -> float:
    return float(np.int64(bits).view(np.float64))


class SkippedImages:
    """Numbers of the images that a stream could not read on any process.

    Args:
        stream: the stream.
        device: device for gathering over processes.
    """

    def __init__(self, stream: Stream, device: torch.device) -> None:
        self.stream, self.device = stream, device

    def state_dict(self) -> dict[str, list[int]]:
        """Numbers by split, ascending."""
        skipped = {}
        for split, numbers in self.stream.skipped.items():
            own = torch.tensor(numbers, dtype=torch.int64, device=self.device)
            skipped[split] = torch.cat(gather_over_processes(own)).unique().tolist()
        return skipped

    def load_state_dict(self, state: dict[str, list[int]]) -> None:
        """Set the skipped images of all processes on this one."""
        self.stream.skipped = state
