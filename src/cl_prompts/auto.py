"""The base model that an adapter names, and the adapter on it."""

from __future__ import annotations

from typing import Any

from cl_prompts.methods import PromptPoolConfig
from cl_prompts.model import PromptPoolModel
from cl_prompts.sharing.base_models import load_base
from cl_prompts.storage.adapter_files import HUB_KEYWORDS, AdapterSource, find_adapter


class AutoPromptPoolModel:
    """`AutoPromptPoolModel.from_pretrained(adapter)` loads the base model named in the adapter, then the adapter.

    Raises:
        TypeError: on an attempt to make an instance.
    """

    def __init__(self) -> None:
        raise TypeError("AutoPromptPoolModel has no instances: call AutoPromptPoolModel.from_pretrained(adapter)")

    @classmethod
    def from_pretrained(
        cls,
        model_id: AdapterSource,
        adapter_name: str = "default",
        is_trainable: bool = False,
        *,
        strict_base: bool = False,
        verify: bool = True,
        max_adapter_bytes: int | None = None,
        **kwargs: Any,
    ) -> PromptPoolModel:
        """Load an adapter and its base.

        Only model classes of transformers itself are built, from safetensors; no code of a repository is run.

        Args:
            model_id: folder or Hub id of the adapter, or the files that `find_adapter` found.
            adapter_name: name of the adapter in the model.
            is_trainable: whether training goes on.
            strict_base: a base with other weights is an error instead of a warning.
            verify: compare the checksum of the weights.
            max_adapter_bytes: refuse larger adapters before memory is allocated (default 8 GiB).
            kwargs: `revision`, `subfolder` of the adapter; `token`, `cache_dir`, `local_files_only` of both; the rest, like
                `dtype` or `attn_implementation`, goes to the base's `from_pretrained`.

        Raises:
            ValueError: the adapter is damaged, or names no base that can be loaded here.
            cl_prompts.storage.hub_errors.HubError: the Hub cannot be reached or refuses.
        """
        hub = {name: kwargs.pop(name) for name in HUB_KEYWORDS if name in kwargs}
        limit = max_adapter_bytes or PromptPoolConfig.max_adapter_bytes
        files = find_adapter(model_id, kwargs.pop("subfolder", None), max_bytes=limit, **hub)
        shared = {name: hub[name] for name in ("token", "cache_dir", "local_files_only") if name in hub}
        base = load_base(PromptPoolConfig.from_pretrained(files), files, **shared, **kwargs)
        return PromptPoolModel.from_pretrained(
            base,
            files,
            adapter_name,
            is_trainable,
            strict_base=strict_base,
            verify=verify,
            max_adapter_bytes=max_adapter_bytes,
        )
