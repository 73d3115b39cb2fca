"""A killed run goes on where it was and ends as if nothing had happened, bit for bit."""

import json
import random
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from support.methods import METHODS, WITH_CLASSIFIER
from support.query_images import Scaled, Unsaid, picture_stream
from support.small_runs import Stop, StopAt, small_model, small_trainer, tensors

from cl_prompts.continual import ContinualArguments, ContinualTrainer, TrainerCallback, TrainerState
from cl_prompts.continual.checkpointing.checkpoint import Checkpoints, join_tensors, split_tensors
from cl_prompts.continual.checkpointing.parts import RandomState
from cl_prompts.heads import AlignedClassifier, DiscriminantClassifier, FeatureClassifier, RidgeClassifier
from cl_prompts.storage.staging import PREFIX, STAGING


pytestmark = pytest.mark.by_turns(3)


def assert_same_run(one: ContinualTrainer, other: ContinualTrainer) -> None:
    assert one.matrix == other.matrix
    mine, theirs = tensors(one), tensors(other)
    assert list(mine) == list(theirs)
    assert [name for name in mine if not torch.equal(mine[name], theirs[name])] == []
    assert torch.equal(torch.get_rng_state(), torch.get_rng_state())


def killed_and_resumed(method: str, folder: Path, steps: list[int], **settings: Any) -> ContinualTrainer:
    for number, step in enumerate(steps):
        trainer = small_trainer(method, folder, callbacks=[StopAt(step)], **settings)
        with pytest.raises(Stop):
            trainer.train(resume=number > 0)
    trainer = small_trainer(method, folder, **settings)
    trainer.train(resume=True)
    return trainer


@pytest.mark.by_turns(13, always=())
@pytest.mark.parametrize("method", [*METHODS, *(name for name in WITH_CLASSIFIER if name != "none analytic")])
def test_every_method_resumes_inside_an_epoch(method: str, tmp_path: Path) -> None:
    """Inside the last of three tasks."""
    whole = small_trainer(method, num_train_epochs=1)
    whole.train()
    assert_same_run(whole, killed_and_resumed(method, tmp_path, [8], num_train_epochs=1))


def test_a_head_in_closed_form_resumes_between_tasks(tmp_path: Path) -> None:
    class StopAfterTask(TrainerCallback):
        def on_task_begin(self, state: TrainerState, task: Any) -> None:
            if task.number == 2:
                raise Stop

    whole = small_trainer("none analytic")
    whole.train()
    with pytest.raises(Stop):
        small_trainer("none analytic", tmp_path, callbacks=[StopAfterTask()]).train()
    resumed = small_trainer("none analytic", tmp_path)
    resumed.train(resume=True)
    assert resumed.progress.global_step == 0
    assert_same_run(whole, resumed)


@pytest.mark.by_turns(6, always=())
@pytest.mark.parametrize(
    "settings",
    [
        {"mixed_precision": "bf16"},
        {"lr_scheduler_type": "cosine", "warmup_steps": 2, "optim": "adamw", "optim_args": {"weight_decay": 0.1}},
        {"keep_optimizer": True, "optim": "sgd", "optim_args": {"momentum": 0.9}, "learning_rate": 0.05},
        {"memory_size": 5, "memory_batch_size": 3, "config": {"class_mask": "none"}},
        {"gradient_accumulation_steps": 2, "max_grad_norm": 0.5},
        {"method": "cpg", "config": {"gate_noise": True}},  # numbers are drawn in each step
    ],
    ids=lambda s: "-".join(s),
)
def test_settings_resume(settings: dict[str, Any], tmp_path: Path) -> None:
    settings = {"method": "hash", **settings}
    whole = small_trainer(**settings)
    whole.train()
    assert_same_run(whole, killed_and_resumed(folder=tmp_path, steps=[2, 7, 8, 13], **settings))


@pytest.mark.slow
def test_hidden_states_are_computed_again(tmp_path: Path) -> None:
    """From the same batches, whatever they were used for before the run ended."""
    whole = small_trainer("cpg", hidden_cache_bytes=2**30)
    whole.train()
    assert_same_run(whole, killed_and_resumed("cpg", tmp_path, [2, 8], hidden_cache_bytes=2**30))


