"""Refuses a base that cannot run with prompts: wrappers by their kind, and where the structure cannot tell, by a trial."""

from __future__ import annotations

import re
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from cl_prompts.backbones.frozen_tensors import execution_device
from cl_prompts.backbones.plan import PassPlan, PassRecord
from cl_prompts.backbones.prompted_backbone import PromptedBackbone
from cl_prompts.backbones.reuse import runs_as_defined
from cl_prompts.backbones.structure import expected_image
from cl_prompts.runtime.text import first_line


# Model types of transformers whose classes are tested with prompts, and need no trial.
TESTED = (
    "vit",
    "deit",
    "vit_mae",
    "vit_msn",
    "ijepa",
    "beit",
    "dinov2",
    "dinov2_with_registers",
    "dinov3_vit",
    "clip",
    "siglip",
    "siglip2",
)


def check_weights(model: nn.Module, *, training: bool) -> None:
    """Raise TypeError if a base has no weights, is compiled in part, or cannot be part of a `training` graph."""
    name = type(model).__name__
    # PEFT removes Accelerate's hooks while it loads an adapter onto a model with a device map.
    if execution_device(model).type == "meta" and not hasattr(model, "hf_device_map"):
        raise TypeError(f"the weights of this {name} are on the meta device, without values: load it with from_pretrained")
    for part, module in model.named_modules():
        if module._compiled_call_impl is not None:
            raise TypeError(
                f"{part or 'all'} of this {name} was compiled in place, and prompts cannot enter it: load the base "
                "anew, and compile it afterwards with model.compile_backbone()"
            )
    if training and (torch.is_inference_mode_enabled() or any(p.is_inference() for p in model.parameters())):
        raise TypeError(
            f"nothing can be trained on this {name} under torch.inference_mode(): load the base and make the model outside"
        )


def check_runs(backbone: PromptedBackbone, arguments: dict[str, Any], *, training: bool) -> None:
    """Raise TypeError if a base, which is in eval mode, cannot run with prompts.

    A model of a tested family with dense weights in memory is not tried. Any other one runs one black image without prompts
    and with one.

    Args:
        backbone: the base with its hooks.
        arguments: further arguments of its forward.
        training: whether gradients have to reach prompts.
    """
    model = backbone.model
    check_takes_images(model, arguments)
    device = execution_device(model)
    # A forward of a sharded model would fix which module is the root of its sharding.
    sharded = any(hasattr(p, "full_tensor") for p in model.parameters())
    packed = "spatial_shapes" in signature(model.forward).parameters
    if sharded or packed or device.type == "meta" or not _is_unusual(model):
        return
    try_once(backbone, arguments, device, training=training)


def try_once(backbone: PromptedBackbone, arguments: dict[str, Any], device: torch.device, *, training: bool) -> None:
    """Raise TypeError if a base does not run one black image without prompts and with one; arguments as in `check_runs`."""
    model = backbone.model
    inputs = {"pixel_values": _image(backbone, device), **arguments}
    token = torch.zeros(1, 1, backbone.structure.shape.width, device=device, requires_grad=training)
    plan = PassPlan(PassRecord(), tokens=token)
    try:
        with torch.random.fork_rng(devices=[]), torch.set_grad_enabled(training):
            backbone.features((), inputs, "mean")
            with backbone.prompted(plan):
                model(**inputs)
            assert plan.record.prompt_hidden is not None, "its blocks do not run in its forward"
            if training:
                torch.autograd.grad(plan.record.prompt_hidden.sum(), token)
    except Exception as error:  # the code of any model may fail in any way
        raise TypeError(
            f"this {type(model).__name__} cannot run as a base: a trial with one image failed ({type(error).__name__}: "
            f"{first_line(error)}). Pass a model as transformers' from_pretrained returns it"
        ) from error


def check_takes_images(model: nn.Module, arguments: dict[str, Any]) -> None:
    """Raise TypeError if the forward of a base names its inputs, and `pixel_values` is none of them or not all."""
    named = [p for p in signature(model.forward).parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    names = [p.name for p in named]
    if named and "pixel_values" not in names:
        raise TypeError(
            f"this {type(model).__name__} cannot run as a base: its forward takes {names[0]!r}, not 'pixel_values'. Pass a "
            "vision model, as transformers' from_pretrained returns it"
        )
    needed = [p.name for p in named if p.default is p.empty and p.name not in ("pixel_values", *arguments)]
    if needed and "spatial_shapes" not in needed:
        raise TypeError(
            f"this {type(model).__name__} cannot run as a base: its forward needs {needed[0]!r} besides pixel_values. "
            "Pass a vision model that needs images only"
        )


def _is_unusual(model: nn.Module) -> bool:
    """Whether a model is not of a tested family, or runs other code or tensors than its class has."""
    kind, name = type(model).__module__, type(model).__name__
    tested = kind in (f"transformers.models.{family}.modeling_{family}" for family in TESTED)
    if not tested or not re.fullmatch(r"(?!.*Text)\w+(Model|ForImageClassification(WithTeacher)?)", name):
        return True
    for module in model.modules():
        if type(module).__module__.split(".")[0] not in ("torch", "transformers") or not runs_as_defined(module):
            return True
    return any(p.is_meta or not _is_dense(p) for p in model.parameters())


def _is_dense(parameter: Tensor) -> bool:
    return type(parameter) is nn.Parameter


def _image(backbone: PromptedBackbone, device: torch.device) -> Tensor:
    """A black image [1, channels, height, width] of the size that a model takes, or a video [1, frames, channels, ...]."""
    model: Any = backbone.model
    channels, size = expected_image(model, backbone.structure)
    config = getattr(model.get_submodule(backbone.structure.inner), "config", None)
    side = getattr(config, "image_size", None) or 224
    height, width = size or ((side, side) if isinstance(side, int) else side)
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    image = torch.zeros(1, channels or 3, height, width, device=device, dtype=dtype)
    embeddings = model.get_submodule(backbone.structure.embeddings)
    of_video = any(isinstance(module, nn.Conv3d) for module in embeddings.modules())
    frames = getattr(config, "num_frames", None)
    return image.unsqueeze(1).expand(-1, frames, -1, -1, -1) if of_video and frames else image
