"""Bases that are not dense and in memory train, save, load and answer; bases that cannot run are refused at once."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers as T
from accelerate import cpu_offload, disk_offload
from peft import PeftModel
from support.families import SIZES, build, inputs
from support.methods import METHODS
from torch import Tensor, nn

from cl_prompts import L2PConfig, PromptPoolModel, get_prompt_pool_model
from cl_prompts.backbones.frozen_tensors import precision


pytestmark = pytest.mark.by_turns(3)


class Int8(Tensor):
    """A weight as torchao stores it: int8 numbers and a scale. It has no `view` and no data of its own."""

    numbers: Tensor
    scale: Tensor

    @staticmethod
    def __new__(cls, numbers: Tensor, scale: Tensor) -> Any:
        return Tensor._make_wrapper_subclass(cls, numbers.shape, dtype=scale.dtype)  # type: ignore[attr-defined]

    def __init__(self, numbers: Tensor, scale: Tensor) -> None:
        self.numbers, self.scale = numbers, scale

    def dequantize(self) -> Tensor:
        return self.numbers * self.scale

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["numbers", "scale"], None

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is nn.functional.linear:
            return func(args[0], args[1].dequantize(), *args[2:], **kwargs or {})
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return cls(args[0].numbers, args[0].scale)
        raise NotImplementedError(f"Int8 has no {func}")


class OnlyDequantize(Int8):
    """It does not tell what it is made of."""

    __tensor_flatten__ = property()  # type: ignore[assignment]


def int8(kind: type[Int8] = Int8) -> Any:
    model = build("vit")
    for module in model.modules():
        if isinstance(module, nn.Linear):
            scale = module.weight.detach().abs().amax(1, keepdim=True) / 127
            numbers = (module.weight.detach() / scale).round().to(torch.int8)
            module.weight = nn.Parameter(kind(numbers, scale), requires_grad=False)
    return model


def dynamic(dtype: torch.dtype = torch.qint8) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated, but used
        return torch.ao.quantization.quantize_dynamic(build("vit"), {nn.Linear}, dtype=dtype)


def device_mapped(folder: Path) -> Any:
    build("vit").save_pretrained(folder / "base")
    places = {"embeddings": "cpu", "layers": "disk", "layernorm": "cpu", "pooler": "cpu"}
    return T.ViTModel.from_pretrained(folder / "base", device_map=places, offload_folder=folder / "offloaded")


BASES: dict[str, Callable[[Path], Any]] = {
    "in memory": lambda folder: build("vit"),
    "offloaded to the CPU": lambda folder: cpu_offload(build("vit"), execution_device="cpu"),
    "offloaded to disk": lambda folder: disk_offload(build("vit"), folder / "disk", execution_device="cpu"),
    "device map with disk": device_mapped,
    "int8 tensors": lambda folder: int8(),
    "int8 tensors that only dequantize": lambda folder: int8(OnlyDequantize),
    "dynamically quantized": lambda folder: dynamic(),
    "dynamically quantized to float16": lambda folder: dynamic(torch.float16),
}


def trained(base: Any, config: Any = None) -> PromptPoolModel:
    torch.manual_seed(0)
    model = get_prompt_pool_model(base, config or L2PConfig(pool_size=4, prompt_length=2, top_k=2))
    model.begin_task([3, 1])
    model.train()
    optimizer = torch.optim.SGD(model.parameter_groups(0.5))
    for _ in range(2):
        model(**inputs("vit"), labels=torch.tensor([1, 3, 1])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.end_task()
    return model.eval()


@torch.no_grad()
def answers(model: Any) -> Tensor:
    return model.eval()(**inputs("vit")).logits


@pytest.mark.parametrize("kind", BASES)
def test_train_save_load_answer(kind: str, tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    base = BASES[kind](tmp_path)
    model = trained(base)
    found, state = answers(model), model.adapter.config.state
    if "offloaded" in kind or "map" in kind:
        plain = trained(build("vit"))
        assert torch.equal(found, answers(plain))
        assert state.base_fingerprint == plain.adapter.config.state.base_fingerprint
    assert state.base_fingerprint is not None
    model.save_pretrained(tmp_path / "adapter")
    again = PromptPoolModel.from_pretrained(model.unload(), tmp_path / "adapter", strict_base=True)
    assert torch.equal(answers(again), found)
    if "map" not in kind:  # PEFT itself cannot dispatch this base again
        assert torch.equal(answers(PeftModel.from_pretrained(again.unload(), str(tmp_path / "adapter"))), found)
    assert not [w for w in recwarn if "trained on" in str(w.message) or "fingerprint" in str(w.message)]


def test_offloaded_after_it_was_wrapped() -> None:
    model = trained(build("vit"))
    found = answers(model)
    cpu_offload(model.get_base_model(), execution_device="cpu")
    assert torch.equal(answers(model), found)


def test_gradients_pass_dynamically_quantized_layers() -> None:
    config = METHODS["coda"]()
    gradients = []
    for base in (build("vit"), dynamic()):
        torch.manual_seed(0)
        model = get_prompt_pool_model(base, config)
        model.begin_task([3, 1])
        model.train()(**inputs("vit"), labels=torch.tensor([1, 3, 1])).loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.adapter.pool.parameters() if p.grad is not None]))
    assert torch.cosine_similarity(*gradients, dim=0) > 0.98


class LayerNormWithExtraState(nn.LayerNorm):
    """Its state dict has an entry that is no tensor."""

    def get_extra_state(self) -> object:
        return object()

    def set_extra_state(self, state: object) -> None:
        pass


def test_a_base_whose_numbers_cannot_be_read(tmp_path: Path) -> None:
    base = build("vit")
    base.layernorm = LayerNormWithExtraState(base.config.hidden_size)
    with pytest.warns(
        UserWarning, match=r"weights of this ViTModel cannot be read .*_extra_state is a object.*not checked"
    ):
        model = trained(base)
    assert model.adapter.config.state.base_fingerprint is None
    found = answers(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(answers(PromptPoolModel.from_pretrained(model.unload(), tmp_path)), found)


def test_an_offloaded_module_cannot_be_trained() -> None:
    base = cpu_offload(build("vit"), execution_device="cpu")
    with pytest.raises(ValueError, match="modules_to_save: 'layernorm' of the base is offloaded"):
        get_prompt_pool_model(base, L2PConfig(modules_to_save=["layernorm"]))


def test_names_of_precisions() -> None:
    assert precision(build("vit")) == "float32"
    assert precision(build("vit").half()) == "float16"
    assert precision(int8()).startswith("Int8+")
    assert precision(dynamic()).startswith("qint8+")
    assert precision(dynamic(torch.float16)) == "dynamic_float16+float32"


# ---- bases that cannot run ------------------------------------------------------------------------------------------


class WithoutGradient(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.vit = build("vit")

    @torch.no_grad()
    def forward(self, pixel_values: Tensor) -> Any:
        return self.vit(pixel_values)


def compiled_in_place(what: str) -> Any:
    base = build("vit")
    base.get_submodule(what).compile(backend="eager")
    return base


def scripted(what: str) -> Any:
    base = build("vit")
    example = torch.zeros(1, 5, base.config.hidden_size) if what else inputs("vit")["pixel_values"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated, but used
        traced = torch.jit.trace(base.get_submodule(what), example, strict=False)
    if what:
        base.set_submodule(what, traced)
    return base if what else traced


def failing() -> Any:
    base = build("vit")
    base.forward = lambda *args, **kwargs: 1 / 0
    return base


def without_values() -> Any:
    with torch.device("meta"):
        return T.ViTModel(T.ViTConfig(**SIZES))


def under_inference_mode() -> Any:
    with torch.inference_mode():
        return build("vit")


def sharded() -> Any:
    from torch.distributed.fsdp import FullyShardedDataParallel

    base = build("vit")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a single process
            base.layers[1] = FullyShardedDataParallel(base.layers[1], device_id=torch.device("cpu"))
    finally:
        dist.destroy_process_group()
    return base


def pose_estimator() -> Any:
    backbone = T.VitPoseBackboneConfig(**SIZES | {"image_size": [32, 32], "patch_size": [8, 8], "out_indices": [3]})
    return T.VitPoseForPoseEstimation(T.VitPoseConfig(backbone_config=backbone))


TEXT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "vocab_size": 64}
REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "compiled": (lambda: torch.compile(build("vit"), backend="eager"), "compiled .* base._orig_mod.*compile_backbone"),
    "compiled in place": (lambda: compiled_in_place(""), "all of this ViTModel was compiled in place.*compile_backbone"),
    "a block compiled in place": (lambda: compiled_in_place("layers.1"), "layers.1 of this ViTModel was compiled in place"),
    "DataParallel": (lambda: nn.DataParallel(build("vit")), "wrapped in a DataParallel: pass .* base.module"),
    "a block sharded by FSDP1": (
        sharded,
        "layers.1 of this ViTModel is wrapped in a FullyShardedDataParallel.*frozen_blocks",
    ),
    "TorchScript": (lambda: scripted(""), r"a TorchScript module \(\w+\): pass the transformers model"),
    "a block in TorchScript": (lambda: scripted("layers.1"), "this ViTModel|ViTModel is not supported"),
    "no values": (without_values, "on the meta device, without values: load it with from_pretrained"),
    "inference tensors": (under_inference_mode, "nothing can be trained on this ViTModel under torch.inference_mode"),
    "a forward that fails": (failing, r"this ViTModel cannot run as a base.*ZeroDivisionError: division by zero"),
    "a forward of another kind": (lambda: nn.Sequential(build("vit")), "this Sequential cannot run .*'pixel_values'"),
    "no gradients": (WithoutGradient, "this WithoutGradient cannot run as a base: .*does not require grad"),
    "reads text": (
        lambda: T.CLIPTextModel(T.CLIPTextConfig(**TEXT)),
        "this CLIPTextModel .* takes 'input_ids', not 'pixel_values'",
    ),
    "reads words": (lambda: T.BertModel(T.BertConfig(**TEXT)), "this BertModel .* takes 'input_ids', not 'pixel_values'"),
    # It has a part called `backbone`, as the tuner has; its head reads hidden states with prompts in them.
    "reads hidden states": (pose_estimator, "this VitPoseForPoseEstimation cannot run as a base: a trial"),
    "reads sound": (lambda: T.ASTModel(T.ASTConfig(**TEXT)), "this ASTModel .* takes 'input_values', not 'pixel_values'"),
    "reads packed patches": (
        lambda: T.VideoLlama3VisionModel(T.VideoLlama3VisionConfig(**SIZES)),
        "this VideoLlama3VisionModel cannot run as a base: its forward needs 'grid_thw' besides pixel_values",
    ),
    "counts its tokens": (lambda: T.DINOv3ViTBackbone(T.DINOv3ViTConfig(**SIZES)), "this DINOv3ViTBackbone cannot run"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_refused_when_the_model_is_made(kind: str) -> None:
    build_base, message = REFUSED[kind]
    with pytest.raises(TypeError, match=message) as caught:
        get_prompt_pool_model(build_base(), L2PConfig(pool_size=4, prompt_length=2, top_k=2))
    assert "\n" not in str(caught.value)


def test_a_trial_changes_nothing() -> None:
    class Own(T.ViTModel):
        """Its code is not of transformers, so it is tried."""

    base = Own(T.ViTConfig(**SIZES)).eval()
    base.load_state_dict(build("vit").state_dict())
    before = torch.get_rng_state()
    get_prompt_pool_model(base, L2PConfig(num_labels=3, class_mask="none")).unload()
    config = L2PConfig(num_labels=3, class_mask="none")
    torch.set_rng_state(before)
    one = get_prompt_pool_model(base, config).adapter.pool.prompts
    torch.set_rng_state(before)
    assert torch.equal(get_prompt_pool_model(build("vit"), config).adapter.pool.prompts, one)
    assert all(p.grad is None for p in base.parameters())


def test_a_base_under_inference_mode_answers(tmp_path: Path) -> None:
    model = trained(build("vit"))
    model.save_pretrained(tmp_path)
    assert torch.equal(answers(PromptPoolModel.from_pretrained(under_inference_mode(), tmp_path)), answers(model))


def test_compiled_in_place_afterwards() -> None:
    model = trained(build("vit"))
    model.get_base_model().compile(backend="eager")
    with pytest.raises(TypeError, match=r"compiled in place.*compile_backbone"):
        answers(model)
