"""Image classification with an adapter: images in, labels and scores out."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, TypeAlias, overload

import torch
from peft import PeftModel
from torch import Tensor, nn

from cl_prompts.auto import AutoPromptPoolModel
from cl_prompts.methods import PromptPoolConfig
from cl_prompts.model import PromptPoolModel
from cl_prompts.sharing.base_models import load_base
from cl_prompts.sharing.image_processor import PROCESSOR_FILE, check_processor, load_processor
from cl_prompts.sharing.images import ImageSource, rgb_image
from cl_prompts.storage.adapter_files import HUB_KEYWORDS, AdapterSource, find_adapter
from cl_prompts.tuner.tuner import PromptPoolTuner


Predictions: TypeAlias = list[dict[str, Any]]


class PromptPoolPipeline:
    """Classifies images as transformers' image-classification pipeline does, with an adapter's own class names.

    An image's answer does not depend on the images beside it: each goes through the image processor alone, and only
    images that come out in one shape share a forward. Several threads may call one pipeline. The mode of the model is not
    changed: without gradients its forward is that of the test, also in training mode.

    Args:
        model: a model with a prompt pool, `PromptPoolModel` or plain `PeftModel`; its active adapter answers.
        image_processor: makes `pixel_values` of a PIL image, as the adapter's training did.
        batch_size: images in a forward.
        device: where the model is moved; None: it stays where it is.

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
    ) -> None:
        if not isinstance(getattr(model, "base_model", None), PromptPoolTuner):
            raise TypeError(f"{type(model).__name__} has no prompt pool: load one with AutoPromptPoolModel.from_pretrained")
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size} must be at least 1")
        check_processor(image_processor, model.adapter.config.state.image_size)
        try:
            self.model = model if device is None else model.to(device)
        except (AssertionError, RuntimeError) as error:  # the first where torch was built without that device
            raise ValueError(f"device={device!r} cannot be used here ({error})") from error
        self.image_processor = image_processor
        self.batch_size = batch_size

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
        **kwargs: Any,
    ) -> PromptPoolPipeline:
        """Load an adapter, its base model and its image processor. No code from the Hub is ever run.

        Args:
            adapter: folder or Hub id, or the files that `find_adapter` found.
            base: a base model, or its folder or Hub id, instead of the one that the adapter names.
            image_processor: instead of the adapter's own `preprocessor_config.json` or, where it has none, the base's.
            revision: branch, tag or commit of the adapter on the Hub.
            token: for private repositories on the Hub.
            batch_size: images in a forward.
            device: where the model is moved; None: the CPU, or where `base` is.
            kwargs: as in `PromptPoolModel.from_pretrained`.

        Raises:
            ValueError: files are missing, damaged or foreign, or do not fit each other.
        """
        hub = {"revision": revision, "token": token} | {name: kwargs.pop(name) for name in HUB_KEYWORDS if name in kwargs}
        limit = kwargs.get("max_adapter_bytes") or PromptPoolConfig.max_adapter_bytes
        files = find_adapter(adapter, kwargs.pop("subfolder", None), max_bytes=limit, **hub)
        shared = {name: hub[name] for name in ("token", "cache_dir", "local_files_only") if name in hub}
        base_revision = None
        if base is None:
            model = AutoPromptPoolModel.from_pretrained(files, **shared, **kwargs)
            base_revision = model.adapter.config.revision
        elif isinstance(base, nn.Module):
            model = PromptPoolModel.from_pretrained(base, files, **kwargs)
        else:
            config = PromptPoolConfig.from_pretrained(files)
            config.base_model_name_or_path, config.revision = os.fspath(base), None
            model = PromptPoolModel.from_pretrained(load_base(config, **shared), files, **kwargs)
        if image_processor is None:
            own = files.further_file(PROCESSOR_FILE)
            base_name = str(model.get_base_model().name_or_path)
            image_processor = (
                load_processor(own.parent) if own else load_processor(base_name, revision=base_revision, **shared)
            )
        return cls(model, image_processor, batch_size=batch_size, device=device)

    @overload
    def __call__(self, images: ImageSource, top_k: int | None = 5) -> Predictions: ...

    @overload
    def __call__(self, images: list[Any] | tuple[Any, ...], top_k: int | None = 5) -> list[Predictions]: ...

    def __call__(self, images: Any, top_k: int | None = 5) -> Predictions | list[Predictions]:
        """The most likely classes of images.

        Args:
            images: a path, URL, PIL image, array or tensor (see `cl_prompts.sharing.images.rgb_image`), or a list of them.
            top_k: how many classes, best first; None: all. More than the adapter knows are all.

        Returns:
            A list of `{"label", "score"}`, for a list of images a list of such lists. A label is the class's name, or its
            id as text where the adapter has no name for it; scores are probabilities over all classes the adapter knows.

        Raises:
            ValueError: an image cannot be found, read or understood, or `top_k` is below 1.
            TypeError: something is no image.
        """
        if top_k is not None and top_k < 1:
            raise ValueError(f"top_k={top_k} must be at least 1, or None for all classes")
        if not isinstance(images, (list, tuple)):
            return self._answer([rgb_image(images)], top_k)[0]
        answers: list[Predictions] = []
        for start in range(0, len(images), self.batch_size):
            batch = []
            for number, image in enumerate(images[start : start + self.batch_size], start):
                try:
                    batch.append(rgb_image(image))
                except (TypeError, ValueError) as error:
                    raise type(error)(f"image {number} of the list: {error}") from error
            answers += self._answer(batch, top_k)
        return answers

    def _answer(self, images: Sequence[Any], top_k: int | None) -> list[Predictions]:
        prepared = [dict(self.image_processor(images=image, return_tensors="pt")) for image in images]
        # A processor that keeps an image's proportions makes several shapes, where the base takes any.
        by_shape: dict[Any, list[int]] = {}
        for number, inputs in enumerate(prepared):
            by_shape.setdefault(tuple((name, inputs[name].shape) for name in sorted(inputs)), []).append(number)
        answers: list[Predictions] = [[] for _ in images]
        for numbers in by_shape.values():
            scores = self._scores({k: torch.cat([prepared[n][k] for n in numbers]) for k in prepared[numbers[0]]})
            for number, row in zip(numbers, scores, strict=True):
                answers[number] = self._best(row, top_k)
        return answers

    @torch.no_grad()  # for this thread only; without gradients a model in training mode answers as at test
    def _scores(self, inputs: dict[str, Tensor]) -> Tensor:
        base = self.model.get_base_model()
        like = next(base.parameters())
        inputs = {k: v.to(like.device, like.dtype if v.is_floating_point() else None) for k, v in inputs.items()}
        scores: Tensor = self.model(**inputs).logits.float().softmax(-1)
        return scores.cpu()

    def _best(self, scores: Tensor, top_k: int | None) -> Predictions:
        names = self.model.adapter.config.state.class_names
        labels = [names.get(str(c), str(c)) for c in self.model.classes]
        best = scores.argsort(descending=True, stable=True)[:top_k].tolist()
        return [{"label": labels[column], "score": scores[column].item()} for column in best]
