"""Two processes equal one: the same global batches, some of which do not divide, on one process and on two (gloo).

All cases run in one launch; `learn` is the same code for both sides.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from datasets import Dataset
from support.families import build
from support.methods import METHODS
from support.processes import in_two_processes
from support.turns import in_this_run
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close

from cl_prompts import HashPromptConfig, L2PConfig, PromptPoolConfig, PromptPoolModel, get_prompt_pool_model
from cl_prompts.continual import ClassIncrementalStream, evaluate, stream_features
from cl_prompts.continual.streams.loading import process_shards
from cl_prompts.tuner.sharding import shard_frozen_blocks


pytestmark = pytest.mark.xdist_group("distributed")

PROCESSES, BATCH, EPOCHS = 2, 4, 2
# 11 and 9 training images a task: the last global batches hold 3 and 1, so one process once gets nothing but padding.
TRAIN_LABELS = [0, 7, 0, 7, 3, 1, 0, 1, 7, 0, 3, 1, 0, 3, 7, 3, 1, 3, 0, 7]
TEST_LABELS = [3, 0, 7, 1, 0, 7, 0, 3, 1, 7, 0, 1, 3]


@dataclass(frozen=True)
class Case:
    family: str
    config: Callable[[], PromptPoolConfig]
    cached_queries: bool = False
    sharded: bool = False
    tasks: tuple[list[int], ...] = ([7, 0], [1, 3])


def l2p(**fields: Any) -> Callable[[], PromptPoolConfig]:
    return lambda: L2PConfig(pool_size=6, prompt_length=2, top_k=2, **fields)


def hashed(**fields: Any) -> Callable[[], PromptPoolConfig]:
    return lambda: HashPromptConfig(
        pool_size=6, prompt_length=4, top_k=2, layers=[0, 2], history_top=2, delta=0.5, **fields
    )


SINGLE = ([7], [0], [1, 3])
CASES = {
    **{f"l2p-{family}": Case(family, l2p()) for family in ("vit", "dinov2", "siglip")},
    **{f"hash-{family}": Case(family, hashed()) for family in ("vit", "dinov2", "siglip")},
    "hash-prototype": Case("vit", hashed(router_inference="prototype"), cached_queries=True),
    "hash-covariance": Case("vit", hashed(router_inference="prototype", task_statistics="covariance")),
    "hash-quadratic": Case("vit", hashed(modulate="quadratic", router_inference="confidence")),
    "hash-cosine": Case("vit", hashed(head="cosine", modulate="gradient", router_inference="last")),
    "l2p-task-free": Case("vit", l2p(num_labels=8, class_mask="batch")),
    "hash-task-free": Case("vit", hashed(num_labels=8, class_mask="batch")),
    "l2p-regularised": Case("vit", l2p(diversity_weight=0.1, alignment_weight=0.1, entropy_weight=0.5)),
    "l2p_prefix-coupled": Case("vit", lambda: METHODS["l2p_prefix"](key_loss="coupled")),
    "l2p-vote": Case("vit", l2p(batchwise_selection=True, diversified_selection=True)),
    **{f"l2p-{mask}-one-class": Case("vit", l2p(class_mask=mask), tasks=SINGLE) for mask in ("task", "batch", "none")},
    **{name: Case("vit", make) for name, make in METHODS.items()},
    **{f"{name}-sharded": Case("vit", METHODS[name], sharded=True) for name in ("l2p", "coda", "hash", "hide", "vpt")},
    **{f"l2p-{family}-sharded": Case(family, l2p(), sharded=True) for family in ("dinov2", "siglip")},
}


def images_of(labels: list[int], seed: int) -> Tensor:
    """Noise over a picture of the class, so that there is something to learn."""
    pictures = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    noise = torch.randn(len(labels), 3, 32, 32, generator=torch.Generator().manual_seed(seed))
    return pictures[torch.tensor(labels)] + noise


def make_stream(tasks: Sequence[list[int]] = Case.tasks) -> ClassIncrementalStream:
    images = torch.cat([images_of(TRAIN_LABELS, 2), images_of(TEST_LABELS, 3)])
    train = Dataset.from_dict({"image": list(range(len(TRAIN_LABELS))), "label": TRAIN_LABELS})
    test = Dataset.from_dict({"image": list(range(len(TRAIN_LABELS), len(images))), "label": TEST_LABELS})
    return ClassIncrementalStream(train, test, tasks, images.__getitem__)


def make_model(case: Case) -> PromptPoolModel:
    base = build(case.family)
    torch.manual_seed(5)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="batchwise_selection")
        return get_prompt_pool_model(base, case.config())


def averaged(loss: Tensor) -> float:
    total = loss.detach().clone()
    if dist.is_initialized():
        dist.all_reduce(total)
        total /= dist.get_world_size()
    return total.item()


@contextmanager
def counted_bytes() -> Iterator[list[int]]:
    """The bytes of what this process gives to collective operations other than those of DDP."""
    sent: list[int] = []
    with pytest.MonkeyPatch.context() as patch:

        def counted(original: Callable[..., Any], place: int) -> Callable[..., Any]:
            def call(*args: Any) -> Any:
                sent.append(args[place].numel() * args[place].element_size())
                return original(*args)

            return call

        patch.setattr(dist, "all_reduce", counted(dist.all_reduce, 0))
        patch.setattr(dist, "all_gather", counted(dist.all_gather, 1))
        yield sent


def bytes_of_a_step(name: str, model: PromptPoolModel, images: int, classes: int) -> int | None:
    """As docs/processes.md says, for this process's share of `images`; None where an option needs sums in a step."""
    if name not in METHODS:
        return None
    adapter, width = model.adapter, model.structure.shape.width
    sent = 8  # the number of images, by which the loss is divided
    sent += 8 * classes if adapter.running_gaussians is not None else 0
    sent += 8 + 8 * images if adapter.pool.counts_images else 0  # their numbers
    more = {
        "smope": 16,  # how many images it has counted
        "hide": 4 * images * (1 + PROCESSES) * width + 8 * images,  # features, on the way back all gradients; targets
        "cpg": 3 * 4 * 2 * 5,  # sums of weights of five prompts in two blocks, their gradients, and counts
        "coda_layer_argmax": 8 + 2 * 4 * 2 * 2,  # number of images; sums of two scores in two blocks, their gradients
    }
    return sent + more.get(name.replace("norga", "hide"), 0)


