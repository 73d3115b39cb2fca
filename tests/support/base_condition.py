"""What a failed call must leave as it was on a base model."""

from typing import Any


def condition(base: Any) -> list[Any]:
    """All that a failed load might leave behind on a base model."""
    return [
        [(name, p.requires_grad, id(p)) for name, p in base.named_parameters()],
        [(name, id(m), m.training, id(getattr(m, "config", None))) for name, m in base.named_modules()],
        [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in base.modules()],
        [sorted(vars(m)) for m in base.modules()],
        base.config.to_dict(),
    ]
