"""The page of examples/space, without a browser: what it answers and teaches."""

import re
import zipfile
from pathlib import Path

import answering
import keeping
import opening
import pytest
import showing
import teaching
import torch
import visitor
from support.methods import METHODS
from support.paths import ROOT
from support.space_pools import logits, samples, tiny
from transformers import ViTModel

from cl_prompts import (
    DualPromptConfig,
    L2PConfig,
    NoPromptsConfig,
    PromptPoolModel,
    PromptPoolPipeline,
)


@pytest.fixture(scope="module")
def digits() -> opening.OpenPool:
    return opening.open_digits()


# ---- the embedded default, answers


def test_the_digits_are_answered_as_the_pipeline_answers_them(digits: opening.OpenPool) -> None:
    assert not digits.notes
    assert digits.pipe.calibrated
    assert digits.record is not None
    right = 0
    for digit, image in enumerate(samples("digits").values()):
        found = answering.answer(digits, image)
        expected = digits.pipe(image, top_k=answering.TOP)
        assert [label for label, _ in found.labels] == [e["label"] for e in expected]
        assert [score for _, score in found.labels] == pytest.approx([e["score"] for e in expected], abs=1e-6)
        assert [name for name, _ in found.rows] == ["block 1", "block 2", "block 3", "block 4"]
        assert sum(found.tasks.values()) == pytest.approx(1)
        right += found.labels[0][0] == str(digit)
    assert right == 7  # of the eight that it knows
    page = showing.facts(digits) + showing.record(digits)
    for said in ("Hash", "micro ViT of the examples", "1: 0, 1", "task 4 (6, 7)", "After the last task 98.6"):
        assert said in page
    assert page.count("<figure>") == 4


