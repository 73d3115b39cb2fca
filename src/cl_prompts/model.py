"""`PromptPoolModel`: a `PeftModel` with a typed forward, atomic saves, and checks on load."""

from __future__ import annotations

import glob
import os
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import CommitInfo
from peft import PeftConfig, PeftModel
from torch import Tensor, nn

from cl_prompts.backbones.frozen_tensors import kept_offloaded
from cl_prompts.backbones.input_checks import checked_base
from cl_prompts.backbones.restore import left_as_it_was
from cl_prompts.methods import PromptPoolConfig, default_config
from cl_prompts.outputs import PromptPoolOutput
from cl_prompts.runtime.arguments import refuse_unknown
from cl_prompts.sharing.run_record import RunRecord
from cl_prompts.storage.adapter_files import LOAD_KEYWORDS, AdapterFiles, AdapterSource, find_adapter, load_with_retry
from cl_prompts.storage.declared import WEIGHTS_FILE
from cl_prompts.storage.file_source import HUB_KEYWORDS
from cl_prompts.storage.integrity import digest_file
from cl_prompts.storage.staging import staging_folder
from cl_prompts.tuner.argument_checks import check_adapter_name, check_config, chosen_adapter
from cl_prompts.tuner.mixed_batch import check_disabled_forward
from cl_prompts.tuner.prompt_dtype import with_prompts_in
from cl_prompts.tuner.registration import register_peft_type
from cl_prompts.tuner.task_api import TaskAPI
from cl_prompts.tuner.validation import check_same_adapter


register_peft_type()

_PEFT_SAVES = threading.Lock()  # PEFT changes fields of the configs during a save


