"""A base model is left as it was if wrapping it fails."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from cl_prompts.backbones.prompted_backbone import PromptedBackbone


@contextmanager
def left_as_it_was(model: nn.Module) -> Iterator[None]:
    """Restore the base on an error: hooks, wrapped modules, modes, requires_grad, users, and new attributes."""
    attributes, backbone = dict(vars(model)), PromptedBackbone.existing(model)
    config = getattr(model, "config", None)
    config_fields = set(vars(config)) if config is not None else set()
    users = set() if backbone is None else set(backbone.users)
    # A TorchScript module may be inside the base; its modules cannot be replaced.
    plain = [module for module in model.modules() if not isinstance(module, torch.jit.ScriptModule)]
    modules = [(module, module.training, dict(module._modules)) for module in plain]
    parameters = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    except BaseException:
        for module, training, children in modules:
            module.training = training
            module._modules.update(children)
        for parameter, requires_grad in parameters:
            if parameter.requires_grad != requires_grad:  # torch refuses any True for tensors of torch.inference_mode()
                parameter.requires_grad_(requires_grad)
        backbone = PromptedBackbone.existing(model)
        if backbone is not None:
            for user in set(backbone.users) - users:
                backbone.release(user)
        for name in set(vars(model)) - set(attributes):
            delattr(model, name)
        if config is not None:
            for name in set(vars(config)) - config_fields:
                delattr(config, name)
        if "peft_config" in attributes:
            model.peft_config = attributes["peft_config"]
        raise