@pytest.mark.slow
def test_random_numbers_go_on(tmp_path: Path) -> None:
    class Draws(TrainerCallback):
        def __init__(self) -> None:
            self.drawn: list[float] = []

        def on_step_end(self, state: TrainerState, task: Any) -> None:
            self.drawn.append(float(torch.rand(())))

    whole, second = Draws(), Draws()
    small_trainer("l2p", callbacks=[whole]).train()
    with pytest.raises(Stop):
        small_trainer("l2p", tmp_path, callbacks=[Draws(), StopAt(5)]).train()
    torch.manual_seed(99)
    small_trainer("l2p", tmp_path, callbacks=[second]).train(resume=True)
    assert whole.drawn[4:] == second.drawn


def test_a_finished_run_only_reports(tmp_path: Path) -> None:
    first = small_trainer("l2p", tmp_path)
    first.train()
    second = small_trainer("l2p", tmp_path, callbacks=[StopAt(first.progress.global_step)])
    second.train(resume=True)
    assert_same_run(first, second)
    assert [m.accuracy for m in second.evaluations] == [m.accuracy for m in first.evaluations]


def test_another_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Stop):
        small_trainer("l2p", tmp_path, callbacks=[StopAt(4)]).train()
    before = sorted(p.read_bytes() for p in (tmp_path / "checkpoints").rglob("*") if p.is_file())
    for settings, what in (
        ({"learning_rate": 0.1}, "settings"),
        ({"tasks": 2}, "stream"),
        ({"config": {"pool_size": 7}}, "learner"),
    ):
        with pytest.raises(ValueError, match=f"another run, whose {what} differ"):
            small_trainer("l2p", tmp_path, **settings).train(resume=True)
    assert before == sorted(p.read_bytes() for p in (tmp_path / "checkpoints").rglob("*") if p.is_file())


def ridge(**settings: Any) -> FeatureClassifier:
    return RidgeClassifier(32, **{"projection_size": 8, "ridge": 1.0, **settings})


OTHER_CLASSIFIERS: dict[str, tuple[dict[str, FeatureClassifier], str]] = {
    "fewer": ({}, "classifier 'r'"),
    "more": ({"r": ridge(), "s": DiscriminantClassifier(32)}, "classifier 's'"),
    "another name": ({"s": ridge()}, "classifier 's' and classifier 'r'"),
    "another kind": ({"r": DiscriminantClassifier(32)}, "classifier 'r'"),
    "another ridge": ({"r": ridge(ridge=3.0)}, "classifier 'r'"),
    "a chosen ridge": ({"r": ridge(ridge=None)}, "classifier 'r'"),
    "another size": ({"r": ridge(projection_size=9)}, "classifier 'r'"),
    "another drift": ({"r": ridge(drift="shift")}, "classifier 'r'"),
    "another seed": ({"r": ridge(seed=1)}, "classifier 'r'"),
}


