"""A demo page: classify pictures with a prompt pool, see the chosen prompts, teach it a class, download the new adapter.

    pip install -e '.[space]' -c constraints.txt
    python examples/space/app.py        # http://127.0.0.1:7860; GRADIO_SERVER_NAME and GRADIO_SERVER_PORT change that

This file has the layout and the events of the page. `visits.py` gives each visitor a process of their own, forked by
`fork_server.py`, in which `visitor.py` does what is asked: `opening.py` loads pools, `uploads.py` checks uploaded files,
`answering.py` classifies pictures, `teaching.py` teaches a class, `keeping.py` saves the adapter, `showing.py` writes HTML.
"""

import atexit
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Sequence
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
import showing  # noqa: E402
import teaching  # noqa: E402
import uploads  # noqa: E402
from visits import ENDED, MINUTES, REQUESTS, Visit, VisitEnded, Visits  # noqa: E402


HERE = Path(__file__).resolve().parent
ABOUT = """
<h1>Ask a prompt pool, teach it a class</h1>
<p>A vision transformer stays frozen. A small <b>pool of prompts</b> learns new classes, task after task, without
old pictures. Here you can classify pictures with such a pool, see which prompts it chose, and teach it a class of your
own.</p>
"""
STEPS = """
<nav aria-label="steps"><a href="#the-pool">1 · Pool</a><a href="#ask-it">2 · Ask</a><a href="#teach-it">3 · Teach</a></nav>
"""
FOOT = f"""
<p>Your pictures stay in memory until {MINUTES} minutes after the last use of this visit; uploaded files are removed
as soon as they are read. At most {uploads.MAX_IMAGES} pictures at a time, {uploads.MAX_IMAGE_BYTES // 2**20} MB each.
Only safetensors and JSON are read from adapters; nothing in them is run. Made with cl_prompts.</p>
"""

Shown = dict[Any, Any]  # new values of elements of the page


