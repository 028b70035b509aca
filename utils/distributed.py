"""What torchrun needs, and nothing when it is absent: one process is rank 0 of 1."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


@contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """Joins torchrun's process group (NCCL on GPUs, Gloo on CPUs) for the time of the block."""
    if "LOCAL_RANK" not in os.environ:
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def pick_device(name: str | None = None) -> torch.device:
    """This process's device: `name` if given, else its own GPU, else the CPU.

    Raises:
        ValueError: no such device here.
    """
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device={name!r} is not a device; try cpu, cuda or cuda:1") from error
    if device.type not in ("cpu", "cuda", "mps") or (
        device.type == "mps" and not torch.backends.mps.is_available()
    ):
        raise ValueError(f"device={name!r} is not to be had here; try cpu or cuda")
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    if device.type == "cuda" and device.index >= torch.cuda.device_count():
        raise ValueError(f"device={name!r}: this machine has {torch.cuda.device_count()} CUDA GPUs")
    return device


def rank() -> int:
    """Number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def sum_over_processes(tensor: Tensor) -> Tensor:
    """`tensor` summed in place over all processes."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def broadcast_buffers(*modules: nn.Module) -> None:
    """Gives every process rank 0's buffers, such as BatchNorm's running statistics."""
    if dist.is_initialized():
        for module in modules:
            for buffer in module.buffers():
                dist.broadcast(buffer, src=0)


def union(items: dict[str, None]) -> dict[str, None]:
    """The keys that any process has, in order of rank."""
    if not dist.is_initialized():
        return items
    gathered: list[dict[str, None]] = [{}] * world_size()
    dist.all_gather_object(gathered, items)
    return {key: None for keys in gathered for key in keys}


def barrier() -> None:
    """Waits for all processes."""
    if dist.is_initialized():
        dist.barrier()


def data_parallel(model: nn.Module, device: torch.device) -> nn.Module:
    """`model` with its gradients averaged over processes; itself if there is only one."""
    if not dist.is_initialized():
        return model
    return DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None)
