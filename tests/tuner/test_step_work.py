"""What a training step does, counted: passes, reads back to the host, graphs below the prompts, what an optimizer holds."""

from collections import Counter
from typing import Any

import pytest
import torch
from support.families import build, inputs
from support.methods import METHODS
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from cl_prompts import get_prompt_pool_model


pytestmark = pytest.mark.by_turns(3)


class Waits(TorchDispatchMode):
    """Counts what makes the host wait for a device: numbers and sizes that are read back."""

    NAMES = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "is_nonzero", "equal.default")

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = next((name for name in self.NAMES if name in str(func)), None)
        if name:
            self.seen[name] += 1
        return func(*args, **(kwargs or {}))


def second_task(method: str) -> Any:
    """A model in its second task, so that what is frozen and what is replayed takes part."""
    model = get_prompt_pool_model(build("vit"), METHODS[method]())
    model.begin_task([0, 1])
    model.end_task()
    model.begin_task([2, 3])
    model.attach_optimizer(torch.optim.Adam(model.parameter_groups(learning_rate=1e-3)))
    model.base_model.backbone.readable(0, 1)  # the trial runs once, before the first pass
    return model.train()


@pytest.mark.parametrize("method", METHODS)
def test_a_step_reads_nothing_back(method: str) -> None:
    """Only labels on the CPU are looked at, twice: whether they are known, and of the current task."""
    model, labels = second_task(method), torch.tensor([2, 3, 2])
    with Waits() as waits:
        model(**inputs("vit"), labels=labels).loss.backward()
    assert waits.seen == {"_local_scalar_dense": 2}
    model.eval()
    with Waits() as waits, torch.no_grad():
        model(**inputs("vit"))
    # torch looks whether the factorisation of a covariance succeeded
    assert waits.seen == ({"_local_scalar_dense": 1} if method in ("dualprompt prototype", "norga") else {})


@pytest.mark.parametrize("method", METHODS)
def test_passes_and_graph(method: str) -> None:
    """One pass with the query at hand, two without; one where the method needs none. No graph below the first prompt."""
    model, labels = second_task(method), torch.tensor([2, 3, 2])
    structure, base = model.base_model.structure, model.get_base_model()
    learns: list[list[bool]] = [[], [], []]

    def note(number: int) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            first: Tensor = output[0] if isinstance(output, tuple) else output
            learns[number].append(first.requires_grad)

        return hook

    handles = [base.get_submodule(name).register_forward_hook(note(i)) for i, name in enumerate(structure.blocks)]
    model(**inputs("vit"), labels=labels)
    passes = len(learns[-1])
    assert passes == (2 if model.needs_query else 1)
    pool = model.base_model.adapter.pool
    lowest = min(pool.layers, default=0 if method in ("l2p", "vpt") else 3)
    for number, seen in enumerate(learns):
        assert seen[-1] == (number >= lowest), number
        assert not any(seen[:-1])
    if model.needs_query:
        for seen in learns:
            seen.clear()
        model(**inputs("vit"), labels=labels, query=torch.randn(3, 32))
        assert [len(seen) for seen in learns] == [1, 1, 1]
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("method", METHODS)
def test_what_is_held(method: str) -> None:
    """One copy of the backbone; gradients and optimizer state for the adapter's parameters alone."""
    base = build("vit")
    tensors = {id(t) for t in base.state_dict(keep_vars=True).values()}
    model = get_prompt_pool_model(base, METHODS[method]())
    model.begin_task([2, 3])
    optimizer = torch.optim.Adam(model.parameter_groups(learning_rate=1e-3))
    model.attach_optimizer(optimizer)
    model.train()(**inputs("vit"), labels=torch.tensor([2, 3, 2])).loss.backward()
    optimizer.step()
    own = {id(t) for name, t in model.state_dict(keep_vars=True).items() if ".prompt_pool." not in name}
    assert own == tensors
    assert all(p.grad is None for p in base.parameters())
    held = sum(t.numel() for state in optimizer.state.values() for t in state.values() if t.dim())
    assert held == 2 * sum(p.numel() for p in model.parameters() if p.requires_grad and p.grad is not None)
