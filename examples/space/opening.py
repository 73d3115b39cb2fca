"""Open a pool with its base for a visitor: the built-in digits, one from the Hub, or one from uploaded files."""

import os
import shutil
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import constants
from huggingface_hub.utils import validate_repo_id
from transformers import PreTrainedModel
from uploads import MAX_ADAPTER_BYTES, take_adapter

from cl_prompts import PromptPoolConfig, PromptPoolModel, PromptPoolPipeline
from cl_prompts.runs import MICRO_VIT
from cl_prompts.runtime.text import first_line
from cl_prompts.sharing.base_models import load_base
from cl_prompts.sharing.card import hub_base
from cl_prompts.sharing.inspect import describe_adapter
from cl_prompts.sharing.run_record import RESULTS_FILE, RunRecord
from cl_prompts.storage.adapter_files import AdapterFiles, find_adapter
from cl_prompts.storage.bounded_read import MAX_RESULTS_BYTES, read_bounded


HERE = Path(__file__).resolve().parent
DIGITS = HERE / "digits"

MAX_BASE_BYTES = 2**30
MIN_FREE_BYTES = 4 * 2**30  # on the disk with the Hub's cache
PUBLIC: dict[str, Any] = {"token": False}  # with the page's token, visitors could open its owner's private repositories
PICTURE, MAX_PICTURE_BYTES = "selection.png", 2 * 2**20


@dataclass(eq=False)
class OpenPool:
    """A pool that one visitor has open.

    Args:
        name: name on the page.
        pipe: model and image processor.
        facts: result of `describe_adapter`.
        record: record of the run that trained these weights, if known.
        picture: the record's selection histogram, an unchecked PNG.
        taught: whether it was taught a class on this page, after the record.
        on_micro_vit: whether its base is the micro ViT of the examples instead of a model on the Hub.
        notes: warnings of the loading.
    """

    name: str
    pipe: PromptPoolPipeline
    facts: dict[str, Any]
    record: RunRecord | None = None
    picture: bytes | None = None
    on_micro_vit: bool = False
    taught: bool = False
    notes: list[str] = field(default_factory=list)

    @property
    def model(self) -> PromptPoolModel:
        """The model."""
        return self.pipe.model


def open_digits() -> OpenPool:
    """The built-in pool."""
    return _opened(DIGITS, "Digits 0 to 7 (built in)")


def open_hub(repo_id: str) -> OpenPool:
    """A public adapter of the Hub.

    Raises:
        ValueError: no such id, or the adapter or its base is damaged, foreign or too large.
        cl_prompts.storage.hub_errors.HubError: the Hub cannot be reached or refuses.
    """
    repo_id = repo_id.strip()
    try:
        validate_repo_id(repo_id)
        fits = "/" in repo_id and not Path(repo_id).exists()  # visitors must not open folders of this machine
    except ValueError:
        fits = False
    if not fits:
        raise ValueError(f"{repo_id[:100]!r} is no Hub id: write it like name/pool")
    return _opened(repo_id, repo_id)


def open_files(paths: Sequence[str | Path]) -> OpenPool:
    """An adapter from uploaded files (`take_adapter`), on the base that it names on the Hub or on the micro ViT.

    Raises:
        ValueError: the files are no adapter, or its base is neither.
        cl_prompts.storage.hub_errors.HubError: the Hub cannot be reached or refuses.
    """
    with tempfile.TemporaryDirectory(prefix="cl-prompts-upload-") as room:
        try:
            take_adapter(paths, Path(room))
            return _opened(Path(room), "Uploaded adapter")
        except (ValueError, OSError) as error:
            raise ValueError(first_line(error).replace(f"{room}{os.sep}", "").replace(room, "the upload")) from error


def _opened(source: str | Path, name: str) -> OpenPool:
    files = find_adapter(source, max_bytes=MAX_ADAPTER_BYTES, **PUBLIC)
    config = PromptPoolConfig.from_pretrained(files)
    on_micro_vit = config.state.base_fingerprint == micro_vit_fingerprint()
    base = str(MICRO_VIT) if on_micro_vit else _load_base(files, config)
    facts = describe_adapter(files) | {"adapter": name}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", UserWarning)
        pipe = PromptPoolPipeline.from_pretrained(
            files,
            base=base,
            is_trainable=True,
            max_adapter_bytes=MAX_ADAPTER_BYTES,
            **PUBLIC,
        )
    results = files.further_file(RESULTS_FILE, MAX_RESULTS_BYTES)
    record = RunRecord.load(results) if results is not None else None
    if record is not None and record.weights_sha256 != config.state.weights_sha256:
        record = None  # it describes other weights
    picture = files.further_file(PICTURE, MAX_PICTURE_BYTES) if record is not None else None
    pipe.model.eval()
    return OpenPool(
        name,
        pipe,
        facts,
        record,
        read_bounded(picture, MAX_PICTURE_BYTES) if picture is not None else None,
        on_micro_vit,
        notes=[first_line(w.message) for w in caught if isinstance(w.message, UserWarning)],
    )


def micro_vit_fingerprint() -> str | None:
    """The base fingerprint of adapters that were trained on the micro ViT, read from the built-in one."""
    return PromptPoolConfig.from_pretrained(DIGITS).state.base_fingerprint


def _load_base(files: AdapterFiles, config: PromptPoolConfig) -> PreTrainedModel:
    """The base that an adapter names or brings along; ValueError if it names none or is too large for this page."""
    brought_along = files.repo_id is not None and not config.base_model_name_or_path
    if hub_base(config) is None and not brought_along:
        raise ValueError("the adapter names no base model on the Hub, and was not trained on this page's micro ViT")
    os.makedirs(constants.HF_HUB_CACHE, exist_ok=True)
    if shutil.disk_usage(constants.HF_HUB_CACHE).free < MAX_BASE_BYTES + MIN_FREE_BYTES:
        raise ValueError("this page's disk is full: try again later, or run the page on your machine")
    return load_base(config, files, max_bytes=MAX_BASE_BYTES, **PUBLIC)
