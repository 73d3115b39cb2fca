"""What a base computes, told so that two that are told alike compute alike: for the key of cached features."""

from __future__ import annotations

from typing import Any

from cl_prompts.backbones.structure import find_structure, fingerprint


ATTENTIONS = ("eager", "sdpa", "flex_attention", "flash_attention_2", "flash_attention_3")
NAMES = (  # in a config, without a part in the feature
    *("_name_or_path", "architectures", "transformers_version", "id2label", "label2id", "problem_type"),
    "keys_to_ignore_at_inference",
)


class NotTold(Exception):
    """Something does not say what it does."""


def base_as_it_is(model: Any) -> dict[str, Any]:
    """A learner's base: its weights, the settings that are not in its weights, and which feature is taken.

    Raises:
        NotTold: it has code or hooks of others, or is compiled.
    """
    base = model.get_base_model()
    structure = find_structure(base)
    inner = base.get_submodule(structure.inner)
    for name, module in base.named_modules():
        where = f"{name or 'the base'}, a {type(module).__name__},"
        if type(module).__module__.split(".")[0] not in ("torch", "transformers"):
            raise NotTold(f"{where} is neither of torch nor of transformers")
        if "forward" in vars(module) or module._compiled_call_impl is not None:
            raise NotTold(f"{where} is compiled or wrapped")
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values()):
            if str(getattr(hook, "__module__", None)).split(".")[0] not in ("cl_prompts", "transformers"):
                raise NotTold(f"{where} has a forward hook of others")
    attention = [part.config._attn_implementation for part in (base, inner)]
    if not set(attention) <= set(ATTENTIONS):
        raise NotTold(f"its attention is {attention}, none of {list(ATTENTIONS)}")
    return {
        "weights": fingerprint(base, structure, model.query_pooling),
        "pooling": model.query_pooling,
        "reader": model.extract_features.__qualname__,
        "modules": repr(inner),
        "inner": structure.inner,
        "config": {name: value for name, value in base.config.to_dict().items() if name not in NAMES},
        "attention": attention,
    }
