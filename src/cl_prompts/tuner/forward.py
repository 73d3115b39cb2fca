"""The forward of a model with a prompt pool, from images to `PromptPoolOutput`.

    validate -> query -> pool -> plan -> prompted pass -> head -> losses -> output

PEFT calls the base model inside `_enable_peft_forward_hooks`, which enters `prompted_forward`. `prompted_forward` runs the
steps up to the plan on entry and passes `answer`, which runs the steps after the prompted pass, to the backbone. So a plain
`PeftModel` and a `PromptPoolModel` return the same output.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from cl_prompts.backbones.own_arguments import OWN_ARGUMENTS
from cl_prompts.backbones.plan import PassPlan, PassRecord, Reuse
from cl_prompts.backbones.prompted_backbone import PromptedBackbone
from cl_prompts.backbones.readout import read_feature
from cl_prompts.backbones.reuse import reuse_of_states
from cl_prompts.backbones.structure import cls_position_embedding
from cl_prompts.interfaces import PoolInput, Probe, Prompts
from cl_prompts.learner.checks import check_labels
from cl_prompts.methods import Observation
from cl_prompts.outputs import PromptPoolOutput
from cl_prompts.tuner.adapter import PoolAdapter
from cl_prompts.tuner.inputs import check_inputs
from cl_prompts.tuner.output import combine_candidates, head_losses, mask_logits, method_losses, selection_of, total_loss
from cl_prompts.tuner.validation import check_answerable, check_ready


@dataclass(frozen=True)
class Inputs:
    """The arguments of one forward, validated.

    Args:
        adapter: the active adapter.
        args, kwargs: arguments of the base model, without `labels`, `query` and the others of this library.
        images: [B, 3, H, W].
        training: whether the method learns from this forward.
        features_only: use the trained head instead of a classifier computed from features; only the features are read.
        targets: index of the logit of each image's class [B], -100 for padding; None without labels.
        valid: True for real images, False for padding [B].
        query, lower_blocks: un-prompted features [B, D] and hidden states [B, N, D] passed by the caller, or None.
        sample_ids: a number per image, or None.
        num_items: number of images of the whole accumulated batch, or None.
    """

    adapter: PoolAdapter
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    images: Tensor
    training: bool
    features_only: bool
    targets: Tensor | None
    valid: Tensor
    query: Tensor | None
    lower_blocks: Tensor | None
    sample_ids: Any
    num_items: Tensor | int | None

    @property
    def learns(self) -> bool:
        """Whether the pool gets gradients and statistics from this forward."""
        return self.training and not self.adapter.frozen


@contextmanager
def prompted_forward(
    backbone: PromptedBackbone,
    adapter: PoolAdapter,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    training: bool,
    features_only: bool = False,
    probe: Probe = None,
) -> Iterator[None]:
    """Within this context the base model, called with these arguments, returns the adapter's `PromptPoolOutput`.

    Args:
        backbone: the base model with its hooks.
        adapter: the active adapter.
        args, kwargs: arguments of the forward, including `labels`, `query` and the others of this library.
        training: whether the method learns from this forward.
        features_only: use the trained head instead of a classifier computed from features.
        probe: called with the attention of each block that has a prefix; None: not called.

    Raises:
        ValueError: the images do not fit the base, a label is of no declared class, or an earlier call is missing.
        TypeError: an argument is of the wrong type.
    """
    inputs = validate(backbone, adapter, args, kwargs, training=training, features_only=features_only)
    query, reuse = query_features(backbone, inputs)
    prompts = choose_prompts(inputs, query)
    plan = plan_pass(backbone, inputs, prompts, reuse, probe)
    with backbone.prompted(plan, partial(answer, backbone, inputs, query, prompts, plan)):
        yield


def validate(
    backbone: PromptedBackbone,
    adapter: PoolAdapter,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    training: bool,
    features_only: bool,
) -> Inputs:
    """Check the arguments of a forward and map labels to targets."""
    images: Any = kwargs.get("pixel_values", args[0] if args else None)
    labels, query = kwargs.get("labels"), kwargs.get("query")
    base_kwargs = adapter.base_arguments | {name: v for name, v in kwargs.items() if name not in OWN_ARGUMENTS}
    check_inputs(backbone, adapter, images, query, base_kwargs, learning=training or features_only)
    batch_size = images.shape[0]
    check_ready(adapter, learning=training and labels is not None)
    check_labels(labels, batch_size, kwargs.get("num_items_in_batch"), learning=training)
    targets = adapter.to_targets(labels) if labels is not None else None
    check_answerable(adapter, None if training or features_only else targets)
    valid = torch.ones(batch_size, dtype=torch.bool, device=images.device) if targets is None else targets >= 0
    return Inputs(
        adapter=adapter,
        args=args,
        kwargs=base_kwargs,
        images=images,
        training=training,
        features_only=features_only,
        targets=targets,
        valid=valid,
        query=query,
        lower_blocks=kwargs.get("lower_blocks"),
        sample_ids=kwargs.get("sample_ids"),
        num_items=kwargs.get("num_items_in_batch"),
    )


def query_features(backbone: PromptedBackbone, inputs: Inputs) -> tuple[Tensor | None, Reuse | None]:
    """Un-prompted features [B, D], or None if the pool needs none, and what the prompted pass can reuse of that pass."""
    pool, lowest = inputs.adapter.pool, min(inputs.adapter.pool.layers, default=0)
    if inputs.query is not None or not pool.needs_query:
        kept = reuse_of_states(inputs.lower_blocks, backbone.model, backbone.structure, lowest, inputs.images.shape[0])
        return None if inputs.query is None else inputs.query.detach().float(), kept
    # No reuse if a gradient to the images must go through both passes, or the whole model is compiled into one graph.
    reusable = not inputs.images.requires_grad and not torch.compiler.is_compiling()
    below = backbone.unprompted_blocks(lowest) if reusable else None
    query, reuse = backbone.features(inputs.args, inputs.kwargs, inputs.adapter.query_pooling, keep_below=below)
    return query.detach(), reuse


def choose_prompts(inputs: Inputs, query: Tensor | None) -> Prompts:
    """The pool's prompts for each image, computed in float32."""
    pool = inputs.adapter.pool
    task = max(pool.num_tasks - 1, 0) if inputs.training else None
    with torch.autocast(inputs.images.device.type, enabled=False):
        return pool(PoolInput(inputs.images.shape[0], query, task, inputs.valid))


