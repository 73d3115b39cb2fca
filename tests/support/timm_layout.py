"""A small vision transformer of our own with the modules and names of timm's, where timm cannot be installed."""

from typing import Any

import torch
import transformers as T
from torch import Tensor, nn
from torch.nn import functional as F

from support.families import SIZES, randomized


KINDS = ("plain", "registers", "gap", "attention pooling", "relative", "rotary")
SIZE, PATCHES = SIZES["hidden_size"], 16


class PatchEmbed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.img_size, self.strict_img_size = (32, 32), True
        self.proj = nn.Conv2d(3, SIZE, 8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class Attention(nn.Module):
    """A fused projection; with relative positions its biases are apart, as in BEiT, with rotary ones as in EVA."""

    def __init__(self, kind: str, special: int) -> None:
        super().__init__()
        self.num_heads, self.special = SIZES["num_attention_heads"], special
        self.qkv = nn.Linear(SIZE, 3 * SIZE, bias=kind != "relative")
        self.proj = nn.Linear(SIZE, SIZE)
        self.q_bias = self.v_bias = self.bias = None
        if kind == "relative":
            self.q_bias, self.v_bias = (nn.Parameter(torch.zeros(SIZE)) for _ in range(2))
            self.register_buffer("k_bias", torch.zeros(SIZE), persistent=False)
            self.bias = nn.Parameter(torch.zeros(1, self.num_heads, PATCHES + special, PATCHES + special))

    def forward(self, x: Tensor, rope: Tensor | None = None, attn_mask: Tensor | None = None) -> Tensor:
        bias = self.qkv.bias if self.q_bias is None else torch.cat((self.q_bias, self.k_bias, self.v_bias))
        qkv = F.linear(x, self.qkv.weight, bias) if self.q_bias is not None else self.qkv(x)
        q, k, v = qkv.reshape(*x.shape[:2], 3, self.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        if rope is not None:
            q, k = (torch.cat([t[:, :, : self.special], rotated(t[:, :, self.special :], rope)], 2) for t in (q, k))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=self.bias if self.bias is not None else attn_mask)
        return self.proj(out.transpose(1, 2).reshape(x.shape))


def rotated(x: Tensor, rope: Tensor) -> Tensor:
    sine, cosine = rope.chunk(2, -1)
    return x * cosine + torch.stack([-x[..., 1::2], x[..., ::2]], -1).reshape(x.shape) * sine


class Block(nn.Module):
    def __init__(self, kind: str, special: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(SIZE, eps=1e-12), nn.LayerNorm(SIZE, eps=1e-12)
        self.attn = Attention(kind, special)
        self.mlp = nn.Sequential(nn.Linear(SIZE, 64), nn.GELU(), nn.Linear(64, SIZE))

    def forward(self, x: Tensor, rope: Tensor | None = None) -> Tensor:
        x = x + self.attn(self.norm1(x), rope=rope)
        return x + self.mlp(self.norm2(x))


class AttentionPool(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.latent = nn.Parameter(torch.zeros(1, 1, SIZE))
        self.attention = nn.MultiheadAttention(SIZE, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(self.latent.expand(len(x), -1, -1), x, x)[0][:, 0]


class VisionTransformer(nn.Module):
    def __init__(self, kind: str, num_classes: int = 0) -> None:
        super().__init__()
        self.num_classes = num_classes
        has_cls = kind not in ("gap", "attention pooling")
        registers = 4 if kind == "registers" else 0
        self.special = has_cls + registers
        self.patch_embed = PatchEmbed()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, SIZE)) if has_cls else None
        self.reg_token = nn.Parameter(torch.zeros(1, registers, SIZE)) if registers else None
        self.pos_embed = nn.Parameter(torch.zeros(1, PATCHES + self.special, SIZE))
        self.norm_pre = nn.Identity()
        self.blocks = nn.Sequential(*(Block(kind, self.special) for _ in range(3)))
        self.norm = nn.Identity() if kind == "gap" else nn.LayerNorm(SIZE, eps=1e-12)
        self.attn_pool = AttentionPool() if kind == "attention pooling" else None
        self.fc_norm = nn.LayerNorm(SIZE) if kind == "gap" else nn.Identity()
        self.head = nn.Linear(SIZE, num_classes) if num_classes else nn.Identity()
        self.kind, self.grad_checkpointing = kind, False

    def forward_features(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x)
        tokens = [t.expand(len(x), -1, -1) for t in (self.cls_token, self.reg_token) if t is not None]
        x = self.norm_pre(torch.cat([*tokens, x], 1) + self.pos_embed)
        if self.kind == "rotary":
            angles = torch.arange(PATCHES)[:, None] * torch.tensor([1.0, 1.0, 0.1, 0.1, 0.5, 0.5, 0.7, 0.7])
            for block in self.blocks:
                x = block(x, rope=torch.cat([angles.sin(), angles.cos()], -1))
        else:
            x = self.blocks(x)
        return self.norm(x)

    def forward_head(self, x: Tensor) -> Tensor:
        if self.attn_pool is not None:
            return self.head(self.fc_norm(self.attn_pool(x)))
        return self.head(self.fc_norm(x[:, 0] if self.cls_token is not None else x.mean(1)))

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


class Wrapper(T.PreTrainedModel):
    """As transformers' `TimmWrapperModel`."""

    config_class = T.PreTrainedConfig
    main_input_name = "pixel_values"

    def __init__(self, config: Any, kind: str) -> None:
        super().__init__(config)
        self.timm_model = VisionTransformer(kind)

    def forward(self, pixel_values: Tensor, **kwargs: Any) -> Any:
        hidden = self.timm_model.forward_features(pixel_values)
        return T.modeling_outputs.BaseModelOutputWithPooling(hidden, self.timm_model.forward_head(hidden))


def build_layout(kind: str, seed: int = 0) -> Any:
    """A model with random weights so large that attention is far from uniform."""
    torch.manual_seed(seed)
    return randomized(Wrapper(T.PreTrainedConfig(), kind))


def build_bare(kind: str, num_classes: int = 0) -> Any:
    """The model inside, as `timm.create_model` makes it."""
    torch.manual_seed(0)
    return randomized(VisionTransformer(kind, num_classes))


def converted(model: Wrapper) -> Any:
    """transformers' ViT with the weights of a plain model, its fused projections split in three."""
    names = {
        "cls_token": "embeddings.cls_token",
        "pos_embed": "embeddings.position_embeddings",
        "patch_embed.proj": "embeddings.patch_embeddings.projection",
        "norm": "layernorm",
        "norm1": "layernorm_before",
        "norm2": "layernorm_after",
        "attn.proj": "attention.o_proj",
        "mlp.0": "mlp.fc1",
        "mlp.2": "mlp.fc2",
    }
    state: dict[str, Tensor] = {}
    for name, tensor in model.timm_model.state_dict().items():
        block, inside = "", name
        if name.startswith("blocks."):
            block, inside = f"layers.{name.split('.')[1]}.", name.split(".", 2)[2]
        owner, _, kind = inside.rpartition(".") if inside not in names else (inside, "", "")
        if owner == "attn.qkv":
            for part, value in zip("qkv", tensor.chunk(3), strict=True):
                state[f"{block}attention.{part}_proj.{kind}"] = value
        else:
            state[f"{block}{names[owner]}" + (f".{kind}" if kind else "")] = tensor
    vit = T.ViTModel(T.ViTConfig(**SIZES), add_pooling_layer=False)
    vit.load_state_dict(state)
    return vit.eval()
