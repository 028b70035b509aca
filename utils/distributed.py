"""What torchrun needs, and nothing when it is absent: one process is rank 0 of 1."""

import datetime
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

# A process waits this much longer for the others than for its own images, so that the process with
# the problem reports it first.
MARGIN_S = 60


@contextmanager
def process_group(device: torch.device, timeout_s: float = 600) -> Iterator[None]:
    """Joins torchrun's process group (NCCL on GPUs, Gloo on CPUs) for the block.

    Args:
        timeout_s: how long a process waits for its images; it waits `MARGIN_S` longer for others.

    Raises:
        ConnectionError: the other processes cannot be reached, or one of them died or hangs.
    """
    if not launched():
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    timeout = datetime.timedelta(seconds=timeout_s + MARGIN_S)
    backend = "nccl" if device.type == "cuda" else "gloo"
    try:
        dist.init_process_group(backend, timeout=timeout, **_fresh_store(timeout))
    except (RuntimeError, ValueError) as error:  # a port in use, a missing variable
        reason = str(error).splitlines()[0]
        raise ConnectionError(f"cannot join the other processes at {address} ({reason})") from error
    try:
        yield
    except RuntimeError as error:
        if not _is_network_error(error):
            raise
        reason = str(error).splitlines()[0]
        raise ConnectionError(f"another process died or hangs ({reason})") from error
    finally:
        dist.destroy_process_group()


def _fresh_store(timeout: datetime.timedelta) -> dict[str, Any]:
    """Arguments of init_process_group that separate processes that torchrun has restarted.

    PyTorch 2.14's torchrun keeps one store over all restarts, in which new processes may find the
    addresses of dead ones. Restarts of several nodes have no common number; there torchrun needs
    TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 (docs/scale.md).
    """
    env = os.environ
    if env.get("TORCHELASTIC_USE_AGENT_STORE") != "True" or env.get("GROUP_WORLD_SIZE") != "1":
        return {}
    port, size = int(env["MASTER_PORT"]), int(env["WORLD_SIZE"])
    store = dist.TCPStore(env["MASTER_ADDR"], port, size, is_master=False, timeout=timeout)
    store = dist.PrefixStore(f"restart {env['TORCHELASTIC_RESTART_COUNT']}", store)
    return {"store": store, "rank": int(env["RANK"]), "world_size": size}


def launched() -> bool:
    """Whether torchrun, or a launcher that sets the same variables, started this process."""
    return "LOCAL_RANK" in os.environ


def _is_network_error(error: RuntimeError) -> bool:
    words = ("gloo", "pair closure", "timed out", "connection", "socket")  # Gloo has no type
    is_of_loader = str(error).startswith("DataLoader")  # which times out in the same words
    found = any(word in str(error).lower() for word in words) and not is_of_loader
    return isinstance(error, dist.DistError) or found


def pick_device(name: str | None = None) -> torch.device:
    """The device of this process: `name` if given, else its own GPU, else the CPU.

    Raises:
        ValueError: there is no such device.
    """
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device={name!r} is not a device; try cpu, cuda or cuda:1") from error
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device={name!r} is not available here; try cpu or cuda")
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


def gather(tensor: Tensor) -> Tensor:
    """`tensor` of every process, stacked by rank."""
    if not dist.is_initialized():
        return tensor[None].clone()
    found = [torch.empty_like(tensor) for _ in range(world_size())]
    dist.all_gather(found, tensor)
    return torch.stack(found)


def broadcast_buffers(*modules: nn.Module) -> None:
    """Gives every process the buffers of rank 0, such as BatchNorm's running statistics."""
    if dist.is_initialized():
        for module in modules:
            for buffer in module.buffers():
                dist.broadcast(buffer, src=0)


def gather_objects(item: Any) -> list[Any]:
    """`item` of every process, by rank."""
    found = [item] * world_size()
    if dist.is_initialized():
        dist.all_gather_object(found, item)
    return found


def union(items: dict[str, None]) -> dict[str, None]:
    """The keys of all processes, by rank."""
    return {key: None for keys in gather_objects(items) for key in keys}


def of_rank_0(make: Callable[[], Any]) -> Any:
    """The result of `make` in the process of rank 0, in every process; its ValueError too."""
    if not dist.is_initialized():
        return make()
    found: list[Any] = [None]
    if rank() == 0:
        try:
            found = [make()]
        except (ValueError, OSError) as error:  # else the others would wait forever
            found = [error]
    dist.broadcast_object_list(found)
    if isinstance(found[0], Exception):
        raise found[0]
    return found[0]


def data_parallel(
    model: nn.Module, device: torch.device, sync_batchnorm: bool = False
) -> nn.Module:
    """`model` with gradients averaged over processes; the model itself if there is only one.

    Args:
        sync_batchnorm: whether BatchNorm statistics are those of the images of all processes.

    Raises:
        ValueError: `sync_batchnorm` on a CPU, where PyTorch has none.
    """
    if sync_batchnorm and device.type != "cuda":
        raise ValueError("sync_batchnorm=True needs GPUs: PyTorch has no SyncBatchNorm on CPUs")
    if not dist.is_initialized():
        return model
    if sync_batchnorm:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    return DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None)


def sync_gradients(net: nn.Module, now: bool) -> AbstractContextManager:
    """Whether backward passes in the block average the gradients of `data_parallel`'s result."""
    return nullcontext() if now or not dist.is_initialized() else net.no_sync()
