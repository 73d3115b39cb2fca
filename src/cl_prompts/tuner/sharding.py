"""One frozen backbone in the memory of many processes, with torch's FSDP2.

What a prompt method trains is small and grows with the tasks, so every process keeps it whole and DDP adds its gradients.
Wrapping the whole model, as Accelerate's FSDP does, would cut that up too. The frozen blocks neither change nor grow: each
process keeps its share of their weights and the whole block only while it computes.
"""

from __future__ import annotations

from peft import PeftModel
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from cl_prompts.runtime.distributed import world_size


def shard_frozen_blocks(model: PeftModel) -> None:
    """Spread the weights of the base's transformer blocks over all processes; answers and training stay the same.

    To be called once, on every process, when the model is on its device and before it is wrapped. From then on every
    forward is one of all processes: each must call it equally often, as it does in training, in `evaluate` and with
    `ContinualTrainer`. Embeddings, final norm, pools and heads stay whole everywhere, and so does what is saved.

    Args:
        model: with a frozen base, not wrapped.

    Raises:
        ValueError: there is one process only, the blocks are sharded already, or something in them is to be trained.
    """
    if world_size() == 1:
        raise ValueError("there is one process, nobody to share the blocks with: launch several, or do not shard")
    tuner = model.base_model
    blocks = [tuner.model.get_submodule(name) for name in tuner.structure.blocks]
    inside = [(name, p) for block in blocks for name, p in block.named_parameters()]
    if any(isinstance(p, DTensor) for _, p in inside):
        raise ValueError("the blocks of this base are sharded already")
    trained = [name for name, p in inside if p.requires_grad]
    if trained:
        raise ValueError(f"only what stays frozen can be sharded, and {trained[:3]} in the blocks are to be trained")
    mesh = init_device_mesh(inside[0][1].device.type, (world_size(),))
    for block in blocks:
        # Said explicitly: by default a block without a sharded parent would stay whole once it has computed.
        fully_shard(block, mesh=mesh, reshard_after_forward=True)
    # FSDP gathers a block for its backward when the gradient of what it has seen leave the block arrives.
    tuner.backbone.move_hooks_behind()
    sharded = [name for name, p in model.named_parameters() if isinstance(p, DTensor)]
    # DDP would hand every frozen weight to all processes as it was on the first; these are not whole on any.
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, sharded)
