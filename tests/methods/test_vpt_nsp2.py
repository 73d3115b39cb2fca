"""VPT-NSP2 and what it shares with CPG: the pass at the end of a task, the null space, projected steps, what is saved.

Golden numbers of both methods' released code; the first part of them is in tests/contract/test_golden.py.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from support.families import build
from support.golden_cases import CPG, VPT_NSP2
from support.golden_harness import Case, Method
from support.methods import METHODS
from support.small_runs import small_trainer
from support.tensors import draw
from torch import Tensor
from torch.testing import assert_close

from cl_prompts import PromptPoolModel, get_prompt_pool_model
from cl_prompts.backbones.prefix import _key_weight
from cl_prompts.methods.shared.null_space import null_space_size, projection


both = pytest.mark.parametrize("name", ["vpt_nsp2", "cpg"])
FIXTURES: dict[str, Method] = {"vpt_nsp2": VPT_NSP2, "cpg": CPG}
TASKS = [[4, 1], [0, 7], [3, 5]]


def batches(images: Tensor, label: int, size: int, pad: int = 0) -> list[dict[str, Any]]:
    """Batches of `size`, each with `pad` rows of padding in front."""
    parts = []
    for number, part in enumerate(images.split(size)):
        labels = torch.tensor([-100] * pad + [label] * len(part))
        ids = torch.tensor([-1] * pad + list(range(size * number, size * number + len(part))))
        parts.append({"pixel_values": torch.cat([part[:1]] * pad + [part]), "labels": labels, "sample_ids": ids})
    return parts


# ---- golden numbers --------------------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("pad", [0, 2])
def test_matrices_at_the_end_of_a_task(name: str, pad: int) -> None:
    """C1, C2, the kept vectors and B after the task before, and after the task that `test_golden.py` trains."""
    method, case = FIXTURES[name], Case.load(name)
    model = method.build(case, test=False).eval()
    pool, size = model.adapter.pool, case.sizes["eval_batch_size"]
    label = case.about["task"]["current_classes"][0]
    for number in (0, 1):
        start = {0: "fixed/{}", 1: "expected/task_end0/{}"}[number]
        pool.first, pool.second = (case.tensors[start.format(c)].clone() for c in ("C1", "C2"))
        pool.collected, pool.available = (torch.tensor(pool.num_tasks - 1) for _ in range(2))
        with torch.no_grad():
            for part in method.all_parts(case, model, lambda tensor: tensor):
                stored = f"after/{part.name}" if number else f"before/{part.name}"
                part.ours.copy_(case.tensors[stored][part.index])
            if name == "vpt_nsp2" and not number:
                pool.prompts.copy_(case.tensors["fixed/previous_prompts"])
        model.consolidate(batches(case.tensors[f"task_end{number}/pixel_values"], label, size, pad))
        found = pool.projections()
        assert found is not None
        pairs = zip((pool.first, pool.second), found, ("1", "2"), strict=True)
        for matrix, projected, which in pairs:
            wanted = case.tensors[f"expected/task_end{number}/C{which}"]
            allowed = case.tolerance("C" + which) * (wanted.abs().max().item() + 1e-3)
            assert_close(matrix, wanted, atol=allowed, rtol=0)
            values = torch.linalg.eigvalsh(matrix.double()).abs().sort(descending=True).values
            kept = [null_space_size(one) for one in values]
            assert kept == case.tensors[f"expected/task_end{number}/kept{which}"].tolist()
            case.close(projected, f"expected/task_end{number}/B{which}", "B" + which)


@both
def test_knee(name: str) -> None:
    case = Case.load(name)
    for number, kept in enumerate(case.tensors["expected/knee/kept"].tolist()):
        spectrum = case.tensors[f"knee/spectrum{number}"].double()
        assert null_space_size(spectrum.sort(descending=True).values) == kept
        rest = projection(spectrum.diag(), 1.0).diagonal()
        assert int((rest > 0.5 * kept**-0.5).sum()) == kept
        assert spectrum[rest > 0.5 * kept**-0.5].max() <= spectrum[rest < 0.5 * kept**-0.5].min()


@pytest.mark.parametrize("size", [1, 2])
def test_a_matrix_without_a_knee_projects_nothing(size: int) -> None:
    assert torch.equal(projection(torch.ones(size, size), 0.97), torch.eye(size))


# ---- the contract ----------------------------------------------------------------------------------------------------


def new_model(name: str, **fields: Any) -> PromptPoolModel:
    base = build("vit")
    torch.manual_seed(0)
    return get_prompt_pool_model(base, METHODS[name](**fields))


def learn(model: PromptPoolModel, task: int, *, consolidate: bool = True, kind: Any = torch.optim.AdamW) -> None:
    model.begin_task(TASKS[task])
    optimizer = kind(model.parameter_groups(learning_rate=0.02), weight_decay=0.1)
    model.attach_optimizer(optimizer)
    images, labels = draw(6, 3, 32, 32, seed=10 + task), torch.tensor(TASKS[task] * 3)
    for _ in range(2):
        model.train()(images, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    if consolidate:
        model.eval().consolidate([{"pixel_values": images, "labels": labels}])
    model.end_task()


@both
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW])
def test_steps_are_projected_and_old_rows_of_the_head_stay(name: str, kind: Any) -> None:
    """The step of the second task is the optimizer's own, multiplied by B; rows of old classes stay under weight decay."""
    model = new_model(name)
    learn(model, 0)
    model.begin_task(TASKS[1])
    pool = model.adapter.pool
    optimizer = kind(model.parameter_groups(learning_rate=0.02), weight_decay=0.1)
    free = [p.detach().clone().requires_grad_() for group in optimizer.param_groups for p in group["params"]]
    own = kind(free, lr=0.02, weight_decay=0.1)
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    start, old_rows = [p.detach().clone() for p in trained], model.head.weight[:2].detach().clone()
    model.attach_optimizer(optimizer)
    model.train()(draw(6, 3, 32, 32), labels=torch.tensor(TASKS[1] * 3)).loss.backward()
    for mine, theirs in zip(free, trained, strict=True):
        mine.grad = theirs.grad.clone()
    own.step()
    optimizer.step()
    names = {id(p): n for n, p in pool.named_parameters()}
    first, second = pool.projections()
    for before, mine, theirs in zip(start, free, trained, strict=True):
        step, taken = mine.detach() - before, theirs.detach() - before
        of = names.get(id(theirs))
        if of == "prompts":
            wanted = torch.stack([b2 @ u @ b1 for b1, b2, u in zip(first, second, step, strict=True)])
        elif of == "gate":
            wanted = torch.stack([u @ b1 for b1, u in zip(first, step, strict=True)])
        elif of == "experts":
            wanted = torch.einsum("lmn,lnrd->lmrd", second, step)
        else:
            wanted = torch.cat([torch.zeros_like(step[:2]), step[2:]])
        assert_close(taken, wanted, atol=1e-6, rtol=1e-4, msg=lambda m, of=of: f"{of or 'head'}: {m}")
    assert torch.equal(model.head.weight[:2], old_rows)


