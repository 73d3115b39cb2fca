"""HTML fragments of the page. Every value that comes from a file or a visitor is escaped with `text`."""

import base64
import html
from collections.abc import Sequence
from io import BytesIO
from typing import Any

from answering import Answer, Choice, keeps_tasks_apart, row_name, selection_counts
from opening import OpenPool
from PIL import Image
from torch import Tensor

from cl_prompts.continual import AccuracyMatrix
from cl_prompts.runtime.images import UnreadableImage, read_rgb
from cl_prompts.runtime.text import LONGEST_LINE, plain_text
from cl_prompts.sharing.card import in_bytes


CLASSES_SHOWN = 12  # of a task
LONGEST = 80  # characters of a name
BARS = 40  # prompts in a histogram
GROUPS = 4  # histograms
MATRIX = 12  # tasks in a matrix with numbers
THUMBNAIL = 96  # pixels
SCALED_UP = 48  # pixels; smaller pictures are scaled up without smoothing


def text(value: Any) -> str:
    """A value escaped for HTML, without unprintable characters, cut to `LONGEST` characters."""
    return html.escape(plain_text(value, LONGEST))


def message(said: str, kind: str = "done") -> str:
    """A message; kind is "done", "hint" or "bad"."""
    role = "alert" if kind == "bad" else "status"
    return f'<p class="message {kind}" role="{role}">{html.escape(plain_text(said, LONGEST_LINE))}</p>' if said else ""


def messages(lines: Sequence[str]) -> str:
    """A message of kind "bad" for each line."""
    return "".join(message(line, "bad") for line in lines)


def folded(title: str, said: str) -> str:
    """A longer message that the visitor opens."""
    return f"<details><summary>{title}</summary>{message(said, 'hint')}</details>"


def color(task: int) -> str:
    """The color of a task, for any number of tasks; consecutive tasks have different colors."""
    return f"hsl({(205 + 137.5 * task) % 360:.0f} 62% {50 if task % 2 else 42}%)"


def task_name(pool: OpenPool, task: int) -> str:
    """Number and classes of a task, like "task 2 (2, 3)"."""
    tasks = pool.facts["tasks"]
    if task >= len(tasks):
        return f"task {task + 1}"
    return f"task {task + 1} ({_names(tasks[task])})"


def _names(task: Sequence[dict[str, Any]]) -> str:
    names = ", ".join(text(c["name"] or c["id"]) for c in task[:CLASSES_SHOWN])
    return names + (f" and {len(task) - CLASSES_SHOWN} more" if len(task) > CLASSES_SHOWN else "")


def facts(pool: OpenPool) -> str:
    """Tasks of the pool; method, base, head and size folded away."""
    found = pool.facts
    base = found["base_model"]
    shape = f"{text(base['class'])}, {base['blocks']} blocks, width {base['width']}"
    rows = {
        "Method": text(found["title"].split(":")[0].rstrip(".")),
        "Base": f"micro ViT of the examples ({shape})"
        if pool.on_micro_vit
        else f"{text(base['name'] or 'its own')} ({shape})",
        "Answers with": f"{text(found['head'])} head on the {text(found['readout'])} feature",
        "Size": f"{found['numbers']:,} numbers, {in_bytes(found['bytes'])}",
    }
    for settings in [{"pool_size": "prompts", "prompt_length": "rows each", "top_k": "chosen for an image"}]:
        said = [f"{found['settings'][key]} {words}" for key, words in settings.items() if key in found["settings"]]
        rows |= {"Pool": text(", ".join(said))} if said else {}
    listed = "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in rows.items())
    tasks = "".join(
        f'<li><i style="background:{color(number)}"></i>{number + 1}: {_names(task)}</li>'
        for number, task in enumerate(found["tasks"])
    )
    head = f"<h3>{text(pool.name)}</h3>"
    folded = f'<details><summary>Method, base and size</summary><dl class="facts">{listed}</dl></details>'
    known = f'<p class="label">Tasks, in the order of learning</p><ul class="tasks">{tasks}</ul>' if tasks else ""
    return f'<div class="card">{head}{known}{folded}</div>{messages(pool.notes)}'


