"""Comparison learners on the same backbone, stream and trainer as the prompts: what a prompt method has to beat."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from cl_prompts.baselines.base import ComparisonLearner
from cl_prompts.baselines.bic import BiC
from cl_prompts.baselines.class_mean import NearestClassMean
from cl_prompts.baselines.ewc import EWC, OnlineEWC
from cl_prompts.baselines.fresh_start import GDumb, JointStream, JointTraining
from cl_prompts.baselines.growing import CONFIG_FILE, WEIGHTS_FILE
from cl_prompts.baselines.icarl import ICaRL
from cl_prompts.baselines.lwf import LwF
from cl_prompts.baselines.replay import ER, DERPlusPlus
from cl_prompts.baselines.sequential import FrozenBackbone, SequentialFineTuning
from cl_prompts.baselines.si import SI
from cl_prompts.storage.staging import finish_interrupted_save, read_together


_LEARNERS: tuple[type[ComparisonLearner], ...] = (
    SequentialFineTuning,
    FrozenBackbone,
    JointTraining,
    NearestClassMean,
    EWC,
    OnlineEWC,
    LwF,
    SI,
    ER,
    DERPlusPlus,
    GDumb,
    BiC,
    ICaRL,
)
BASELINES: dict[str, type[ComparisonLearner]] = {learner.name: learner for learner in _LEARNERS}


def get_comparison_learner(name: str, backbone: nn.Module, **options: Any) -> ComparisonLearner:
    """A comparison learner.

    Args:
        name: one of `BASELINES`.
        backbone: any supported Hugging Face vision transformer, bare or with an image classification head (bypassed); it is
            trained in place.
        options: of the learner, see its class.

    Raises:
        TypeError: the backbone is not supported, or the learner has no such option.
        ValueError: no learner has that name, or an option is out of range.
    """
    if name not in BASELINES:
        raise ValueError(f"no comparison learner is called {name!r}: choose one of {sorted(BASELINES)}")
    return BASELINES[name](backbone, **options)


def load_comparison_learner(folder: str | os.PathLike[str], backbone: nn.Module) -> ComparisonLearner:
    """A learner from what its `save_pretrained` wrote, in eval mode.

    Args:
        folder: where it was saved.
        backbone: the one it began with, as it was then.

    Raises:
        ValueError: files are missing or damaged, or of another backbone.
    """
    finish_interrupted_save(folder)

    def read() -> tuple[dict[str, Any], dict[str, Any]]:
        try:
            told = json.loads(Path(folder, CONFIG_FILE).read_text())
            if not isinstance(told, dict) or not all(isinstance(told.get(key), dict) for key in ("options", "state")):
                raise ValueError(f"{CONFIG_FILE} has no options or no state")
            return told, load_file(Path(folder, WEIGHTS_FILE))
        except (OSError, ValueError, SafetensorError) as error:
            raise ValueError(f"{folder} holds no comparison learner, or a damaged one ({error})") from error

    told, tensors = read_together([Path(folder, CONFIG_FILE), Path(folder, WEIGHTS_FILE)], read)
    learner = get_comparison_learner(told.get("learner", ""), backbone, **told["options"])
    learner.load_training_state(tensors, told)
    learner.eval()
    return learner


__all__ = [
    "BASELINES",
    "ER",
    "EWC",
    "SI",
    "BiC",
    "ComparisonLearner",
    "DERPlusPlus",
    "FrozenBackbone",
    "GDumb",
    "ICaRL",
    "JointStream",
    "JointTraining",
    "LwF",
    "NearestClassMean",
    "OnlineEWC",
    "SequentialFineTuning",
    "get_comparison_learner",
    "load_comparison_learner",
]
