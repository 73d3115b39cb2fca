"""Config fields of virtual outlier regularization, a stage of the trained head that any method can use."""

from __future__ import annotations

from dataclasses import dataclass, field

from peft import PeftConfig

from cl_prompts.methods.shared.field_checks import LARGEST, not_negative, positive, positive_number
from cl_prompts.runtime.text import short_repr


@dataclass
class OutlierConfig(PeftConfig):
    """Virtual outlier regularization (OVOR, Huang et al., ICLR 2024): the trained head learns, after a task's training, to
    be less sure of points around the task's features.

    It reads the images of each task once more after its training (`model.consolidate(images)`). Defaults are those of the
    released code, whose CIFAR-100 runs train 16 epochs without and 4 with it. There these are the last epochs of one Adam
    with the learning rate's schedule going on and images augmented; here they are of a new Adam, on features of images that
    are not augmented.

    Args:
        outlier_epochs: number of epochs; 0: no regularization.
        outlier_learning_rate: of Adam, constant.
        outlier_weight: weight of the energy loss.
        outlier_energies: energy that images should be below, and energy that outliers should be above. The energy is
            -logsumexp of the logits of the current task.
        outlier_spread: standard deviation of outliers around features at the boundary.
        outlier_neighbors: K; a feature is as far out as its K-th neighbor is away.
        outlier_boundary: number of features at the boundary that outliers are drawn around.
        outlier_draws: candidates around each of them.
        outliers_per_class: outliers of an epoch, for each class of the task.
    """

    outlier_epochs: int = field(default=0, metadata={"help": "epochs of virtual outlier regularization; 0: none"})
    outlier_learning_rate: float = field(default=1e-3, metadata={"help": "learning rate of these epochs"})
    outlier_weight: float = field(default=0.1, metadata={"help": "weight of the energy loss"})
    outlier_energies: list[float] = field(
        default_factory=lambda: [-15.0, -3.0], metadata={"help": "energies of images and of outliers"}
    )
    outlier_spread: float = field(default=0.1, metadata={"help": "spread of outliers around features"})
    outlier_neighbors: int = field(default=50, metadata={"help": "neighbor whose distance counts"})
    outlier_boundary: int = field(default=50, metadata={"help": "features that outliers are drawn around"})
    outlier_draws: int = field(default=600, metadata={"help": "candidates around each of them"})
    outliers_per_class: int = field(default=40, metadata={"help": "outliers of an epoch for each class"})

    def check_outliers(self) -> None:
        """Validate the fields.

        Raises:
            ValueError: a field is out of range.
        """
        if self.outlier_epochs != 0:
            positive(self, "outlier_epochs")
        positive_number(self, "outlier_learning_rate")
        not_negative(self, "outlier_weight", "outlier_spread")
        positive(self, "outlier_neighbors", "outlier_boundary", "outlier_draws", "outliers_per_class")
        pair = self.outlier_energies
        numbers = isinstance(pair, (list, tuple)) and all(
            isinstance(e, (int, float)) and not isinstance(e, bool) and abs(e) <= LARGEST for e in pair
        )
        if not numbers or len(pair) != 2:
            raise ValueError(f"outlier_energies={short_repr(pair)} must be two numbers: of images, and of outliers")
