"""How two processes of a test find each other: as torchrun would start them, on a port of this machine."""

import os
import socket

import torch


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def become(rank: int, port: int) -> None:
    """Make this process that `rank` of two; the first trainer, or init_process_group, joins them."""
    torch.set_num_threads(1)
    own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= own | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
