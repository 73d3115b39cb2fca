"""Fields of the classifier: trained along with the prompts, aligned afterwards, or in closed form."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from peft import PeftConfig

from cl_prompts.methods.shared.field_checks import choice, flag, not_negative, positive, positive_number
from cl_prompts.runtime.text import shown


TRAINED_HEADS = ("linear", "cosine")
CLOSED_FORM = ("analytic", "discriminant")
ALIGNMENTS = ("none", "covariance", "diagonal", "centroids")
DRIFTS = ("none", "shift", "affine")
COVARIANCES = ("full", "shared", "diagonal")


@dataclass
class ClassifierConfig(PeftConfig):
    """What answers, and how it comes to know old classes that the loss no longer sees.

    With a closed-form head or alignment each task's images are looked at once more when its training is done
    (`model.consolidate(images)`), and, with drift compensation, once before it (`model.record_features(images)`).

    Args:
        head: "linear" (w.x + b, the papers), "cosine" (head_scale * cos(w, x): rows of different tasks stay comparable,
            although no loss ever compares them under class_mask="task"), or in closed form: "analytic" (ridge regression on
            random ReLU features, RanPAC) or "discriminant" (regularised discriminant analysis).
        head_scale: scale of the cosine head.
        loss_head: the head that the loss reads while prompts are trained for a closed-form `head`: "linear" or "cosine".
        alignment: train the head again, after each task, on features drawn from Gaussians of all classes: with each class's
            "covariance", its variances ("diagonal"), or means and variances of ten clusters ("centroids"). "none": do not.
        trained_tasks: "all", or "first": prompts are trained on the first task and frozen, so features stay what they are.
        drift_compensation: how statistics of old classes follow features that change: "affine" (a map fitted on the new
            task's images, before and after), "shift" (their mean's way) or "none". Nothing to do if prompts are frozen.
        projection_size: random features M of the analytic head; 0: none. RanPAC: 10,000 for width 768.
        ridge: of the analytic head; None: chosen after each task on held-out images of it.
        class_covariance: of the discriminant head: of each class ("full": 4 * D * D bytes a class), one for all ("shared")
            or variances ("diagonal").
        own_covariance: weight of a class's own covariance against the one of all classes. Ours, chosen on held-out images.
        spherical_covariance: weight of a multiple of the identity against both. Ours, likewise.
        save_statistics: save what a closed-form or aligned head needs to learn further tasks, not only to answer. The
            discriminant head answers from it and always does.
        classifier_seed: draws the projection, and features from Gaussians.
    """

    head: str = field(default="linear", metadata={"help": "linear, cosine, analytic or discriminant"})
    head_scale: float = field(default=20.0, metadata={"help": "scale of the cosine head"})
    loss_head: str = field(default="linear", metadata={"help": "what the loss reads where the head is in closed form"})
    alignment: str = field(default="none", metadata={"help": "train the head again on Gaussians of all classes"})
    trained_tasks: str = field(default="all", metadata={"help": "train prompts on all tasks, or on the first"})
    drift_compensation: str = field(default="affine", metadata={"help": "how statistics follow the features"})
    projection_size: int = field(default=5000, metadata={"help": "random features of the analytic head"})
    ridge: float | None = field(default=None, metadata={"help": "of the analytic head; None: chosen on held-out images"})
    class_covariance: str = field(default="full", metadata={"help": "of the discriminant head"})
    own_covariance: float = field(default=0.1, metadata={"help": "weight of a class's own covariance"})
    spherical_covariance: float = field(default=0.1, metadata={"help": "weight of the identity in a covariance"})
    save_statistics: bool = field(default=False, metadata={"help": "save what further tasks need"})
    classifier_seed: int = field(default=0, metadata={"help": "of the projection and of drawn features"})

    trains_prompts: ClassVar[bool] = True

    @property
    def closed_form(self) -> bool:
        """Whether the head is computed instead of trained."""
        return self.head in CLOSED_FORM

    @property
    def consolidates(self) -> bool:
        """Whether a task's images are looked at once more when its training is done."""
        return self.closed_form or self.alignment != "none"

    @property
    def trains_features(self) -> bool:
        """Whether training changes what the classifier reads: prompts, or modules of the base."""
        return self.trains_prompts or bool(getattr(self, "modules_to_save", None))  # a field of the class below

    @property
    def drift(self) -> str:
        """`drift_compensation` where features change at all."""
        return self.drift_compensation if self.trained_tasks == "all" and self.trains_features else "none"

    @property
    def scale(self) -> float | None:
        """Scale of the trained head, None for a linear one."""
        return self.head_scale if "cosine" in (self.head, self.closed_form and self.loss_head) else None

    def check_classifier(self, num_labels: int | None) -> None:
        """See that the fields fit each other, and the config's `num_labels`.

        Raises:
            ValueError: they do not.
        """
        choice(self, "head", (*TRAINED_HEADS, *CLOSED_FORM))
        positive_number(self, "head_scale")
        choice(self, "loss_head", TRAINED_HEADS)
        choice(self, "alignment", ALIGNMENTS)
        choice(self, "trained_tasks", ("all", "first"))
        choice(self, "drift_compensation", DRIFTS)
        choice(self, "class_covariance", COVARIANCES)
        flag(self, "save_statistics")
        not_negative(self, "own_covariance", "spherical_covariance")
        for name in ("own_covariance", "spherical_covariance"):
            if getattr(self, name) > 1:
                raise ValueError(f"{name}={getattr(self, name)!r} is a weight: choose a number from 0 to 1")
        if self.projection_size != 0:
            positive(self, "projection_size")
        if self.ridge is not None:
            positive_number(self, "ridge")
        if type(self.classifier_seed) is not int or not 0 <= self.classifier_seed < 2**31:
            raise ValueError(f"classifier_seed={shown(self.classifier_seed)} must be an integer from 0 to 2**31 - 1")
        if self.trained_tasks == "first" and getattr(self, "modules_to_save", None):
            raise ValueError('trained_tasks="first" freezes prompts, but modules_to_save would go on: leave one out')
        if self.closed_form and self.alignment != "none":
            raise ValueError(f"alignment={self.alignment!r}: head={self.head!r} knows all classes anyway; leave it at none")
        if self.consolidates and num_labels is not None and self.trains_features:
            raise ValueError(
                f"num_labels={num_labels}: without tasks nobody says when to look at their images; use a trained head "
                'without alignment, or method "none", whose features do not change'
            )
