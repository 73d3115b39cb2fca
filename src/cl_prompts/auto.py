"""Loading an adapter together with the base model that its config names."""

from __future__ import annotations

from typing import Any

from cl_prompts.methods import PromptPoolConfig
from cl_prompts.model import PromptPoolModel
from cl_prompts.sharing.base_models import load_base
from cl_prompts.storage.adapter_files import AdapterSource, find_adapter
from cl_prompts.storage.file_source import HUB_KEYWORDS


class AutoPromptPoolModel:
    """`AutoPromptPoolModel.from_pretrained(adapter)` loads the base model named in the adapter's config, then the adapter.

    Raises:
        TypeError: always; the class has no instances.
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

        The base must be a model class of transformers with safetensors weights. No code from a repository is run.

        Args:
            model_id: folder or Hub id of the adapter, or the result of `find_adapter`.
            adapter_name: name of the adapter in the model.
            is_trainable: whether the adapter is loaded for training.
            strict_base: raise an error instead of a warning if the base has other weights than the adapter was trained on.
            verify: check the checksum of the weights.
            max_adapter_bytes: largest accepted size of the adapter, checked before memory is allocated; None: 8 GiB.
            kwargs: `revision` and `subfolder` for the adapter; `token`, `cache_dir` and `local_files_only` for both; all
                others, for example `dtype` or `attn_implementation`, for the base's `from_pretrained`.

        Raises:
            ValueError: the adapter is damaged, or its base cannot be loaded.
            cl_prompts.storage.hub_errors.HubError: the Hub cannot be reached or refuses the request.
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