def page(visits: Visits) -> gr.Blocks:
    """The page."""
    with gr.Blocks(
        title="Prompt pools: ask one, teach one", analytics_enabled=False, delete_cache=(60, MINUTES * 60), fill_width=True
    ) as blocks:
        visit = gr.State(None, time_to_live=MINUTES * 60, delete_callback=lambda v: v and v.end())
        fragment("about", ABOUT)
        fragment("steps", STEPS)
        with gr.Row():
            with gr.Column(scale=4, min_width=300, elem_classes="step", elem_id="the-pool"):
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
                with gr.Column(elem_classes="step", elem_id="ask-it"):
                    fragment("title", "<h2>2 · Ask it</h2>")
                    pictures = drop_zone("Drop pictures here", "ask-files")
                    with gr.Row():
                        scanned = gr.Button("Try ten scanned digits", size="sm", min_width=80, elem_id="ask-samples")
                        photographed = gr.Button("Try six photographs", size="sm", min_width=80, elem_id="ask-photographs")
                    asked = fragment("asked")
                    answers = fragment("answers")
                with gr.Column(elem_classes="step", elem_id="teach-it"):
                    fragment("title", "<h2>3 · Teach it a class</h2>")
                    name = gr.Textbox(label="Name of the new class", max_length=100, elem_id="class-name")
                    handful = drop_zone(
                        f"Drop pictures of it: {teaching.MIN_IMAGES} to {uploads.MAX_IMAGES}", "lesson-files"
                    )
                    with gr.Row():
                        eights = gr.Button("Ten eights", size="sm", min_width=80, elem_id="use-8")
                        nines = gr.Button("Ten nines", size="sm", min_width=80, elem_id="use-9")
                        photographs = gr.Button("Ten photographs", size="sm", min_width=120, elem_id="use-photograph")
                        cleared = gr.Button("Clear", size="sm", min_width=80, elem_id="clear-lesson")
                    lesson = fragment("lesson")
                    way = gr.Radio(label="How", choices=[], elem_id="way")
                    go = gr.Button("Teach", variant="primary", elem_id="teach")
                    why = fragment("why")
                    taught = fragment("taught")
                    download = gr.DownloadButton("Download the new adapter", interactive=False, elem_id="download")
        fragment("foot", FOOT)

        parts = {"facts": facts, "opened": opened, "record": record, "asked": asked, "answers": answers, "name": name}
        parts |= {"lesson": lesson, "way": way, "why": why, "taught": taught, "download": download}
        of_the_digits = (scanned, eights, nines)
        zones = (files, pictures, handful)
        shown = [visit, *parts.values(), *of_the_digits, *zones]

        def ask(request: str, by: Visit | None, *given: Any, **options: Any) -> Shown:
            """What the page shows after a request."""
            found = answer(visits, request, by, *given, **options)
            values: Shown = {parts[part]: update(part, value) for part, value in found.items() if part != "samples"}
            if "samples" in found:
                values |= {button: gr.Button(visible=found["samples"]) for button in of_the_digits}
            return {visit: by, **values}

        def start() -> Shown:
            """The page at the start of a visit."""
            return ask("look", visits.start())

        def event(request: str, *given: Any) -> Callable[..., Shown]:
            return lambda by, *values: ask(request, by, *given, *values)

        def upload(request: str, zone: gr.File) -> Callable[..., Shown]:
            def taken(by: Visit | None, paths: Sequence[str] | None) -> Shown:
                try:
                    return {**ask(request, by, paths or []), zone: None}
                finally:
                    uploads.forget(paths)

            return taken

        def teach(by: Visit | None, name: str, way: str | None, progress: gr.Progress = gr.Progress()) -> Shown:  # noqa: B008 - gradio's way
            return ask("teach", by, name, way, tick=lambda done, text: progress(done, desc=text))

        private: dict[str, Any] = {"outputs": shown, "api_visibility": "private"}
        starts = private | {"concurrency_id": "start", "concurrency_limit": 4, "show_progress_on": facts}
        opens = private | {"concurrency_id": "open", "concurrency_limit": 2, "show_progress_on": facts}
        asks = private | {"concurrency_id": "ask", "concurrency_limit": 8, "show_progress_on": answers}
        lays = asks | {"show_progress_on": lesson}
        teaches = private | {"concurrency_id": "teach", "concurrency_limit": 4, "show_progress_on": lesson}
        blocks.load(start, None, **starts)
        again.click(event("open_digits"), visit, **opens)
        for trigger in (from_hub.click, repo_id.submit):
            trigger(event("open_hub"), [visit, repo_id], **opens)
        files.upload(upload("open_files", files), [visit, files], **opens)
        pictures.upload(upload("ask", pictures), [visit, pictures], **asks)
        scanned.click(event("ask_samples", "digits"), visit, **asks)
        photographed.click(event("ask_samples", "photographs"), visit, **asks)
        handful.upload(upload("lay_out", handful), [visit, handful], **lays)
        for button, taught_as in ((eights, "8"), (nines, "9"), (photographs, "photograph")):
            button.click(event("lay_out_samples", taught_as), visit, **lays)
        cleared.click(event("clear"), visit, **lays)
        go.click(teach, [visit, name, way], **teaches)
    return blocks


def answer(visits: Visits, request: str, by: Visit | None, *given: Any, **options: Any) -> dict[str, Any]:
    """The parts of the page that a request changes; a message if the visit is over or busy."""
    try:
        if by is None:
            raise VisitEnded(ENDED)
        found = by.request(request, *given, **options)
        visits.make_room()
        return found
    except (VisitEnded, ValueError) as error:
        return {REQUESTS[request].said: showing.message(str(error), "bad")}


def update(part: str, value: Any) -> Any:
    """The new value of an element of the page."""
    if part == "way":
        return gr.Radio(choices=value, value=value[0] if value else None, visible=bool(value))
    if part == "download":
        return gr.DownloadButton(value=value, interactive=value is not None)
    return value


def fragment(name: str, content: str = "") -> gr.HTML:
    """An element for HTML that `showing.py` writes."""
    return gr.HTML(content, elem_id=name if name != "title" else None, js_on_load=None, padding=False)


def drop_zone(label: str, name: str) -> gr.File:
    """An upload area for files; `uploads.py` checks them."""
    return gr.File(label=label, file_count="multiple", type="filepath", height=130, elem_id=name, elem_classes="drop")


def main() -> None:
    """Serve the page until it is stopped, then end the visits and remove their files."""
    atexit.register(shutil.rmtree, CACHE, ignore_errors=True)
    visits = Visits(CACHE)
    atexit.register(visits.end)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    # Font names only: gradio's default fonts would be downloaded.
    fonts, fonts_mono = ["system-ui", "sans-serif"], ["ui-monospace", "monospace"]
    page(visits).queue(max_size=20).launch(
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