@both
def test_without_the_pass_the_next_task_warns(name: str) -> None:
    model = new_model(name)
    learn(model, 0, consolidate=False)
    with pytest.warns(UserWarning, match=rf"{name} has seen the images of 0 of 1 tasks.*call model.consolidate"):
        model.begin_task(TASKS[1])
    assert model.adapter.pool.update_projections() == {}


@pytest.mark.by_turns(2, always=())
@both
def test_the_trainer_shows_each_tasks_images(name: str) -> None:
    trainer: Any = small_trainer(name)
    trainer.train()
    pool = trainer.model.adapter.pool
    assert int(pool.collected) == int(pool.available) == 3
    assert pool.first.flatten(1).any(1).all()
    assert pool.update_projections()


@both
def test_a_task_is_seen_once(name: str) -> None:
    model, batch = new_model(name), {"pixel_values": draw(2, 3, 32, 32), "labels": torch.tensor(TASKS[0])}
    model.begin_task(TASKS[0])
    model.eval().consolidate([batch])
    first = model.adapter.pool.first
    with pytest.raises(ValueError, match="all 1 tasks begun were seen already"):
        model.consolidate([batch])
    assert model.adapter.pool.first is first


@both
def test_a_failed_pass_changes_nothing(name: str) -> None:
    model = new_model(name)
    model.begin_task(TASKS[0])
    images = draw(4, 3, 32, 32)
    with pytest.raises(ValueError, match="do not belong to the current task"):
        model.eval().consolidate([{"pixel_values": images, "labels": torch.tensor([4, 1, 3, 5])}])
    pool = model.adapter.pool
    assert not pool.first.any()
    assert int(pool.collected) == 0


