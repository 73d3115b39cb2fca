"""Prompts into a transformer with no code of ours: what the prompted passes of the library are compared with."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from cl_prompts.backbones.plan import PassPlan, PassRecord
from cl_prompts.backbones.prompted_backbone import PromptedBackbone
from cl_prompts.backbones.structure import find_structure, fused_projection, projection_names
from cl_prompts.interfaces import PrefixKV


def hidden_of(args: Any, kwargs: Any) -> Tensor:
    hidden: Tensor = args[0] if args else kwargs["hidden_states"]
    return hidden


@contextmanager
def token_extension(model: nn.Module, prefixes: dict[int, PrefixKV]) -> Iterator[None]:
    """Oracle for prefixes with no code of ours in it: the attention's input gets P more rows, whose projected keys and
    values are overwritten and whose outputs are dropped (ECOSYSTEM 2.2, variant B3)."""
    structure = find_structure(model)
    handles: list[Any] = []
    for layer, prefix in prefixes.items():
        attention = model.get_submodule(structure.attentions[layer])
        length = prefix.k.shape[2]

        def extend(module: nn.Module, args: Any, kwargs: Any, length: int = length) -> Any:
            longer = lambda x: torch.cat([x.new_zeros(x.shape[0], length, x.shape[2]), x], 1)  # noqa: E731
            tables = kwargs.get("position_embeddings")
            if tables is not None and tables[0].shape[0] == hidden_of(args, kwargs).shape[1]:  # rotary, for all tokens
                rows = ((0, 0, length, 0), (0, 0, length, 0))
                padded = [nn.functional.pad(t, pad, value=v) for t, pad, v in zip(tables, rows, (1.0, 0.0), strict=True)]
                kwargs = {**kwargs, "position_embeddings": padded}
            if kwargs.get("attention_mask") is not None:
                mask = kwargs["attention_mask"]
                free = float(mask.dtype == torch.bool)
                kwargs = {**kwargs, "attention_mask": nn.functional.pad(mask, (length, 0, length, 0), value=free)}
            if args:
                return (longer(args[0]), *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": longer(kwargs["hidden_states"])}

        def drop(module: nn.Module, args: Any, output: Any, length: int = length) -> Any:
            return (output[0][:, length:], *output[1:]) if isinstance(output, tuple) else output[:, length:]

        handles += [
            attention.register_forward_pre_hook(extend, with_kwargs=True),
            attention.register_forward_hook(drop),
        ]
        names, fused = projection_names(attention), fused_projection(attention)
        if names is None:

            def overwrite_parts(module: nn.Module, args: Any, output: Tensor, prefix: PrefixKV = prefix) -> Tensor:
                query, *parts = output.chunk(3, -1)
                for part, rows in zip(parts, (prefix.k, prefix.v), strict=True):
                    part = torch.cat([rows.transpose(1, 2).flatten(2), part[:, rows.shape[2] :]], 1)
                    query = torch.cat([query, part], -1)
                return query

            handles.append(getattr(attention, fused or "").register_forward_hook(overwrite_parts))
            continue
        for name, rows in zip(names[1:], (prefix.k, prefix.v), strict=True):

            def overwrite(module: nn.Module, args: Any, output: Tensor, rows: Tensor = rows) -> Tensor:
                return torch.cat([rows.transpose(1, 2).flatten(2), output[:, rows.shape[2] :]], 1)

            handles.append(getattr(attention, name).register_forward_hook(overwrite))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def random_prefixes(model: nn.Module, batch: int, length: int = 5, scale: float = 1.0) -> dict[int, PrefixKV]:
    shape = find_structure(model).shape
    generator = torch.Generator().manual_seed(7)

    def rows() -> Tensor:
        return (scale * torch.randn(batch, shape.num_heads, length, shape.head_dim, generator=generator)).requires_grad_()

    return {layer: PrefixKV(rows(), rows()) for layer in (0, 2)}


def run(backbone: PromptedBackbone, values: dict[str, Tensor], **planned: Any) -> Tensor:
    """Last hidden state before the final norm, of a pass under a plan."""
    plan = PassPlan(PassRecord(), **planned)
    with backbone.prompted(plan):
        backbone.model(**values)
    assert plan.record.hidden is not None
    return plan.record.hidden


def record_block_inputs(model: nn.Module, block: str) -> list[Tensor]:
    seen: list[Tensor] = []

    def keep(module: nn.Module, args: Any, kwargs: Any) -> None:
        seen.append(args[0] if args else kwargs["hidden_states"])
        handle.remove()

    handle = model.get_submodule(block).register_forward_pre_hook(keep, with_kwargs=True)
    return seen


@contextmanager
def explicit_attention(model: nn.Module, prefixes: dict[int, PrefixKV]) -> Iterator[None]:
    """Oracle for models that call `scaled_dot_product_attention`: softmax written out, over [prefix; keys]."""
    layer = 0

    def attend(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **options: Any) -> Tensor:
        nonlocal layer
        logits = query @ key.transpose(2, 3) * (options.get("scale") or query.shape[3] ** -0.5)
        if attn_mask is not None:
            logits = logits + attn_mask
        if layer in prefixes:
            k, v = prefixes[layer].k, prefixes[layer].v
            logits = torch.cat([query @ k.transpose(2, 3) * (options.get("scale") or query.shape[3] ** -0.5), logits], 3)
            value = torch.cat([v, value], 2)
        layer += 1
        return logits.softmax(3) @ value

    before, nn.functional.scaled_dot_product_attention = nn.functional.scaled_dot_product_attention, attend
    try:
        yield
    finally:
        nn.functional.scaled_dot_product_attention = before
