"""Bad input is refused with the value and the mend in the message, and leaves everything as it was."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.base_condition import condition
from support.families import build, inputs
from torch import nn

from cl_prompts import HashPromptConfig, L2PConfig, PromptPoolConfig, PromptPoolModel, get_prompt_pool_model


def learner() -> PromptPoolModel:
    model = get_prompt_pool_model(build("vit"), L2PConfig())
    model.begin_task([3, 1])
    return model.train()


# ---- configs


@pytest.mark.parametrize(
    ("build_config", "message"),
    [
        (lambda: L2PConfig(pool_size=3, top_k=4), r"top_k=4 is larger than pool_size=3: choose at most"),
        (lambda: HashPromptConfig(pool_size=3), r"top_k=4 is larger than pool_size=3"),
        (lambda: HashPromptConfig(pool_size=3, top_k=2), r"history_top=4 is larger than pool_size=3"),
        (lambda: HashPromptConfig(layers=[0, -1]), r"layers=\[0, -1\] must be a list of block numbers, counted from 0"),
        (lambda: HashPromptConfig(layers=[0.0]), r"layers=\[0.0\] must be a list of block numbers"),
        (lambda: HashPromptConfig(layers=["1"]), r"layers=\['1'\] must be a list of block numbers"),
        (lambda: HashPromptConfig(layers=[True]), r"layers=\[True\] must be a list of block numbers"),
        (lambda: HashPromptConfig(layers=[]), r"layers=\[\] must be a list of block numbers"),
        (lambda: HashPromptConfig(layers=2), r"layers=2 must be a list of block numbers"),
        (lambda: HashPromptConfig(layers=[2, 0, 2]), r"layers=\[2, 0, 2\] names a block twice"),
        (lambda: HashPromptConfig(prompt_length=5), r"prompt_length=5 .*use an even number"),
        (lambda: HashPromptConfig(prompt_length=0), r"prompt_length=0 must be an integer of at least 1"),
        (lambda: L2PConfig(pool_size=2**63), r"pool_size=9223372036854775808 must be an integer .*below 2\*\*63"),
        (lambda: L2PConfig(pool_size=10.0), r"pool_size=10.0 must be an integer"),
        (lambda: L2PConfig(top_k=True), r"top_k=True must be an integer"),
        (lambda: HashPromptConfig(delta=-0.1), r"delta=-0.1 must be a finite number of at least 0"),
        (lambda: HashPromptConfig(delta=float("nan")), r"delta=nan must be a finite number"),
        (lambda: L2PConfig(pull_coefficient="0.1"), r"pull_coefficient='0.1' must be a finite number"),
        (lambda: HashPromptConfig(beta=0), r"beta=0 must lie in \(0, 1\]: 1 does not change updates"),
        (lambda: HashPromptConfig(beta=1.5), r"beta=1.5 must lie in \(0, 1\]"),
        (lambda: HashPromptConfig(beta="high"), r"beta='high' must be a finite number"),
        (lambda: HashPromptConfig(history_decay=1.01), r"history_decay=1.01 must lie in \[0, 1\]"),
        (lambda: HashPromptConfig(share_layers="yes"), r"share_layers='yes' must be True or False"),
        (lambda: L2PConfig(batchwise_selection=1), r"batchwise_selection=1 must be True or False"),
        (lambda: L2PConfig(add_cls_position_embedding=0), r"add_cls_position_embedding=0 must be True or False"),
        (lambda: PromptPoolConfig(method="coda2"), r"unknown method 'coda2': choose one of \[.*'hash'.*'l2p'"),
        (lambda: PromptPoolConfig(), r"unknown method None: choose one of"),
        (lambda: PromptPoolConfig(method=["l2p"]), r"unknown method \['l2p'\]: choose one of"),
        (lambda: L2PConfig(method="hash"), r"L2PConfig is for method='l2p', not 'hash'"),
        (lambda: L2PConfig(prompt_init="ones"), r"prompt_init='ones': choose one of \['uniform'"),
        (lambda: L2PConfig(position="end"), r"position='end': choose one of \['after_cls', 'front'\]"),
        (lambda: L2PConfig(key_type="none"), r'key_type="none" uses every prompt: set top_k=10'),
        (lambda: HashPromptConfig(router_inference="best"), r"router_inference='best': choose one of \['average'"),
        (lambda: HashPromptConfig(modulate=None), r"modulate=None: choose one of \['update'"),
        (lambda: L2PConfig(class_mask="tasks"), r"class_mask='tasks': choose one of \['task', 'batch', 'none'\]"),
        (lambda: HashPromptConfig(readout="prompt"), r'readout="prompt" needs prompt tokens.*: use "auto"'),
        (lambda: L2PConfig(num_labels=5), r'num_labels is for task-free training: set class_mask="batch" or "none"'),
        (lambda: L2PConfig(num_labels=0, class_mask="none"), r"num_labels=0 must be an integer of at least 1"),
        (lambda: L2PConfig(task_type="SEQ_CLS"), r"task_type='SEQ_CLS': .*leave it out"),
        (lambda: L2PConfig(modules_to_save="layernorm"), r"modules_to_save='layernorm' must be a list of names"),
        (lambda: L2PConfig(state="new"), r"`state` must be an object .*got 'new'"),
    ],
)
def test_configs(build_config: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_config()


STATES: list[tuple[dict[str, Any], str]] = [
    ({"format_version": 2}, r"format version 2, .* reads up to 1: upgrade with `pip install"),
    ({"format_version": "1"}, r"format version '1'"),
    ({"tasks": "01"}, r"`state.tasks` must be lists of distinct class ids, got '01'"),
    ({"tasks": [0, 1]}, r"`state.tasks` must be lists of distinct class ids, got \[0, 1\]"),
    ({"tasks": [[0, 1, 0]]}, r"`state.tasks` must be lists of distinct class ids, got \[\[0, 1, 0\]\]"),
    ({"tasks": [[0, -100]]}, r"`state.tasks` must be lists of distinct class ids"),
    ({"tasks": [[2**63]]}, r"`state.tasks` must be lists of distinct class ids"),
    ({"tasks": [[0, 1], []]}, r"`state.tasks` must be lists of distinct class ids"),
    ({"tasks": [], "task_open": True}, r"`state.task_open` must be true or false, false without tasks, got True"),
    ({"class_names": ["cat"]}, r"`state.class_names` must map str\(class id\) to a name, got \['cat'\]"),
    ({"base_fingerprint": 5}, r"`state.base_fingerprint` must be str or null, got 5"),
    ({"base_width": "32"}, r"`state.base_width` must be int or null, got '32'"),
    ({"image_size": 32}, r"`state.image_size` must be height and width in pixels or null, got 32"),
]


@pytest.mark.parametrize(("state", "message"), STATES)
def test_states(state: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        L2PConfig(state=state)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (HashPromptConfig(layers=[0, 3, 7]), r"layers \[3, 7\] are out of range: the base has 3 blocks, 0 to 2"),
        (L2PConfig(modules_to_save=["layers"]), r"modules_to_save cannot be applied to modules of type .*ModuleList"),
    ],
)
def test_configs_for_a_base(config: Any, message: str) -> None:
    base = build("vit").train()
    before = condition(base)
    with pytest.raises((ValueError, TypeError), match=message):
        get_prompt_pool_model(base, config)
    assert condition(base) == before


# ---- tasks


@pytest.mark.parametrize(
    ("classes", "error", "message"),
    [
        ([5, 6, 5], ValueError, r"classes \[5\] are declared twice in one call"),
        ([6, 1], ValueError, r"classes \[1\] were declared in an earlier task: leave them out, or pass revisit=True"),
        ([2.0], TypeError, r"classes must be integers as they stand in `labels`, got \[2.0\]"),
        (["cat"], TypeError, r"classes must be integers .*got \['cat'\]"),
        ([True], TypeError, r"classes must be integers .*got \[True\]"),
        (7, TypeError, r"classes must be a list of class ids, got 7: write \[7\]"),
        ([], ValueError, r"a task needs at least one class"),
        ([-100], ValueError, r"class -100 is negative: .* ids start at 0"),
        ([2**63], ValueError, r"class 9223372036854775808 does not fit the int64 of `labels`"),
    ],
)
def test_begin_task(classes: Any, error: type[Exception], message: str) -> None:
    model = learner()
    model.end_task()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(error, match=message):
        model.begin_task(classes)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    model.begin_task([8])
    assert model.classes == [3, 1, 8]


def test_revisit_brings_a_class_back_without_growing_the_head() -> None:
    model = learner()
    model.end_task()
    weight = model.base_model.adapter.head.weight.detach().clone()
    model.begin_task([1], revisit=True)
    assert model.classes == [3, 1]
    assert torch.equal(model.base_model.adapter.head.weight, weight)
    with pytest.raises(ValueError, match=r"labels \[3\] do not belong to the current task \[1\]: declare them in begin"):
        model(**inputs("vit"), labels=torch.tensor([1, 3, 1]))


def test_order_of_tasks() -> None:
    model = get_prompt_pool_model(build("vit"), L2PConfig())
    with pytest.raises(ValueError, match=r"no class is known yet: call begin_task\(classes\), or set num_labels"):
        model(**inputs("vit"))
    with pytest.raises(ValueError, match=r"no task is open: call begin_task\(classes\) first"):
        model.end_task()
    model.begin_task([0])
    with pytest.raises(ValueError, match=r"task 0 is still open: call end_task\(\) first"):
        model.begin_task([1])
    model.end_task()
    with pytest.raises(ValueError, match=r"a training forward outside a task: call begin_task\(classes\) first, or mo"):
        model.train()(**inputs("vit"), labels=torch.zeros(3, dtype=torch.int64))
    free = get_prompt_pool_model(build("vit"), L2PConfig(num_labels=4, class_mask="none"))
    with pytest.raises(ValueError, match=r"num_labels=4 makes this learner task-free: leave begin_task out"):
        free.begin_task([0])


# ---- batches

IMAGES = torch.zeros(2, 3, 32, 32)
LABELS = torch.tensor([3, 1])


@pytest.mark.parametrize(
    ("batch", "error", "message"),
    [
        ({}, TypeError, r"pixel_values must be a tensor \[B, channels, height, width\], got NoneType"),
        ({"pixel_values": [1]}, TypeError, r"pixel_values must be a tensor .*got list"),
        ({"pixel_values": IMAGES[0]}, ValueError, r"shape \[3, 32, 32\], expected \[B, 3, height, width\]"),
        ({"pixel_values": IMAGES[:0]}, ValueError, r"shape \[0, 3, 32, 32\]: give at least one image"),
        ({"pixel_values": IMAGES[:, :1]}, ValueError, r"has 1 channels, the base takes 3: convert images to RGB"),
        ({"pixel_values": IMAGES[..., :24]}, ValueError, r"are 32x24, the base takes 32x32: resize them with its image"),
        ({"labels": torch.tensor([3, 7])}, ValueError, r"labels \[7\] are of no declared class; declared are \[3, 1\]"),
        ({"labels": torch.tensor([3])}, ValueError, r"labels has shape \[1\], expected \[2\]: one class id per image"),
        ({"labels": torch.eye(2)}, TypeError, r"labels must be an integer tensor \[2\].*got a tensor of torch.float32"),
        ({"labels": [3, 1]}, TypeError, r"labels must be an integer tensor \[2\] of class ids, got list"),
        ({"query": torch.zeros(2, 31)}, ValueError, r"query has shape \[2, 31\], expected \[2, 32\]"),
        ({"query": torch.zeros(1, 32)}, ValueError, r"query has shape \[1, 32\], expected \[2, 32\]"),
        ({"query": [0.0]}, TypeError, r"query must be a tensor \[B, width\] from extract_features, got list"),
        ({"sample_ids": [4]}, ValueError, r"1 sample_ids for 2 images: give one per image"),
        ({"sample_ids": [4.0, 5.0]}, TypeError, r"sample_ids must be integers, one per image, got torch.float32"),
        ({"sample_ids": ["a", "b"]}, TypeError, r"sample_ids must be integers, one per image"),
    ],
)
def test_batches(batch: dict[str, Any], error: type[Exception], message: str) -> None:
    model = learner()
    if batch and "pixel_values" not in batch:
        batch = {"pixel_values": IMAGES, "labels": LABELS, **batch}
    expected = model.eval()(IMAGES).logits
    with pytest.raises(error, match=message):
        model.train()(**batch)
    assert torch.equal(model.eval()(IMAGES).logits, expected)


def test_labels_of_an_earlier_task() -> None:
    model = learner()
    model.end_task()
    model.begin_task([5])
    with pytest.raises(ValueError, match=r"labels \[1\] do not belong to the current task \[5\]: declare them in begin"):
        model(IMAGES, labels=torch.tensor([5, 1]))
    assert model.eval()(IMAGES, labels=torch.tensor([5, 1])).loss.isfinite()


def test_extract_features_of_bad_images() -> None:
    with pytest.raises(ValueError, match=r"has 1 channels, the base takes 3"):
        learner().extract_features(IMAGES[:, :1])


# ---- optimizers


def test_optimizers() -> None:
    model = get_prompt_pool_model(build("vit"), HashPromptConfig(layers=[0]))
    model.begin_task([3, 1])
    with pytest.raises(ValueError, match=r"hash changes the optimizer's steps: call model.attach_optimizer\(optimizer\)"):
        model(IMAGES, labels=LABELS)
    with pytest.raises(TypeError, match=r"expected a torch optimizer, got list"):
        model.attach_optimizer(model.parameter_groups(learning_rate=0.1))
    with pytest.raises(ValueError, match=r"no parameter group is called \['heads'\]: choose from \['base', 'head', 'k"):
        model.parameter_groups(learning_rate=0.1, heads=0.2)
    old = torch.optim.SGD(model.parameter_groups(learning_rate=0.1))
    model.attach_optimizer(old)
    model(IMAGES, labels=LABELS)
    model.end_task()
    model.begin_task([5])
    with pytest.raises(ValueError, match=r"does not train \['pool.router', .*build a new optimizer from model.parameter"):
        model.attach_optimizer(old)


def test_a_training_forward_with_the_optimizer_of_an_earlier_task() -> None:
    """Also where the method needs no attached optimizer, but has one."""
    model = learner()
    optimizer = torch.optim.SGD(model.parameter_groups(learning_rate=0.1))
    model.attach_optimizer(optimizer)
    model.base_model.adapter.head.weight = nn.Parameter(torch.zeros(2, 32))
    with pytest.raises(ValueError, match=r"does not train \['head.weight'\]: begin_task adds parameters"):
        model(IMAGES, labels=LABELS)


def test_an_adapter_cast_with_its_base_is_refused() -> None:
    model = learner().to(torch.bfloat16).eval()
    values = {name: x.bfloat16() for name, x in inputs("vit").items()}
    with pytest.raises(ValueError, match=r"the adapter was cast to torch.bfloat16.*cast the base alone"):
        model(**values)
    alone = learner().eval()
    alone.get_base_model().to(torch.bfloat16)
    assert alone(**values).logits.dtype == torch.float32