@both
def test_saved_without_matrices_it_answers_and_learns_no_more(name: str, tmp_path: Path) -> None:
    model = new_model(name, save_statistics=False)
    learn(model, 0)
    model.save_pretrained(tmp_path)
    loaded = PromptPoolModel.from_pretrained(build("vit"), tmp_path, is_trainable=True)
    images = draw(3, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(loaded.eval()(images).logits, model.eval()(images).logits)
    before = loaded.classes
    with pytest.raises(ValueError, match=r"without the matrices .* save_statistics=True"):
        loaded.begin_task(TASKS[1])
    assert loaded.classes == before
    state = model.training_state_dict()  # a checkpoint has them
    learn(model, 1)
    other = new_model(name, save_statistics=False)
    other.load_training_state_dict(state)
    torch.manual_seed(0)
    assert torch.equal(other.adapter.pool.first, state["tensors"]["adapter.pool.first"])


@both
def test_a_frozen_pool_and_a_stream_without_tasks_need_no_pass(name: str) -> None:
    assert new_model(name).needs_consolidation
    assert not new_model(name, trained_tasks="first").needs_consolidation
    assert not new_model(name, num_labels=8, class_mask="none").needs_consolidation


@both
def test_a_compiled_backbone_collects_the_same(name: str) -> None:
    found = []
    for compiled in (False, True):
        model = new_model(name)
        model.begin_task(TASKS[0])
        if compiled:
            model.compile_backbone(backend="eager", fullgraph=True)
        model.eval().consolidate(batches(draw(4, 3, 32, 32), 4, 2))
        found.append(model.adapter.pool.first)
    assert torch.equal(*found)


def test_prefix_attention_is_the_models_own() -> None:
    """What the pass sees of a block's attention, against a forward by hand, with the images in two batches."""
    model = new_model("vpt_nsp2", layers=[1])
    model.begin_task(TASKS[0])
    images, pool, base = draw(4, 3, 32, 32), model.adapter.pool, model.get_base_model()
    model.eval().consolidate(batches(images, 4, 3))
    with torch.no_grad():
        layer: Any = base.layers[1]
        hidden = base.layers[0](base.embeddings(images))
        normed = layer.layernorm_before(torch.cat([hidden, pool.prompts[0].expand(4, -1, -1)], 1))
        attention = layer.attention
        cut = (-1, attention.head_dim)
        q, k = (project(normed).unflatten(2, cut) for project in (attention.q_proj, attention.k_proj))
        q, k = q[:, : hidden.shape[1]].transpose(1, 2), k.transpose(1, 2)
        weights = (q @ k.mT * q.shape[3] ** -0.5).softmax(-1)[..., hidden.shape[1] :]
        key_weight = _key_weight(attention, hidden)
        mapped = torch.einsum("bhnd,hdx->bhnx", q, key_weight)
        wanted = [
            sum(torch.einsum("bhnx,bhny->xy", part, part) / part[..., 0].numel() for part in rows.split(3))
            for rows in (mapped, weights)
        ]
    assert_close(pool.first[0], wanted[0], atol=1e-5, rtol=1e-4)
    assert_close(pool.second[0], wanted[1], atol=1e-6, rtol=1e-4)


def test_key_weight_of_a_layer_that_hides_it() -> None:
    """A quantized or LoRA layer is asked for its outputs."""
    attention: Any = build("vit").layers[0].attention
    tokens = draw(2, 5, attention.k_proj.in_features)
    plain = _key_weight(attention, tokens)

    class Hidden(torch.nn.Linear):
        pass

    other = Hidden(attention.k_proj.in_features, attention.k_proj.out_features)
    other.load_state_dict(attention.k_proj.state_dict())
    attention.k_proj = other
    with torch.no_grad():
        assert_close(_key_weight(attention, tokens), plain, atol=1e-6, rtol=0)
