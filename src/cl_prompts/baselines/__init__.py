"""Baselines: learners on the same backbone, stream and trainer as the prompts, which a prompt method has to beat."""

from __future__ import annotations

import os
from typing import Any

from torch import nn

from cl_prompts.backbones.input_checks import checked_base
from cl_prompts.baselines.a_gem import AGEM
from cl_prompts.baselines.base import Baseline
from cl_prompts.baselines.bic import BiC
from cl_prompts.baselines.class_mean import NearestClassMean
from cl_prompts.baselines.co2l import Co2L
from cl_prompts.baselines.dualnet import DualNet
from cl_prompts.baselines.ewc import EWC, OnlineEWC
from cl_prompts.baselines.files import read_files
from cl_prompts.baselines.gem import GEM
from cl_prompts.baselines.hat import HAT
from cl_prompts.baselines.icarl import ICaRL
from cl_prompts.baselines.lora import SequentialLoRA
from cl_prompts.baselines.lwf import LwF
from cl_prompts.baselines.packnet import PackNet
from cl_prompts.baselines.replay import ER, DERPlusPlus
from cl_prompts.baselines.retrain import GDumb, JointTraining
from cl_prompts.baselines.sequential import FrozenBackbone, SequentialFineTuning
from cl_prompts.baselines.si import SI
from cl_prompts.baselines.supsup import SupSup


_CLASSES: tuple[type[Baseline], ...] = (
    SequentialFineTuning,
    FrozenBackbone,
    SequentialLoRA,
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
    GEM,
    AGEM,
    Co2L,
    DualNet,
    PackNet,
    SupSup,
    HAT,
)
BASELINES: dict[str, type[Baseline]] = {baseline.name: baseline for baseline in _CLASSES}


def get_baseline(name: str, backbone: nn.Module, **options: Any) -> Baseline:
    """A new baseline.

    Args:
        name: one of `BASELINES`.
        backbone: any supported Hugging Face vision transformer, bare or with an image classification head (bypassed); it is
            trained in place.
        options: of the baseline, see its class.

    Raises:
        TypeError: the backbone is not supported, or the baseline has no such option.
        ValueError: no baseline has that name, or an option is out of range.
    """
    if name not in BASELINES:
        raise ValueError(f"no baseline is called {name!r}: choose one of {sorted(BASELINES)}")
    return BASELINES[name](checked_base(backbone), **options)


def load_baseline(folder: str | os.PathLike[str], backbone: nn.Module) -> Baseline:
    """Load what `Baseline.save_pretrained` wrote, in eval mode.

    Args:
        folder: where it was saved.
        backbone: the one it was made with, with the weights it had then.

    Raises:
        ValueError: files are missing or damaged, or of another backbone.
    """
    name, options, state = read_files(folder)
    learner = get_baseline(name, backbone, **options)
    learner.load_training_state_dict(state)
    learner.eval()
    return learner


__all__ = [
    "AGEM",
    "BASELINES",
    "ER",
    "EWC",
    "GEM",
    "HAT",
    "SI",
    "Baseline",
    "BiC",
    "Co2L",
    "DERPlusPlus",
    "DualNet",
    "FrozenBackbone",
    "GDumb",
    "ICaRL",
    "JointTraining",
    "LwF",
    "NearestClassMean",
    "OnlineEWC",
    "PackNet",
    "SequentialFineTuning",
    "SequentialLoRA",
    "SupSup",
    "get_baseline",
    "load_baseline",
]
