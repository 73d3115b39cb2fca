"""From a checkpoint file to a folder that `AutoModel.from_pretrained` loads."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from safetensors.torch import save_file

from cl_prompts.conversion.layouts import Network, find_network
from cl_prompts.conversion.reading import find_checkpoint, read_normalization, read_tensors
from cl_prompts.conversion.vit import to_transformers
from cl_prompts.storage.staging import staging_folder


Normalization = Literal["half", "imagenet"]
# Mean and standard deviation of the color channels.
NORMALIZATIONS: dict[str, tuple[list[float], list[float]]] = {
    "half": ([0.5, 0.5, 0.5], [0.5, 0.5, 0.5]),
    "imagenet": ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
}
BILINEAR, BICUBIC = 2, 3  # Pillow's numbers


@dataclass(frozen=True)
class Converted:
    """What was written.

    Attributes:
        folder: where.
        config: transformers' config of the model.
        mean: of the color channels, which the image processor subtracts.
        std: by which it divides.
        assumed: whether the file does not tell mean and standard deviation, and the layout only suggests them.
        left_out: names of tensors in the file that are not used, such as those of a projection head.
    """

    folder: Path
    config: Any
    mean: list[float]
    std: list[float]
    assumed: bool
    left_out: list[str]


def convert_checkpoint(
    source: str | Path,
    destination: str | Path,
    *,
    num_heads: int | None = None,
    normalization: Normalization | None = None,
    with_head: bool = True,
    prefix: str | None = None,
) -> Converted:
    """Write a vision transformer of timm, Google, DINO, iBOT or MoCo v3 as a Hugging Face folder.

    The folder gets `config.json`, `model.safetensors` and `preprocessor_config.json`; it appears whole or not at all.

    Args:
        source: a `.npz`, `.safetensors` or torch file, or a folder with `model.safetensors` and perhaps
            timm's `config.json`.
        destination: a folder that does not exist, or is empty.
        num_heads: attention heads; None: as the file tells, else those that are usual for the width.
        normalization: "half" (0.5) or "imagenet"; None: of timm's `config.json`, else "half" for Google's files and for
            timm's with a classifier, "imagenet" for others.
        with_head: whether a classifier in the file is kept.
        prefix: start of the names of the network, where a file holds several.

    Raises:
        FileNotFoundError: `source` does not exist.
        ValueError: `destination` exists, or the checkpoint cannot be converted.
    """
    target = Path(destination)
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise ValueError(f"{destination} exists: name a new folder")
    checkpoint = find_checkpoint(source)
    network = find_network(read_tensors(checkpoint), prefix)
    declared = read_normalization(checkpoint) if normalization is None else None
    preset = normalization or _usual_normalization(network)
    if preset not in NORMALIZATIONS:
        raise ValueError(f"normalization is {preset!r}: choose among {', '.join(NORMALIZATIONS)}")
    mean, std = (declared["mean"], declared["std"]) if declared else NORMALIZATIONS[preset]
    config, state = to_transformers(network, num_heads, with_head)
    processor = {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": config.image_size, "width": config.image_size},
        "resample": _resampling(network, declared),
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": mean,
        "image_std": std,
    }
    with staging_folder(target) as staging:
        save_file(state, staging / "model.safetensors", metadata={"format": "pt"})
        (staging / "preprocessor_config.json").write_text(json.dumps(processor, indent=2) + "\n")
        config.save_pretrained(staging)
    return Converted(target, config, mean, std, declared is None and normalization is None, network.left_out)


def _usual_normalization(network: Network) -> Normalization:
    """ImageNet's for DeiT and for networks without a classifier, trained without labels; 0.5 for Google's and timm's."""
    if network.kind == "jax":
        return "half"
    plain = network.kind == "timm" and "head.weight" in network.tensors and "dist_token" not in network.tensors
    return "half" if plain else "imagenet"


def _resampling(network: Network, declared: Mapping[str, Any] | None) -> int:
    if declared and declared.get("interpolation") in ("bilinear", "bicubic"):
        return BILINEAR if declared["interpolation"] == "bilinear" else BICUBIC
    return BILINEAR if network.kind == "jax" else BICUBIC
