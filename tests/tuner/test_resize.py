"""`grow_pool`: old rows stay bit-equal and keep their optimizer state, new rows start as a new pool's."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from support.base_condition import condition
from support.families import build, inputs
from support.methods import METHODS
from torch import Tensor
from torch.testing import assert_close

from cl_prompts import (
    HashPromptConfig,
    L2PConfig,
    PromptPoolConfig,
    PromptPoolModel,
    get_prompt_pool_model,
)


pytestmark = pytest.mark.by_turns(5)


FIXED = {name: make for name, make in METHODS.items() if hasattr(make(), "pool_size")}
each_method = pytest.mark.parametrize("method", FIXED)
IMAGES = inputs("vit", 6)["pixel_values"]
TASKS = [[4, 1], [0, 7], [3, 5]]


def new_model(make: Callable[..., PromptPoolConfig], **fields: Any) -> PromptPoolModel:
    base = build("vit")
    torch.manual_seed(0)
    return get_prompt_pool_model(base, make(**fields))


def begin(model: Any, task: int, make: Callable[..., Any] = torch.optim.Adam) -> Any:
    model.begin_task(TASKS[task])
    optimizer = make(model.parameter_groups(learning_rate=1e-2))
    model.attach_optimizer(optimizer)
    model.train()
    return optimizer


def backward(model: Any, task: int) -> None:
    model(IMAGES + task, labels=torch.tensor(TASKS[task] * 3)).loss.backward()


def learn(model: Any, tasks: int, *, end: bool = True) -> Any:
    for task in range(tasks):
        optimizer = begin(model, task)
        for _ in range(2):
            backward(model, task)
            optimizer.step()
            optimizer.zero_grad()
        if end or task < tasks - 1:
            model.end_task()
    return optimizer


def tensors(model: Any) -> dict[str, Tensor]:
    pool = model.adapter.pool
    return {name: t.detach().clone() for name, t in [*pool.named_parameters(), *pool.named_buffers()]}


def corner(larger: Tensor, like: Tensor) -> Tensor:
    return larger[tuple(slice(n) for n in like.shape)]


@torch.no_grad()
def logits(model: Any) -> Tensor:
    answer: Tensor = model.eval()(IMAGES).logits
    return answer


@pytest.mark.parametrize("end", [True, False], ids=["between tasks", "in a task"])
@each_method
def test_old_rows_stay_and_all_goes_on(method: str, end: bool, tmp_path: Path) -> None:
    model = new_model(FIXED[method])
    learn(model, 2, end=end)
    pool, size = model.adapter.pool, model.adapter.config.pool_size
    before, prompts, keys = tensors(model), pool.prompt_table().detach(), pool.key_table()
    model.grow_pool(size + 3)
    pool = model.adapter.pool
    assert model.peft_config["default"].pool_size == pool.config.pool_size == size + 3
    after = tensors(model)
    assert after.keys() == before.keys()
    grown = [name for name in before if after[name].shape != before[name].shape]
    for name, tensor in before.items():
        assert torch.equal(corner(after[name], tensor), tensor), name
        assert after[name].dtype == tensor.dtype
        axes = sum(now != then for now, then in zip(after[name].shape, tensor.shape, strict=True))  # a matrix grows in two
        assert axes == (name in grown) * (2 if name == "second" else 1), name
        assert after[name].numel() * size**axes == tensor.numel() * (size + 3) ** axes, name
    assert pool.prompt_table().shape[1] == size + 3
    assert torch.equal(pool.prompt_table()[:, :size], prompts)
    if keys is not None:
        assert torch.equal(pool.key_table()[:, :size], keys)
    assert all(p.requires_grad for p in pool.parameters())
    assert pool.training

    if end:
        begin(model, 2)
    else:
        model.attach_optimizer(torch.optim.Adam(model.parameter_groups(learning_rate=1e-2)))
    backward(model, 2 if end else 1)
    for name, parameter in pool.named_parameters():
        assert parameter.grad is not None, name
    expected = logits(model)
    model.save_pretrained(tmp_path / "grown")
    assert torch.equal(logits(PromptPoolModel.from_pretrained(build("vit"), tmp_path / "grown")), expected)


@pytest.mark.parametrize("method", ["l2p", "l2p_prefix"])
def test_prompts_that_nobody_chooses_change_no_answer(method: str) -> None:
    model = new_model(FIXED[method])
    learn(model, 1)
    expected, size = logits(model), model.adapter.config.pool_size
    model.grow_pool(size + 4)
    with torch.no_grad():
        model.adapter.pool.keys[..., size:, :] = -model.extract_features(IMAGES).mean(0)
    assert torch.equal(logits(model), expected)
    with torch.no_grad():
        model.adapter.pool.keys[..., size:, :] *= -1
    assert (logits(model) - expected).abs().max() > 1e-3


def test_new_rows_start_as_a_new_pools() -> None:
    model = new_model(L2PConfig, key_init="small_uniform")
    learn(model, 1)
    model.grow_pool(60)
    pool = model.adapter.pool
    rows, keys = pool.prompts[10:], pool.keys[10:]
    assert rows.abs().max() <= 1
    assert rows.std().item() == pytest.approx(3**-0.5, rel=0.05)  # U(-1, 1)
    assert 0 <= keys.min() <= keys.max() <= 0.01
    assert pool.history.counts.dtype == torch.int64
    assert pool.history.counts[:, 10:].sum() == 0
    assert len(torch.unique(rows.detach().view(50, -1), dim=0)) == 50

    model = new_model(HashPromptConfig, layers=[0, 1], modulate="quadratic")
    learn(model, 3)
    model.grow_pool(100)
    pool = model.adapter.pool
    assert pool.config.history_top == 4
    assert pool.router[:, 20:].std().item() == pytest.approx(0.02, rel=0.05)
    for router in pool.old_routers:  # the router of a task starts as a copy of the one before
        assert torch.equal(router[:, 20:], pool.router[:, 20:])
    assert torch.equal(pool.anchor[:, 20:], pool.prompts[:, 20:]), "new prompts have not moved yet"


def test_new_prompts_are_counted() -> None:
    model = new_model(FIXED["l2p"])
    learn(model, 1, end=False)
    before = model.adapter.pool.history.counts.clone()
    model.grow_pool(13)
    with torch.no_grad():
        model.adapter.pool.keys[10:] = model.extract_features(IMAGES).mean(0)
    model.attach_optimizer(torch.optim.SGD(model.parameter_groups(learning_rate=0.1)))
    backward(model, 0)
    counts = model.adapter.pool.history.counts
    assert torch.equal(counts[:, :10], before)
    assert counts[0, 10:].tolist() == [6, 6, 6]


# ---- a kept optimizer


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adam": torch.optim.Adam,
    "amsgrad": lambda p: torch.optim.AdamW(p, weight_decay=0.1, amsgrad=True, foreach=True),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
}


class Twin:
    """The same optimizer on copies of a model's parameters as they are now, which never grow."""

    def __init__(self, model: Any, optimizer: Any, make: Callable[[Any], torch.optim.Optimizer]) -> None:
        self.copies = {n: p.detach().clone() for n, p in model.adapter.named_parameters() if p.requires_grad}
        names = {id(p): n for n, p in model.adapter.named_parameters()}
        groups = [[self.copies[names[id(p)]] for p in group["params"]] for group in optimizer.param_groups]
        self.optimizer = make([{"params": copies, "lr": 1e-2} for copies in groups])
        self.factors = model.adapter.pool.update_factors()

    def step(self, model: Any) -> None:
        """Follow the model's next step, which has its gradients."""
        before = {name: copy.clone() for name, copy in self.copies.items()}
        for name, p in model.adapter.named_parameters():
            self.copies[name].grad = corner(p.grad, self.copies[name]).clone()
        self.optimizer.step()
        for name, factor in self.factors.items():
            copy, start = self.copies[f"pool.{name}"], before[f"pool.{name}"]
            copy.copy_(torch.where(factor < 1, start + factor * (copy - start), copy))

    def check(self, model: Any) -> None:
        for name, p in model.adapter.named_parameters():
            assert torch.equal(corner(p.detach(), self.copies[name]), self.copies[name]), name