def learn(case: Case) -> dict[str, Any]:
    """Two tasks, as a user's script trains them; everything the promise speaks of."""
    stream, model = make_stream(case.tasks), make_model(case)
    task_free = model.adapter.config.num_labels is not None
    found: dict[str, Any] = {"sent": [], "losses": [], "accuracies": [], "measured": [], "reliability": []}
    if case.sharded and dist.is_initialized():
        shard_frozen_blocks(model)
    images = stream.all_images(train=True, batch_size=BATCH)
    found["features"] = stream_features(model, images, len(TRAIN_LABELS), "cpu")
    queries = found["features"] if case.cached_queries else None
    for task in stream:
        if not task_free:
            model.begin_task(task.classes)
        # A larger eps than Adam's 1e-8, which turns the rounding of a gradient near zero into a step.
        optimizer = torch.optim.Adam(model.parameter_groups(learning_rate=5e-3, routers=1e-2), eps=1e-6)
        model.attach_optimizer(optimizer)
        wrapped: Any = DistributedDataParallel(model) if dist.is_initialized() else model
        wrapped.train()
        for epoch in range(EPOCHS):
            for batch in stream.train_batches(task, BATCH, seed=3, epoch=epoch, queries=queries):
                with counted_bytes() as sent:
                    loss = wrapped(**batch).loss
                    loss.backward()
                    optimizer.step()
                found["sent"].append((sum(sent), len(batch["labels"]), len(task.classes)))
                optimizer.zero_grad()
                found["losses"].append(averaged(loss))
        model.eval()
        if model.needs_consolidation:
            model.consolidate(stream.images(stream.tasks[task.number].train_rows, BATCH))
        if not task_free:
            model.end_task()
        seen = stream.tasks[: task.number + 1]
        for t in seen:
            batches = stream.test_batches(t, BATCH)
            further = {"slice": lambda features: features[:, : len(model.classes)]} if task.number else None
            measured = evaluate(model, batches, model.classes, "cpu", task=t.number, tasks=case.tasks, classifiers=further)
            found["accuracies"].append((measured.accuracy, measured.images))
            ids = measured.prompt_ids
            chosen = None if ids is None else sorted(ids.flatten(1).tolist())
            known, weights = measured.reliability, measured.prompt_weights
            sums = [] if weights is None else [len(weights), weights.double().sum().item()]
            found["reliability"].append(
                sums + ([] if known is None else [sum(known.images), sum(known.confidence), known.loss])
            )
            aside = {"prompt_ids": chosen, "prompt_weights": None, "reliability": None}
            found["measured"].append(vars(measured) | aside)
    state = {k: v for k, v in model.state_dict().items() if "prompt_pool" in k}
    found["counts"] = {k: v for k, v in state.items() if not v.is_floating_point()}
    found["tensors"] = {k: v for k, v in state.items() if v.is_floating_point()}
    return found


