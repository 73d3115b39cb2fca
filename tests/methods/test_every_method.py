"""What every method keeps on a tiny ViT, one row per method: padding, task-free use, autocast, spaces, files, fields."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.families import build
from support.methods import METHODS, VARIANTS
from support.tensors import draw
from torch import Tensor
from torch.testing import assert_close

from cl_prompts import HashPromptConfig, PromptPoolConfig, PromptPoolModel, get_prompt_pool_model
from cl_prompts.backbones.structure import projection_names
from cl_prompts.interfaces import PrefixKV
from cl_prompts.methods.pool import PromptPool


pytestmark = pytest.mark.by_turns(5)


Method = Callable[..., PromptPoolConfig]
# The router of class statistics is not in METHODS.
EVERY: dict[str, Method] = (
    METHODS
    | VARIANTS
    | {
        "hash prototype": lambda **more: HashPromptConfig(
            pool_size=6,
            top_k=2,
            layers=[0, 2],
            history_top=2,
            router_inference="prototype",
            task_statistics="covariance",
            **more,
        )
    }
)
every_method = pytest.mark.parametrize("method", EVERY)
TASKS = [[4, 1], [0, 7], [3, 5]]


def new_model(method: str, **fields: Any) -> PromptPoolModel:
    base = build("vit")
    torch.manual_seed(0)
    return get_prompt_pool_model(base, EVERY[method](**fields))


def images_of(task: int) -> Tensor:
    return draw(6, 3, 32, 32, seed=10 + task)


def learn(model: PromptPoolModel, tasks: range, *, end: bool = True) -> PromptPoolModel:
    """Two steps a task; every row of prompts and keys moves."""
    for task in tasks:
        model.begin_task(TASKS[task])
        optimizer = torch.optim.AdamW(model.parameter_groups(learning_rate=0.02), weight_decay=0.1)
        model.attach_optimizer(optimizer)
        model.train()
        for _ in range(2):
            labels = torch.tensor(TASKS[task] * 3)
            model(images_of(task), labels=labels, sample_ids=range(6)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        if end or task != tasks[-1]:
            model.end_task()
    return model.eval()


# ---- padding -------------------------------------------------------------------------------------------------------


@every_method
def test_padding_changes_no_loss_no_gradient_and_no_statistic(method: str) -> None:
    """Padding among the images of a second task, with every regularizer that the method has."""
    config = EVERY[method]()
    fields = {"entropy_weight": 0.7} if config.selects else {}
    if method.startswith("hide"):
        fields["contrastive_weight"] = 1.0
    plain = learn(new_model(method, **fields), range(2), end=False).train()
    padded, labels = copy.deepcopy(plain), torch.tensor(TASKS[1] * 3)
    for model in (plain, padded):
        model.attach_optimizer(torch.optim.SGD(model.parameter_groups(learning_rate=0.1)))
    rows, real = [0, 0, 1, 2, 3, 1, 4, 5], torch.tensor([True, False, True, True, True, False, True, True])
    images = torch.where(real[:, None, None, None], images_of(1)[rows], 9 * images_of(0)[rows])
    outputs = [
        plain(images_of(1), labels=labels, sample_ids=range(10, 16)),
        padded(images, labels=torch.where(real, labels[rows], -100), sample_ids=[10, -1, 11, 12, 13, -1, 14, 15]),
    ]
    for output in outputs:
        output.loss.backward()
    assert_close(outputs[1].losses, outputs[0].losses, atol=1e-5, rtol=1e-5)
    pools = [model.adapter.pool for model in (plain, padded)]
    for (name, ours), theirs in zip(pools[1].named_parameters(), pools[0].parameters(), strict=True):
        assert_close(ours.grad, theirs.grad, atol=1e-5, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}")
    for (name, ours), theirs in zip(pools[1].named_buffers(), pools[0].buffers(), strict=True):
        assert_close(ours, theirs, atol=1e-4, rtol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


# ---- without tasks -------------------------------------------------------------------------------------------------


@every_method
def test_task_free_it_learns_keeps_no_task_and_is_loaded(method: str, tmp_path: Path) -> None:
    """Every parameter of the pool learns; in training and at test an image gets the same prompts."""
    fields: dict[str, Any] = {"num_labels": 8, "class_mask": "none"}
    model = new_model(method, **fields)
    pool, values, labels = model.adapter.pool, images_of(0), torch.tensor(TASKS[0] * 3)
    model.attach_optimizer(torch.optim.SGD(model.parameter_groups(learning_rate=1.0)))
    output = model.train()(values, labels=labels)
    with torch.no_grad():
        answer = model.eval()(values)
    assert_close(answer.logits, output.logits, atol=1e-5, rtol=0)
    if answer.prompt_ids is not None:
        assert torch.equal(answer.prompt_ids, output.prompt_ids)
    output.loss.backward()
    still = {name for name, p in pool.named_parameters() if p.grad is None or not p.grad.any()}
    # What lies before a projection that starts at zero learns from the second step on.
    assert still <= ({"down.current", "bias.current"} if method == "layer_grouped" else set())
    rows = {name: part.counts.shape[0] for name, part in pool.named_modules() if hasattr(part, "counts")}
    rows |= {name: part.earlier.shape[0] for name, part in pool.named_modules() if hasattr(part, "earlier")}
    assert set(rows.values()) <= {0}
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        loaded = PromptPoolModel.from_pretrained(build("vit"), tmp_path)(values)
    assert torch.equal(loaded.logits, answer.logits)


# ---- autocast ------------------------------------------------------------------------------------------------------


@every_method
def test_under_autocast_an_image_chooses_as_it_does_alone(method: str) -> None:
    """In bf16, with scores and weights in float32."""
    model, images = learn(new_model(method), range(2)), images_of(2)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        together, alone = model(images), [model(image[None]) for image in images]
    assert_close(together.logits, torch.cat([one.logits for one in alone]), atol=0.05, rtol=0)
    for name in ("prompt_weights", "scores"):
        assert together.get(name) is None or together[name].dtype == torch.float32
    if together.prompt_ids is not None:
        assert torch.equal(together.prompt_ids, torch.cat([one.prompt_ids for one in alone]))


# ---- prefixes ------------------------------------------------------------------------------------------------------


def projected(prefix: Any, attention: Any) -> Any:
    """A prefix in the input space, sent through the block's own projections by hand."""
    if callable(prefix):
        return lambda block_input, queries: projected(prefix(block_input, queries), attention)
    assert isinstance(prefix, PrefixKV)
    _, *names = projection_names(attention)
    for field, name in zip("kv", names, strict=True):
        rows = getattr(attention, name)(getattr(prefix, field))
        setattr(prefix, field, rows.unflatten(2, (4, 8)).transpose(1, 2))
    return prefix


