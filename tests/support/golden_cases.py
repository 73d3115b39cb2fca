"""The fixtures of `golden/` by method: which config, and where each of the fixture's tensors lies in our adapter."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch.testing import assert_close

from cl_prompts import (
    APTConfig,
    CodaPromptConfig,
    CPGConfig,
    DualPromptConfig,
    HiDePromptConfig,
    L2PConfig,
    L2PPrefixConfig,
    NoRGaConfig,
    OnePromptConfig,
    PromptPoolConfig,
    PromptPoolOutput,
    SMoPEConfig,
    VPTNSP2Config,
    VQPromptConfig,
)
from support.golden_harness import Case, Method, Part, Value, by_layer, tasks_of


def _l2p(case: Case) -> PromptPoolConfig:
    return L2PConfig(
        pool_size=case.sizes["pool_size"],
        prompt_length=case.sizes["prompt_length"],
        top_k=case.sizes["top_k"],
        pull_coefficient=case.sizes["pull_coefficient"],
        batchwise_selection=case.sizes["batchwise_vote"],
    )


def _l2p_choices(case: Case, output: PromptPoolOutput) -> None:
    chosen = case.tensors.get("expected/indices")
    if chosen is None:
        assert torch.equal(output.prompt_ids.sort(1).values[0], case.tensors["expected/indices_voted"].flatten())
        return
    assert torch.equal(output.prompt_ids, chosen)
    similarity = case.tensors["expected/similarity"].gather(1, chosen)
    assert_close(output.prompt_weights, similarity, atol=case.tolerance("similarity"), rtol=0)


L2P = Method(
    config=_l2p,
    layout=lambda case, pool, value: [Part("prompt", ..., value(pool.prompts)), Part("key", ..., value(pool.keys))],
    parts={"ce": "cross_entropy", "key": "pull"},
    check_test=_l2p_choices,
)


def _l2p_prefix(key_loss: str) -> Callable[[Case], PromptPoolConfig]:
    return lambda case: L2PPrefixConfig(
        pool_size=case.sizes["pool_size"],
        prompt_length=case.sizes["prompt_length"],
        top_k=case.sizes["top_k"],
        layers=case.sizes["layers"],
        pull_coefficient=case.sizes["key_loss_weight"],
        key_loss=key_loss,
    )


def _choices_by_layer(case: Case, output: PromptPoolOutput) -> None:
    layers = case.sizes.get("e_layers") or case.sizes["layers"]
    for row, layer in enumerate(layers):
        chosen = case.tensors[f"expected/indices/layer{layer}"]
        assert torch.equal(output.prompt_ids[:, row], chosen.view(len(chosen), -1)), f"layer {layer}"
        similarity = case.tensors[f"expected/similarity/layer{layer}"].gather(1, chosen.view(len(chosen), -1))
        assert_close(output.prompt_weights[:, row], similarity, atol=case.tolerance("similarity"), rtol=0)


def _l2p_prefix_method(fixture: str, key_loss: str = "distance", variant: str = "") -> Method:
    return Method(
        config=_l2p_prefix(key_loss),
        layout=lambda case, pool, value: [
            *by_layer("e_prompt", value(pool.prompts), pool.layers),
            *by_layer("key", value(pool.keys), pool.layers),
        ],
        parts={"ce": "cross_entropy", "key": "pull"},
        fixture=fixture,
        variant=variant,
        check_test=_choices_by_layer,
    )


def _dualprompt(case: Case, pool: Any, value: Value) -> list[Part]:
    heads = (pool.shape.num_heads, pool.shape.head_dim)
    rows = (2, -1, *heads)
    return [
        Part("g_prompt", ..., value(pool.g_prompts).unflatten(2, heads).unflatten(1, rows[:2])),
        *(
            Part("e_prompt", (slice(None), slice(None), task), one.unflatten(2, heads).unflatten(1, rows[:2]))
            for task, one in enumerate(tasks_of(pool.e_prompts, value))
        ),
        *(Part("key", task, one[0]) for task, one in enumerate(tasks_of(pool.keys, value))),
    ]


def _dualprompt_choices(case: Case, output: PromptPoolOutput) -> None:
    chosen = case.tensors["expected/indices"]
    assert torch.equal(output.prompt_ids, chosen)
    assert_close(output.scores, case.tensors["expected/similarity"], atol=case.tolerance("similarity"), rtol=0)


DUALPROMPT = Method(
    config=lambda case: DualPromptConfig(
        g_layers=case.sizes["g_layers"],
        e_layers=case.sizes["e_layers"],
        g_length=case.sizes["g_prompt_length"],
        e_length=case.sizes["e_prompt_length"],
        pull_coefficient=case.sizes["pull_coefficient"],
    ),
    layout=_dualprompt,
    parts={"ce": "cross_entropy", "key": "pull"},
    test_tasks=lambda case: int(case.sizes["pool_size"]),
    check_test=_dualprompt_choices,
)


def _dualprompt_coda(case: Case, pool: Any, value: Value) -> list[Part]:
    g_layers, e_layers = pool.config.g_layers, pool.config.e_layers
    return [
        *by_layer("g_prompt", value(pool.g_prompts), g_layers),
        *(
            part
            for name, tensor in (("e_prompt", pool.e_prompts), ("key", pool.keys))
            for task, one in enumerate(tasks_of(tensor, value))
            for part in by_layer(name, one, e_layers, task)
        ),
    ]


DUALPROMPT_CODA = Method(
    config=lambda case: DualPromptConfig(
        g_layers=case.sizes["g_layers"],
        e_layers=case.sizes["e_layers"],
        g_length=case.sizes["g_prompt_length"],
        e_length=case.sizes["e_prompt_length"],
        split=True,
        keys_per_layer=True,
        key_loss="distance",
        pull_coefficient=case.sizes["key_loss_weight"],
    ),
    layout=_dualprompt_coda,
    parts={"ce": "cross_entropy", "key": "pull"},
    test_tasks=lambda case: int(case.sizes["pool_size"]),
    check_test=_choices_by_layer,
)


def _coda(case: Case, pool: Any, value: Value) -> list[Part]:
    count = pool.config.components_per_task
    return [
        part
        for name, tensor in (("e_prompt", pool.components), ("key", pool.keys), ("attention", pool.attention))
        for task, one in enumerate(tasks_of(tensor, value))
        for part in by_layer(name, one, pool.layers, slice(task * count, (task + 1) * count))
    ]


def _coda_weights(case: Case, output: PromptPoolOutput) -> None:
    for row, layer in enumerate(case.sizes["layers"]):
        case.close(output.prompt_weights[:, row], f"expected/weights/layer{layer}", "weights")


def _coda_method(**parts: str) -> Method:
    return Method(
        config=lambda case: CodaPromptConfig(
            components_per_task=case.sizes["components_per_task"],
            prompt_length=case.sizes["prompt_length"],
            layers=case.sizes["layers"],
            orthogonality_weight=case.sizes["ortho_weight"],
        ),
        layout=_coda,
        parts={"ce": "cross_entropy", **parts},
        check_test=_coda_weights,
    )


def _rates(prompts: str) -> Callable[[dict[str, Any]], dict[str, float]]:
    """The fixture gives two rates: for what it calls `prompts`, and for the head."""
    return lambda about: {"learning_rate": about["lr"][prompts], "head": about["lr"]["head"]}


def _vq_choices(case: Case, output: PromptPoolOutput) -> None:
    for row, layer in enumerate(case.sizes["layers"]):
        chosen, scores = case.tensors[f"expected/indices/layer{layer}"][:, None], output.scores[:, row]
        assert torch.equal(output.prompt_ids[:, row], chosen), f"layer {layer}"
        case.close(scores, f"expected/similarity/layer{layer}", "similarity")
        case.close((scores / case.sizes["temperature"]).softmax(1), f"expected/weights/layer{layer}", "weights")
        weights = case.tensors[f"expected/weights/layer{layer}"].gather(1, chosen)
        assert_close(output.prompt_weights[:, row], weights, atol=case.tolerance("weights"), rtol=0)


VQ_PROMPT = Method(
    config=lambda case: VQPromptConfig(**case.sizes),
    layout=lambda case, pool, value: [
        *by_layer("e_prompt", value(pool.prompts), pool.layers),
        *by_layer("key", value(pool.keys), pool.layers),
    ],
    parts={"ce": "cross_entropy", "vq": "quantization"},
    rates=_rates("prompt and key tensors"),
    check_test=_vq_choices,
)


def _smope(case: Case, pool: Any, value: Value) -> list[Part]:
    heads = (pool.shape.num_heads, pool.shape.head_dim)
    ours = {"expert_k": pool.expert_keys, "expert_v": pool.expert_values}
    return [Part(name, ..., value(x).unflatten(2, heads).transpose(1, 2)) for name, x in ours.items()]


def _smope_past(case: Case, pool: Any) -> None:
    pool.history.counts[0] = case.tensors["fixed/activation_count"]
    assert torch.equal(pool.frequently_used(), case.tensors["fixed/frequently_used"])
    pool.old_keys.copy_(case.tensors["fixed/old_expert_k"].transpose(1, 2).flatten(2))


def smope_choices(case: Case, output: PromptPoolOutput, when: str = "eval") -> None:
    assert torch.equal(output.prompt_ids.transpose(0, 1), case.tensors[f"expected/indices_{when}"])
    case.close(output.scores.transpose(0, 1), f"expected/similarity_{when}", "similarity")


SMOPE = Method(
    config=lambda case: SMoPEConfig(
        pool_size=case.sizes["experts"],
        **{name: case.sizes[name] for name in ("top_k", "layers", "router_weight", "prototype_weight", "epsilon")},
    ),
    layout=_smope,
    parts={"ce": "cross_entropy", "router": "router+prototype"},
    rates=_rates("experts"),
    prepare=_smope_past,
    check_test=smope_choices,
)


def _task_prompts(case: Case, pool: Any, value: Value) -> list[Part]:
    heads = (pool.shape.num_heads, pool.shape.head_dim)
    return [
        Part("e_prompt", (slice(None), slice(None), task), one.unflatten(3, heads))
        for task, one in enumerate(tasks_of(pool.prompts, value))
    ]


def _task_prompts_past(case: Case, pool: Any) -> None:
    pool.task_inference = lambda query: case.tensors["prompt_ids"]
    means = case.tensors.get("fixed/class_means")
    if means is not None:
        pool.class_means[: len(means)] = means  # in any order; a class that has none is left out


def _task_prompt_choices(case: Case, output: PromptPoolOutput) -> None:
    assert torch.equal(output.prompt_ids[:, 0], case.tensors["prompt_ids"])


def _all_sizes(case: Case) -> dict[str, Any]:
    return {name: value for name, value in case.sizes.items() if name != "pool_size"}


HIDE = Method(
    config=lambda case: HiDePromptConfig(**_all_sizes(case)),
    layout=_task_prompts,
    parts={"ce": "cross_entropy", "contrastive": "contrastive"},
    rates=_rates("prompts"),
    test_tasks=lambda case: int(case.sizes["pool_size"]),
    prepare=_task_prompts_past,
    check_test=_task_prompt_choices,
)

NORGA = replace(
    HIDE,
    config=lambda case: NoRGaConfig(**_all_sizes(case)),
    layout=lambda case, pool, value: [
        *_task_prompts(case, pool, value),
        Part("gate_scale", ..., value(pool.gate_scale)[:, :, None, None]),
    ],
    rates=_rates("prompts and gate_scale"),
)

OVOR = Method(
    config=lambda case: OnePromptConfig(
        g_layers=case.sizes["g_layers"],
        e_layers=case.sizes["e_layers"],
        g_length=case.sizes["g_prompt_length"],
        e_length=case.sizes["e_prompt_length"],
    ),
    layout=lambda case, pool, value: [
        Part("g_prompt", ..., value(pool.g_prompts)),
        Part("e_prompt", ..., value(pool.e_prompts)),
    ],
    parts={"ce": "cross_entropy"},
    check_test=lambda case, output: case.close(output.features, "expected/features", "features"),
)

APT = Method(
    config=lambda case: APTConfig(average=case.sizes["alpha"], layers=case.sizes["layers"]),
    layout=lambda case, pool, value: [Part("prompt", ..., value(pool.prompts))],
    parts={"ce": "cross_entropy"},
    prepare=lambda case, pool: pool.average.copy_(case.tensors["fixed/global_prompt"]),
)


def _matrices(case: Case, pool: Any) -> None:
    """The matrices of the tasks before."""
    for ours, name in ((pool.first, "C1"), (pool.second, "C2")):
        ours.copy_(case.tensors[f"expected/task_end0/{name}"])
    pool.collected, pool.available = (torch.tensor(pool.num_tasks) for _ in range(2))


def _vpt_nsp2_past(case: Case, pool: Any) -> None:
    _matrices(case, pool)
    pool.previous.copy_(case.tensors["fixed/previous_prompts"])


VPT_NSP2 = Method(
    config=lambda case: VPTNSP2Config(
        loss_temperature=case.sizes["temperature"],
        distribution_weight=case.sizes["ln_loss_weight"],
        **{name: case.sizes[name] for name in ("prompt_length", "layers", "eta1", "eta2")},
    ),
    layout=lambda case, pool, value: [Part("prompts", ..., value(pool.prompts))],
    parts={"ce": "cross_entropy", "mean": "prompt_mean", "std": "prompt_std"},
    prepare=_vpt_nsp2_past,
)


def _cpg_choices(case: Case, output: PromptPoolOutput) -> None:
    assert torch.equal(output.prompt_ids.transpose(0, 1), case.tensors["expected/indices"])
    gates = case.tensors["expected/gates"].transpose(0, 1).gather(2, output.prompt_ids)
    assert_close(output.prompt_weights, gates, atol=case.tolerance("gates"), rtol=0)


CPG = Method(
    config=lambda case: CPGConfig(
        pool_size=case.sizes["num_experts"],
        loss_temperature=case.sizes["temperature"],
        balance_weight=case.sizes["balance_coefficient"],
        **{name: case.sizes[name] for name in ("prompt_length", "top_k", "layers", "eta1", "eta2")},
    ),
    layout=lambda case, pool, value: [
        Part("experts", ..., value(pool.experts)),
        Part("w_gate", ..., value(pool.gate).mT),
    ],
    parts={"ce": "cross_entropy", "balance": "balance"},
    prepare=_matrices,
    check_test=_cpg_choices,
)


METHODS: dict[str, Method] = {
    "l2p_pytorch": L2P,
    "l2p_pytorch_batchwise": L2P,
    "l2p_prefix": _l2p_prefix_method("l2p_prefix"),
    "l2p_prefix as released": _l2p_prefix_method("l2p_prefix", "coupled", "as_released/"),
    "l2p_prefix_deep": _l2p_prefix_method("l2p_prefix_deep"),
    "l2p_prefix_deep as released": _l2p_prefix_method("l2p_prefix_deep", "coupled", "as_released/"),
    "dualprompt": DUALPROMPT,
    "dualprompt_coda": DUALPROMPT_CODA,
    "coda_prompt_task0": _coda_method(),
    "coda_prompt_task1": _coda_method(),
    "coda_prompt_task1_ortho": _coda_method(ortho="orthogonality"),
    "coda_prompt_task2": _coda_method(),
    "vq_prompt": VQ_PROMPT,
    "smope": SMOPE,
    "hide": HIDE,
    "norga": NORGA,
    "ovor": OVOR,
    "apt": APT,
    "vpt_nsp2": VPT_NSP2,
    "cpg": CPG,
}