def grow_while_wrapped(late: bool) -> str:
    """The message of the error that a model gives when begin_task came after it was wrapped."""
    model = make_model(CASES["l2p-vit"])
    batch = next(iter(make_stream().train_batches(make_stream().tasks[0], BATCH, seed=0, epoch=0)))
    if late:
        model.begin_task([0, 7])
    wrapped = DistributedDataParallel(model).train()
    if late:
        wrapped(**batch).loss.backward()
        model.end_task()
        model.begin_task([1, 3])
        batch["labels"] = torch.where(batch["labels"] == 0, 1, 3)
    else:
        model.begin_task([0, 7])
    try:
        wrapped(**batch)
    except ValueError as error:
        return str(error)
    return ""


def report_wrong_label(rank: int) -> str:
    """The message about a wrong label that process 1 alone has counted, after one more forward."""
    model = make_model(CASES["l2p-vit"])
    model.begin_task([0, 7])
    wrapped = DistributedDataParallel(model).train()
    count = torch.compile(model.adapter.tasks.targets, backend="eager")  # in a graph labels are counted, as on a device
    count(torch.tensor([5 if rank == 1 else 0]), model.head, only_current=True)
    wrapped(**next(iter(make_stream().train_batches(make_stream().tasks[0], BATCH, seed=0, epoch=0))))
    try:
        model.check_labels()
    except ValueError as error:
        return str(error)
    return ""


def within_a_task(name: str) -> dict[str, Any]:
    """The errors of a save and of an answer within a task, and the statistics once they are gathered, in two rounds."""
    model, stream = make_model(CASES[name]), make_stream()
    model.begin_task([0, 7])
    wrapped: Any = DistributedDataParallel(model) if dist.is_initialized() else model
    found: dict[str, Any] = {"errors": [], "statistics": []}
    for epoch in range(2):
        wrapped.train()
        for batch in stream.train_batches(stream.tasks[0], BATCH, seed=3, epoch=epoch):
            wrapped(**batch).loss.backward()
        for attempt in (model.state_dict, model.training_state_dict, lambda: model.eval()(images_of([0], 0))):
            try:
                attempt()
            except ValueError as error:
                found["errors"].append(str(error))
        model.gather_statistics()
        found["statistics"].append({n: b.clone() for n, b in model.adapter.named_buffers()})
        model.eval()(images_of([0], 0))
    return found


