"""Which layout a checkpoint has, and its tensors under the names that timm gives them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from cl_prompts.runtime.text import short_repr


TIMM_MARK, JAX_MARK = "blocks.0.attn.qkv.weight", "Transformer/encoder_norm/scale"
# Of the networks of one file, those that are meant to be used: DINO's and iBOT's teacher, MoCo v3's encoder, an average.
PREFERRED = re.compile(r"(^|\.)(teacher|base_encoder|\w*_ema)\.")
MOMENTUM_CONTRAST = re.compile(r"(^|\.)(base|momentum)_encoder\.")
# Parts of the pretraining that lie inside the network: projection heads, mask tokens, decoders.
PRETRAINING = re.compile(r"head\.(\d+|mlp|last_layer\d*)\.|mask(ed_embed|_token)$|decoder_")

Kind = Literal["jax", "timm", "moco", "wrapped"]


@dataclass(frozen=True)
class Network:
    """The tensors of one vision transformer.

    Attributes:
        kind: "jax": Google's; "moco": MoCo v3; "wrapped": under a prefix, as DINO, iBOT and training runs save it; or
            "timm".
        tensors: by timm's names.
        num_heads: attention heads, if the file tells.
        left_out: names in the file that do not belong to the network, or only to its pretraining.
    """

    kind: Kind
    tensors: dict[str, Tensor]
    num_heads: int | None
    left_out: list[str]


def find_network(tensors: Mapping[str, Tensor], prefix: str | None = None) -> Network:
    """The vision transformer among the tensors of a file.

    Args:
        tensors: by their names in the file.
        prefix: start of the names of the network, where a file holds several.

    Raises:
        ValueError: there is none of a known layout, or there are several.
    """
    marks = {mark: _prefixes(tensors, mark) for mark in (TIMM_MARK, JAX_MARK)}
    mark = TIMM_MARK if marks[TIMM_MARK] else JAX_MARK
    chosen = _choose(marks[mark], prefix, tensors)
    inside = {name.removeprefix(chosen): tensor for name, tensor in tensors.items() if name.startswith(chosen)}
    left_out = [name for name in tensors if not name.startswith(chosen)]
    if mark == JAX_MARK:
        named, num_heads = _from_jax(inside)
        return Network("jax", named, num_heads, left_out)
    left_out += [chosen + name for name in inside if PRETRAINING.match(name)]
    named = {name: tensor for name, tensor in inside.items() if not PRETRAINING.match(name)}
    kind: Kind = "moco" if MOMENTUM_CONTRAST.search(chosen) else "wrapped" if chosen else "timm"
    return Network(kind, named, None, left_out)


def _prefixes(names: Iterable[str], mark: str) -> list[str]:
    return [name.removesuffix(mark) for name in names if name.endswith(mark)]


def _choose(prefixes: list[str], wanted: str | None, names: Iterable[str]) -> str:
    if wanted is not None:
        found = [prefix for prefix in prefixes if prefix.rstrip("./") == wanted.rstrip("./")]
        if not found:
            raise ValueError(f"no network has the prefix {short_repr(wanted)}: choose among {_listed(prefixes)}")
        return found[0]
    if not prefixes:
        raise ValueError(
            f"no vision transformer of timm's or Google's layout: no tensor is named {TIMM_MARK} or {JAX_MARK}, "
            f"but {_listed(names)}"
        )
    preferred = [prefix for prefix in prefixes if PREFERRED.search(prefix)] if len(prefixes) > 1 else prefixes
    if len(preferred) != 1:
        raise ValueError(f"several networks, under {_listed(prefixes)}: choose one with --prefix")
    return preferred[0]


def _listed(names: Iterable[str], most: int = 5) -> str:
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return (", ".join(short_repr(name) for name in names[:most]) or "none") + more


# Google's names and timm's. Of the numbers, big_vision has the second where vision_transformer has the first.
JAX_NAMES = {
    r"cls": "cls_token",
    r"embedding/(\w+)": r"patch_embed.proj.\1",
    r"Transformer/posembed_input/pos_embedding|pos_embedding": "pos_embed",
    r"Transformer/encoder_norm/(\w+)": r"norm.\1",
    r"pre_logits/(\w+)": r"pre_logits.fc.\1",
    r"head/(\w+)": r"head.\1",
    r"Transformer/encoderblock_(\d+)/LayerNorm_0/(\w+)": r"blocks.\1.norm1.\2",
    r"Transformer/encoderblock_(\d+)/LayerNorm_[12]/(\w+)": r"blocks.\1.norm2.\2",
    r"Transformer/encoderblock_(\d+)/MlpBlock_[03]/Dense_0/(\w+)": r"blocks.\1.mlp.fc1.\2",
    r"Transformer/encoderblock_(\d+)/MlpBlock_[03]/Dense_1/(\w+)": r"blocks.\1.mlp.fc2.\2",
    r"Transformer/encoderblock_(\d+)/MultiHeadDotProductAttention_[01]/(query|key|value)/(\w+)": r"blocks.\1.attn.\2.\3",
    r"Transformer/encoderblock_(\d+)/MultiHeadDotProductAttention_[01]/out/(\w+)": r"blocks.\1.attn.proj.\2",
}


def _from_jax(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], int | None]:
    """Tensors by timm's names, queries, keys and values still apart, and the number of heads."""
    named: dict[str, Tensor] = {}
    num_heads = None
    for name, tensor in tensors.items():
        matches = ((re.fullmatch(pattern, name), timm_name) for pattern, timm_name in JAX_NAMES.items())
        target = next((match.expand(timm_name) for match, timm_name in matches if match), name)
        owner, _, kind = target.rpartition(".")
        part = owner.rpartition(".")[2]
        if kind == "kernel" and tensor.ndim == 3:  # [D, heads, head_dim], of the output projection [heads, head_dim, D]
            num_heads = tensor.shape[0 if part == "proj" else 1]
            tensor = tensor.flatten(0, 1) if part == "proj" else tensor.flatten(1)
        if kind == "kernel":  # [..., in, out]; a convolution's is [height, width, in, out]
            tensor = tensor.permute(3, 2, 0, 1) if tensor.ndim == 4 else tensor.T
        elif part in ("query", "key", "value"):
            tensor = tensor.flatten()
        named[f"{owner}.{_TERMS.get(kind, kind)}" if owner else target] = tensor
    return named, num_heads


_TERMS = {"kernel": "weight", "scale": "weight"}