@pytest.fixture(scope="module")
def with_ridge(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run with a classifier "r" beside, killed in its second task, when that has seen one."""
    folder = tmp_path_factory.mktemp("with_ridge")
    with pytest.raises(Stop):
        small_trainer("l2p", folder, classifiers={"r": ridge()}, callbacks=[StopAt(8)]).train()
    return folder


@pytest.mark.by_turns(3)
@pytest.mark.parametrize("other", OTHER_CLASSIFIERS)
def test_other_classifiers_beside_the_learner_are_refused(other: str, with_ridge: Path, tmp_path: Path) -> None:
    classifiers, what = OTHER_CLASSIFIERS[other]
    folder = shutil.copytree(with_ridge, tmp_path / "run")
    with pytest.raises(ValueError, match=f"another run, whose {what} differ"):
        small_trainer("l2p", folder, classifiers=classifiers).train(resume=True)


def test_the_settings_of_a_classifier_include_those_of_its_parts() -> None:
    """Settings of `ClassGaussians`, options of `align`, whose order is nothing."""

    def settings(classifier: FeatureClassifier) -> str:
        return small_trainer("l2p", classifiers={"r": classifier}).extra_classifiers.settings["r"]

    assert settings(DiscriminantClassifier(32)) == settings(DiscriminantClassifier(32))
    assert settings(DiscriminantClassifier(32)) != settings(DiscriminantClassifier(32, kind="diagonal"))
    assert settings(DiscriminantClassifier(32)) != settings(DiscriminantClassifier(32, own=0.2))
    assert settings(AlignedClassifier(32, epochs=1, lr=0.1)) == settings(AlignedClassifier(32, lr=0.1, epochs=1))
    assert settings(AlignedClassifier(32, epochs=1)) != settings(AlignedClassifier(32, epochs=2))


def picture_trainer(folder: Path, transform: Any, *callbacks: TrainerCallback) -> ContinualTrainer:
    AcceleratorState._reset_state(reset_partial_state=True)
    args = ContinualArguments(str(folder), num_train_epochs=1, batch_size=8, save_steps=1, cache_queries=False)
    return ContinualTrainer(small_model("l2p"), picture_stream(transform=transform), args, callbacks=callbacks)


def test_another_transform_is_refused_where_it_says_so(tmp_path: Path) -> None:
    with pytest.raises(Stop):
        picture_trainer(tmp_path, Scaled(mean=0.5), StopAt(3)).train()
    for transform in (Scaled(mean=0.4), Unsaid(mean=0.5), Scaled(mean=0.5).__call__):
        with pytest.raises(ValueError, match="another run, whose transform differ"):
            picture_trainer(tmp_path, transform).train(resume=True)
    resumed = picture_trainer(tmp_path, Scaled(mean=0.5))
    resumed.train(resume=True)
    assert resumed.progress.task == 2


@pytest.mark.parametrize("transform", [Unsaid(), Scaled().__call__], ids=["not as JSON", "no settings()"])
def test_a_transform_that_says_nothing_resumes(transform: Any, tmp_path: Path) -> None:
    with pytest.raises(Stop):
        picture_trainer(tmp_path, transform, StopAt(3)).train()
    resumed = picture_trainer(tmp_path, transform)
    resumed.train(resume=True)
    assert resumed.progress.task == 2


def test_a_checkpoint_of_an_earlier_version_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Stop):
        small_trainer("l2p", tmp_path, callbacks=[StopAt(2)]).train()
    (folder,) = (tmp_path / "checkpoints").iterdir()
    found = Checkpoints(tmp_path / "checkpoints").latest()
    assert found is not None
    del found["parts"]["extra_classifiers"]["classes"]
    for change, message in (
        ({}, "the state of 'extra_classifiers' has no 'classes'. Resume with the version that wrote them, remove them"),
        ({"format": 1}, "are of another version of cl_prompts (format 1, this one has 4), which cannot be resumed"),
    ):
        Checkpoints(tmp_path / "checkpoints").save(int(folder.name), found | change)
        with pytest.raises(ValueError, match=f"checkpoints in {re.escape(str(tmp_path))} .*{re.escape(message)}"):
            small_trainer("l2p", tmp_path).train(resume=True)


def test_the_last_two_are_kept_without_the_backbone(tmp_path: Path) -> None:
    trainer = small_trainer("l2p", tmp_path)
    trainer.train()
    folders = sorted((tmp_path / "checkpoints").iterdir())
    assert len(folders) == 2
    found = Checkpoints(tmp_path / "checkpoints").latest()
    assert found is not None
    base = sum(p.numel() for p in trainer.model.get_base_model().parameters())
    del found["parts"]["random"]
    assert sum(tensor.numel() for tensor in split_tensors(found)[0].values()) < base / 2
    assert {path.suffix for path in (tmp_path / "checkpoints").rglob("*") if path.is_file()} == {".safetensors", ".json"}


@pytest.mark.by_turns(5)
@pytest.mark.parametrize("damage", ["cut", "changed", "missing", "no manifest", "not json"])
def test_a_damaged_checkpoint_is_skipped(damage: str, tmp_path: Path) -> None:
    whole = small_trainer("hash")
    whole.train()
    with pytest.raises(Stop):
        small_trainer("hash", tmp_path, callbacks=[StopAt(8)]).train()
    newest = sorted((tmp_path / "checkpoints").iterdir())[-1]
    file = newest / "tensors.safetensors"
    content = file.read_bytes()
    if damage == "cut":
        file.write_bytes(content[: len(content) // 2])
    elif damage == "changed":
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif damage == "missing":
        file.unlink()
    elif damage == "no manifest":
        (newest / "manifest.json").unlink()
    else:
        (newest / "manifest.json").write_text("{")
    resumed = small_trainer("hash", tmp_path)
    with pytest.warns(UserWarning, match="is damaged"):
        resumed.train(resume=True)
    assert_same_run(whole, resumed)


def test_large_tensors_that_did_not_change_are_not_written_again(tmp_path: Path) -> None:
    checkpoints, kept, new = Checkpoints(tmp_path), torch.randn(2, 2**18), torch.randn(2**18)
    state = {"statistics": kept, "moments": new, "step": 1}
    before = {file.name: file for file in checkpoints.save(1, state).iterdir()}
    after = {file.name: file for file in checkpoints.save(2, {**state, "moments": new + 1, "step": 2}).iterdir()}
    shared = {name for name in after if name in before and after[name].samefile(before[name]) and len(name) > 60}
    assert len(shared) == 1
    assert sum(after[name].stat().st_size for name in after.keys() - shared) < kept.nbytes
    found = checkpoints.latest()
    assert found is not None
    assert torch.equal(found["statistics"], kept)
    assert torch.equal(found["moments"], new + 1)
    (name,) = shared
    before[name].write_bytes(b"damaged")
    checkpoints.save(3, state)  # what is damaged is not taken over
    found = checkpoints.latest()
    assert found is not None
    assert torch.equal(found["statistics"], kept)
    after[name].unlink()  # of both earlier ones
    shutil.rmtree(tmp_path / "000000003")
    with pytest.warns(UserWarning, match="is damaged"):
        assert checkpoints.latest() is None


def test_a_checkpoint_cut_short_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(Stop):
        small_trainer("l2p", tmp_path, callbacks=[StopAt(4)]).train()
    folder = tmp_path / "checkpoints"
    newest = sorted(folder.iterdir())[-1]
    shutil.copytree(newest, folder / f"{PREFIX}0{STAGING}")
    (folder / f"{PREFIX}0{STAGING}" / "manifest.json").unlink()
    found = Checkpoints(folder).latest()
    assert found is not None
    assert found["parts"]["progress"] == json.loads((newest / "values.json").read_text())["parts"]["progress"]


def test_the_log_has_every_step_once(tmp_path: Path) -> None:
    killed_and_resumed("l2p", tmp_path, [5, 11], logging_steps=1)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 19))
    assert [line["task"] for line in lines if "accuracies" in line] == [0, 1, 2]


@pytest.mark.by_turns(5)
@pytest.mark.parametrize("event", ["on_log", "on_evaluate", "on_task_end"])
def test_a_run_that_ends_between_a_line_and_its_checkpoint(event: str, tmp_path: Path) -> None:
    """Also lines of a user's callback: what the resumed run repeats stands in the log once."""

    class Ends(TrainerCallback):
        trainer: ContinualTrainer

        def __init__(self, task: int) -> None:
            self.task = task

        def on_task_end(self, state: TrainerState, task: Any) -> None:
            self.trainer.accelerator.log({"mine": task.number}, step=state.progress.global_step)

    def end(self: Ends, state: TrainerState, *_: Any) -> None:
        if event == "on_task_end":
            Ends.on_task_end(self, state, *_)
        if state.progress.task - (event == "on_task_end") == self.task:
            raise Stop

    dying = type("Dying", (Ends,), {event: end})
    for number, callback in enumerate([dying(0), dying(1), dying(2), Ends(9)]):
        trainer = small_trainer("l2p", tmp_path, callbacks=[callback], logging_steps=1, save_steps=4)
        callback.trainer = trainer
        if number < 3:
            with pytest.raises(Stop):
                trainer.train(resume=number > 0)
        else:
            trainer.train(resume=True)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 19))
    assert [line["task"] for line in lines if "accuracies" in line] == [0, 1, 2]
    assert [line["mine"] for line in lines if "mine" in line] == [0, 1, 2]


