"""The config and the tensors of transformers' ViT or DeiT from a network with timm's names."""

from __future__ import annotations

import re
from math import isqrt

import torch
from torch import Tensor
from transformers import DeiTConfig, PreTrainedConfig, ViTConfig

from cl_prompts.conversion.layouts import Network
from cl_prompts.conversion.tensors import Tensors


HEAD_DIM, LARGEST = 64, 1024  # a head of every published ViT up to this width, but MoCo v3's smallest
HEADS = {1152: 16, 1280: 16, 1408: 16, 1536: 24, 1664: 16}  # of wider ones: so400m, ViT-H, g, DINOv2's giant, ViT-G
MOCO_SMALL, MOCO_SMALL_HEADS = 384, 12
# Without and with a classifier.
CLASSES = {
    "vit": ("ViTModel", "ViTForImageClassification"),
    "deit": ("DeiTModel", "DeiTForImageClassificationWithTeacher"),
}
# Of a projection: the names that timm and DeiT III give the scale behind it.
LAYER_SCALES = {"attention.output.dense": ("ls1.gamma", "gamma_1"), "output.dense": ("ls2.gamma", "gamma_2")}


def to_transformers(
    network: Network, num_heads: int | None = None, with_head: bool = True
) -> tuple[PreTrainedConfig, dict[str, Tensor]]:
    """The config of the model, and its tensors by the names of transformers' files.

    Depth, widths, patch and image size follow from shapes. LayerScale is multiplied into the projections in front of it.

    Args:
        network: the network.
        num_heads: attention heads; None: as the file tells, else those that are usual for the width.
        with_head: whether a classifier is kept, too.

    Raises:
        ValueError: a tensor is missing, has another shape or no place in a ViT, or the number of heads does not fit.
    """
    tensors = Tensors(network.tensors)
    width, channels, patch, _ = tensors.shape("patch_embed.proj.weight", 4)
    if channels != 3:
        raise ValueError(f"patch_embed.proj.weight takes {channels} channels: only networks of RGB images are converted")
    distilled = "dist_token" in tensors
    matches = (re.match(r"blocks\.(\d+)\.", name) for name in network.tensors)
    depth = 1 + max((int(found[1]) for found in matches if found), default=-1)
    inner = tensors.shape("blocks.0.mlp.fc1.weight", 2)[0]
    has_bias = "blocks.0.attn.qkv.bias" in tensors or "blocks.0.attn.query.bias" in tensors
    if "cls_token" not in tensors:
        raise ValueError("the network has no cls_token: only vision transformers that have one are converted")

    state = _both("embeddings.patch_embeddings.projection", tensors, "patch_embed.proj", width, channels, patch, patch)
    state["embeddings.cls_token"] = tensors.take("cls_token", 1, 1, width)
    if distilled:
        state["embeddings.distillation_token"] = tensors.take("dist_token", 1, 1, width)
    positions, grid = _positions(tensors, width, 1 + distilled)
    state["embeddings.position_embeddings"] = positions
    for n in range(depth):
        block = _block(tensors, f"blocks.{n}.", width, inner, has_bias)
        state |= {f"encoder.layer.{n}.{name}": tensor for name, tensor in block.items()}
    state |= _both("layernorm", tensors, "norm", width)
    head = _head(tensors, width, distilled, with_head)
    tensors.check_empty()

    family = "deit" if distilled else "vit"
    labels = next((tensor.shape[0] for name, tensor in head.items() if name.endswith("classifier.weight")), None)
    if labels is not None:
        state = {f"{family}.{name}": tensor for name, tensor in state.items()}
    kinds = {tensor.dtype for tensor in (state | head).values()}
    dtype = kinds.pop() if len(kinds) == 1 else torch.float32
    config = (DeiTConfig if distilled else ViTConfig)(
        architectures=[CLASSES[family][labels is not None]],
        hidden_size=width,
        num_hidden_layers=depth,
        num_attention_heads=_num_heads(network, width, num_heads),
        intermediate_size=inner,
        layer_norm_eps=1e-6,  # of Google's, timm's and all others named here; transformers' default is 1e-12
        image_size=patch * grid,
        patch_size=patch,
        num_channels=channels,
        qkv_bias=has_bias,
        dtype=str(dtype).removeprefix("torch."),
        **({} if labels is None else {"num_labels": labels}),
    )
    return config, {name: tensor.to(dtype).contiguous().clone() for name, tensor in (state | head).items()}


