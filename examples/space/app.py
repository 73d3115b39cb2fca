"""A demo page: classify pictures with a prompt pool, see the chosen prompts, teach it a class, download the new adapter.

    pip install -e '.[space]' -c constraints.txt
    python examples/space/app.py        # http://127.0.0.1:7860; GRADIO_SERVER_NAME and GRADIO_SERVER_PORT change that

This file has the layout and the events of the page. `opening.py` loads pools, `uploads.py` checks uploaded files,
`answering.py` classifies pictures, `teaching.py` teaches a class, `keeping.py` saves the adapter, `showing.py` writes HTML.
Each visitor has their own pool; uploaded files are not kept.
"""

import atexit
import os
import shutil
import signal
import sys
import tempfile
import traceback
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


CACHE = Path(tempfile.mkdtemp(prefix="cl-prompts-page-"))
# Before gradio is imported, which reads them.
os.environ |= {
    "GRADIO_ANALYTICS_ENABLED": "False",
    "GRADIO_TEMP_DIR": str(CACHE),
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
}
# Visitors share the cores: on a busy machine two threads that wait for each other took ten times as long as one.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import gradio as gr  # noqa: E402
import keeping  # noqa: E402
import opening  # noqa: E402
import showing  # noqa: E402
import teaching  # noqa: E402
import uploads  # noqa: E402
from answering import answer  # noqa: E402
from PIL import Image  # noqa: E402
from transformers.utils import logging  # noqa: E402

from cl_prompts.cli import EXPECTED  # noqa: E402
from cl_prompts.runtime.text import first_line  # noqa: E402


HERE = Path(__file__).resolve().parent
SAMPLES = HERE / "samples"
MINUTES = 30  # a visitor's pool and download are kept this long after their last use
ENDED = f"This visit ended: a pool is kept for {MINUTES} minutes after its last use. Reload the page."
ABOUT = """
<h1>Ask a prompt pool, teach it a class</h1>
<p>A vision transformer stays frozen. A small <b>pool of prompts</b> learns new classes, task after task, without
old pictures. Here you can classify pictures with such a pool, see which prompts it chose, and teach it a class of your
own.</p>
"""
FOOT = f"""
<p>Your pictures stay in memory until {MINUTES} minutes after the last use of this visit; uploaded files are removed
as soon as they are read. At most {uploads.MAX_IMAGES} pictures at a time, {uploads.MAX_IMAGE_BYTES // 2**20} MB each.
Only safetensors and JSON are read from adapters; nothing in them is run. Made with cl_prompts.</p>
"""


@dataclass(eq=False)
class Visit:
    """The state of one visitor's page.

    Args:
        pool: the visitor's own pool.
        asked: pictures to classify, by name.
        lesson: pictures of the class to teach, by name.
        lessons: a line on each class taught.
    """

    pool: opening.OpenPool
    asked: dict[str, Image.Image] = field(default_factory=dict)
    lesson: dict[str, Image.Image] = field(default_factory=dict)
    lessons: list[str] = field(default_factory=list)

    def answers(self) -> str:
        """The pool's answers for the pictures, as HTML."""
        found = [(name, image, answer(self.pool, image)) for name, image in self.asked.items()]
        return showing.answers(self.pool, found)


def bad(error: Exception | str) -> str:
    """An error as one line of the page.

    Every error while a visitor's file is read or used ends here: values of strangers may make any code fail. One that the
    command would not expect is also printed for the owner of the page.
    """
    if isinstance(error, Exception) and not isinstance(error, EXPECTED):
        traceback.print_exception(error)
        error = f"this cannot be used ({type(error).__name__}: {first_line(error)})"
    return showing.message(error if isinstance(error, str) else first_line(error), "bad")


def view(visit: Visit, said: str) -> list[Any]:
    """Values for all elements in `shown`, after another pool was opened."""
    offered, why = teaching.ways(visit.pool)
    own = visit.pool.on_micro_vit
    return [
        visit,
        said,
        showing.facts(visit.pool),
        showing.record(visit.pool),
        visit.answers(),
        showing.waiting(visit.lesson),
        gr.Radio(choices=offered, value=offered[0] if offered else None, visible=bool(offered)),
        showing.message(why, "hint"),
        gr.DownloadButton(value=None, interactive=False),
        *(gr.Button(visible=own) for _ in range(3)),
    ]


def start() -> list[Any]:
    """The page at the start of a visit."""
    return view(Visit(opening.open_digits()), "")


