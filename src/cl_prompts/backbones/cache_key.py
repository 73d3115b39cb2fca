"""Cache key of a backbone: equal keys mean equal features of equal images."""

from __future__ import annotations

from typing import Any

from torch import nn

from cl_prompts.backbones.fingerprint import fingerprint
from cl_prompts.backbones.reuse import runs_as_defined
from cl_prompts.backbones.structure import find_structure
from cl_prompts.interfaces import NotCacheableError


ATTENTIONS = ("eager", "sdpa", "flex_attention", "flash_attention_2", "flash_attention_3")
IRRELEVANT = (  # fields of a config that change no feature
    *("_name_or_path", "architectures", "transformers_version", "id2label", "label2id", "problem_type"),
    "keys_to_ignore_at_inference",
)


def backbone_cache_key(base: nn.Module, pooling: str) -> dict[str, Any]:
    """What decides the features of a base: its weights, settings that are not in its weights, and which feature is taken.

    Args:
        base: the frozen backbone.
        pooling: which feature, as in `cl_prompts.backbones.readout.read_feature`.

    Raises:
        NotCacheableError: the base has code or hooks of others, or is compiled.
    """
    structure = find_structure(base)
    inner: Any = base.get_submodule(structure.inner)
    for name, module in base.named_modules():
        where = f"{name or 'the base'}, a {type(module).__name__},"
        if type(module).__module__.split(".")[0] not in ("torch", "transformers"):
            raise NotCacheableError(f"{where} is neither of torch nor of transformers")
        if not runs_as_defined(module) or module._compiled_call_impl is not None:
            raise NotCacheableError(f"{where} is compiled or wrapped")
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values()):
            if str(getattr(hook, "__module__", None)).split(".")[0] not in ("cl_prompts", "transformers"):
                raise NotCacheableError(f"{where} has a forward hook of others")
    config: Any = base.config
    attention = [part._attn_implementation for part in (config, inner.config)]
    if not set(attention) <= set(ATTENTIONS):
        raise NotCacheableError(f"its attention is {attention}, none of {list(ATTENTIONS)}")
    return {
        "weights": fingerprint(base, structure, pooling),
        "pooling": pooling,
        "modules": repr(inner),
        "inner": structure.inner,
        "config": {name: value for name, value in config.to_dict().items() if name not in IRRELEVANT},
        "attention": attention,
    }