@pytest.mark.parametrize("with_gradients", [False, True], ids=["after a step", "before a step"])
@pytest.mark.parametrize(
    ("method", "name"), [*((method, "adam") for method in FIXED), ("l2p", "amsgrad"), ("l2p", "momentum")]
)
def test_a_kept_optimizer_treats_old_rows_as_if_nothing_happened(method: str, name: str, with_gradients: bool) -> None:
    model = new_model(FIXED[method])
    learn(model, 1)
    optimizer = begin(model, 1, OPTIMIZERS[name])
    twin, size = Twin(model, optimizer, OPTIMIZERS[name]), model.adapter.config.pool_size
    if method == "hash":
        assert (twin.factors["prompts"] < 1).any()
    for step in range(5):
        optimizer.zero_grad()
        if step == 2 and not with_gradients:
            model.grow_pool(size + 2, optimizer)
        backward(model, 1)
        if step == 2 and with_gradients:
            model.grow_pool(size + 2, optimizer)
        twin.step(model)
        optimizer.step()
        twin.check(model)
    assert model.adapter.pool.prompt_table().shape[1] == size + 2
    assert [group["name"] for group in optimizer.param_groups][-1] == "head"


def test_new_rows_start_with_empty_moments() -> None:
    model = new_model(FIXED["l2p"], pull_coefficient=1.0)
    optimizer = begin(model, 0)
    for _ in range(3):
        optimizer.zero_grad()
        backward(model, 0)
        optimizer.step()
    model.grow_pool(12, optimizer)
    keys = model.adapter.pool.keys
    with torch.no_grad():
        keys[10:] = model.extract_features(IMAGES).mean(0) + 0.1
    start = keys.detach().clone()
    optimizer.zero_grad()
    backward(model, 0)
    optimizer.step()
    g = keys.grad[10:]
    assert (g != 0).any()
    first, second = 0.1 * g / (1 - 0.9**4), 0.001 * g**2 / (1 - 0.999**4)
    assert_close(keys.detach()[10:], start[10:] - 1e-2 * first / (second.sqrt() + 1e-8), atol=1e-7, rtol=1e-5)