@pytest.mark.slow
def test_what_every_method_says_of_its_choices_and_that_it_learns_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(teaching, "EPOCHS", 1)
    image, lesson = next(iter(samples("digits").values())), list(samples("teach-8").values())[:3]
    for name, make in METHODS.items():
        pool = tiny(make())
        found, said = answering.answer(pool, image), showing.choice_rule(pool)
        pixels = pool.pipe.image_processor(images=image, return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            output = pool.model(pixel_values=pixels)
        routed = pool.model.chosen_tasks(output)
        assert found.routed == (None if routed is None else int(routed.flatten().mode().values)), name
        (way,) = teaching.ways(pool)[0]
        teaching.teach(pool, "new", lesson, way)
        assert pool.model.adapter.config.state.tasks == [[7, 3], [1, 5], [0]], name
        if output.prompt_ids is None:
            assert "chooses nothing" in said or "no prompts" in said, name
            assert not found.rows
            continue
        shown = [choice.prompt for _, choices in found.rows for choice in choices]
        assert set(shown) <= set(output.prompt_ids.flatten().tolist()), name
        assert set(found.tasks) <= {0, 1}, name
        assert found.tasks or "no counts" in said, name
        if routed is not None and len(shown) == 1:  # it then is the task that made the prompt
            assert found.tasks == {found.routed: pytest.approx(1)}, name
        assert showing.answers(pool, [("a.png", image, found)]).count("chip") == len(shown)


def test_prompts_that_tasks_made_and_prompts_that_they_share() -> None:
    coda = tiny(METHODS["coda"]())
    origins = answering.Origins(coda.model.adapter)
    assert [origins.of(0, prompt) for prompt in (0, 2, 3, 5)] == [{0: 1.0}, {0: 1.0}, {1: 1.0}, {1: 1.0}]
    shared = tiny(METHODS["l2p"]())
    counts = shared.model.adapter.pool.history.counts
    busiest = int(counts.sum(0).argmax())
    share = counts[:, busiest].double() / counts[:, busiest].sum()
    assert answering.Origins(shared.model.adapter).of(0, busiest) == {t: s for t, s in enumerate(share.tolist()) if s}
    frozen = tiny(NoPromptsConfig(head="discriminant", drift_compensation="none"), ())
    assert "nothing to choose" in showing.record(frozen)


# ---- teaching


def test_photographs_are_unknown_until_they_are_taught_and_the_counts_say_so(tmp_path: Path) -> None:
    guest = visitor.Visitor(opening.open_digits(), tmp_path)
    asked = guest.ask_samples("photographs")["answers"]
    assert asked.count("Probably none of these classes") == asked.count("<article") == 6
    assert "Scores are calibrated" in asked
    guest.lay_out_samples("photograph")
    parts = guest.teach("photograph", teaching.CLOSED_FORM)
    lesson, others = parts["taught"].split("<figure>")[1:]
    assert '<th scope="row">photograph</th><td>0</td><td>10</td>' in lesson
    assert '<th scope="row">photograph</th><td>0</td><td>6</td>' in others
    assert "Probably none" not in parts["answers"]
    assert "Scores are not calibrated" in showing.score_rule(tiny(NoPromptsConfig()))


@pytest.mark.parametrize("way", [teaching.CLOSED_FORM, teaching.TRAINING])
def test_a_class_is_taught_and_taken_home(way: str, tmp_path: Path) -> None:
    pool, other, ticks = opening.open_digits(), opening.open_digits(), []
    before, rows = logits(pool), pool.model.head.weight.detach().clone()
    said = teaching.teach(pool, "eight", list(samples("teach-8").values()), way, lambda done, text: ticks.append(done))
    assert said.startswith("task 5: one class from 10 pictures")
    assert ticks == sorted(ticks)
    assert ticks[-1] == 1
    assert torch.equal(logits(other), before)  # another visitor's
    assert torch.equal(pool.model.head.weight[:8], rows)
    answers = [answering.answer(pool, image).labels[0][0] for image in samples("digits").values()]
    assert answers[8] == "eight"
    assert sum(a == str(d) for d, a in enumerate(answers[:8])) == 7
    assert pool.model.adapter.config.class_mask == "task"

    (tmp_path / "visit").mkdir()
    file = keeping.packed(pool, [said], tmp_path / "visit")
    assert pool.taught
    assert [c["name"] for c in pool.facts["tasks"][4]] == ["eight"]
    assert "before it was taught here" in showing.record(pool)
    with zipfile.ZipFile(file) as archive:
        archive.extractall(tmp_path)
    folder = tmp_path / keeping.FOLDER
    expected = logits(pool)
    for loaded in (
        PromptPoolModel.from_pretrained(ViTModel.from_pretrained(opening.MICRO_VIT, add_pooling_layer=False), folder),
        PromptPoolPipeline.from_pretrained(folder).model,  # on the base that it brings along, as its card says
        opening.open_files([file]).model,
    ):
        pool.pipe.model = loaded
        assert torch.equal(logits(pool), expected)
    assert not (folder / "results.json").exists()
    assert said in (folder / "README.md").read_text()
    for written in (*folder.glob("*.json"), folder / "README.md"):
        assert str(ROOT) not in written.read_text()
        assert str(tmp_path) not in written.read_text()


def test_a_trained_head_learns_from_old_classes_as_rivals() -> None:
    pool, lesson = tiny(L2PConfig(top_k=3)), list(samples("teach-8").values())
    teaching.teach(pool, "new", lesson, teaching.TRAINING)
    assert [answering.answer(pool, image).labels[0][0] for image in lesson] == ["new"] * len(lesson)


def test_a_lesson_that_fails_leaves_the_pool_as_it_was() -> None:
    pool, images = opening.open_digits(), list(samples("teach-9").values())
    before = logits(pool)

    def interrupted(done: float, text: str) -> None:
        if text.startswith("step 3") or text == "computing the head":
            raise RuntimeError("enough")

    for way in (teaching.TRAINING, teaching.CLOSED_FORM):
        with pytest.raises(RuntimeError, match="enough"):
            teaching.teach(pool, "nine", images, way, interrupted)
        assert torch.equal(logits(pool), before)
        assert len(pool.model.classes) == 8
        assert pool.model.adapter.config.class_mask == "task"
    teaching.teach(pool, "nine", images, teaching.CLOSED_FORM)
    assert pool.model.classes[-1] == 8  # the first number that is free


def test_lessons_that_are_none(digits: opening.OpenPool) -> None:
    images = list(samples("teach-9").values())
    for name, count, way, told in [
        ("", 10, teaching.CLOSED_FORM, "needs a name"),
        ("\x07 \u202e", 10, teaching.CLOSED_FORM, "needs a name"),
        ("x" * 41, 10, teaching.CLOSED_FORM, "41 characters: at most 40"),
        (" 7\n", 10, teaching.CLOSED_FORM, "knows a class '7' already"),
        ("nine", 2, teaching.CLOSED_FORM, "2 pictures are too few"),
        ("nine", 10, "by heart", "choose Closed form"),
    ]:
        with pytest.raises(ValueError, match=told):
            teaching.teach(digits, name, images[:count], way)
    assert len(digits.model.classes) == 8


def test_which_ways_a_pool_offers() -> None:
    closed = {"head": "discriminant", "drift_compensation": "none"}
    linear = tiny(L2PConfig(top_k=3))
    for pool, offered, told in [
        (linear, [teaching.TRAINING], "some|lost about half"),
        (tiny(L2PConfig(top_k=3, **closed), ()), [teaching.CLOSED_FORM, teaching.TRAINING], "can make them worse"),
        (tiny(NoPromptsConfig(**closed), ()), [teaching.CLOSED_FORM], "nothing to train"),
        (tiny(DualPromptConfig(g_layers=[0], e_layers=[1], **closed), ()), [teaching.TRAINING], "has its own prompts"),
        (tiny(L2PConfig(top_k=3, num_labels=3, class_mask="none"), ()), [], "fixed number of classes"),
    ]:
        found, why = teaching.ways(pool)
        assert found == offered
        assert re.search(told, why), why
    linear.model.begin_task([9])
    assert teaching.ways(linear) == ([], "This adapter was saved in the middle of a task. Finish its training first.")
