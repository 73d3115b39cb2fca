"""Images of classes that nobody has taught: scores, thresholds, measures, and what pipelines and runs make of them."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.class_features import TASKS, WIDTH, images, learnt
from support.closed_form_models import SEEN, answers, in_batches, learnt_model, new_model, task_images, train_steps
from support.families import build
from support.methods import WITH_CLASSIFIER
from support.small_runs import CLASSES, small_trainer
from torch.testing import assert_close

from cl_prompts import L2PConfig, PromptPoolModel
from cl_prompts.evaluation.metrics import AccuracyMatrix
from cl_prompts.evaluation.novelty import NoveltyMeasures, auroc, fpr_at_95
from cl_prompts.evaluation.report import Result, run_page
from cl_prompts.heads import DiscriminantClassifier
from cl_prompts.heads.novelty import energy, threshold_carried_on, threshold_of


@pytest.mark.parametrize("kind", ["low_rank", "full", "shared", "diagonal"])
def test_the_score_is_a_cosine_where_the_covariance_is_the_identity(kind: str) -> None:
    classifier = learnt(DiscriminantClassifier(WIDTH, kind=kind, own=0.0, drift="none"))
    features = images([0, 1, 2, 3, 4, 5], 8, seed=3)[0]
    means = classifier.gaussians.mean[:, 0].double()
    covariance = (
        classifier.gaussians.pooled(0.1) if classifier.gaussians.pools else next(classifier.gaussians.covariances(0.0, 0.1))
    )
    root = np.linalg.inv(np.linalg.cholesky(covariance.numpy())).T
    x, m = ((part - means.mean(0)).numpy() @ root for part in (features.double(), means))
    wanted = (x @ m.T) / np.linalg.norm(x, axis=1)[:, None] / np.linalg.norm(m, axis=1)
    assert_close(classifier.novelty(features).double(), torch.from_numpy(1 - wanted.max(1)), atol=1e-4, rtol=1e-4)
    alone = torch.cat([classifier.novelty(row[None]) for row in features])
    assert_close(classifier.novelty(features), alone, atol=1e-5, rtol=1e-5)


def test_unknown_classes_score_higher() -> None:
    classifier = learnt(DiscriminantClassifier(WIDTH, drift="none"), TASKS[:2])
    known, unknown = (
        classifier.novelty(images([0, 1, 2, 3, 4], 40, seed=3)[0]),
        classifier.novelty(images([5], 40, seed=3)[0]),
    )
    assert auroc(known, unknown) > 80
    one = learnt(DiscriminantClassifier(WIDTH, drift="none"), [[0]])
    assert torch.equal(one.novelty(images([0, 1])[0]), torch.ones(60))


def test_energy_and_thresholds() -> None:
    logits = torch.tensor([[1.0, 2.0], [3.0, float("-inf")]])
    assert_close(energy(logits, 2.0), torch.tensor([-2 * np.logaddexp(1, 2), -6.0], dtype=torch.float32))
    assert threshold_of(torch.arange(100.0), 0.05) == 95.0
    assert threshold_of(torch.arange(4.0), 0.05) is None
    assert threshold_carried_on(None, 1.0, 5) == 1.0
    assert threshold_carried_on(1.0, None, 0) == 1.0
    assert threshold_carried_on(1.0, 2.0, 100) == 1.5


def test_measures() -> None:
    generator = np.random.default_rng(0)
    known, unknown = generator.integers(0, 20, 200), generator.integers(5, 25, 150)
    pairs = (unknown[:, None] > known).mean() + 0.5 * (unknown[:, None] == known).mean()
    assert auroc(known, unknown) == pytest.approx(100 * pairs)
    from sklearn.metrics import roc_auc_score

    assert auroc(known, unknown) == pytest.approx(100 * roc_auc_score([0] * 200 + [1] * 150, [*known, *unknown]))
    assert fpr_at_95(range(100), [94, 94.5, 95, 200]) == 25.0
    found = NoveltyMeasures.of([0.0, 1.0], [0.5, 2.0, 3.0, 4.0], threshold=1.5)
    assert asdict(found) == {"auroc": 87.5, "fpr95": 25.0, "false_alarms": 0.0, "found": 75.0}
    assert NoveltyMeasures.from_dict(json.loads(json.dumps(asdict(found)))) == found
    with pytest.raises(ValueError, match="got 0 and 1"):
        auroc([], [1])
    with pytest.raises(ValueError, match="auroc=101 is no share"):
        NoveltyMeasures.from_dict({"auroc": 101, "fpr95": 1})


def consolidated(method: str) -> Any:
    """Two tasks, after which trained heads are calibrated, too."""
    model = new_model(method)
    for task in CLASSES[:2]:
        given = task_images(task, 15)
        if model.needs_features_before and model.classes:
            model.eval().record_features(in_batches(given, 5))
        model.begin_task(task)
        if model.trains_task(model.num_tasks - 1):
            with torch.enable_grad():
                train_steps(model, given)
        model.consolidate(in_batches(given, 5))
        model.end_task()
    return model


@pytest.mark.by_turns(3)
@torch.no_grad()
@pytest.mark.parametrize("method", ["l2p", "norga", *WITH_CLASSIFIER])
def test_every_head_has_a_score_and_a_threshold_that_files_keep(method: str, tmp_path: Path) -> None:
    model = consolidated(method)
    assert model.novelty_threshold is not None
    scores = model.novelty(model.eval()(pixel_values=SEEN))
    assert scores.shape == (len(SEEN),)
    assert scores.isfinite().all()
    alone = torch.cat([model.novelty(model(pixel_values=image[None])) for image in SEEN])
    assert_close(scores, alone, atol=1e-4, rtol=1e-4)
    model.save_pretrained(tmp_path)
    loaded = PromptPoolModel.from_pretrained(build("vit"), tmp_path)
    assert loaded.novelty_threshold == model.novelty_threshold
    assert torch.equal(loaded.novelty(loaded.eval()(pixel_values=SEEN)), scores)


def test_bad_values_are_refused() -> None:
    for rate in (0, 1, -0.1, 1.5, float("nan")):
        with pytest.raises(ValueError, match="false_alarm_rate"):
            L2PConfig(false_alarm_rate=rate)
    with pytest.raises(ValueError, match="novelty_threshold` must be a number or null"):
        L2PConfig(state={"novelty_threshold": "high"})


@pytest.mark.slow
@pytest.mark.parametrize("method", ["hash discriminant", "coda"])
def test_a_run_measures_novelty_and_drift(method: str, tmp_path: Path) -> None:
    trainer = small_trainer(method, tmp_path, novelty=True)
    matrix = trainer.train()
    assert sorted(matrix.novelty) == [0, 1], "after the last task no class is to come"
    assert 0 <= matrix.novelty[0].auroc <= 100
    summary = matrix.summary()
    assert summary["auroc"] == pytest.approx(sum(found.auroc for found in matrix.novelty.values()) / 2)
    assert sorted(matrix.drift) == ([1, 2] if method == "hash discriminant" else [])
    copy = AccuracyMatrix.from_dict(json.loads(json.dumps(matrix.to_dict())))
    assert copy.novelty == matrix.novelty
    assert copy.drift == matrix.drift
    page = run_page(
        tmp_path, [Result("it", matrix, 0)], command="c", model="m", data="d", arguments={}, seconds=1.0
    ).read_text()
    assert "## Unknown classes and drift" in page
    assert ("drift R²" in page.split("## Unknown classes and drift")[1]) == bool(matrix.drift)
    plain = small_trainer(method).train()
    assert plain.columns == matrix.columns
    assert not plain.novelty


def test_answers_do_not_change_when_scores_are_asked_for() -> None:
    model = learnt_model("hash discriminant", CLASSES[:2])
    before = answers(model)
    model.novelty(model.eval()(pixel_values=SEEN))
    assert torch.equal(answers(model), before)
