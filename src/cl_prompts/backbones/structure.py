"""Finds the parts of a vision transformer by its module structure, without a table of model types.

A model is supported if its blocks are in one `nn.ModuleList` or `nn.Sequential`, each block has one attention module with
query, key and value projections (three, or a fused one), and an embedding of patches comes before the blocks. Of stages of
window attention (Swin), the last one has the blocks that take prompts.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from inspect import signature, unwrap
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from cl_prompts.backbones.frozen_tensors import stored_tensor
from cl_prompts.interfaces import BackboneShape


SUPPORTED = (
    "ViT, DeiT, ViT-MAE, BEiT, DINOv2, DINOv3 ViT, CLIP vision, SigLIP and the other families of the table in the "
    "documentation (docs/families.md), bare or *ForImageClassification"
)
PROJECTIONS = (("q_proj", "k_proj", "v_proj"), ("query", "key", "value"))
FUSED_PROJECTIONS = ("qkv", "query_key_value")
HEADS = ("num_heads", "num_attention_heads", "n_heads")
EMBEDDINGS = ("embeddings", "patch_embed")  # transformers, timm
CLS_TOKENS = ("cls_token", "class_embedding")
SPECIAL_TOKENS = (*CLS_TOKENS, "distillation_token", "register_tokens", "dist_token", "reg_token", "cls_register_token")

_Blocks = tuple[tuple[str, ...], tuple[str, ...]]  # names of the blocks of a list, and of their attentions


@dataclass(frozen=True)
class Structure:
    """Names of a model's parts, and sizes. Names instead of modules, so that wrapped or replaced modules are found too.

    Args:
        inner: name of the bare backbone inside the model ("" for a bare model).
        blocks: names of the transformer blocks, in order.
        attentions: names of their attention modules.
        embeddings: name of the module that embeds patches.
        norm: name of the final norm; None for a model that has none.
        pooler: name of a trained pooling module that reads all tokens; None without one.
        pooling: the default feature: "cls", "pooler" or "mean".
        special_tokens: number of tokens before the patches (CLS, distillation, registers).
        trailing_tokens: number of tokens behind the patches (those of a detector).
        has_cls: whether the first token is a CLS token.
        shape: sizes.
    """

    inner: str
    blocks: tuple[str, ...]
    attentions: tuple[str, ...]
    embeddings: str
    norm: str | None
    pooler: str | None
    pooling: str
    special_tokens: int
    trailing_tokens: int
    has_cls: bool
    shape: BackboneShape

    @property
    def patches(self) -> slice:
        """Where the patches are in the sequence of tokens."""
        return slice(self.special_tokens, -self.trailing_tokens or None)


def projection_names(attention: nn.Module) -> tuple[str, str, str] | None:
    """Names of an attention module's query, key and value projections; None if it does not have three."""
    for names in PROJECTIONS:
        if all(hasattr(getattr(attention, name, None), "out_features") for name in names):
            return names
    return None


def fused_projection(attention: nn.Module) -> str | None:
    """Name of the one projection that makes queries, keys and values, in this order; None if there is none."""
    return next((n for n in FUSED_PROJECTIONS if hasattr(getattr(attention, n, None), "out_features")), None)


def calls_registered_function(attention: nn.Module) -> bool:
    """Whether an attention module looks up an attention function that is registered with transformers."""
    return "ALL_ATTENTION_FUNCTIONS" in unwrap(type(attention).forward).__code__.co_names


def head_width(attention: nn.Module) -> int | None:
    """Width of one head of an attention module, which names it or the number of its heads; None if neither."""
    width = getattr(attention, "head_dim", None) or getattr(attention, "attention_head_size", None)
    if isinstance(width, int):
        return width
    heads = next((n for n in (getattr(attention, name, None) for name in HEADS) if isinstance(n, int)), None)
    names, fused = projection_names(attention), fused_projection(attention)
    if heads is None or not (names or fused):
        return None
    projection: Any = attention.get_submodule(names[1] if names else fused or "")
    return int(projection.out_features) // heads // (1 if names else 3)