def record(pool: OpenPool) -> str:
    """The accuracy matrix and the selection histogram, if they are known."""
    parts = (
        [message("The record is of the adapter before it was taught here.", "hint")] if pool.taught and pool.record else []
    )
    if pool.record is None:
        parts.append("<p>There is no training record for these weights, so their accuracy is unknown.</p>")
    else:
        name, matrix = next(iter(pool.record.results.items()))
        summary = matrix.summary()
        parts.append(
            f"<h4>Accuracy in percent, {text(name)}</h4>{_matrix(matrix)}"
            f"<p>After the last task {summary['faa']:.1f} on average, forgetting {summary['forgetting']:.1f} points"
            f"{text(', ' + pool.record.data if pool.record.data else '')}. Source: the adapter's record.</p>"
        )
    counts = selection_counts(pool.model.adapter)
    if counts is not None:
        parts.append(f"<h4>How often each prompt was chosen in training</h4>{_histograms(pool, counts)}")
    elif pool.picture is not None:
        parts.append(_record_picture(pool.picture))
    else:
        parts.append(f"<p>{choice_rule(pool)}</p>")
    return f'<div class="card">{"".join(parts)}</div>'


def _matrix(matrix: AccuracyMatrix) -> str:
    table, size = matrix.table(), min(len(matrix.columns), MATRIX)
    head = "".join(f'<th scope="col">{j + 1}</th>' for j in range(size))
    rows = "".join(
        f'<tr><th scope="row">task {i + 1}</th>'
        + "".join(
            f'<td style="--share:{table[i, j]:.0f}%">{table[i, j]:.0f}</td>' if j >= i else "<td></td>" for j in range(size)
        )
        + "</tr>"
        for i in range(size)
    )
    more = f"<p>The first {size} of {len(table)} tasks.</p>" if size < len(table) else ""
    return f'<div class="scroll"><table class="matrix"><tr><th>after task</th>{head}</tr>{rows}</table></div>{more}'


def _histograms(pool: OpenPool, counts: Tensor) -> str:
    tasks, rows, prompts = counts.shape
    drawn = []
    for row in range(min(rows, GROUPS)):
        table = counts[:, row, :BARS].tolist()
        highest = max(1, max(sum(column) for column in zip(*table, strict=True)))
        bars = "".join(
            f'<span title="prompt {prompt}: {sum(column)} times">'
            + "".join(
                f'<i style="height:{100 * n / highest:.1f}%;background:{color(task)}"></i>'
                for task, n in reversed(list(enumerate(column)))
                if n
            )
            + "</span>"
            for prompt, column in enumerate(zip(*table, strict=True))
        )
        adapter: Any = pool.model.adapter
        title = row_name(adapter, adapter.pool.history.counts.shape[1:-1], row) or "the pool"
        drawn.append(f'<figure><figcaption>{title}</figcaption><div class="bars">{bars}</div></figure>')
    legend = "".join(
        f'<li><i style="background:{color(task)}"></i>{task_name(pool, task)}</li>' for task in range(min(tasks, BARS))
    )
    more = f"<p>The first {min(rows, GROUPS)} of {rows} blocks or heads and {min(prompts, BARS)} of {prompts} prompts.</p>"
    left_out = more if rows > GROUPS or prompts > BARS else ""
    return f'<div class="histograms">{"".join(drawn)}</div>{left_out}<ul class="tasks">{legend}</ul>'


def _record_picture(content: bytes) -> str:
    try:
        picture = read_rgb(content, max_pixels=4_000_000)
    except UnreadableImage:
        return "<p>The record's selection histogram cannot be read.</p>"
    return f'<h4>Selection histogram of the record</h4><img class="wide" alt="selection histogram" src="{_data(picture)}">'


def choice_rule(pool: OpenPool) -> str:
    """One sentence on how this method chooses prompts, and which tasks they belong to."""
    adapter = pool.model.adapter
    if adapter.config.method == "none":
        return "This method has no prompts: there is nothing to choose."
    if adapter.config.method == "coda":
        return (
            "This method chooses nothing: every picture gets a mix of all prompts. Shown are the heaviest and their tasks."
        )
    if keeps_tasks_apart(adapter):
        return "Each task has its own prompts; the method infers the task of each picture."
    if not adapter.config.selects:
        return "This method chooses nothing: every picture gets the same prompts."
    if selection_counts(adapter) is None:
        return "All tasks share the prompts, and this adapter has no counts of which task's pictures chose which prompt."
    return "All tasks share the prompts. Colors show for which task's pictures a prompt was chosen in training."


def score_rule(pool: OpenPool) -> str:
    """One sentence on what a score says."""
    if pool.pipe.calibrated:
        return "Scores are calibrated: on pictures like those of training, about eight of ten answers with 80 % are right."
    return "Scores are not calibrated: this adapter was saved without a temperature, so 80 % does not mean eight of ten."


