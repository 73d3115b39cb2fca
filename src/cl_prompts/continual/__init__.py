"""Training task after task: trainer, streams, callbacks, metrics."""

from cl_prompts.continual.arguments import ContinualArguments
from cl_prompts.continual.callbacks import JsonlTracker, ProgressBar, TrainerCallback
from cl_prompts.continual.rehearsal import RehearsalMemory
from cl_prompts.continual.state import TrainerState
from cl_prompts.continual.streams.augmentation import CropAndFlip
from cl_prompts.continual.streams.gaussian import GaussianStream
from cl_prompts.continual.streams.indexed import IndexedStream, IndexedTask
from cl_prompts.continual.streams.iterable import IterableStream
from cl_prompts.continual.streams.iterable_scenarios import IterableClassIncrementalStream, IterableDomainIncrementalStream
from cl_prompts.continual.streams.joint import JointStream
from cl_prompts.continual.streams.labels import split_classes
from cl_prompts.continual.streams.scenarios import (
    ClassIncrementalStream,
    DatasetSequenceStream,
    DomainIncrementalStream,
)
from cl_prompts.continual.streams.stream import Stream, Task
from cl_prompts.continual.trainer import ContinualTrainer
from cl_prompts.evaluation.evaluate import Evaluation, accuracy, evaluate, stream_features
from cl_prompts.evaluation.metrics import AccuracyMatrix
from cl_prompts.evaluation.probes import (
    FrozenFeatures,
    closed_form,
    joint_linear_probe,
    nearest_class_mean,
    sequential_probe,
)
from cl_prompts.evaluation.results import TrainingResult
from cl_prompts.runtime.memory import freed_memory_kept


__all__ = [
    "AccuracyMatrix",
    "ClassIncrementalStream",
    "ContinualArguments",
    "ContinualTrainer",
    "CropAndFlip",
    "DatasetSequenceStream",
    "DomainIncrementalStream",
    "Evaluation",
    "FrozenFeatures",
    "GaussianStream",
    "IndexedStream",
    "IndexedTask",
    "IterableClassIncrementalStream",
    "IterableDomainIncrementalStream",
    "IterableStream",
    "JointStream",
    "JsonlTracker",
    "ProgressBar",
    "RehearsalMemory",
    "Stream",
    "Task",
    "TrainerCallback",
    "TrainerState",
    "TrainingResult",
    "accuracy",
    "closed_form",
    "evaluate",
    "freed_memory_kept",
    "joint_linear_probe",
    "nearest_class_mean",
    "sequential_probe",
    "split_classes",
    "stream_features",
]