def find_structure(model: nn.Module) -> Structure:
    """Find blocks, attentions, final norm and special tokens.

    Raises:
        TypeError: the model's structure is not supported. The message lists the supported models.
    """
    check_not_wrapped(model)
    blocks, attentions = _find_blocks(model)
    inner = _find_inner(model, blocks[0])
    backbone = model.get_submodule(inner)
    embeddings = next(name for name in EMBEDDINGS if isinstance(getattr(backbone, name, None), nn.Module))
    norm, after = _find_norm(backbone, inner, blocks[0])
    owners = (backbone.get_submodule(embeddings), backbone)
    special = sum(_token_count(owners, name) for name in SPECIAL_TOKENS)
    has_cls = any(_token_count(owners, name) for name in CLS_TOKENS)
    pooler = next((_join(inner, name) for name, module in after if _reads_all_tokens(module)), None)
    if has_cls and norm is not None and not isinstance(model.get_submodule(norm), nn.Identity):
        pooling = "cls"
    else:
        pooling = "pooler" if pooler else "mean"
    return Structure(
        inner=inner,
        blocks=blocks,
        attentions=attentions,
        embeddings=_join(inner, embeddings),
        norm=norm,
        pooler=pooler,
        pooling=pooling,
        special_tokens=special,
        trailing_tokens=_token_count(owners, "detection_tokens"),
        has_cls=has_cls,
        shape=_shape(model, blocks, attentions, has_cls),
    )


def behind_the_feature(model: nn.Module, structure: Structure) -> list[str]:
    """Names of the bare backbone's children that come behind its final norm or, without one, behind its blocks."""
    inner = f"{structure.inner}." if structure.inner else ""
    children = [name for name, _ in model.get_submodule(structure.inner).named_children()]
    last = (structure.norm or structure.blocks[0]).removeprefix(inner).split(".")[0]
    return children[children.index(last) + 1 :]


def check_not_compiled(model: nn.Module) -> None:
    """Raise TypeError for a model that `model.compile()` has compiled in place, hooks included."""
    if model._compiled_call_impl is not None:
        raise TypeError(
            f"this {type(model).__name__} was compiled in place, and prompts cannot enter it: load the base anew, and "
            "compile it afterwards with model.compile_backbone()"
        )


def check_not_wrapped(model: nn.Module) -> None:
    """Raise TypeError for a model inside a wrapper that hides its calls from hooks: compiled, parallel or TorchScript."""
    kind = type(model).__name__
    if isinstance(getattr(model, "_orig_mod", None), nn.Module):
        raise TypeError(
            "the base is compiled by torch.compile: pass the module inside it, base._orig_mod, and compile it afterwards "
            "with model.compile_backbone()"
        )
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError(f"the base is a TorchScript module ({kind}): pass the transformers model that it was made from")
    if isinstance(getattr(model, "module", None), nn.Module):
        raise TypeError(f"the base is wrapped in a {kind}: pass the module inside it, base.module, and wrap the result")
    for name, module in model.named_modules():
        if type(module).__name__ == "FullyShardedDataParallel":
            raise TypeError(
                f"{name} of this {kind} is wrapped in a FullyShardedDataParallel, whose weights cannot be read between "
                "forwards: load the base anew, and shard it with cl_prompts.tuner.sharding.shard_frozen_blocks"
            )


def _unsupported(model: nn.Module, why: str) -> TypeError:
    return TypeError(f"{type(model).__name__} is not supported: {why}. Supported are {SUPPORTED}")