def process(rank: int, folder: str, names: list[str]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=PROCESSES)
    try:
        results: dict[str, Any] = {name: learn(CASES[name]) for name in names}
        results["errors"] = [grow_while_wrapped(late=False), grow_while_wrapped(late=True)]
        results["wrong label"] = report_wrong_label(rank)
        results["within a task"] = {name: within_a_task(name) for name in ("dualprompt prototype", "smope")}
        results["shares"] = [list(process_shards(np.arange(1, n + 1), BATCH)) for n in range(1, 10)]
        try:
            list(process_shards(np.arange(8), 7))
        except ValueError as error:
            results["errors"].append(str(error))
        torch.save(results, Path(folder, f"{rank}.pt"))
        dist.barrier()
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_processes(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two processes found."""
    folder = tmp_path_factory.mktemp("distributed")
    in_two_processes(process, str(folder), in_this_run(request, "name"))
    return [torch.load(folder / f"{rank}.pt") for rank in range(PROCESSES)]


@pytest.mark.by_turns(17, always=())
@pytest.mark.parametrize("name", CASES)
def test_two_processes_equal_one(name: str, two_processes: list[dict[str, Any]]) -> None:
    one = learn(CASES[name])
    model = make_model(CASES[name])
    for rank, found in enumerate(two_processes):
        two = found[name]
        for sent, images, classes in two["sent"]:
            assert sent == (bytes_of_a_step(name, model, images, classes) or sent)
        assert_close(two["features"], one["features"], atol=1e-5, rtol=0)
        assert two["counts"].keys() == one["counts"].keys()
        for key, counts in one["counts"].items():
            assert torch.equal(two["counts"][key], counts), f"{key} on process {rank}"
        if name != "l2p-vote":  # at test a vote is each process's own: answers then depend on the batch, as is warned
            assert two["accuracies"] == one["accuracies"]
            assert two["measured"] == one["measured"]
            assert_close(torch.tensor(two["reliability"]), torch.tensor(one["reliability"]), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(two["losses"], one["losses"], atol=1e-5, rtol=0)
        assert two["tensors"].keys() == one["tensors"].keys()
        for key, values in one["tensors"].items():
            assert_close(two["tensors"][key], values, atol=1e-5, rtol=0, msg=lambda m, k=key: f"{k}: {m}")
    single = CASES[name].tasks == SINGLE
    assert len(one["losses"]) == EPOCHS * (2 + 2 + 3 if single else 3 + 3)
    assert [images for _, images in one["accuracies"]] == ([3, 3, 4, 3, 4, 6] if single else [7, 7, 6])
    for key, counts in one["counts"].items():
        if key.endswith("history.counts") and "task-free" not in name:
            # top_k times the images of a task, however many epochs and padding
            images = torch.tensor([5, 6, 9] if single else [11, 9])
            chosen = getattr(model.adapter.config, "top_k", 1) * images
            assert (counts.sum(-1) == chosen.view(-1, *[1] * (counts.dim() - 2))).all()


def test_a_model_that_grows_inside_its_wrapper_says_so(two_processes: list[dict[str, Any]]) -> None:
    for found in two_processes:
        for message in found["errors"][:2]:
            assert "unwrap it, begin_task, new optimizer, then prepare it again" in message


def test_a_wrong_label_of_one_process_is_reported_by_all(two_processes: list[dict[str, Any]]) -> None:
    """DDP copies the buffers of process 0 over those of the others before every forward: the count is no buffer."""
    first, second = (found["wrong label"] for found in two_processes)
    assert first == second
    assert second.startswith("1 labels are of no declared class")


@pytest.mark.parametrize("method", ["dualprompt prototype", "smope"])
def test_statistics_are_gathered_before_they_are_read(method: str, two_processes: list[dict[str, Any]]) -> None:
    """SMoPE's pass over the images is complete within the second round."""
    one = within_a_task(method)
    assert not one["errors"], "one process has all"
    for found in two_processes:
        two = found["within a task"][method]
        assert len(two["errors"]) == 6
        assert all("call model.gather_statistics() on every process" in error for error in two["errors"])
        assert_close(two["statistics"], one["statistics"], atol=1e-5, rtol=1e-5)


def test_shares_of_a_global_batch(two_processes: list[dict[str, Any]]) -> None:
    """Equal in length on all processes; together the global batch, and padding (-1 - row) only at its end."""
    for rows, parts in enumerate(zip(*(found["shares"] for found in two_processes), strict=True), start=1):
        for number, (first, second) in enumerate(zip(*parts, strict=True)):
            assert len(first) == len(second)
            wanted = list(range(1, rows + 1))[BATCH * number : BATCH * (number + 1)]
            whole = first + second
            assert whole[: len(wanted)] == wanted
            assert [-1 - row for row in whole[len(wanted) :]] == wanted[: len(wanted) % PROCESSES]
    for found in two_processes:
        assert found["errors"][2:] == ["a global batch of 7 images does not divide by 2 processes"]
