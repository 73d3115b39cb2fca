"""The frozen blocks in two processes' memory: each holds its share, and what is learnt, saved and resumed is the same.

`test_distributed.py` compares every kind of method step by step.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate import DistributedType
from support.families import build
from support.matrices import assert_same_matrix
from support.processes import become, free_port, in_two_processes
from support.small_runs import Stop, StopAt, small_model, small_stream, small_trainer, tensors
from torch import Tensor, nn
from torch.testing import assert_close

from cl_prompts import PromptPoolModel
from cl_prompts.continual import ContinualArguments, ContinualTrainer
from cl_prompts.tuner.sharding import shard_frozen_blocks


pytestmark = pytest.mark.xdist_group("distributed")


def weights(block: nn.Module) -> int:
    """Numbers of a block that this process holds."""
    return sum(p.to_local().numel() if hasattr(p, "to_local") else p.numel() for p in block.parameters())


def refused(model: PromptPoolModel) -> str:
    with pytest.raises(ValueError, match="shard") as error:
        shard_frozen_blocks(model)
    return str(error.value)


def process(rank: int, port: int, folder: str) -> None:
    become(rank, port)
    settings: dict[str, Any] = {"tasks": 2, "config": {"prompt_length": 2}}
    trainer = small_trainer("l2p", Path(folder, "run"), callbacks=[StopAt(8)], **settings)
    blocks = list(trainer.model.get_base_model().layers)
    found: dict[str, Any] = {"before": weights(blocks[1])}
    shard_frozen_blocks(trainer.model)
    found["after"] = weights(blocks[1])
    found["again"] = refused(trainer.model)
    with pytest.raises(Stop):
        trainer.train()
    trainer = small_trainer("l2p", Path(folder, "run"), **settings)
    shard_frozen_blocks(trainer.model)
    found["matrix"] = trainer.train(resume=True).to_dict()
    found["learnt"] = tensors(trainer)
    logits(trainer.model.eval(), torch.zeros(1, 3, 32, 32))
    found["in the end"] = [weights(block) for block in trainer.model.get_base_model().layers]
    learning = small_model("l2p")
    next(learning.get_base_model().layers[0].parameters()).requires_grad_()
    found["learning"] = refused(learning)
    if not rank:
        trainer.model.save_pretrained(Path(folder, "adapter"))
    torch.save(found, Path(folder, f"{rank}.pt"))
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_share_the_blocks(tmp_path: Path) -> None:
    in_two_processes(process, free_port(), str(tmp_path))
    alone = small_trainer("l2p", tasks=2, config={"prompt_length": 2})
    matrix = alone.train().to_dict()
    expected = tensors(alone)
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt")
        assert found["after"] == found["before"] / 2
        assert set(found["in the end"]) == {found["after"]}, "also once the blocks have computed"
        assert found["again"] == "the blocks of this base are sharded already"
        assert "only frozen parameters can be sharded, and [" in found["learning"]
        assert_same_matrix(found["matrix"], matrix)
        assert found["learnt"].keys() == expected.keys()
        for name, tensor in expected.items():
            assert_close(found["learnt"][name], tensor, atol=1e-5, rtol=0)
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    loaded = PromptPoolModel.from_pretrained(build("vit"), tmp_path / "adapter").eval()
    assert_close(logits(loaded, images), logits(alone.model.eval(), images), atol=1e-4, rtol=0)


@torch.no_grad()
def logits(model: Any, images: Tensor) -> Tensor:
    """What a model answers."""
    found: Tensor = model(pixel_values=images).logits
    return found


def test_one_process_has_nobody_to_share_with() -> None:
    assert "there is only one process: launch several" in refused(small_model("l2p"))


@pytest.mark.parametrize("engine", ["FSDP", "DEEPSPEED", "MEGATRON_LM"])
def test_engines_that_cut_up_what_grows_are_refused(engine: str) -> None:
    accelerator = small_trainer("l2p").accelerator
    accelerator.state.distributed_type = DistributedType[engine]  # Accelerate sets it on GPUs only
    with pytest.raises(ValueError, match=rf"Accelerate is set to {engine}, which shards .*\.shard_frozen_blocks"):
        ContinualTrainer(small_model("l2p"), small_stream(), ContinualArguments(), accelerator=accelerator)