def _find_blocks(model: nn.Module) -> _Blocks:
    lists: list[_Blocks] = []
    for list_name, items in model.named_modules():
        if isinstance(items, (nn.ModuleList, nn.Sequential)) and len(items):
            owners = [_attention_of(block) for block in items]
            if all(owners):
                lists.append(
                    (
                        tuple(f"{list_name}.{i}" for i in range(len(items))),
                        tuple(_join(f"{list_name}.{i}", owner or "") for i, owner in enumerate(owners)),
                    )
                )
    if not lists:
        raise _unsupported(model, "it has no list of transformer blocks with query, key and value projections")
    stages = [found for found in lists if all(runs_in_windows(model.get_submodule(block)) for block in found[0])]
    if len(stages) > 1 and _are_stages(model, stages, lists):
        lists = stages[-1:]
    if len(lists) > 1:
        raise _unsupported(model, f"it has {len(lists)} lists of blocks (a hierarchy, or several towers)")
    for name in lists[0][1]:
        attention = model.get_submodule(name)
        if getattr(attention, "is_causal", False):  # a prefix would be hidden from tokens in front
            raise _unsupported(model, f"{type(attention).__name__} is causal")
    return lists[0]


def _are_stages(model: nn.Module, stages: list[_Blocks], lists: list[_Blocks]) -> bool:
    """Whether some lists of blocks are the stages of one hierarchy, each wider than the one before, and none are elsewhere.

    The list of the stages counts as a list of blocks where each stage has one block.
    """
    widths, places = [], set()
    for number, (blocks, attentions) in enumerate(stages):
        parent, index, name = blocks[0].rpartition(".")[0].rsplit(".", 2)
        places.add((parent, index == str(number), name))
        attention = model.get_submodule(attentions[0])
        names = projection_names(attention)
        widths.append(0 if names is None else getattr(attention, names[1]).in_features)
    elsewhere = any(found[0][0].rpartition(".")[0] != parent for found in lists if found not in stages)
    return not elsewhere and len(places) == 1 and all(before < behind for before, behind in pairwise(widths))


def runs_in_windows(block: nn.Module) -> bool:
    """Whether a block cuts its tokens into windows, which attention sees one by one."""
    return hasattr(block, "window_size") and hasattr(block, "shift_size")


def _attention_of(block: nn.Module) -> str | None:
    owners = [name for name, module in block.named_modules() if projection_names(module) or fused_projection(module)]
    return owners[0] if len(owners) == 1 else None


def _join(*parts: str) -> str:
    return ".".join(part for part in parts if part)


def _find_inner(model: nn.Module, block: str) -> str:
    name = block
    while name:
        name = name.rpartition(".")[0]
        if any(isinstance(getattr(model.get_submodule(name), part, None), nn.Module) for part in EMBEDDINGS):
            return name
    raise _unsupported(model, "no `embeddings` come before its blocks")


def _find_norm(backbone: nn.Module, inner: str, block: str) -> tuple[str | None, list[tuple[str, nn.Module]]]:
    """The first norm registered after the blocks, None in a backbone without norms; and what is registered after it."""
    children = list(backbone.named_children())
    towards_blocks = block.removeprefix(f"{inner}.").split(".")[0] if inner else block.split(".")[0]
    position = [name for name, _ in children].index(towards_blocks)
    behind = children[position + 1 :]
    for i, (name, module) in enumerate(behind):
        original = getattr(module, "original_module", module)  # a ModulesToSaveWrapper of PEFT
        if "Norm" in type(original).__name__ or isinstance(original, nn.Identity):
            further = next((n for n, between in behind[:i] if any(True for _ in between.parameters())), None)
            if further is not None:
                raise _unsupported(backbone, f"`{further}` comes between its blocks and its norm")
            return _join(inner, name), behind[i + 1 :]
    if any("Norm" in type(module).__name__ for _, module in children):
        raise _unsupported(backbone, "no norm follows its blocks")
    return None, behind


def _reads_all_tokens(module: nn.Module) -> bool:
    """Whether a pooler reads all tokens: attention pooling (SigLIP) or a norm of the patches' mean (BEiT).

    A pooler with a `dense` layer reads token 0 only.
    """
    parts = list(module.modules())
    attends = any("Attention" in type(part).__name__ for part in parts)
    only_norm = any("Norm" in type(part).__name__ for part in parts) and not any(
        isinstance(part, nn.Linear) for part in parts
    )
    return attends or only_norm