def test_a_nested_state_is_split_and_joined() -> None:
    tensors = {"a": torch.arange(3), "b": {"c": torch.ones(2, dtype=torch.bool)}}
    state = {"x": tensors, "y": [torch.zeros(1), {"n": None}, "text"], "empty": {}, "1": {"2": 0.5}}
    parts, values = split_tensors(state)
    assert list(parts) == ["x/a", "x/b/c", "y/0"]
    joined = join_tensors(parts, json.loads(json.dumps(values)))
    assert str(joined) == str(state)
    assert joined["x"]["b"]["c"].dtype == torch.bool
    with pytest.raises(TypeError, match=r"the keys \[1\] of x must be strings"):
        split_tensors({"x": {1: torch.zeros(1)}})


def test_every_generator_continues() -> None:
    """Also with a Gaussian that numpy and Python keep for the next call."""

    def draw() -> list[float]:
        return [float(torch.rand(())), float(np.random.standard_normal()), random.gauss(0, 1), random.random()]

    state = RandomState(torch.device("cpu"), 0)
    for _ in range(2):  # with and without a Gaussian that is kept
        tensors, values = split_tensors(state.state_dict())
        expected = [draw(), draw()]
        state.load_state_dict(join_tensors(tensors, json.loads(json.dumps(values))))
        assert [draw(), draw()] == expected
        draw()


def test_resume_needs_a_folder() -> None:
    with pytest.raises(ValueError, match="set output_dir"):
        small_trainer("l2p").train(resume=True)