def _num_heads(network: Network, width: int, wanted: int | None) -> int:
    if network.num_heads is not None:
        if wanted not in (None, network.num_heads):
            raise ValueError(f"num_heads is {wanted}, but the checkpoint has {network.num_heads} heads")
        return network.num_heads
    if wanted is None:
        if network.kind == "moco" and width == MOCO_SMALL:
            return MOCO_SMALL_HEADS
        usual = HEADS.get(width) if width > LARGEST or width % HEAD_DIM else width // HEAD_DIM
        if usual is None:
            raise ValueError(
                f"the checkpoint does not tell the number of heads, nor does its width {width}: pass --num-heads"
            )
        return usual
    if wanted < 1 or width % wanted:
        raise ValueError(f"num_heads is {wanted}, which does not divide the width {width}")
    return wanted


def _both(target: str, tensors: Tensors, name: str, *shape: int) -> dict[str, Tensor]:
    """Weight, of this shape, and bias of a module."""
    weight, bias = (tensors.take(f"{name}.{kind}", *of) for kind, of in (("weight", shape), ("bias", shape[:1])))
    return {f"{target}.weight": weight, f"{target}.bias": bias}


def _positions(tensors: Tensors, width: int, special: int) -> tuple[Tensor, int]:
    """Position embeddings [1, special + grid², width] and the grid's side. DeiT III has none for special tokens: zeros."""
    count = tensors.shape("pos_embed", 3)[1]
    positions = tensors.take("pos_embed", 1, count, width)
    for own in (special, 0):
        grid = isqrt(max(0, count - own))
        if grid and grid**2 == count - own:
            return torch.cat([positions.new_zeros(1, special - own, width), positions], 1), grid
    raise ValueError(f"pos_embed has {count} positions, which are no square of patches: only square images are converted")


def _block(tensors: Tensors, name: str, width: int, inner: int, has_bias: bool) -> dict[str, Tensor]:
    """The tensors of a block, by their names in a layer of transformers' files."""
    state = _both("layernorm_before", tensors, f"{name}norm1", width)
    state |= _both("layernorm_after", tensors, f"{name}norm2", width)
    for kind in ("weight", "bias") if has_bias else ("weight",):
        shape = (width, width) if kind == "weight" else (width,)
        if f"{name}attn.query.{kind}" in tensors:
            parts = [tensors.take(f"{name}attn.{part}.{kind}", *shape) for part in ("query", "key", "value")]
        else:
            parts = list(tensors.take(f"{name}attn.qkv.{kind}", 3 * width, *shape[1:]).chunk(3))
        for part, tensor in zip(("query", "key", "value"), parts, strict=True):
            state[f"attention.attention.{part}.{kind}"] = tensor
    state |= _both("attention.output.dense", tensors, f"{name}attn.proj", width, width)
    state |= _both("intermediate.dense", tensors, f"{name}mlp.fc1", inner, width)
    state |= _both("output.dense", tensors, f"{name}mlp.fc2", width, inner)
    for target, scales in LAYER_SCALES.items():
        for scale in scales:
            if f"{name}{scale}" in tensors:
                gamma = tensors.take(f"{name}{scale}", width)
                state[f"{target}.weight"] = gamma[:, None] * state[f"{target}.weight"]
                state[f"{target}.bias"] = gamma * state[f"{target}.bias"]
    return state


def _head(tensors: Tensors, width: int, distilled: bool, with_head: bool) -> dict[str, Tensor]:
    """The tensors behind the blocks. With `pre_logits` they are the pooler, as in transformers' own conversion."""
    if with_head and "pre_logits.fc.weight" in tensors:
        tensors.drop("head.")
        return _both("pooler.dense", tensors, "pre_logits.fc", width, width)
    if not with_head or "head.weight" not in tensors:
        tensors.drop("head.", "head_dist.", "pre_logits.")
        return {}
    labels = tensors.shape("head.weight", 2)[0]
    if not distilled:
        return _both("classifier", tensors, "head", labels, width)
    head = _both("cls_classifier", tensors, "head", labels, width)
    return head | _both("distillation_classifier", tensors, "head_dist", labels, width)
