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
    """Boxes and arrows in two columns, from top to bottom, so that the text is legible on a phone."""

    def __init__(self, width: float, height: float) -> None:
        self.figure = Figure(figsize=(width, height), facecolor="white")
        self.axes: Axes = self.figure.add_axes((0, 0, 1, 1))
        self.axes.set_xlim(0, width)
        self.axes.set_ylim(height, 0)
        self.axes.axis("off")

    def box(self, x: float, y: float, text: str, color: str) -> float:
        """A box with lines of text, of which the first of several is bold. Returns the y of its lower edge."""
        lines = text.split("\n")
        height = 0.1 + LINE * len(lines)
        frame = FancyBboxPatch((x, y), COLUMN, height, "round,pad=0,rounding_size=0.06", fc=color, ec=QUIET, lw=0.8)
        self.axes.add_patch(frame)
        for number, line in enumerate(lines):
            weight = "bold" if number == 0 and len(lines) > 1 else "normal"
            middle = y + 0.05 + LINE * (number + 0.5)
            self.axes.text(x + COLUMN / 2, middle, line, size=SIZE, ha="center", va="center", color=INK, weight=weight)
        return y + height

    def heading(self, y: float, text: str) -> None:
        """A heading at the left."""
        self.axes.text(LEFT, y, text, size=10.5, va="center", color=INK, weight="bold")

    def arrow(self, *points: tuple[float, float]) -> None:
        """A line through points that ends in an arrow."""
        xs, ys = zip(*points[:-1], strict=True)
        self.axes.plot(xs, ys, color=QUIET, lw=1.0, solid_capstyle="round")
        self.axes.add_patch(
            FancyArrowPatch(points[-2], points[-1], arrowstyle="-|>", mutation_scale=8, color=QUIET, lw=1.0)
        )


# Inches, and points of text: on a phone of 390 pixels the text has 8.6 pixels.
LEFT, RIGHT, COLUMN, GAP, LINE, SIZE = 0.1, 2.6, 2.2, 0.14, 0.17, 8.6
FEATURES = {"cls": "CLS, final norm", "prompt": "mean of {} prompt outputs"}


def shape(sizes: list[int]) -> str:
    """ "[2, 32]"."""
    return "[" + ", ".join(map(str, sizes)) + "]"


def counted(number: int, what: str) -> str:
    """ "1 token", "2 tokens"."""
    return f"{number} {what}" + ("" if number == 1 else "s")


def draw_pass(
    drawing: Drawing, x: float, y: float, blocks: list[dict[str, int]], plain: int, images: list[int]
) -> tuple[float, list[float]]:
    """A column: images, and blocks with the tokens they compute and the keys that their attention reads.

    Returns the lower edge of the last block, and the middle of each block.
    """
    y = drawing.box(x, y, f"images {shape(images)}\n{counted(plain, 'token')}", PLAIN)
    middles = []
    for number, block in enumerate(blocks):
        drawing.arrow((x + COLUMN / 2, y), (x + COLUMN / 2, y + GAP))
        top, text = y + GAP, f"block {number}: {counted(block['queries'], 'token')}, {counted(block['keys'], 'key')}"
        y = drawing.box(x, top, text, PROMPTED if block["keys"] > plain else PLAIN)
        middles.append((top + y) / 2)
    return y, middles


def draw_below(drawing: Drawing, x: float, y: float, text: str, color: str) -> float:
    """A box under another one, with an arrow to it. Returns its lower edge."""
    drawing.arrow((x + COLUMN / 2, y), (x + COLUMN / 2, y + GAP))
    return drawing.box(x, y + GAP, text, color)


def draw_head(drawing: Drawing, x: float, y: float, found: dict[str, Any]) -> float:
    """What becomes of the last pass."""
    feature = FEATURES[found["head_reads"]].format(found["passes"][-1][-1]["queries"])
    text = f"what is read {shape(found['features'])}\n{feature}\nhead: logits {shape(found['logits'])}"
    return draw_below(drawing, x, y, text, READ)


def draw_l2p(drawing: Drawing, y: float, found: dict[str, Any], images: list[int]) -> float:
    """Two passes: the query, then the prompts as tokens. Returns the lower edge."""
    query_pass, prompted_pass = found["passes"]
    plain, top_k = query_pass[0]["keys"], found["top_k"]
    inserted = prompted_pass[0]["tokens"] - plain
    drawing.heading(y, f"L2P: prompts join as tokens. {len(found['passes'])} passes")
    low, _ = draw_pass(drawing, LEFT, y + 0.2, query_pass, plain, images)
    low = draw_below(drawing, LEFT, low, f"query {shape(found['query'])}\n{FEATURES[found['query_is']]}", READ)
    pool = f"pool of {found['pool']} prompts\neach has {found['prompt_length']} tokens and a key\n"
    pool += f"the {top_k} nearest to the query:\n{top_k} × {found['prompt_length']} = {inserted} tokens join"
    lowest = draw_below(drawing, LEFT, low, pool, PROMPTED)
    between, joins = (LEFT + COLUMN + RIGHT) / 2, y + 0.2 + 0.1 + 2 * LINE + 0.5 * GAP  # above the first block
    drawing.arrow((LEFT + COLUMN, lowest - 0.35), (between, lowest - 0.35), (between, joins), (RIGHT + COLUMN / 2, joins))
    low, _ = draw_pass(drawing, RIGHT, y + 0.2, prompted_pass, plain, images)
    draw_head(drawing, RIGHT, low, found)
    return lowest


def draw_hash(drawing: Drawing, y: float, found: dict[str, Any], plain: int, images: list[int]) -> float:
    """One pass: each of the first blocks chooses its own keys and values. Returns the lower edge."""
    (only,) = found["passes"]
    prompted = [number for number, block in enumerate(only) if block["keys"] > plain]
    rows = only[prompted[0]]["keys"] - plain
    drawing.heading(y, "Hash: prompts join as keys and values. 1 pass")
    low, middles = draw_pass(drawing, LEFT, y + 0.2, only, plain, images)
    pool = f"pool and router per block\n{found['pool']} prompts, scored by the\nmean token; the best {found['top_k']} are\n"
    pool += f"mixed: {counted(rows, 'key')} and {counted(rows, 'value')}\nbefore the block's own"
    beside = (middles[prompted[0]] + middles[prompted[-1]] - 0.1 - 5 * LINE) / 2
    drawing.box(RIGHT, beside, pool, PROMPTED)
    between = (LEFT + COLUMN + RIGHT) / 2
    for number in prompted:
        drawing.arrow(
            (RIGHT, beside + 0.475), (between, beside + 0.475), (between, middles[number]), (LEFT + COLUMN, middles[number])
        )
    return draw_head(drawing, LEFT, low, found)


def draw(found: dict[str, Any]) -> Figure:
    """The picture of a record."""
    drawing = Drawing(4.9, 9.65)
    low = draw_l2p(drawing, 0.2, found["l2p"], found["images"])
    plain = found["l2p"]["passes"][0][0]["keys"]
    low = draw_hash(drawing, low + 0.4, found["hash"], plain, found["images"])
    legend = "Orange: prompts at work. Tokens: what a block computes\n(the last one only what is read). "
    legend += "Keys: what its attention reads."
    drawing.axes.text(LEFT, low + 0.35, legend, size=SIZE, va="center", color=INK)
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
