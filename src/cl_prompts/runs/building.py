"""Stream and learner of a run from its settings."""

from __future__ import annotations

import warnings
from inspect import signature
from typing import Any

from transformers import AutoConfig, AutoModel

from cl_prompts.baselines import BASELINES, get_baseline
from cl_prompts.continual import CropAndFlip, JointStream, Stream
from cl_prompts.heads import CLASSIFIERS, FeatureClassifier
from cl_prompts.methods import PromptPoolConfig
from cl_prompts.model import get_prompt_pool_model
from cl_prompts.runs.arguments import Arguments, pairs
from cl_prompts.runs.images import ToTensor, load_stream
from cl_prompts.runtime.text import short_repr


def load_backbone(name: str, attention: str) -> Any:
    """Load a backbone without pooler. Many checkpoints have none, and transformers would initialize one at random.

    Warns:
        UserWarning: the checkpoint lacks other tensors, which are random then.
    """
    config = AutoConfig.from_pretrained(name)
    config = getattr(config, "vision_config", config)
    parameters = signature(AutoModel._model_mapping[type(config)].__init__).parameters
    options = {"add_pooling_layer": False} if "add_pooling_layer" in parameters else {}
    backbone, loaded = AutoModel.from_pretrained(
        name, config=config, attn_implementation=attention, output_loading_info=True, **options
    )
    if absent := sorted(loaded["missing_keys"]):
        warnings.warn(f"{name} lacks {short_repr(absent)}: these tensors of the backbone are random", stacklevel=2)
    return backbone


def augmentation(args: Arguments) -> CropAndFlip:
    """The augmentation of training images."""
    return CropAndFlip(scale=(args.crop_scale, 1.0), views=args.views or None, on_device=args.augment_on_device)


def build_stream(args: Arguments, processor: Any, seed: int) -> Stream:
    """The stream of tasks."""
    stream = load_stream(
        args.scenario,
        args.dataset,
        ToTensor(processor, args.input_range, args.resample),
        tasks=args.tasks[0] if len(args.tasks) == 1 else args.tasks,
        class_order=args.class_order,
        seed=seed,
        image_column=args.image_column,
        label_column=args.label_column,
        domain_column=args.domain_column,
        order=args.order or None,
        common_test=args.common_test,
        width=args.width,
        parts=args.parts,
        held_out=args.held_out,
        augmentation=augmentation(args) if args.augment else None,
        on_bad_image=args.on_bad_image,
        streaming=args.streaming,
        train_images=args.train_images or None,
    )
    stream.max_pixels = args.max_pixels
    return JointStream(stream, only_last=True) if args.joint else stream


def build_learner(args: Arguments, stream: Stream, seed: int) -> Any:
    """A prompt pool on a frozen backbone, or a baseline on one that may be trained."""
    options = pairs(args.config)
    backbone = load_backbone(args.model, args.attention)
    if stream.task_free:
        options = {"num_labels": max(stream.classes) + 1} | options
    if args.method in BASELINES:
        return get_baseline(args.method, backbone, **options)
    options = {"classifier_seed": seed} | options
    if stream.task_free:
        options = {"class_mask": "batch"} | options
    return get_prompt_pool_model(backbone, PromptPoolConfig(method=args.method, **options))


def extra_classifiers(args: Arguments, learner: Any, own_seed: int) -> dict[str, FeatureClassifier]:
    """Classifiers to evaluate on the learner's features."""
    frozen = learner.features.frozen if args.method in BASELINES else learner.adapter.config.drift == "none"
    classifiers: dict[str, FeatureClassifier] = {}
    for name in args.extra_classifiers:
        make: Any = CLASSIFIERS[name]
        seed = {"seed": own_seed} if "seed" in signature(make).parameters else {}
        classifiers[name] = make(learner.head.weight.shape[1], drift="none" if frozen else "affine", **seed)
    return classifiers
