"""Image classification pipeline for adapters."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from typing import Any, TypeAlias, overload

import torch
from peft import PeftModel
from torch import Tensor, nn

from cl_prompts.auto import AutoPromptPoolModel
from cl_prompts.methods import PromptPoolConfig
from cl_prompts.model import PromptPoolModel
from cl_prompts.runtime.images import MAX_PIXELS
from cl_prompts.sharing.base_models import base_place, load_base
from cl_prompts.sharing.image_processor import PROCESSOR_FILE, check_processor, load_processor
from cl_prompts.sharing.images import ImageSource, rgb_image
from cl_prompts.storage.adapter_files import AdapterSource, find_adapter
from cl_prompts.storage.bounded_read import MAX_PROCESSOR_BYTES
from cl_prompts.storage.file_source import HUB_KEYWORDS
from cl_prompts.tuner.tuner import PromptPoolTuner


Predictions: TypeAlias = list[dict[str, Any]]

logger = logging.getLogger(__name__)


class PromptPoolPipeline:
    """Image classification, like the pipeline of transformers, with the class names of an adapter.

    The prediction for an image does not depend on the other images of a call: each image is processed alone, and only
    images of one shape share a forward. Several threads may call one pipeline. The model's mode is not changed: without
    gradients, its forward in training mode is that of eval mode.

    Args:
        model: a `PromptPoolModel` or plain `PeftModel` with a prompt pool. Its active adapter is used.
        image_processor: turns a PIL image into `pixel_values`, as in the adapter's training.
        batch_size: largest number of images in a forward.
        device: device to move the model to; None: the model is not moved.
        max_pixels: largest number of pixels of an image, checked before it is decoded; half of it for WebP and progressive
            CMYK JPEG.

    Raises:
        TypeError: the model has no prompt pool.
        ValueError: `batch_size` is below 1; the image processor fails, or makes images of another size than the adapter was
            trained on; the device does not exist.
    """

    def __init__(
        self,
        model: PeftModel,
        image_processor: Any,
        *,
        batch_size: int = 8,
        device: torch.device | str | int | None = None,
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        if not isinstance(getattr(model, "base_model", None), PromptPoolTuner):
            raise TypeError(f"{type(model).__name__} has no prompt pool: load one with AutoPromptPoolModel.from_pretrained")
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size} must be at least 1")
        check_processor(image_processor, model.image_size, any_size=model.takes_any_size)
        try:
            self.model = model if device is None else model.to(device)
        except (AssertionError, RuntimeError) as error:  # AssertionError: torch was built without support for the device
            raise ValueError(f"device={device!r} cannot be used here ({error})") from error
        self.image_processor = image_processor
        self.batch_size, self.max_pixels = batch_size, max_pixels
        if not self.calibrated:
            logger.warning(
                "the scores are not calibrated: the adapter was saved without a temperature, so a score is not the share "
                "of right answers; model.consolidate(images) after a task's training chooses one"
            )

    @property
    def calibrated(self) -> bool:
        """Whether the active adapter has a temperature, so that a score of 0.8 is right in about 80 % of the cases."""
        return self.model.adapter.config.state.temperature is not None

    @classmethod
    def from_pretrained(
        cls,
        adapter: AdapterSource,
        *,
        base: nn.Module | str | os.PathLike[str] | None = None,
        image_processor: Any = None,
        revision: str | None = None,
        token: str | None = None,
        batch_size: int = 8,
        device: torch.device | str | int | None = None,
        max_pixels: int = MAX_PIXELS,
        **kwargs: Any,
    ) -> PromptPoolPipeline:
        """Load an adapter, its base model and its image processor. No code from the Hub is run.

        Args:
            adapter: folder or Hub id of the adapter, or the result of `find_adapter`.
            base: a base model, or its folder or Hub id; None: the base that the adapter's config names.
            image_processor: an image processor; None: the adapter's `preprocessor_config.json` or, if it has none, the
                base's.
            revision: branch, tag or commit of the adapter on the Hub.
            token: token of the Hub, for private repositories.
            batch_size: largest number of images in a forward.
            device: device to move the model to; None: the device of `base`, or the CPU.
            max_pixels: largest number of pixels of an image, checked before it is decoded; half of it for WebP and
                progressive CMYK JPEG.
            kwargs: as in `PromptPoolModel.from_pretrained`.

        Raises:
            ValueError: a file is missing, damaged or not of this library, or adapter and base do not fit each other.
        """
        hub = {"revision": revision, "token": token} | {name: kwargs.pop(name) for name in HUB_KEYWORDS if name in kwargs}
        limit = kwargs.get("max_adapter_bytes") or PromptPoolConfig.max_adapter_bytes
        files = find_adapter(adapter, kwargs.pop("subfolder", None), max_bytes=limit, **hub)
        shared = {name: hub[name] for name in ("token", "cache_dir", "local_files_only") if name in hub}
        config = PromptPoolConfig.from_pretrained(files)
        if base is None:
            model = AutoPromptPoolModel.from_pretrained(files, **shared, **kwargs)
        else:
            name = str(getattr(base, "name_or_path", "")) if isinstance(base, nn.Module) else os.fspath(base)
            if name != config.base_model_name_or_path:
                config.base_model_name_or_path, config.revision = name, None
            loaded = base if isinstance(base, nn.Module) else load_base(config, **shared)
            model = PromptPoolModel.from_pretrained(loaded, files, **kwargs)
        if image_processor is None:
            own = files.further_file(PROCESSOR_FILE, MAX_PROCESSOR_BYTES) is not None
            if not own and base is not None and not config.base_model_name_or_path:
                raise ValueError(f"the adapter has no {PROCESSOR_FILE}, and its base model no name: pass image_processor=")
            image_processor = load_processor(
                files.place if own else base_place(config, files if base is None else None, shared)
            )
        return cls(model, image_processor, batch_size=batch_size, device=device, max_pixels=max_pixels)

    @overload
    def __call__(self, images: ImageSource, top_k: int | None = 5) -> Predictions: ...

    @overload
    def __call__(self, images: list[Any] | tuple[Any, ...], top_k: int | None = 5) -> list[Predictions]: ...

    def __call__(self, images: Any, top_k: int | None = 5) -> Predictions | list[Predictions]:
        """The most likely classes of images.

        Args:
            images: a path, URL, PIL image, array or tensor (see `cl_prompts.sharing.images.rgb_image`), or a list of them.
            top_k: largest number of classes to return per image; None: all.

        Returns:
            A list of `{"label", "score"}`, most likely class first; for a list of images, a list of these lists. A label is
            the class's name, or its id as text if it has no name. Scores are probabilities over all known classes, which
            are as often right as they say if the adapter is `calibrated`.

        Raises:
            ValueError: an image cannot be found, read or converted, or `top_k` is below 1.
            TypeError: an image is of an unsupported type.
        """
        if top_k is not None and top_k < 1:
            raise ValueError(f"top_k={top_k} must be at least 1, or None for all classes")
        if not isinstance(images, (list, tuple)):
            return self.classify([self.preprocess(images)], top_k)[0]
        answers: list[Predictions] = []
        for start in range(0, len(images), self.batch_size):
            batch = []
            for number, image in enumerate(images[start : start + self.batch_size], start):
                try:
                    batch.append(self.preprocess(image))
                except (TypeError, ValueError) as error:
                    raise type(error)(f"image {number} of the list: {error}") from error
            answers += self.classify(batch, top_k)
        return answers

    def preprocess(self, image: ImageSource) -> dict[str, Tensor]:
        """The model's arguments for one image, as made by the image processor.

        Args:
            image: as in a call of the pipeline. The decoded image is not kept, since it may be far larger than the result.

        Raises:
            ValueError: the image cannot be found, read or converted.
            TypeError: it is of an unsupported type.
        """
        return dict(self.image_processor(images=rgb_image(image, self.max_pixels), return_tensors="pt"))

    def classify(self, prepared: Sequence[dict[str, Tensor]], top_k: int | None = 5) -> list[Predictions]:
        """The most likely classes of images from `preprocess`; images of one shape share a forward.

        Args:
            prepared: arguments of the model for each image.
            top_k: largest number of classes for each image; None: all.
        """
        # A processor that keeps the aspect ratio makes images of several shapes, for bases that take any size.
        by_shape: dict[Any, list[int]] = {}
        for number, inputs in enumerate(prepared):
            by_shape.setdefault(tuple((name, inputs[name].shape) for name in sorted(inputs)), []).append(number)
        answers: list[Predictions] = [[] for _ in prepared]
        for numbers in by_shape.values():
            scores = self._scores({k: torch.cat([prepared[n][k] for n in numbers]) for k in prepared[numbers[0]]})
            for number, row in zip(numbers, scores, strict=True):
                answers[number] = self._best(row, top_k)
        return answers

    @torch.no_grad()  # per thread; without gradients a model in training mode predicts as in eval mode
    def _scores(self, inputs: dict[str, Tensor]) -> Tensor:
        base = self.model.get_base_model()
        # The adapter is where the base runs, also if the base's weights are offloaded.
        device, dtype = next(self.model.adapter.parameters()).device, next(base.parameters()).dtype
        inputs = {k: v.to(device, dtype if v.is_floating_point() else None) for k, v in inputs.items()}
        scores: Tensor = self.model(**inputs).logits.float().softmax(-1)
        return scores.cpu()

    def _best(self, scores: Tensor, top_k: int | None) -> Predictions:
        labels = self.model.adapter.tasks.id2label
        best = scores.argsort(descending=True, stable=True)[:top_k].tolist()
        return [{"label": labels[column], "score": scores[column].item()} for column in best]