class PromptPoolModel(TaskAPI, PeftModel):
    """A frozen vision transformer with a prompt pool.

    The `PromptPoolTuner` holds the adapters, so a plain `PeftModel` on the same base gives the same output. This class adds
    the signature of the forward, atomic saves and checked loads. `TaskAPI` has the methods for tasks and training.
    """

    def forward(
        self,
        pixel_values: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        query: Tensor | None = None,
        sample_ids: Any = None,
        num_items_in_batch: Tensor | int | None = None,
        adapter_names: Sequence[str] | None = None,
        **kwargs: Any,
    ) -> PromptPoolOutput:
        """Logits over the known classes and, with labels, the loss.

        Args:
            pixel_values: images [B, 3, H, W], normalized as the base expects.
            labels: class ids [B]; -100 marks padding, which is ignored.
            query: un-prompted features [B, D] from `extract_features`; saves the un-prompted pass.
            sample_ids: a number per image, the same in every epoch. With them the method's statistics count an image once
                per task; without them, in every training forward.
            num_items_in_batch: number of images of the accumulated global batch, a scalar, from `transformers.Trainer`.
            adapter_names: the adapter that answers for each image [B], outside of training; None: the active one for all.
                The logits of an image follow the classes of its adapter and end in -inf if others have more.
            kwargs: `lower_blocks` of `extract_lower_blocks`, which saves these blocks; others are passed to the base model.

        Raises:
            TypeError: the base has no argument of that name.
            ValueError: wrong image size or channels, a label of no declared class, or no class is known yet.
        """
        own = {"labels": labels, "query": query, "sample_ids": sample_ids, "num_items_in_batch": num_items_in_batch}
        passed = {name: value for name, value in own.items() if value is not None}
        pools = self.base_model.pools
        if pools.disable_adapters:
            check_disabled_forward(self.get_base_model(), pools.prompt_pool, pixel_values, adapter_names, kwargs)
        elif adapter_names is not None:
            return self.base_model.mixed_forward(pixel_values, adapter_names=adapter_names, **passed, **kwargs)
        return super().forward(pixel_values=pixel_values, **passed, **kwargs)

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        safe_serialization: bool = True,
        selected_adapters: list[str] | None = None,
        is_main_process: bool = True,
        *,
        record: RunRecord | None = None,
        pictures: Sequence[str | os.PathLike[str]] = (),
        image_processor: Any = None,
        state_dict: dict[str, Tensor] | None = None,
        save_function: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Save adapters as `adapter_config.json`, `adapter_model.safetensors` and a model card, `README.md`.

        The adapter "default" is saved in the folder itself, others in subfolders by name. A save is atomic: with several
        threads or processes saving into one folder the last one wins, and a load always gets the files of one save. Other
        files in the folder are not changed.

        Args:
            save_directory: folder to write.
            safe_serialization: must be True; pickle files are not supported.
            selected_adapters: names of adapters; None: all.
            is_main_process: if False, nothing is written.
            record: the run that trained the active adapter (`RunRecord.of`), for `results.json` and the card.
            pictures: PNG files for the card. Accuracies are drawn from `record` in addition, if matplotlib is installed.
            image_processor: image processor of the training, saved as `preprocessor_config.json`.
            state_dict: the model's tensors, if the caller has gathered them; None: those of the model.
            save_function: not used; scripts pass `accelerator.save`, as transformers' models expect.
            dtype: precision of the saved prompts: `torch.float16` or `torch.bfloat16` for smaller files; None: float32.
                They are float32 again after loading, rounded. All else is saved in full. This model is not changed.

        Raises:
            ValueError: `safe_serialization` is False, a prompt is too large for `dtype`, an adapter does not exist, the
                path is a file, or `record` is given and the active adapter is not saved.
            FloatingPointError: a tensor holds NaN or Inf. The files of the last save are kept.
            OSError: the disk is full. The files of the last save are kept.
        """
        from cl_prompts.sharing.card import add_pictures, card_inputs, write_card  # deferred: imports evaluation
        from cl_prompts.sharing.image_processor import save_processor

        if not safe_serialization:
            raise ValueError("safe_serialization=False would write a pickle: adapters are saved as safetensors only")
        if not is_main_process:
            return
        names = list(self.peft_config) if selected_adapters is None else selected_adapters
        if not names:
            raise ValueError(f"selected_adapters={names} would save nothing: name some of {list(self.peft_config)}")
        if record is not None and not set(names) & set(self.active_adapters):
            raise ValueError(
                f"record= is of the active adapter, {self.active_adapters}; saved are {names}: call set_adapter first"
            )
        if dtype is not None:
            tensors = self.state_dict() if state_dict is None else state_dict
            state_dict = with_prompts_in(dtype, tensors, self.base_model.pools.prompt_pool, names)
        given = {} if state_dict is None else {"state_dict": state_dict}
        places = {name: "" if name == "default" else f"{name}/" for name in names}
        inputs = [
            f"{glob.escape(place)}{pattern}"
            for place in places.values()
            for pattern in card_inputs(Path(save_directory, place))
        ]
        with staging_folder(save_directory, inputs) as folder:
            with _PEFT_SAVES:
                super().save_pretrained(
                    str(folder), selected_adapters=selected_adapters, save_embedding_layers=False, **given
                )
            for name, place in places.items():
                if image_processor is not None:
                    save_processor(image_processor, folder / place)
                if record is not None and name in self.active_adapters:
                    record.save(folder / place, digest_file(folder / place))
                    add_pictures(folder / place, record, pictures)
                write_card(folder / place, name=Path(save_directory).resolve().name)

    def create_or_update_model_card(self, output_dir: str) -> None:
        """Does nothing. PEFT calls it too early, before files are in `output_dir`; `save_pretrained` writes the card."""

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        revision: str | None = None,
        commit_message: str | None = None,
        create_pr: bool = False,
        token: str | bool | None = None,
        base_model_id: str | None = None,
        include_base: bool = False,
        license: str | None = None,
        adapter_name: str | None = None,
        record: RunRecord | None = None,
        pictures: Sequence[str | os.PathLike[str]] = (),
        image_processor: Any = None,
        dtype: torch.dtype | None = None,
    ) -> CommitInfo:
        """Push an adapter with a model card to the Hub, in one commit. The base model is not pushed by default.

        Args:
            repo_id: Hub id, like "name/pool".
            private: whether a new repository is private; None: the account's default.
            revision: branch, created if it does not exist; None: the main branch.
            commit_message: message of the commit; None: "Upload adapter".
            create_pr: open a pull request against the main branch instead of committing; not with `revision`.
            token: token of the Hub; None: that of `hf auth login`.
            base_model_id: Hub id of the base model, for an adapter whose base is a local folder.
            include_base: also push the base model, into the folder `base/`.
            license: license identifier of the Hub, like "apache-2.0".
            adapter_name: name of the adapter; None: the active one.
            record: the run that trained it, see `save_pretrained`.
            pictures: PNG files for the card.
            image_processor: image processor of the training.
            dtype: precision of the prompts in the file, see `save_pretrained`.

        Raises:
            ValueError: the base is a local folder, and neither `base_model_id` nor `include_base` is given.
            cl_prompts.storage.hub_errors.HubError: the Hub cannot be reached or refuses the request; nothing was changed
                there.
        """
        from cl_prompts.sharing.push import push_folder  # deferred: imports the model card

        name = adapter_name or self.active_adapters[0]
        with tempfile.TemporaryDirectory(prefix="cl_prompts-") as temporary:
            folder = Path(temporary, repo_id.split("/")[-1])
            self.save_pretrained(
                folder,
                selected_adapters=[name],
                record=record,
                pictures=pictures,
                image_processor=image_processor,
                dtype=dtype,
            )
            return push_folder(
                folder if name == "default" else folder / name,
                repo_id,
                private=private,
                revision=revision,
                commit_message=commit_message,
                create_pr=create_pr,
                token=token,
                base_model_id=base_model_id,
                include_base=include_base,
                license=license,
            )

    @classmethod
    def from_pretrained(
        cls,
        model: nn.Module,
        model_id: AdapterSource,
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: PeftConfig | None = None,
        *,
        strict_base: bool = False,
        verify: bool = True,
        max_adapter_bytes: int | None = None,
        **kwargs: Any,
    ) -> PromptPoolModel:
        """Load an adapter from a folder or the Hub onto a base model.

        Args:
            model: the base model. It is not changed if loading fails.
            model_id: folder or Hub id of the adapter, or the result of `find_adapter`.
            adapter_name: name of the adapter in this model.
            is_trainable: whether the adapter is loaded for training.
            config: config to use instead of the saved one.
            strict_base: raise an error instead of a warning if the base has other weights than the adapter was trained on.
            verify: check the checksum of the weights.
            max_adapter_bytes: largest accepted size of the adapter, checked before memory is allocated; None: 8 GiB.
            kwargs: `revision`, `subfolder`, `token`, `cache_dir`, `low_cpu_mem_usage` and others, as in PEFT.

        Raises:
            TypeError: the base is not supported, `config` is not a `PromptPoolConfig`, or an argument is unknown.
            ValueError: a file is missing, damaged or not of this library, or the adapter does not fit the base.
            cl_prompts.storage.hub_errors.HubError: the Hub cannot be reached or refuses the request.
        """
        refuse_unknown("from_pretrained", kwargs, LOAD_KEYWORDS)
        model = checked_base(model)
        hub = {name: kwargs.pop(name) for name in HUB_KEYWORDS if name in kwargs}
        limit = max_adapter_bytes or PromptPoolConfig.max_adapter_bytes

        def load(files: AdapterFiles) -> PromptPoolModel:
            chosen = PromptPoolConfig.from_pretrained(files) if config is None else config
            check_config(chosen)
            chosen.strict_base, chosen.verify, chosen.max_adapter_bytes = strict_base, verify, limit
            with left_as_it_was(model), kept_offloaded(model):
                loaded: PromptPoolModel = super(PromptPoolModel, cls).from_pretrained(
                    model, files, adapter_name, is_trainable=is_trainable, config=chosen, **kwargs
                )
                if not verify and files.were_replaced():  # with `verify` the checksum detects it
                    raise ValueError(f"{files.folder} was saved again while it was loaded: try again")
            return loaded

        return load_with_retry(find_adapter(model_id, kwargs.pop("subfolder", None), max_bytes=limit, **hub), load)

    def load_adapter(self, model_id: AdapterSource, adapter_name: str, is_trainable: bool = False, **kwargs: Any) -> Any:
        """Load another adapter, as in PEFT. If that fails, the model is not changed.

        Args:
            model_id: folder or Hub id of the adapter, or the result of `find_adapter`.
            adapter_name: name of the adapter in this model.
            is_trainable: whether the adapter is loaded for training.
            kwargs: as in PEFT.

        Raises:
            ValueError: a file is missing, damaged or not of this library, or the adapter does not fit the base.
            cl_prompts.storage.hub_errors.HubError: the Hub cannot be reached or refuses the request.
        """
        refuse_unknown("load_adapter", (n for n, value in kwargs.items() if value is not None), LOAD_KEYWORDS)
        check_adapter_name(adapter_name)
        hub = {name: kwargs.pop(name) for name in HUB_KEYWORDS if name in kwargs}
        limit = PromptPoolConfig.max_adapter_bytes
        files = find_adapter(model_id, kwargs.pop("subfolder", None), max_bytes=limit, **hub)
        own = self.peft_config.get(adapter_name)
        if own is not None and own.state.weights_sha256 is not None:  # `from_pretrained` has just read it from these files
            return self._load_files(files, adapter_name, is_trainable, **kwargs)
        return load_with_retry(files, lambda found: self._load_files(found, adapter_name, is_trainable, **kwargs))

    def add_adapter(self, adapter_name: str, peft_config: PromptPoolConfig, *args: Any, **kwargs: Any) -> None:
        """Add the adapter `adapter_name` with a new config `peft_config`; `args` and `kwargs` are as in PEFT.

        Raises:
            TypeError: `peft_config` is not a `PromptPoolConfig`, or an argument is unknown.
            ValueError: an adapter cannot have that name or has it already, or the config does not fit the base.
        """
        check_adapter_name(adapter_name)
        check_config(peft_config)
        super().add_adapter(adapter_name, peft_config, *args, **kwargs)

    def set_adapter(self, adapter_name: Any, inference_mode: bool = False) -> None:
        """Make `adapter_name`, a name or a list of one, the active adapter, trainable unless `inference_mode`.

        Raises:
            ValueError: there are several names, or no adapter has that name.
        """
        frozen = {"inference_mode": True} if inference_mode else {}  # PEFT 0.18 does not know the argument
        super().set_adapter(chosen_adapter(adapter_name, self.peft_config), **frozen)

    def _load_files(self, files: AdapterFiles, adapter_name: str, is_trainable: bool, **kwargs: Any) -> Any:
        new = adapter_name not in self.peft_config
        if not new and self.peft_config[adapter_name].state.weights_sha256 is None:
            # PEFT then reads tensors only, as when transformers.Trainer loads its best checkpoint. They are checked against
            # the checksum in the config that was saved with them.
            saved, own = PromptPoolConfig.from_pretrained(files), self.peft_config[adapter_name]
            check_same_adapter(own, saved, files.source)
            own.state.weights_sha256 = saved.state.weights_sha256
        with left_as_it_was(self.get_base_model()), kept_offloaded(self.get_base_model()):
            try:
                if new:  # PEFT would do the same, but read the config two more times
                    config = PromptPoolConfig.from_pretrained(files)
                    config.inference_mode = not is_trainable
                    options = ("low_cpu_mem_usage", "autocast_adapter_dtype")
                    self.add_adapter(adapter_name, config, **{k: kwargs[k] for k in options if k in kwargs})
                    if is_trainable:
                        self.set_requires_grad(adapter_name)
                return super().load_adapter(str(files.folder), adapter_name, is_trainable=is_trainable, **kwargs)
            except BaseException as error:
                if new and adapter_name in self.peft_config:
                    self.delete_adapter(adapter_name)
                if isinstance(error, KeyError):  # PEFT looks up the tensors of modules_to_save before our checks
                    raise ValueError(
                        f"{WEIGHTS_FILE} does not fit its config: missing {error}. Are both files from the same save?"
                    ) from error
                raise


def get_prompt_pool_model(
    model: nn.Module, config: PromptPoolConfig | None = None, adapter_name: str = "default", **kwargs: Any
) -> PromptPoolModel:
    """Add a new prompt pool to a vision transformer, whose parameters are frozen in place.

    Args:
        model: a supported Hugging Face vision transformer, bare or with an image classification head (which is not used),
            or one of timm.
        config: a method's config; None: `default_config()`.
        adapter_name: name of the adapter.
        kwargs: `revision`, `autocast_adapter_dtype`, `low_cpu_mem_usage`, as in PEFT.

    Raises:
        TypeError: an argument is unknown, or the model is not supported; the message lists the supported models.
        ValueError: the config does not fit the model.
    """
    refuse_unknown("get_prompt_pool_model", kwargs, ("revision", "autocast_adapter_dtype", "low_cpu_mem_usage"))
    model = checked_base(model)
    config = default_config() if config is None else config
    check_config(config)
    config.base_model_name_or_path = model.__dict__.get("name_or_path") or config.base_model_name_or_path
    config.revision = kwargs.pop("revision", None) or config.revision
    config.declared = None  # set if the config was read from a file; its weights are not loaded here
    with left_as_it_was(model):
        return PromptPoolModel(model, config, adapter_name=adapter_name, **kwargs)


def extract_features(model: PeftModel, pixel_values: Tensor, **kwargs: Any) -> Tensor:
    """Features of the frozen backbone without prompts. They are the query of the methods that use one.

    Args:
        model: a model with a prompt pool.
        pixel_values: images [B, 3, H, W].
        kwargs: further inputs of the base.

    Returns:
        float32 [B, D], without gradient.
    """
    return model.extract_features(pixel_values, **kwargs)