def open_other(visit: Visit | None, open_it: Any) -> list[Any]:
    """Replace the visitor's pool by another one; after an error keep the pool and show the error."""
    try:
        return view(Visit(open_it()), showing.message("The pool is open."))
    except Exception as error:
        return [visit, bad(error), *[gr.skip()] * 10]


def open_hub(repo_id: str, visit: Visit | None) -> list[Any]:
    """Open an adapter of the Hub."""
    return open_other(visit, lambda: opening.open_hub(repo_id))


def open_files(paths: Sequence[str] | None, visit: Visit | None) -> list[Any]:
    """Open an uploaded adapter; its files are removed."""
    try:
        return [*open_other(visit, lambda: opening.open_files(paths or [])), None]
    finally:
        uploads.forget(paths)


def ask(paths: Sequence[str] | None, visit: Visit | None) -> list[Any]:
    """Answer uploaded pictures; their files are removed."""
    if visit is None:
        return [visit, bad(ENDED), gr.skip(), None]
    try:
        images, problems = uploads.take_images(paths or [])
        visit.asked = images or visit.asked
        return [visit, showing.messages(problems), visit.answers(), None]
    except Exception as error:
        return [visit, bad(error), gr.skip(), None]
    finally:
        uploads.forget(paths)


def ask_samples(visit: Visit | None) -> list[Any]:
    """Classify the sample pictures of this folder."""
    if visit is None:
        return [visit, bad(ENDED), gr.skip()]
    visit.asked = samples("try")
    return [visit, "", visit.answers()]


def lay_out(paths: Sequence[str] | None, visit: Visit | None) -> list[Any]:
    """Add uploaded pictures to the lesson; their files are removed."""
    if visit is None:
        return [visit, bad(ENDED), gr.skip(), None]
    try:
        images, problems = uploads.take_images(paths or [], visit.lesson)
        if len(visit.lesson) + len(images) > uploads.MAX_IMAGES:
            raise ValueError(f"at most {uploads.MAX_IMAGES} pictures teach a class: clear some first")
        visit.lesson = visit.lesson | images
        return [visit, showing.messages(problems), showing.waiting(visit.lesson), None]
    except Exception as error:
        return [visit, bad(error), gr.skip(), None]
    finally:
        uploads.forget(paths)


def lay_out_samples(digit: int, visit: Visit | None) -> list[Any]:
    """Use sample pictures of a digit that the built-in pool has not learned, and set its name."""
    if visit is None:
        return [visit, bad(ENDED), gr.skip(), gr.skip()]
    visit.lesson = samples(f"teach-{digit}")
    return [visit, "", showing.waiting(visit.lesson), str(digit)]


def clear(visit: Visit | None) -> list[Any]:
    """Remove the pictures of the lesson."""
    if visit is None:
        return [visit, bad(ENDED), gr.skip()]
    visit.lesson = {}
    return [visit, "", showing.waiting({})]


def teach(name: str, way: str | None, visit: Visit | None, progress: gr.Progress = gr.Progress()) -> list[Any]:  # noqa: B008 - gradio's way
    """Teach the pool a class, and update its answers."""
    if visit is None:
        return [visit, bad(ENDED), *[gr.skip()] * 5]
    try:
        said = teaching.teach(visit.pool, name, list(visit.lesson.values()), way or "", lambda d, t: progress(d, desc=t))
        visit.lessons.append(said)
        file = keeping.packed(visit.pool, visit.lessons, CACHE / uuid.uuid4().hex)
    except Exception as error:
        return [visit, bad(error), *[gr.skip()] * 5]
    visit.lesson = {}
    return [
        visit,
        showing.message(f"Learned as {said}. Ask again above, or download the new adapter."),
        showing.facts(visit.pool),
        showing.record(visit.pool),
        visit.answers(),
        showing.waiting({}),
        gr.DownloadButton(value=str(file), interactive=True),
    ]


def samples(folder: str) -> dict[str, Image.Image]:
    """The sample pictures in a folder under `samples/`, by name."""
    return uploads.take_images(sorted((SAMPLES / folder).glob("*.png")))[0]


