"""What a step does, counted: passes, reads back to the host, shapes, masks, graphs below the prompts, what is held."""

from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from support.families import build, inputs
from support.methods import METHODS
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cl_prompts import CodaPromptConfig, DualPromptConfig, HiDePromptConfig, PromptPoolConfig, get_prompt_pool_model


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


class Kernels(TorchDispatchMode):
    """Notes each operation with the shapes of its tensors; adds up the numbers that are written."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, tuple[torch.Size, ...]]] = []
        self.written = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves((args, kwargs, result)) if isinstance(x, Tensor)]
        self.calls.append((str(func), tuple(x.shape for x in tensors)))
        if not any(out.alias_info is not None for out in func._schema.returns):  # no view, nothing in place
            self.written += sum(x.numel() for x in tree_leaves(result) if isinstance(x, Tensor))
        return result

    def masks(self) -> int:
        """How many attentions got a mask or bias: kernels with one tensor more, or written out if it is trained."""
        fused = [shapes for name, shapes in self.calls if "flash_attention" in name and "backward" not in name]
        assert fused
        # query, key, value; output, log-sum-exp
        return sum(len(shapes) > 5 for shapes in fused) + sum("_safe_softmax" in name for name, _ in self.calls)


def second_task(method: str, config: PromptPoolConfig | None = None) -> Any:
    """A model in its second task, so that what is frozen and what is replayed takes part."""
    model = get_prompt_pool_model(build("vit"), config or METHODS[method]())
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


@pytest.mark.by_turns(7)
@pytest.mark.parametrize("method", METHODS)
def test_shapes_and_masks(method: str) -> None:
    """Shapes do not depend on images and labels, as CUDA graphs need it. A mask only where a method adds to logits."""
    model = second_task(method)
    optimizer = torch.optim.Adam(model.parameter_groups(learning_rate=1e-3))
    model.attach_optimizer(optimizer)
    seen = []
    for number, labels in enumerate(([2, 3, 2], [2, 3, 2], [3, 3, 3])):
        images = inputs("vit", seed=number)
        with Kernels() as step:
            model(**images, labels=torch.tensor(labels)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        with Kernels() as answer, torch.no_grad():
            model.eval()(**images)
        model.train()
        seen.append((step, answer))
    for before, after in zip(*seen[1:], strict=True):  # the first step makes the optimizer's state
        assert before.calls == after.calls
    own_layers = len(model.adapter.pool.layers)
    assert seen[2][0].masks() == (own_layers if method in ("smope", "norga") else 0)


# l2p adds a position embedding, whose values are read; a factorisation of a covariance is looked at.
@pytest.mark.by_turns(7)
@pytest.mark.parametrize("method", sorted(METHODS.keys() - {"l2p", "dualprompt prototype", "norga"}))
def test_a_step_stays_on_its_device(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On torch's device without values: an operation that takes a tensor of the CPU too, or asks for a value, fails."""
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model, labels = second_task(method).to("meta"), torch.tensor([2, 3, 2], device="meta")
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    model.base_model.backbone.readable(0, 1)
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: nullcontext())  # which has no such device
    images = {name: value.to("meta") for name, value in inputs("vit").items()}
    model(**images, labels=labels).loss.backward()
    with torch.no_grad():
        assert model.eval()(**images).logits.is_meta


GROWING: dict[str, Callable[[], PromptPoolConfig]] = {
    "coda": lambda: CodaPromptConfig(components_per_task=3, layers=[0, 2]),
    "coda_layer_argmax": METHODS["coda_layer_argmax"],
    "dualprompt": lambda: DualPromptConfig(g_layers=[0], e_layers=[1, 2], e_length=40),
    "hide": lambda: HiDePromptConfig(layers=[0, 1], prompt_length=40),
}


@pytest.mark.parametrize("method", GROWING)
def test_prompts_of_earlier_tasks_are_not_copied(method: str) -> None:
    """In a step and in an answer, what is written grows by less than half of what ten tasks add to the pool."""
    model = second_task(method, GROWING[method]())

    def measure() -> tuple[int, int, int]:
        last = model.num_tasks
        labels = torch.tensor([2 * last - 2, 2 * last - 1, 2 * last - 1])
        model.attach_optimizer(torch.optim.Adam(model.parameter_groups(learning_rate=1e-3)))
        with Kernels() as step:
            model.train()(**inputs("vit"), labels=labels).loss.backward()
        with Kernels() as answer, torch.no_grad():
            model.eval()(**inputs("vit"))
        return step.written, answer.written, sum(b.numel() for b in model.adapter.pool.buffers())

    before = measure()
    for task in range(2, 12):
        model.end_task()
        model.begin_task([2 * task, 2 * task + 1])
    step, answer, pool = (b - a for a, b in zip(before, measure(), strict=True))
    assert step < pool / 2
    assert answer < pool / 2


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