def test_accelerates_optimizer_and_a_plain_peft_model() -> None:
    torch.manual_seed(0)
    model = peft.get_peft_model(build("vit"), FIXED["hash"]())
    learn(model, 1)
    optimizer = begin(model, 1)
    try:
        prepared = Accelerator(cpu=True).prepare_optimizer(optimizer)
        model.grow_pool(9, prepared)
        start = model.adapter.pool.prompts.detach().clone()
        backward(model, 1)
        twin = Twin(model, optimizer, torch.optim.Adam)
        twin.step(model)
        prepared.step()
        twin.check(model)
        assert (model.adapter.pool.prompts != start)[:, 6:].any()
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


def test_a_scheduler_goes_on() -> None:
    model = new_model(FIXED["l2p"])
    optimizer = begin(model, 0)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    model.grow_pool(11, optimizer)
    backward(model, 0)
    optimizer.step()
    schedule.step()
    assert [group["lr"] for group in optimizer.param_groups] == [5e-3] * 3


def test_training_goes_on_only_with_an_optimizer_that_trains_the_grown_pool() -> None:
    model = new_model(FIXED["hash"])
    optimizer = learn(model, 1, end=False)
    model.grow_pool(7)
    with pytest.raises(ValueError, match=r"does not train \['pool.prompts', 'pool.router'\]: .*grow_pool replaces"):
        backward(model, 0)
    with pytest.raises(ValueError, match=r"does not train"):
        model.attach_optimizer(optimizer)
    model.attach_optimizer(torch.optim.Adam(model.parameter_groups(learning_rate=1e-2)))
    backward(model, 0)


def test_what_was_frozen_stays_frozen() -> None:
    model = new_model(FIXED["hash"])
    learn(model, 1)
    model.adapter.pool.prompts.requires_grad_(False)
    model.eval()
    model.adapter.pool.to(torch.bfloat16)
    model.grow_pool(7)
    pool = model.adapter.pool
    assert [p.requires_grad for p in pool.parameters()] == [False, True]
    assert {t.dtype for t in pool.state_dict().values()} == {torch.bfloat16, torch.int64}
    assert not any(module.training for module in pool.modules())


# ---- what is refused


def foreign_optimizer(model: Any) -> Any:
    return torch.optim.Adam(model.adapter.head.parameters())