def plan_pass(backbone: PromptedBackbone, inputs: Inputs, prompts: Prompts, reuse: Reuse | None, probe: Probe) -> PassPlan:
    """What the prompted pass inserts, reuses and reads: everything with a probe."""
    tokens, readout = prompts.tokens, inputs.adapter.readout
    if tokens is not None and prompts.tokens_take_cls_position:
        position = cls_position_embedding(backbone.model, backbone.structure)
        tokens = tokens if position is None else tokens + position.detach().to(tokens)
    index = int(prompts.tokens_after_cls and backbone.structure.has_cls)
    inserted = 0 if tokens is None else tokens.shape[1]
    read = None
    if probe is None and readout == "cls":
        read = backbone.readable(inserted if index == 0 else 0, 1)
    elif probe is None and readout == "prompt":
        read = backbone.readable(index, inserted)
    # Nothing to reuse if an image's passes differ (candidates), or if prompt tokens change every block from block 0 on.
    if prompts.candidates > 1 or (reuse is not None and reuse.below and tokens is not None):
        reuse = None
    return PassPlan(
        PassRecord(),
        tokens=tokens,
        token_index=index,
        prefixes=prompts.prefixes,
        read=read,
        reuse=reuse,
        repeats=prompts.candidates,
        learning=inputs.training,
        arguments=inputs.adapter.base_arguments,
        probe=probe,
    )


def answer(
    backbone: PromptedBackbone,
    inputs: Inputs,
    query: Tensor | None,
    prompts: Prompts,
    plan: PassPlan,
    return_dict: bool,
) -> PromptPoolOutput | tuple[Any, ...]:
    """Output of the forward from what the prompted pass recorded. In training the pool updates its statistics."""
    adapter, record = inputs.adapter, plan.record
    with torch.autocast(inputs.images.device.type, enabled=False):
        features = read_feature(backbone.model, backbone.structure, record, adapter.readout)
        logits = (adapter.head if inputs.training or inputs.features_only else adapter.classify)(features)
        chosen = selection_of(prompts, record.prefixes)
        if prompts.candidates > 1:
            logits, features, chosen = combine_candidates(adapter, prompts, logits, features, chosen)
        logits = mask_logits(adapter, logits, inputs.targets) if inputs.training else adapter.calibrated(logits, features)
        loss, losses = None, None
        if inputs.targets is not None:
            parts = head_losses(adapter, features, inputs.targets) if inputs.training else {}
            if inputs.learns:
                parts |= method_losses(
                    adapter.pool, prompts, record.prefixes, features, inputs.targets, inputs.valid, chosen
                )
            temperature = adapter.config.loss_temperature if inputs.training else 1.0
            loss, losses = total_loss(
                logits / temperature, inputs.targets, inputs.valid, parts, inputs.num_items, over_processes=inputs.training
            )
        if inputs.learns:
            with torch.no_grad():
                first_seen = adapter.first_seen(inputs.sample_ids, inputs.valid)
                observed = (chosen.ids, query, inputs.targets, inputs.valid, first_seen, chosen.scores, features)
                adapter.pool.observe(Observation(*observed))
    output = PromptPoolOutput(
        loss=loss,
        logits=logits,
        losses=losses,
        prompt_ids=chosen.ids,
        prompt_weights=chosen.weights,
        scores=chosen.scores,
        query=query,
        features=features,
    )
    return output if return_dict else output.to_tuple()
