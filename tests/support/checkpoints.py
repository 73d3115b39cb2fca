"""Small checkpoints of vision transformers as other libraries save them."""

import torch
from torch import Tensor


WIDTH, DEPTH, PATCH, GRID, LABELS = 16, 2, 4, 3, 5


def timm_state(
    *,
    width: int = WIDTH,
    labels: int | None = LABELS,
    distilled: bool = False,
    scaled: bool = False,
    bias: bool = True,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Random tensors by timm's names, so large that attention is far from uniform.

    Args:
        width: D.
        labels: number of classes; None: no classifier.
        distilled: with DeiT's second token.
        scaled: DeiT III, with LayerScale and positions of patches only.
        bias: of queries, keys and values.
        seed: of the numbers.
    """
    shapes: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, width),
        "patch_embed.proj.weight": (width, 3, PATCH, PATCH),
        "patch_embed.proj.bias": (width,),
        "pos_embed": (1, GRID**2 + (0 if scaled else 1 + distilled), width),
    }
    if distilled:
        shapes["dist_token"] = (1, 1, width)
    linear = {"attn.qkv": (3 * width, width), "attn.proj": (width, width), "mlp.fc1": (24, width), "mlp.fc2": (width, 24)}
    norms = ["norm", *(f"blocks.{n}.norm{k}" for n in range(DEPTH) for k in (1, 2))]
    layers = {f"blocks.{n}.{name}": shape for n in range(DEPTH) for name, shape in linear.items()}
    if labels is not None:
        layers |= dict.fromkeys(("head", "head_dist")[: 1 + distilled], (labels, width))
    for name, shape in layers.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    for name in norms:
        shapes |= {f"{name}.weight": (width,), f"{name}.bias": (width,)}
    if scaled:
        shapes |= {f"blocks.{n}.ls{k}.gamma": (width,) for n in range(DEPTH) for k in (1, 2)}
    random = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(shape, generator=random) * (0.5 if len(shape) == 2 else 1)
        for name, shape in shapes.items()
        if bias or not name.endswith("qkv.bias")
    }
