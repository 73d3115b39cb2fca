"""Draws docs/images/batch_path.svg from what really happens to a batch in a tiny ViT, for L2P and for Hash.

    python docs/figures/batch_path.py

The numbers in the picture are those of the record, which stands in the file's metadata;
tests/docs/test_figures.py makes both again and compares.
"""

import json
from pathlib import Path
from typing import Any

import matplotlib
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
from torch import Tensor, nn
from transformers import AttentionInterface, ViTConfig, ViTModel

from cl_prompts import HashPromptConfig, L2PConfig, PromptPoolConfig, PromptPoolModel, get_prompt_pool_model


FILE = Path(__file__).parents[1] / "images" / "batch_path.svg"
BLOCKS, WIDTH, IMAGES, CLASSES_PER_TASK = 6, 32, 2, 2
INK, QUIET, PLAIN, PROMPTED, READ = "#1f2430", "#5b6475", "#e8ecf3", "#ffd9a8", "#cfe8d5"


class Recorder:
    """Notes every pass through a base model: tokens that enter a block, and the queries and keys of its attention.

    Attributes:
        passes: for each pass, in order, a dict for each block.
    """

    def __init__(self, base: Any) -> None:
        self.passes: list[list[dict[str, int]]] = [[]]
        AttentionInterface.register("recording", self._attend)
        base.set_attn_implementation("recording")
        base.embeddings.register_forward_hook(self._begin)
        for block in base.layers:
            # Behind the hooks of the prompts, which were put on before: so it sees what the block gets.
            block.register_forward_pre_hook(self._enter)

    def _begin(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self.passes.append([])

    def _enter(self, block: nn.Module, args: tuple[Tensor, ...]) -> None:
        self.passes[-1].append({"tokens": args[0].shape[1]})

    def _attend(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **more: Any) -> Any:
        self.passes[-1][-1] |= {"queries": query.shape[2], "keys": key.shape[2]}
        return AttentionInterface()["sdpa"](module, query, key, value, mask, **more)


def trained(config: PromptPoolConfig) -> PromptPoolModel:
    """A tiny ViT with a pool that has two tasks; none of them is trained, which changes no shape."""
    size: dict[str, Any] = {"num_hidden_layers": BLOCKS, "hidden_size": WIDTH, "intermediate_size": 64}
    base = ViTModel(ViTConfig(**size, num_attention_heads=4, image_size=32, patch_size=8), add_pooling_layer=False)
    model = get_prompt_pool_model(base, config)
    for task in range(2):
        model.begin_task(range(CLASSES_PER_TASK * task, CLASSES_PER_TASK * (task + 1)))
        model.end_task()
    return model.eval()


def one(config: Any) -> dict[str, Any]:
    """What happens to one batch at test."""
    torch.manual_seed(0)
    model = trained(config)
    recorder = Recorder(model.get_base_model())
    images = torch.rand(IMAGES, 3, 32, 32)
    with torch.no_grad():
        model(pixel_values=images)  # the first pass also tries whether the last block may be narrowed
        recorder.passes.clear()
        output = model(pixel_values=images)
    return {
        "passes": recorder.passes,
        "query": None if output.query is None else list(output.query.shape),
        "prompt_ids": list(output.prompt_ids.shape),
        "features": list(output.features.shape),
        "logits": list(output.logits.shape),
        "query_is": model.query_pooling,
        "head_reads": model.adapter.readout,
        "pool": config.pool_size,
        "prompt_length": config.prompt_length,
        "top_k": config.top_k,
    }


def record() -> dict[str, Any]:
    """The path of a batch with the default sizes of both methods."""
    return {"images": [IMAGES, 3, 32, 32], "l2p": one(L2PConfig()), "hash": one(HashPromptConfig())}


class Drawing:
    """Boxes and arrows on a grid: columns from left to right, rows from top to bottom."""

    def __init__(self, width: float, height: float) -> None:
        self.figure = Figure(figsize=(width, height), facecolor="white")
        self.axes: Axes = self.figure.add_axes((0, 0, 1, 1))
        self.axes.set_xlim(0, width)
        self.axes.set_ylim(height, 0)
        self.axes.axis("off")

    def box(self, x: float, y: float, width: float, height: float, text: str, color: str) -> None:
        """A box with lines of text, of which the first is bold."""
        frame = FancyBboxPatch((x, y), width, height, "round,pad=0,rounding_size=0.06", fc=color, ec=QUIET, lw=0.8)
        self.axes.add_patch(frame)
        lines = text.split("\n")
        for number, line in enumerate(lines):
            height_of_line = y + height / 2 + 0.175 * (number - (len(lines) - 1) / 2)
            weight = "normal" if number else "bold"
            self.axes.text(
                x + width / 2, height_of_line, line, size=8.2, ha="center", va="center", color=INK, weight=weight
            )

    def heading(self, y: float, text: str) -> None:
        """A heading at the left."""
        self.axes.text(0.15, y, text, size=10.5, va="center", color=INK, weight="bold")

    def arrow(self, *points: tuple[float, float]) -> None:
        """A line through points that ends in an arrow."""
        xs, ys = zip(*points[:-1], strict=True)
        self.axes.plot(xs, ys, color=QUIET, lw=1.0, solid_capstyle="round")
        self.axes.add_patch(
            FancyArrowPatch(points[-2], points[-1], arrowstyle="-|>", mutation_scale=8, color=QUIET, lw=1.0)
        )


FIRST, STEP, BLOCK, TALL = 1.5, 0.94, 0.83, 0.64  # x of block 0, from block to block, width and height of a block
END = FIRST + STEP * BLOCKS
FEATURES = {"cls": "CLS, final norm", "prompt": "mean of {} prompt outputs"}


def shape(sizes: list[int]) -> str:
    """ "[2, 32]"."""
    return "[" + ", ".join(map(str, sizes)) + "]"


def counted(number: int, what: str) -> str:
    """ "1 token", "2 tokens"."""
    return f"{number} {what}" + ("" if number == 1 else "s")


def draw_pass(drawing: Drawing, y: float, blocks: list[dict[str, int]], plain: int, images: list[int]) -> None:
    """A row: images, and blocks with the tokens they compute and the keys that their attention reads."""
    middle = y + TALL / 2
    drawing.box(0.15, y, 1.05, TALL, f"images\n{shape(images)}\n{counted(plain, 'token')}", PLAIN)
    for number, block in enumerate(blocks):
        x = FIRST + STEP * number
        drawing.arrow((x - (0.3 if number == 0 else STEP - BLOCK), middle), (x, middle))
        text = f"block {number}\n{counted(block['queries'], 'token')}\n{counted(block['keys'], 'key')}"
        drawing.box(x, y, BLOCK, TALL, text, PROMPTED if block["keys"] > plain else PLAIN)
    drawing.arrow((END - STEP + BLOCK, middle), (END + 0.1, middle))


def draw_head(drawing: Drawing, y: float, found: dict[str, Any]) -> None:
    """What becomes of the last pass."""
    feature = FEATURES[found["head_reads"]].format(found["passes"][-1][-1]["queries"])
    text = f"what is read {shape(found['features'])}\n{feature}\nhead: logits {shape(found['logits'])}"
    drawing.box(END + 0.1, y, 1.75, TALL, text, READ)


def draw_l2p(drawing: Drawing, found: dict[str, Any], images: list[int]) -> None:
    """Two passes: the query, then the prompts as tokens."""
    query_pass, prompted_pass = found["passes"]
    plain, top_k = query_pass[0]["keys"], found["top_k"]
    inserted = prompted_pass[0]["tokens"] - plain
    drawing.heading(0.25, f"L2P: prompts join as tokens. {len(found['passes'])} passes")
    first, between, second = 0.5, 1.42, 2.34
    draw_pass(drawing, first, query_pass, plain, images)
    drawing.box(END + 0.1, first, 1.75, TALL, f"query {shape(found['query'])}\n{FEATURES[found['query_is']]}", READ)
    middle = between + TALL / 2
    drawing.arrow((END + 0.97, first + TALL), (END + 0.97, middle), (END - STEP - 0.1, middle))
    pool = f"pool of {found['pool']} prompts, {found['prompt_length']} tokens and a key each\n"
    pool += f"the {top_k} prompts whose keys are nearest to the query\n"
    pool += f"{top_k} × {found['prompt_length']} = {inserted} tokens join the sequence"
    drawing.box(FIRST + STEP, between, 4 * STEP - 0.1, TALL, pool, PROMPTED)
    drawing.arrow((FIRST + STEP, middle), (1.33, middle), (1.33, second + TALL / 2))
    draw_pass(drawing, second, prompted_pass, plain, images)
    draw_head(drawing, second, found)


def draw_hash(drawing: Drawing, found: dict[str, Any], plain: int, images: list[int]) -> None:
    """One pass: each of the first blocks chooses its own keys and values."""
    (only,) = found["passes"]
    prompted = [number for number, block in enumerate(only) if block["keys"] > plain]
    rows = only[prompted[0]]["keys"] - plain
    first, last = FIRST + STEP * prompted[0], FIRST + STEP * prompted[-1] + BLOCK
    drawing.heading(3.38, "Hash: prompts join as keys and values. 1 pass")
    above, row = 3.63, 4.55
    pool = f"per block a pool of {found['pool']} prompts, a router\n"
    pool += f"the mean token scores them, the best {found['top_k']} are mixed\n"
    pool += f"{counted(rows, 'key')} and {counted(rows, 'value')} in front of the block's own"
    drawing.box(first, above, last - first, TALL, pool, PROMPTED)
    for number in prompted:
        x = FIRST + STEP * number + BLOCK / 2
        drawing.arrow((x, above + TALL), (x, row))
    draw_pass(drawing, row, only, plain, images)
    draw_head(drawing, row, found)


def draw(found: dict[str, Any]) -> Figure:
    """The picture of a record."""
    drawing = Drawing(9.15, 5.75)
    draw_l2p(drawing, found["l2p"], found["images"])
    plain = found["l2p"]["passes"][0][0]["keys"]
    draw_hash(drawing, found["hash"], plain, found["images"])
    legend = "Orange: prompts at work. Tokens: what a block computes (the last one only what is read). "
    legend += "Keys: what its attention reads."
    drawing.axes.text(0.15, 5.48, legend, size=8.2, va="center", color=INK)
    return drawing.figure


def save(file: Path = FILE) -> None:
    """Make the record, draw it and write the file."""
    found = record()
    with matplotlib.rc_context(
        {"svg.hashsalt": "cl_prompts", "svg.fonttype": "none", "font.sans-serif": ["DejaVu Sans", "Verdana", "Arial"]}
    ):
        draw(found).savefig(file, metadata={"Date": None, "Description": json.dumps(found)})


if __name__ == "__main__":
    save()