def _token_count(owners: tuple[nn.Module, ...], name: str) -> int:
    """Number of tokens in a parameter of that name, which one of the modules may have."""
    token = next((t for t in (getattr(owner, name, None) for owner in owners) if isinstance(t, nn.Parameter)), None)
    if token is None:
        return 0
    return 1 if token.dim() == 1 else token.shape[-2]


def _shape(model: nn.Module, blocks: tuple[str, ...], attentions: tuple[str, ...], has_cls: bool) -> BackboneShape:
    attention: Any = model.get_submodule(attentions[0])
    names, fused = projection_names(attention), fused_projection(attention)
    width = head_width(attention)
    if width is None:
        raise _unsupported(model, f"{type(attention).__name__} does not name the number of its heads")
    part = names[1] if names else fused or ""
    keys: list[Any] = [model.get_submodule(f"{name}.{part}") for name in attentions]
    key = keys[0]
    if any(other.out_features != key.out_features for other in keys):
        raise _unsupported(model, "its blocks have different numbers of heads")
    return BackboneShape(
        width=key.in_features,
        num_layers=len(blocks),
        num_heads=key.out_features // width // (1 if names else 3),
        head_dim=width,
        has_cls=has_cls,
        windowed=runs_in_windows(model.get_submodule(blocks[0])),
    )


def attention_norm(block: nn.Module, attention: nn.Module) -> str:
    """Name, in the block, of the norm before its attention: the block's first norm."""
    inside = set(attention.modules())
    name = next(name for name, m in block.named_modules() if "Norm" in type(m).__name__ and m not in inside)
    return name.removesuffix(".original_module")  # a ModulesToSaveWrapper of PEFT


def cls_position_embedding(model: nn.Module, structure: Structure) -> Tensor | None:
    """The CLS token's learned position embedding [1, 1, D]; None if the model has none."""
    if not structure.has_cls:
        return None
    embeddings = model.get_submodule(structure.embeddings)
    for name in ("position_embeddings", "position_embedding"):
        table = getattr(embeddings, name, None)
        if isinstance(table, Tensor) and table.dim() == 3:
            return stored_tensor(embeddings, name, table)[:, :1]
        if isinstance(table, nn.Embedding):
            return stored_tensor(embeddings, f"{name}.weight", table.weight)[None, :1]
    backbone: Any = model.get_submodule(structure.inner)
    table = getattr(backbone, "pos_embed", None)  # timm; not all of its models have rows for the tokens before the patches
    if isinstance(table, Tensor) and not getattr(backbone, "no_embed_class", False):
        return stored_tensor(backbone, "pos_embed", table)[:, :1]
    return None


def expected_image(model: nn.Module, structure: Structure) -> tuple[int | None, tuple[int, int] | None]:
    """Number of channels and (height, width) that a model requires; None where it accepts any."""
    backbone: Any = model.get_submodule(structure.inner)
    embeddings: Any = model.get_submodule(structure.embeddings)
    channels = next((m.in_channels for m in embeddings.modules() if isinstance(m, nn.Conv2d)), None)
    if getattr(embeddings, "strict_img_size", False):  # timm
        return channels, embeddings.img_size
    size = getattr(getattr(backbone, "config", None), "image_size", None)
    # Models that always interpolate their position embeddings (DINOv2), or have none (DINOv3), accept any size.
    if channels is None or size is None or "interpolate_pos_encoding" not in signature(backbone.forward).parameters:
        return channels, None
    height, width = (size, size) if isinstance(size, int) else size
    return channels, (height, width)


def eager_attention(attention: nn.Module) -> Any:
    """The `eager_attention_forward` of the file that defines an attention module. transformers does not register it."""
    return sys.modules[type(attention).__module__].eager_attention_forward