def counts(found: dict[str, tuple[list[str], list[str]]]) -> str:
    """How many pictures were taken for which class before a lesson, and how many are now.

    Args:
        found: the labels before and after, by a title for the pictures.
    """
    tables = []
    for title, (before, after) in found.items():
        rows = "".join(
            f'<tr><th scope="row">{text(label)}</th><td>{before.count(label)}</td><td>{after.count(label)}</td></tr>'
            for label in sorted({*before, *after})
        )
        titles = (f"of {len(after)}, taken for", "before", "now")
        head = "".join(f'<th scope="col">{column}</th>' for column in titles)
        table = f'<table class="matrix"><tr>{head}</tr>{rows}</table>'
        tables.append(f"<figure><figcaption>{title}</figcaption>{table}</figure>")
    return f'<div class="counts">{"".join(tables)}</div>'


def answers(pool: OpenPool, found: Sequence[tuple[str, Image.Image, Answer]]) -> str:
    """Pictures with labels, scores, chosen prompts and their tasks."""
    if not found:
        return ""
    cards = "".join(_answer(pool, name, image, given) for name, image, given in found)
    return f'<p class="hint">{score_rule(pool)} {choice_rule(pool)}</p><div class="answers">{cards}</div>'


def _answer(pool: OpenPool, name: str, image: Image.Image, given: Answer) -> str:
    scores = "".join(
        f'<li><b>{text(label)}</b><span class="score"><i style="width:{100 * score:.1f}%"></i></span>{score:.1%}</li>'
        for label, score in given.labels
    )
    unknown = '<p class="hint">Probably none of these classes.</p>' if given.unknown else ""
    return (
        f'<article class="answer"><header>{picture(image, name)}<div><h4>{text(given.labels[0][0])}</h4>'
        f'<p class="file">{text(name)}</p>{unknown}</div></header>'
        f'<ul class="scores">{scores}</ul>{_prompts(pool, given)}</article>'
    )


def _prompts(pool: OpenPool, given: Answer) -> str:
    if not given.rows:
        return ""
    said = ""
    if given.routed is not None:
        said = f'<p class="from">Taken for <b>{task_name(pool, given.routed)}</b></p>'
    elif given.tasks:
        most = max(given.tasks, key=lambda task: given.tasks[task])
        said = f'<p class="from">Prompts most used by <b>{task_name(pool, most)}</b></p>'
    band = "".join(
        f'<i style="width:{100 * share:.1f}%;background:{color(task)}" title="task {task + 1}: {share:.0%}"></i>'
        for task, share in given.tasks.items()
    )
    rows = "".join(
        f"<tr><th>{name or 'chosen'}</th><td>{''.join(_chip(choice) for choice in choices)}</td></tr>"
        for name, choices in given.rows
    )
    table = f'<table class="chosen">{rows}</table>'
    return f'{said}<div class="band">{band}</div><details><summary>Prompts chosen</summary>{table}</details>'


def _chip(choice: Choice) -> str:
    most = max(choice.tasks, key=lambda task: choice.tasks[task], default=None)
    shade = f' style="border-color:{color(most)}"' if most is not None else ""
    origin = ", ".join(f"task {task + 1} {share:.0%}" for task, share in choice.tasks.items())
    from_task = f"<small>task {most + 1}</small>" if most is not None else ""
    title = f"prompt {choice.prompt}, weight {choice.weight:.2f}{'; ' + origin if origin else ''}"
    return f'<span class="chip"{shade} title="{title}">{choice.prompt}{from_task}</span>'


def picture(image: Image.Image, name: str) -> str:
    """A small copy of a picture."""
    small = image.copy()
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    tiny = " tiny" if max(image.size) < SCALED_UP else ""
    return f'<img class="thumbnail{tiny}" alt="{text(name)}" src="{_data(small)}">'


def waiting(images: dict[str, Image.Image]) -> str:
    """The pictures of the next lesson."""
    if not images:
        return '<p class="hint">No pictures yet.</p>'
    shown = "".join(picture(image, name) for name, image in images.items())
    plural = "s" if len(images) > 1 else ""
    return f'<div class="waiting">{shown}<p>{len(images)} picture{plural}</p></div>'


def _data(image: Image.Image) -> str:
    content = BytesIO()
    image.save(content, "PNG")
    return f"data:image/png;base64,{base64.b64encode(content.getvalue()).decode()}"