def page() -> gr.Blocks:
    """The page."""
    with gr.Blocks(
        title="Prompt pools: ask one, teach one", analytics_enabled=False, delete_cache=(60, MINUTES * 60), fill_width=True
    ) as blocks:
        visit = gr.State(None, time_to_live=MINUTES * 60)
        fragment("about", ABOUT)
        with gr.Row():
            with gr.Column(scale=4, min_width=300, elem_classes="step"):
                fragment("title", "<h2>1 · The pool</h2>")
                facts = fragment("facts")
                opened = fragment("opened")
                with gr.Accordion("Open another one", open=False):
                    repo_id = gr.Textbox(label="Hub id", placeholder="name/pool", max_length=100, elem_id="hub-id")
                    from_hub = gr.Button("Open from the Hub", elem_id="open-hub")
                    files = drop_zone("or drop its files, or a zip from this page", "adapter-files")
                    again = gr.Button("Back to the digits", elem_id="open-digits")
                with gr.Accordion("How well it did, and what it used", open=False):
                    record = fragment("record")
            with gr.Column(scale=7, min_width=300):
                with gr.Column(elem_classes="step"):
                    fragment("title", "<h2>2 · Ask it</h2>")
                    pictures = drop_zone("Drop pictures here", "ask-files")
                    try_some = gr.Button("Try ten scanned digits", elem_id="ask-samples")
                    asked = fragment("asked")
                    answers = fragment("answers")
                with gr.Column(elem_classes="step"):
                    fragment("title", "<h2>3 · Teach it a class</h2>")
                    name = gr.Textbox(label="Name of the new class", max_length=100, elem_id="class-name")
                    handful = drop_zone(
                        f"Drop pictures of it: {teaching.MIN_IMAGES} to {uploads.MAX_IMAGES}", "lesson-files"
                    )
                    with gr.Row():
                        eights = gr.Button("Use ten eights", size="sm", elem_id="use-8")
                        nines = gr.Button("Use ten nines", size="sm", elem_id="use-9")
                        cleared = gr.Button("Clear", size="sm", elem_id="clear-lesson")
                    lesson = fragment("lesson")
                    way = gr.Radio(label="How", choices=[], elem_id="way")
                    why = fragment("why")
                    go = gr.Button("Teach", variant="primary", elem_id="teach")
                    taught = fragment("taught")
                    download = gr.DownloadButton("Download the new adapter", interactive=False, elem_id="download")
        fragment("foot", FOOT)

        shown = [visit, opened, facts, record, answers, lesson, way, why, download, try_some, eights, nines]
        private: dict[str, Any] = {"api_visibility": "private"}
        opens = private | {"concurrency_id": "open", "concurrency_limit": 1}
        asks = private | {"concurrency_id": "ask", "concurrency_limit": 2}
        teaches = private | {"concurrency_id": "teach", "concurrency_limit": 1}
        blocks.load(start, None, shown, **opens)
        again.click(start, None, shown, **opens)
        for event in (from_hub.click, repo_id.submit):
            event(open_hub, [repo_id, visit], shown, **opens)
        files.upload(open_files, [files, visit], [*shown, files], **opens)
        pictures.upload(ask, [pictures, visit], [visit, asked, answers, pictures], **asks)
        try_some.click(ask_samples, visit, [visit, asked, answers], **asks)
        handful.upload(lay_out, [handful, visit], [visit, taught, lesson, handful], **asks)
        eights.click(lambda v: lay_out_samples(8, v), visit, [visit, taught, lesson, name], **asks)
        nines.click(lambda v: lay_out_samples(9, v), visit, [visit, taught, lesson, name], **asks)
        cleared.click(clear, visit, [visit, taught, lesson], **asks)
        go.click(teach, [name, way, visit], [visit, taught, facts, record, answers, lesson, download], **teaches)
    return blocks


def fragment(name: str, content: str = "") -> gr.HTML:
    """An element for HTML that `showing.py` writes."""
    return gr.HTML(content, elem_id=name if name != "title" else None, js_on_load=None, padding=False)


def drop_zone(label: str, name: str) -> gr.File:
    """An upload area for files; `uploads.py` checks them."""
    return gr.File(label=label, file_count="multiple", type="filepath", height=130, elem_id=name, elem_classes="drop")


def main() -> None:
    """Serve the page until it is stopped, then remove its temporary files."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    atexit.register(shutil.rmtree, CACHE, ignore_errors=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    # Font names only: gradio's default fonts would be downloaded.
    fonts, fonts_mono = ["system-ui", "sans-serif"], ["ui-monospace", "monospace"]
    page().queue(max_size=20).launch(
        server_name=os.environ.get("GRADIO_SERVER_NAME", "127.0.0.1"),
        share=False,
        ssr_mode=False,
        footer_links=[],
        max_file_size=uploads.MAX_ADAPTER_BYTES,
        state_session_capacity=200,
        theme=gr.themes.Base(primary_hue="teal", neutral_hue="slate", font=fonts, font_mono=fonts_mono),
        css_paths=HERE / "style.css",
    )


if __name__ == "__main__":
    main()
