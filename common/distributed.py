"""The processes of a run, one for each GPU: their start, their turns, progress bars, sums and means over them."""

import contextlib
import os
import warnings
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from common.cli import InputError

PEAKS = {"max_ratio", "signal"}  # of these a meter keeps the largest value, of all others the mean


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
    """Rank 0, then the first rank of every other node, then all others: what is missing is downloaded once, whether the
    nodes share a file system or not. They wait for keys of the store, which no collective's time limit ends, and go on
    when every node is through."""
    if world.size == 1:
        yield
        return
    node, nodes = int(os.environ.get("GROUP_RANK", 0)), int(os.environ.get("GROUP_WORLD_SIZE", 1))
    first_of_node, limit = world.local_rank == 0, timedelta(days=7)
    if world.rank > 0:
        world.store.wait([f"node {0 if first_of_node else node} has {what}"], limit)
    try:
        yield
        if first_of_node:
            world.store.set(f"node {node} has {what}", "")
    finally:  # after an error, too, which ends this process: the other nodes would wait for days
        if first_of_node:
            world.store.set(f"node {node} is through with {what}", "")
    world.store.wait([f"node {i} is through with {what}" for i in range(nodes)], limit)


def all_reduce(*tensors):
    """Sum each over all processes, in place."""
    if dist.is_initialized():
        for tensor in tensors:
            dist.all_reduce(tensor)


def data_parallel(policy):
    """policy.encoder; with several processes inside DDP, unless it is frozen, and all start from rank 0's weights."""
    if not dist.is_initialized():
        return policy.encoder
    for value in policy.state_dict().values():
        dist.broadcast(value, 0)
    if not any(parameter.requires_grad for parameter in policy.encoder.parameters()):
        return policy.encoder
    warnings.filterwarnings("ignore", message="Grad strides do not match")  # of parameters (1, 1, D): harmless
    return DistributedDataParallel(policy.encoder)


def progress(items, label, world, total=None):
    """`items` with a progress bar on rank 0's terminal."""
    return tqdm(items, label, total, leave=False, disable=None if world.rank == 0 else True)


class Meter:
    """Weighted means, and peaks, since the last reading. Sums stay on the device, so that no step waits for it."""

    def __init__(self):
        self.sums = {}  # {name: tensor (weighted sum, weight)}, for PEAKS (largest value, 1)

    def add(self, weight, stats):
        """stats: {name: mean over `weight` samples, or peak}."""
        pairs = {}
        for name, value in stats.items():
            value = torch.as_tensor(value, dtype=torch.float64)
            pair = torch.stack([value, torch.ones_like(value)])
            pairs[name] = pair if name in PEAKS else pair * weight
        self.sums = merge(self.sums, pairs)

    def read(self, world):
        """{name: (weighted sum, weight) or (largest value, 1)} over all processes; the meter starts anew."""
        names, pairs = list(self.sums), torch.stack([pair.to(world.device) for pair in self.sums.values()])
        self.sums = {}
        tables = [pairs]  # (names, 2) of each process
        if world.size > 1:
            tables = [torch.empty_like(pairs) for _ in range(world.size)]
            dist.all_gather(tables, pairs)
        reading = {}
        for table in torch.stack(tables).cpu():
            reading = merge(reading, dict(zip(names, table, strict=True)))
        return reading


def merge(one, other):
    """Two readings of a meter as one."""
    merged = one | other
    for name in one.keys() & other.keys():
        merged[name] = torch.maximum(one[name], other[name]) if name in PEAKS else one[name] + other[name]
    return merged
