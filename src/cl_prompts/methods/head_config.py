"""Config fields of the classifier: trained with the prompts, aligned after each task, or computed in closed form."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from cl_prompts.methods.outlier_config import OutlierConfig
from cl_prompts.methods.shared.field_checks import choice, flag, positive, positive_number, scales_logits, share
from cl_prompts.runtime.text import short_repr


TRAINED_HEADS = ("linear", "cosine", "layer_norm")
RIDGE = ("ridge", "analytic")  # two names of one head; "analytic" is RanPAC's
CLOSED_FORM = (*RIDGE, "discriminant")
ALIGNMENTS = ("none", "covariance", "diagonal", "centroids")
DRIFTS = ("none", "shift", "affine")
COVARIANCES = ("low_rank", "full", "shared", "diagonal")


@dataclass
class ClassifierConfig(OutlierConfig):
    """The classifier, and how it keeps the classes of earlier tasks.

    A closed-form head and alignment read the images of each task once more after its training
    (`model.consolidate(images)`). Drift compensation also reads them before it (`model.record_features(images)`).

    Args:
        head: "linear" (w.x + b, the papers), "cosine" (head_scale * cos(w, x); rows of different tasks stay comparable,
            although class_mask="task" never compares them in a loss), "layer_norm" (x after a layer norm without weights,
            times w / |w|: APT), or in closed form: "ridge" (ridge regression on
            random ReLU features, RanPAC; also called "analytic") or "discriminant" (regularized discriminant analysis).
        head_scale: scale of the cosine head.
        loss_head: head of the training loss if `head` is in closed form: "linear", "cosine" or "layer_norm".
        alignment: train the head again, after each task, on features drawn from Gaussians of all classes with
            covariances ("covariance"), with variances ("diagonal"), or with the means and variances of ten clusters per
            class ("centroids"). "none": no alignment.
        trained_tasks: "all", or "first": prompts are trained on the first task and then frozen, so features do not change.
        drift_compensation: how the statistics of old classes follow features that change: "affine" (a map fitted on the new
            task's images before and after its training), "shift" (the change of their mean) or "none". Not used if prompts
            are frozen.
        projection_size: number M of random features of the ridge head; 0: no projection. RanPAC: 10,000 for width 768.
        ridge: regularization of the ridge head; None: chosen after each task on held-out images of it.
        class_covariance: covariance of a class: the pooled one and a factor of `covariance_rank` directions of its own
            ("low_rank", 4 * D * (r + 1) bytes per class), one of its own ("full", 4 * D * (D + 1) bytes per class), or, for
            the discriminant head alone, one for all ("shared") or variances ("diagonal"). The ridge head with drift
            compensation and alignment="covariance" draw features from the first or second.
        covariance_rank: r, the largest number of directions of a low-rank covariance. None: 32, but no more than
            12,288 / D, so that they take at most 48 kB: 16 for a width of 768. Ours, chosen on held-out images.
        own_covariance: weight of a class's own covariance; the pooled covariance has the rest. Ours, chosen on held-out
            images.
        spherical_covariance: weight of a multiple of the identity; the covariance has the rest. Ours, chosen on held-out
            images.
        normalize_features: features pass a layer norm without weights before the discriminant head reads them, as those of
            `loss_head="layer_norm"` do; their mean and length, which that loss leaves open, then count no more. Other heads
            do not use it.
        false_alarm_rate: share of known images that may be taken for none of the known classes; it sets the threshold.
        save_statistics: save what a ridge or aligned head needs to learn further tasks, and a trained head to learn a task
            of one class. The discriminant head always saves its statistics, because its answers need them.
        classifier_seed: seed of the projection and of features drawn from Gaussians.
    """

    head: str = field(default="linear", metadata={"help": "linear, cosine, layer_norm, ridge or discriminant"})
    head_scale: float = field(default=20.0, metadata={"help": "scale of the cosine head"})
    loss_head: str = field(default="linear", metadata={"help": "head of the training loss if the head is in closed form"})
    alignment: str = field(default="none", metadata={"help": "train the head again on Gaussians of all classes"})
    trained_tasks: str = field(default="all", metadata={"help": "train prompts on all tasks, or on the first"})
    drift_compensation: str = field(default="affine", metadata={"help": "how statistics follow the features"})
    projection_size: int = field(default=5000, metadata={"help": "random features of the ridge head"})
    ridge: float | None = field(
        default=None, metadata={"help": "regularization of the ridge head; None: chosen on held-out images"}
    )
    class_covariance: str = field(default="low_rank", metadata={"help": "covariance of a class"})
    covariance_rank: int | None = field(default=None, metadata={"help": "directions of a low-rank covariance"})
    own_covariance: float = field(default=0.1, metadata={"help": "weight of a class's own covariance"})
    spherical_covariance: float = field(default=0.1, metadata={"help": "weight of the identity in a covariance"})
    normalize_features: bool = field(default=False, metadata={"help": "layer norm before the discriminant head"})
    false_alarm_rate: float = field(default=0.05, metadata={"help": "known images taken for none of the classes"})
    save_statistics: bool = field(default=False, metadata={"help": "save what learning further tasks needs"})
    classifier_seed: int = field(default=0, metadata={"help": "seed of the projection and of drawn features"})

    trains_prompts: ClassVar[bool] = True

    @property
    def closed_form(self) -> bool:
        """Whether the head is computed in closed form instead of trained."""
        return self.head in CLOSED_FORM

    @property
    def consolidates(self) -> bool:
        """Whether a task's images are read once more after its training."""
        return self.closed_form or self.alignment != "none" or self.outlier_epochs > 0

    @property
    def trains_features(self) -> bool:
        """Whether training changes the input of the classifier: prompts, or modules of the base."""
        return self.trains_prompts or bool(getattr(self, "modules_to_save", None))  # a field of PromptPoolConfig

    @property
    def drift(self) -> str:
        """`drift_compensation` if features change, else "none"."""
        return self.drift_compensation if self.trained_tasks == "all" and self.trains_features else "none"

    @property
    def trained_head(self) -> str:
        """The head that is trained: `head`, or `loss_head` if that is in closed form."""
        return self.loss_head if self.closed_form else self.head

    @property
    def scale(self) -> float | None:
        """Scale of the trained head; None for a linear one."""
        return {"linear": None, "cosine": self.head_scale, "layer_norm": 1.0}[self.trained_head]

    def check_classifier(self, num_labels: int | None) -> None:
        """Validate the fields, also against the config's `num_labels`.

        Raises:
            ValueError: a field is out of range, or two fields contradict each other.
        """
        choice(self, "head", (*TRAINED_HEADS, *CLOSED_FORM))
        scales_logits(self, "head_scale")
        choice(self, "loss_head", TRAINED_HEADS)
        choice(self, "alignment", ALIGNMENTS)
        choice(self, "trained_tasks", ("all", "first"))
        choice(self, "drift_compensation", DRIFTS)
        choice(self, "class_covariance", COVARIANCES)
        if self.covariance_rank is not None:
            positive(self, "covariance_rank")
        self.check_outliers()
        flag(self, "normalize_features")
        flag(self, "save_statistics")
        positive_number(self, "false_alarm_rate")
        if self.false_alarm_rate >= 1:
            raise ValueError(f"false_alarm_rate={self.false_alarm_rate!r} is a share: choose a number below 1")
        share(self, "own_covariance", "spherical_covariance")
        if self.normalize_features and self.head == "discriminant" and not self.spherical_covariance:
            raise ValueError(
                "spherical_covariance=0: normalized features have no variance along one direction, so their covariance "
                "cannot be inverted; choose a larger one, or normalize_features=False"
            )
        if self.projection_size != 0:
            positive(self, "projection_size")
        if self.ridge is not None:
            positive_number(self, "ridge")
        if type(self.classifier_seed) is not int or not 0 <= self.classifier_seed < 2**31:
            raise ValueError(f"classifier_seed={short_repr(self.classifier_seed)} must be an integer from 0 to 2**31 - 1")
        if self.trained_tasks == "first" and getattr(self, "modules_to_save", None):
            raise ValueError('trained_tasks="first" freezes prompts, but modules_to_save would be trained on: remove one')
        if self.closed_form and self.alignment != "none":
            raise ValueError(
                f"alignment={self.alignment!r}: head={self.head!r} is fitted to all classes and needs no alignment; set "
                '"none"'
            )
        if self.outlier_epochs and (self.closed_form or self.alignment != "none"):
            other = f"head={self.head!r}" if self.closed_form else f"alignment={self.alignment!r}"
            raise ValueError(
                f"outlier_epochs={self.outlier_epochs} trains the head that answers, but {other} replaces it: "
                "choose one of them"
            )
        if self.consolidates and num_labels is not None and self.trains_features:
            raise ValueError(
                f"num_labels={num_labels}: without tasks there is no time to consolidate images; use a trained head "
                'without alignment, or method "none", whose features do not change, or cut the stream into tasks, as '
                "GaussianStream(parts=10) does (--parts 10)"
            )
