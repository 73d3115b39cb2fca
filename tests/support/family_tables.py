"""The tables of docs/families.md, computed: models that work, and models of `AutoModel` that do not."""

from typing import Any

import torch

from cl_prompts import NoPromptsConfig, get_prompt_pool_model
from cl_prompts.backbones.structure import cls_position_embedding, find_structure
from support.automodel_families import vision_models, why_refused
from support.families import build, inputs
from support.further_families import TITLES, build_further, further_inputs


FAMILIES = {
    "ViT": "vit",
    "DeiT": "deit",
    "ViT-MAE": "vit_mae",
    "ViT-MSN": "vit_msn",
    "I-JEPA": "ijepa",
    "BEiT": "beit",
    "BEiT, relative positions": "beit_relative",
    "BEiT, shared relative positions, CLS pooling": "beit_shared",
    "DINOv2": "dinov2",
    "DINOv2 with registers": "dinov2_registers",
    "DINOv3 ViT": "dinov3",
    "CLIP vision": "clip",
    "SigLIP": "siglip",
    "SigLIP 2": "siglip2",
}

HEADER = (
    *("family", "class", "tokens before the patches", 'query (`query_pooling="auto"`)', "position for L2P's prompts"),
    *("last block narrowed", "checkpointing"),
)


def works() -> list[tuple[str, ...]]:
    """A row of `HEADER` for each model of the matrix."""
    rows = [(title, build(name), inputs(name)) for title, name in FAMILIES.items()]
    rows += [(title, build_further(name), further_inputs(name)) for name, title in TITLES.items()]
    return sorted((facts(*row) for row in rows), key=lambda row: row[0].lower())


def facts(title: str, base: Any, values: dict[str, Any]) -> tuple[str, ...]:
    """The row of a model."""
    structure = find_structure(base)
    name = type(base).__name__
    model = get_prompt_pool_model(base, NoPromptsConfig())
    model.begin_task([0])
    seen: list[int] = []

    def see(block: Any, args: Any, kwargs: Any) -> None:
        seen.append((args[0] if args else kwargs["hidden_states"]).shape[1])

    base.get_submodule(structure.blocks[-1]).register_forward_pre_hook(see, with_kwargs=True)
    with torch.no_grad():
        model.eval()(**values)
    position = "none" if cls_position_embedding(base, structure) is None else "CLS's"
    narrowed = "yes" if seen[-1] == 1 else "no"
    checkpointing = "yes" if base.supports_gradient_checkpointing else "no"
    return title, f"`{name}`", str(structure.special_tokens), structure.pooling, position, narrowed, checkpointing


def refused(working: set[str]) -> list[tuple[str, str]]:
    """Class and reason of every other vision model of `AutoModel`."""
    others = {name: folder for name, folder in vision_models().items() if name not in working}
    return sorted((f"`{name}`", why_refused(name, folder) or "not tested") for name, folder in others.items())