def factored(model: Any) -> Any:
    """An optimizer whose second moments are sums over rows and columns."""
    optimizer = torch.optim.Adafactor(model.parameter_groups(learning_rate=1e-2))
    backward(model, 0)
    optimizer.step()
    return optimizer


@pytest.mark.parametrize(
    ("size", "make", "message"),
    [
        (10, None, r"pool_size=10: the pool has 10 prompts and can only grow; give a larger number"),
        (9, None, r"pool_size=9: the pool has 10 prompts"),
        (11.0, None, r"pool_size=11.0: the pool"),
        (2**63, None, r"pool_size=9223372036854775808 must be an integer of at least 1 \(and below"),
        (10**9, None, r"implies [\d,]+ bytes of tensors, more than max_adapter_bytes=8,589,934,592"),
        (10**17, None, r"max_adapter_bytes|impossible size"),
        (11, foreign_optimizer, r"does not train the pool's \['prompts', 'keys'\]: pass the one that was built from"),
        (11, factored, r"Adafactor keeps row_var of shape .* for prompts .*: call grow_pool without it and build a new"),
    ],
)
def test_refusals_change_nothing(size: Any, make: Any, message: str) -> None:
    model = new_model(FIXED["l2p"])
    optimizer = learn(model, 1, end=False)
    given = make(model) if make else optimizer
    pool, config, before = model.adapter.pool, model.adapter.config.to_dict(), tensors(model)
    state = {p: {k: v.clone() for k, v in s.items()} for p, s in given.state.items()}
    with pytest.raises(ValueError, match=message):
        model.grow_pool(size, given)
    assert model.adapter.pool is pool
    assert model.adapter.config.to_dict() == config
    assert all(torch.equal(t, before[name]) for name, t in tensors(model).items())
    assert all(torch.equal(given.state[p][k], v) for p, s in state.items() for k, v in s.items())
    optimizer.zero_grad()
    backward(model, 0)
    optimizer.step()
    assert not torch.equal(pool.prompts, before["prompts"])


def test_the_limit_on_bytes_is_the_callers() -> None:
    model = new_model(FIXED["l2p"], max_adapter_bytes=20_000)
    with pytest.raises(ValueError, match=r"more than max_adapter_bytes=20,000"):
        model.grow_pool(1000)
    model.grow_pool(20)


def test_no_optimizer_at_all() -> None:
    with pytest.raises(TypeError, match=r"expected a torch optimizer, got list"):
        new_model(FIXED["l2p"]).grow_pool(20, [])


@pytest.mark.parametrize("method", [name for name in METHODS if name not in FIXED])
def test_pools_that_grow_by_themselves(method: str) -> None:
    model = new_model(METHODS[method])
    with pytest.raises(ValueError, match=r"has no pool_size: its pool grows with every task, call begin_task\(classes\)"):
        model.grow_pool(100)


def test_a_grown_pool_does_not_fit_a_smaller_config(tmp_path: Path) -> None:
    model = new_model(FIXED["l2p"])
    learn(model, 1)
    model.grow_pool(12)
    folder, base = tmp_path / "grown", build("vit")
    model.save_pretrained(folder)
    shutil.copytree(folder, tmp_path / "copy")
    smaller = PromptPoolConfig.from_pretrained(folder)
    assert smaller.pool_size == 12
    smaller.pool_size = 10
    before = condition(base)
    with pytest.raises(ValueError, match=r"I64\[1, 12\] in .*, the config implies torch.int64\[1, 10\]"):
        PromptPoolModel.from_pretrained(base, folder, config=smaller)
    assert condition(base) == before
    for file in folder.iterdir():
        assert file.read_bytes() == (tmp_path / "copy" / file.name).read_bytes()
    expected = logits(model)
    assert torch.equal(logits(PromptPoolModel.from_pretrained(base, folder)), expected)

    # nor does it go into a model of the smaller pool under the same name
    small = new_model(FIXED["l2p"])
    learn(small, 1)
    answer = logits(small)
    with pytest.raises(ValueError, match=r"is of a config with {'pool_size': 12}, this model has {'pool_size': 10}"):
        small.load_adapter(folder, "default")
    assert torch.equal(logits(small), answer)
