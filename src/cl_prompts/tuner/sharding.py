"""Shards the frozen backbone's blocks over processes, with torch's FSDP2.

Each process keeps its share of the blocks' weights, and a complete block only while that block computes. The parameters
that a prompt method trains are small and grow with the tasks; every process keeps all of them, and DDP averages their
gradients. Accelerate's FSDP wraps the complete model and would shard these too.
"""

from __future__ import annotations

from peft import PeftModel
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from cl_prompts.runtime.distributed import world_size


def shard_frozen_blocks(model: PeftModel) -> None:
    """Shard the weights of the base's transformer blocks over all processes. Outputs and training stay the same.

    Call it once, on every process, after the model is on its device and before it is wrapped. From then on all processes
    must run the same number of forwards, as they do in training, in `evaluate` and in `ContinualTrainer`. Embeddings, final
    norm, pools and heads are not sharded. Saved files do not change.

    Args:
        model: the model, with a frozen base and not wrapped.

    Raises:
        ValueError: there is only one process, the blocks are sharded already, or a parameter in them is trained.
    """
    if world_size() == 1:
        raise ValueError("there is only one process: launch several to shard the blocks, or do not shard")
    tuner = model.base_model
    blocks = [tuner.model.get_submodule(name) for name in tuner.structure.blocks]
    inside = [(name, p) for block in blocks for name, p in block.named_parameters()]
    if any(isinstance(p, DTensor) for _, p in inside):
        raise ValueError("the blocks of this base are sharded already")
    trained = [name for name, p in inside if p.requires_grad]
    if trained:
        raise ValueError(f"only frozen parameters can be sharded, and {trained[:3]} in the blocks require gradients")
    mesh = init_device_mesh(inside[0][1].device.type, (world_size(),))
    for block in blocks:
        # Explicit, because by default a block without a sharded parent is not resharded after its forward.
        fully_shard(block, mesh=mesh, reshard_after_forward=True)
    # FSDP gathers a block for its backward when the gradient of the output that FSDP saw arrives. Our hooks may replace
    # that output, so they must run after FSDP's.
    tuner.backbone.move_hooks_behind()
    sharded = [name for name, p in model.named_parameters() if isinstance(p, DTensor)]
    # DDP broadcasts parameters from the first process; sharded ones differ between processes and must be left out.
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, sharded)
