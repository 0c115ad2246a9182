"""The processes of a run, one for each GPU: their start, their turns, progress bars, sums and means over them."""

import contextlib
import functools
import os
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist
from tqdm import tqdm

from common.cli import InputError


class World(NamedTuple):
    """This process among those that torchrun started; without torchrun rank 0 of size 1, and no process group."""

    rank: int
    local_rank: int
    size: int
    device: torch.device
    store: dist.Store | None = None


def start_processes(device="auto"):
    """Join torchrun's process group (nccl on GPUs, gloo on the CPU) -> World. device: "auto", "cpu" or "cuda"."""
    rank, local_rank = (int(os.environ.get(name, 0)) for name in ("RANK", "LOCAL_RANK"))
    cuda = torch.cuda.is_available() and device != "cpu"
    if device == "cuda" and not cuda:
        raise InputError("--device cuda: no CUDA device here; use --device cpu")
    if cuda and local_rank >= torch.cuda.device_count():
        raise InputError(f"more processes than GPUs ({torch.cuda.device_count()}); lower --nproc_per_node")
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if "RANK" not in os.environ:
        return World(0, 0, 1, device)
    store, rank, size = next(dist.rendezvous("env://"))
    where = {"backend": "nccl", "device_id": device} if cuda else {"backend": "gloo"}
    dist.init_process_group(store=store, rank=rank, world_size=size, **where)
    return World(rank, local_rank, size, device, store)


@contextlib.contextmanager
def in_turn(world, what):
    """Rank 0, then one rank of every other node, then all others: what is missing is downloaded once, whether the nodes
    share a file system or not. They wait in the store, which no collective's time limit touches. `what`: its key."""
    node = os.environ.get("GROUP_RANK", "0")
    if world.rank != 0:
        world.store.wait([f"{what} {'0' if world.local_rank == 0 else node}"], timedelta(days=7))
    yield
    if world.local_rank == 0 and world.store:
        world.store.set(f"{what} {node}", "done")


def all_reduce(*tensors):
    """Sum each over all processes, in place."""
    for tensor in tensors if dist.is_initialized() else ():
        dist.all_reduce(tensor)


def progress(items, label, world, total=None):
    """`items` with a progress bar on rank 0's terminal."""
    return tqdm(items, label, total, leave=False, disable=None if world.rank == 0 else True)


class Meter:
    """Means over samples since the last reading, and peaks. Sums stay on the device, so that no step waits for it."""

    def __init__(self):
        self.pairs = {}  # {name: tensor (sum, weight)}, or (peak, 1) where the name begins with max_

    def add(self, samples, stats):
        """stats: {name: mean over so many samples, or peak}."""
        pairs = {}
        for name, value in stats.items():
            value = torch.as_tensor(value, dtype=torch.float64)
            pairs[name] = torch.stack([value, torch.ones_like(value)]) * (1 if name.startswith("max_") else samples)
        self.pairs = merge(self.pairs, pairs)

    def read(self, world):
        """{name: (sum, weight) or (peak, 1)} over all processes; the meter starts anew."""
        table = torch.stack([pair.to(world.device) for pair in self.pairs.values()])  # (names, 2)
        tables = [table]
        if dist.is_initialized():
            tables = [torch.empty_like(table) for _ in range(world.size)]
            dist.all_gather(tables, table)
        names, self.pairs = list(self.pairs), {}
        return functools.reduce(merge, (dict(zip(names, pairs, strict=True)) for pairs in torch.stack(tables).cpu()))


def merge(one, other):
    """Two readings of a meter as one."""
    both = one.keys() & other.keys()
    merged = {k: torch.maximum(one[k], other[k]) if k.startswith("max_") else one[k] + other[k] for k in both}
    return one | other | merged