TWO_SPACES = [
    name
    for name, make in EVERY.items()
    if hasattr(make(), "prefix_space") and name != "norga" and not name.endswith("tokens")
]


@pytest.mark.parametrize("method", TWO_SPACES)
def test_input_space_prompts_go_through_the_projections(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, images = learn(new_model(method, prefix_space="input"), range(2)), images_of(1)
    with torch.no_grad():
        answer = model(images).logits
    structure, base, pool = model.base_model.structure, model.get_base_model(), model.adapter.pool
    in_input_space = pool.forward

    def by_hand(batch: Any) -> Any:
        prompts = in_input_space(batch)
        for layer, prefix in prompts.prefixes.items():
            prompts.prefixes[layer] = projected(prefix, base.get_submodule(structure.attentions[layer]))
        return prompts

    monkeypatch.setattr(pool, "forward", by_hand)
    with torch.no_grad():
        assert_close(model(images).logits, answer, atol=1e-5, rtol=0)
        monkeypatch.setattr(pool, "forward", in_input_space)
        pool.config.prefix_space = "projected"
        assert (model(images).logits - answer).abs().max() > 1e-3, "the two spaces must differ"


# ---- files ---------------------------------------------------------------------------------------------------------


@pytest.mark.by_turns(17)
@every_method
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_a_loaded_pool_goes_on_as_the_saved_one(method: str, low_cpu_mem_usage: bool, tmp_path: Path) -> None:
    """Saved in an open task and loaded: the same tensors of the same kinds, and after a third task they are bit-equal."""
    model = learn(new_model(method), range(2), end=False)
    model.save_pretrained(tmp_path)
    loaded = PromptPoolModel.from_pretrained(build("vit"), tmp_path, is_trainable=True, low_cpu_mem_usage=low_cpu_mem_usage)
    loaded.set_adapter("default")  # which thaws nothing
    for task in (1, 2):
        ours, theirs = model.adapter.pool, loaded.adapter.pool
        for kind in (PromptPool.named_parameters, PromptPool.named_buffers):
            wanted, found = dict(kind(ours)), dict(kind(theirs))  # type: ignore[operator]
            assert found.keys() == wanted.keys()
            for name, tensor in found.items():
                if task == 2 or name in theirs.state_dict():  # what is not saved
                    assert (tensor.dtype, tensor.requires_grad) == (wanted[name].dtype, wanted[name].requires_grad), name
                    # A tensor that safetensors maps is aligned otherwise, and products with it are rounded otherwise.
                    loose = low_cpu_mem_usage and task == 2
                    assert_close(tensor, wanted[name], atol=1e-5 if loose else 0, rtol=0)
        if task == 1:
            for one in (model, loaded):
                torch.manual_seed(1)
                one.end_task()
                learn(one, range(2, 3))
    with torch.no_grad():
        assert_close(loaded.eval()(images_of(0)).logits, model.eval()(images_of(0)).logits, atol=1e-4, rtol=0)


@every_method
def test_room_made_for_a_file_is_that_of_the_tasks(method: str) -> None:
    """`rebuild`, which takes time linear in the tasks, gives the shapes of `begin_task` for each of them."""
    model = new_model(method)
    built, rebuilt = (type(model.adapter.pool)(model.adapter.config, model.base_model.structure.shape) for _ in range(2))
    tasks = [[0, 1], [2], [1, 3, 4], [5], [6, 7]]
    for task in tasks:
        built.begin_task(task)
    rebuilt.rebuild(tasks)
    assert rebuilt.num_tasks == built.num_tasks == 5
    shapes = [{name: (t.shape, t.dtype) for name, t in pool.state_dict().items()} for pool in (built, rebuilt)]
    assert shapes[0] == shapes[1]
    with torch.no_grad():
        for one, other in zip(rebuilt.parameters(), built.parameters(), strict=True):
            assert one.requires_grad == other.requires_grad


# ---- fields --------------------------------------------------------------------------------------------------------


NOT_LAYERS = [([], r"layers=\[\]"), ([1, 1], "names a block twice"), ([0, -1], r"layers=\[0, -1\]")]
BAD: list[tuple[str, dict[str, Any], str]] = [
    ("coda", {"prompt_length": 7}, "prompt_length=7 cannot be split"),
    ("coda", {"components_per_task": 0}, "components_per_task=0 must be"),
    ("coda", {"readout": "prompt"}, 'prompt tokens that pass all blocks; coda has none here: use "auto"'),
    ("coda", {"query_regularization": 0.1}, "set one_stage=True"),
    ("coda_layer_argmax", {"one_stage": False}, 'use method="coda"'),
    ("dualprompt", {"g_layers": [0, 1], "e_layers": [1, 2]}, r"blocks \[1\] are in g_layers and in e_layers"),
    ("dualprompt", {"split": True, "g_length": 5, "e_length": 20}, "g_length=5 cannot be split"),
    ("dualprompt", {"split": True, "g_length": 6, "e_length": 7}, "e_length=7 cannot be split"),
    ("dualprompt", {"ensemble": 0}, "ensemble=0 must be an integer of at least 1"),
    ("dualprompt", {"task_init": "last"}, "task_init='last': choose one of"),
    ("dualprompt", {"task_inference": "key"}, "task_inference='key': choose one of"),
    ("dualprompt", {"task_inference": "prototype", "one_stage": True}, "un-prompted pass, which one_stage=True leaves out"),
    (
        "dualprompt",
        {"task_statistics": "covariance"},
        "'covariance' is for task_inference='prototype': set that, or leave it",
    ),
    ("dualprompt", {"e_layers": [], "g_layers": []}, "leave no prompt: name blocks for one of them"),
    ("dualprompt", {"e_layers": [], "ensemble": 2}, "ensemble=2 needs E-prompts, .* leave it at 1"),
    ("dualprompt", {"e_layers": [], "entropy_weight": 0.1}, "dualprompt selects nothing; leave it at 0"),
    ("dualprompt", {"e_layers": [], "alignment_weight": 0.1}, "dualprompt has no keys to align; leave it at 0"),
    ("dualprompt", {"g_layers": [], "freeze_g": True}, "leaves no G-prompt to freeze: set freeze_g=False"),
    ("dualprompt", {"g_layers": [], "separation_weight": 0.1}, "separation_weight=0.1 separates .* leave it at 0"),
    ("dualprompt", {"prompt_form": "rows"}, "prompt_form='rows': choose one of"),
    ("dualprompt", {"prompt_form": "tokens", "g_layers": [1]}, r"g_layers=\[1\]: .* give \[0\], or \[\] for none"),
    ("dualprompt", {"prompt_form": "tokens", "split": True, "g_length": 6, "e_length": 6}, "split=True is for prefixes"),
    ("dualprompt", {"prompt_form": "tokens", "prefix_space": "input"}, 'leave it at "projected" with tokens'),
    ("coda", {"adaptive_orthogonality": True}, "which orthogonality_weight=0 leaves out: set that"),
    (
        "coda",
        {"adaptive_orthogonality": True, "orthogonality_weight": 0.1, "one_stage": True},
        "un-prompted pass, which one_stage=True leaves out",
    ),
    ("coda", {"layer_query": "mean"}, "layer_query='mean' is for one-stage queries: set one_stage=True"),
    ("l2p", {"key_width": 0}, "key_width=0 must be an integer of at least 1"),
    ("l2p", {"key_width": 8, "key_type": "prompt_mean"}, "key_width=8 is of learned keys"),
    ("l2p", {"key_width": 8, "alignment_weight": 0.1}, "alignment_weight=0.1 compares keys .* leave one of them out"),
    ("l2p", {"key_loss": "distance"}, "key_loss='distance': choose one of"),
    ("l2p", {"ensemble": 3}, "ensemble=3 passes of top_k=5 prompts need more than pool_size=10: choose fewer passes"),
    ("l2p", {"num_pools": 2, "key_type": "none", "top_k": 10}, "num_pools=2: .* leave it at 1"),
    ("l2p", {"pool_average": "prompts"}, "pool_average='prompts' is for several pools: set num_pools"),
    ("l2p", {"max_size": 20}, "max_size=20 limits a pool that grows: set grow_by"),
    ("l2p", {"grow_by": 2.5}, "grow_by=2.5 must be a whole number"),
    ("l2p", {"grow_by": 2, "num_pools": 2}, "grow_by=2 is for one pool that selects: set num_pools=1"),
    ("l2p", {"grow_by": 2, "max_size": 9}, "max_size=9 is smaller than pool_size=10"),
    ("l2p_prefix", {"as_tokens": True, "prefix_space": "input"}, 'leave it at "projected" with as_tokens=True'),
    ("hash", {"task_statistics": "covariance"}, "'covariance' is for router_inference='prototype': set that, or leave it"),
    ("hash", {"alignment_weight": 0.1}, "alignment_weight=0.1: hash has no keys to align; leave it at 0"),
    ("hide", {"prompt_momentum": 1.5}, r"prompt_momentum=1.5 must lie in \[0, 1\]"),
    ("hide", {"temperature": 0}, "temperature=0 must be larger than 0"),
    ("hide", {"contrastive_weight": -1}, "contrastive_weight=-1 must be a finite number of at least 0"),
    ("hide", {"ensemble": 0}, "ensemble=0 must be an integer of at least 1"),
    ("hide", {"task_init": "copy"}, "task_init='copy': choose one of"),
    ("hide", {"alignment_weight": 0.1}, "has no keys to align"),
    ("hide", {"entropy_weight": 0.1}, "selects nothing"),
    ("hide", {"task_statistics": "variance"}, r"task_statistics='variance': choose one of \['mean', 'covariance'\]"),
    (
        "hide",
        {"task_statistics": "covariance", "covariance_shrinkage": 0.0},
        "covariance_shrinkage=0 must be larger than 0",
    ),
    ("hide", {"task_statistics": "covariance", "covariance_shrinkage": 1.5}, r"=1.5 must lie in \(0, 1\]"),
    ("hide", {"task_statistics": "covariance", "covariance_shrinkage": "oas"}, "='oas' must be a finite number"),
    ("hide", {"covariance_shrinkage": 0.1}, '=0.1 is for task_statistics="covariance": set that, or leave it at None'),
    ("l2p", {"alignment_weight": 0.1, "key_type": "prompt_mean"}, "needs learned keys: set key_type="),
    ("l2p", {"entropy_weight": 1.0, "key_type": "none", "top_k": 10}, "selects nothing; leave it at 0"),
    ("l2p", {"diversity_weight": -1.0}, "diversity_weight=-1.0 must be a finite number of at least 0"),
    ("l2p_prefix", {"pool_size": 3, "top_k": 5}, "top_k=5 is larger than pool_size=3"),
    ("l2p_prefix", {"key_loss": "batch"}, "key_loss='batch': choose one of"),
    ("layer_grouped", {"num_groups": 0}, "num_groups=0"),
    ("layer_grouped", {"num_groups": 2.0}, "num_groups=2.0"),
    ("layer_grouped", {"bottleneck": 0}, "bottleneck=0"),
    ("layer_grouped", {"prompt_length": -1}, "prompt_length=-1"),
    ("layer_grouped", {"temperature": 0}, "temperature=0"),
    ("layer_grouped", {"pull_coefficient": -1}, "pull_coefficient=-1"),
    ("layer_grouped", {"generator_init": "identity"}, "generator_init='identity'"),
    ("layer_grouped", {"prompt_init": "lower_layer"}, "prompt_init='lower_layer'"),
    ("layer_grouped", {"entropy_weight": 0.1}, "selects nothing"),
    ("layer_grouped", {"readout": "prompt"}, "readout"),
    ("layer_grouped", {"prefix_space": "output"}, "prefix_space='output'"),
    ("norga", {"gate": "relu"}, "gate='relu': choose one of"),
    ("norga", {"prefix_space": "input"}, "prefix_space='input': .* leave it at \"projected\""),
    ("smope", {"top_k": 26}, "top_k=26"),
    ("smope", {"epsilon": -1.0}, "epsilon=-1.0"),
    ("smope", {"readout": "prompt"}, "readout"),
    ("smope", {"alignment_weight": 0.1}, "alignment_weight"),
    ("vpt", {"prompt_length": 0}, "prompt_length=0"),
    ("vpt", {"deep": 1}, "deep=1"),
    ("vpt", {"layers": [0]}, "set deep=True"),
    ("vpt", {"deep": True, "position": "front"}, "position='front'"),
    ("vpt", {"deep": True, "add_cls_position_embedding": True}, "add_cls_position_embedding=True"),
    ("vpt", {"deep": True, "readout": "prompt"}, "readout"),
    ("vpt", {"prompt_init": "lower_layer"}, "prompt_init='lower_layer'"),
    ("vpt", {"position": "behind"}, "position='behind'"),
    ("vpt", {"add_cls_position_embedding": None}, "add_cls_position_embedding=None"),
    ("vpt", {"diversity_weight": 0.1}, "diversity_weight=0.1: vpt has one prompt; leave it at 0"),
    ("vpt", {"alignment_weight": 0.1}, "no keys"),
    ("vpt", {"entropy_weight": 0.1}, "selects nothing"),
    ("vq_prompt", {"temperature": 0.0}, "temperature"),
    ("vq_prompt", {"pool_size": 0}, "pool_size"),
    ("vq_prompt", {"prompt_length": 3}, "prompt_length"),
    ("vq_prompt", {"readout": "prompt"}, "readout"),
    *(
        (method, {"layers": layers, **({"deep": True} if method == "vpt" else {})}, message)
        for method in ("coda", "hash", "hide", "l2p_prefix", "layer_grouped", "norga", "smope", "vpt", "vq_prompt")
        for layers, message in NOT_LAYERS
    ),
]


@pytest.mark.parametrize(("method", "fields", "message"), BAD, ids=lambda value: value if isinstance(value, str) else "")
def test_a_bad_field_is_named_with_the_mend(method: str, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PromptPoolConfig(method=method, **fields)


OUT = r"layers \[7\] are out of range: the base has 3 blocks, 0 to 2"
NOT_OF_THE_BASE: list[tuple[str, str, dict[str, Any], str]] = [
    (
        "dualprompt",
        "vit",
        {"g_layers": [2, 7], "e_layers": [1]},
        r"layers \[7\] are out of range: the base has 3 blocks, 0 to 2",
    ),
    (
        "dualprompt",
        "vit",
        {"g_layers": [0], "e_layers": [2, 7]},
        r"layers \[7\] are out of range: the base has 3 blocks, 0 to 2",
    ),
    ("l2p", "beit", {"add_cls_position_embedding": True}, "leave it at None"),
    ("layer_grouped", "vit", {"num_groups": 4}, "num_groups=4: there are only 3 layers to group; choose at most 3"),
    ("layer_grouped", "vit", {"num_groups": 2, "layers": [1]}, "num_groups=2: there are only 1 layers"),
    ("layer_grouped", "vit", {"layers": [2, 3]}, "out of range"),
    ("vpt", "vit", {"deep": True, "layers": [3]}, "out of range"),
    ("vpt", "siglip", {"add_cls_position_embedding": True}, "no position embedding of a CLS token"),
]


@pytest.mark.parametrize(("method", "family", "fields", "message"), NOT_OF_THE_BASE)
def test_fields_that_do_not_fit_the_base(method: str, family: str, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        get_prompt_pool_model(build(family), PromptPoolConfig(method=method, **fields))
