"""Batches of a split, on a process's device.

    decode    file -> RGB uint8 square        once, into the device's memory, up to 1/8 of it; else by workers
    augment   crop after zero padding, flip   whole batches, on the device (segmentation: flip)
    resize    bicubic to the network's side, ImageNet's mean and std          whole batches, on the device

The sequence of global batches, and what augmentation does to each sample, are functions of seed, epoch and step alone:
the number of processes, workers and accumulation steps changes neither.

Shapes: B images, H W pixels, S side of a decoded image, M side of a map of labels.
"""

import math
import os
import shutil
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader

from common.cli import InputError
from common.distributed import all_reduce, progress
from common.images import pad_crop_flip, random_crop, resize, resize_mask, square, to_input

VOID = 255  # in masks: a pixel that takes no part
PIECE = 64  # images at most that a worker decodes at a time, so that a large batch is shared among the workers
PREFETCH = 2  # pieces that each worker is asked for ahead of time
ORDER, AUGMENT, CROP, LINEAR, WRONG_LABELS = range(5)  # what a stream of random numbers is for


def random_generator(purpose, *key):
    """A generator whose numbers belong to `purpose` and `key`, whatever was drawn elsewhere."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence((purpose, *key)).generate_state(1)[0]))


def memory_share(world, share):
    """Bytes: `share` of the memory of the smallest GPU of all processes; on a CPU always 4 GiB."""
    if world.device.type == "cpu":
        return 4 * 2**30
    total = torch.tensor(torch.cuda.get_device_properties(world.device).total_memory, device=world.device)
    if dist.is_initialized():
        dist.all_reduce(total, dist.ReduceOp.MIN)
    return share * total.item()


class Decoder:
    """Reads samples and gives their parts: an image (3, S, S) uint8 for each side, and the class or mask (M, M)."""

    def __init__(self, split, args, *, sides, resized_crop):
        self.split, self.args = split, args
        self.sides, self.resized_crop = sides, resized_crop

    def decode(self, i, key=()):
        """The parts of sample i. `key` is for what is drawn at random."""
        pixels, target = self.split.read(i)
        if self.split.masks:
            mask = resize_mask(torch.from_numpy(target), self.args.map_size)
            return [*(resize(pixels.movedim(-1, 0), side) for side in self.sides), mask]
        if self.resized_crop:
            image = random_crop(pixels, self.args.crop_size, random_generator(CROP, *key, i).initial_seed())
        else:
            image = square(pixels, self.args.crop_size, self.args.resize_size)
        return [image, torch.tensor(target)]

    def __getitem__(self, request):
        """The parts of the samples `indices` of a request (indices, key), each stacked. An InputError is returned:
        raised, it would leave a worker as a traceback."""
        indices, key = request
        try:
            samples = [self.decode(i, key) for i in indices]
        except InputError as error:
            return error
        return [torch.stack(part) for part in zip(*samples, strict=True)]


class Loader:
    """Batches of a split on this process's device: `epoch` for training, `in_order` for evaluation, `fetch` for any
    lists of samples.

    Images are (B, 3, image_size, image_size) float32; for segmentation there may be several, one for each of `sides`.
    Targets are (B,) int64, or masks (B, M, M) int64 with M = args.map_size and -100 for void, as PyTorch's losses
    have it.

    A set of up to an eighth of the device's memory is decoded once and stays there. Larger ones, and random resized
    crops, are decoded for each batch, by args.workers processes that live as long as the loader: one iteration at a
    time.
    """

    def __init__(self, split, args, world, *, augment=False, sides=None):
        self.split, self.args, self.world, self.augment = split, args, world, augment
        self.sides = sides or [args.image_size]
        self.resized_crop = augment and args.resized_crop
        self.pad = 0 if self.resized_crop or split.masks else args.crop_size // 8  # 4 for CIFAR, 8 for Tiny-ImageNet
        self.decoder = Decoder(split, args, sides=self.sides, resized_crop=self.resized_crop)
        first = self.decoder.decode(0)
        self.sample_bytes = sum(part.nbytes for part in first)
        too_large = len(split) * self.sample_bytes > memory_share(world, 1 / 8)
        self.resident = None if self.resized_crop or too_large else self.decode_all(first)
        self.requests, self.workers = [], None

    def __len__(self):
        """The number of steps in an epoch."""
        return math.ceil(len(self.split) / self.args.batch_size)

    def epoch(self, epoch, start=0):
        """This process's (images, targets) of each global batch of `epoch`, from number `start` on.

        Global batch number s holds samples s*m to (s+1)*m of a permutation drawn from (seed, epoch); the last one may
        be smaller. A rank for which nothing is left gets an image whose target is -100: all take the same steps.
        """
        seed = self.args.seed
        order = torch.randperm(len(self.split), generator=random_generator(ORDER, seed, epoch))
        batches = order.split(self.args.batch_size)[start:]
        decoded = self.decoded([self.own_part(batch) for batch in batches], key=(seed, epoch))
        for step, (batch, (images, targets)) in enumerate(zip(batches, decoded, strict=True), start):
            if self.augment:
                generator = random_generator(AUGMENT, seed, epoch, step)
                images, targets = self.augmented(images, targets, len(batch), generator)
            if self.world.rank >= len(batch):
                targets = torch.full_like(targets, -100)
            yield to_input(images, self.args.image_size), targets

    def own_part(self, batch):
        """What belongs to this rank of a tensor with a row for each sample of the global batch: near-equal runs, and
        the first row, not to be counted, where nothing is left."""
        if self.world.rank >= len(batch):
            return batch[:1]
        return batch.tensor_split(self.world.size)[self.world.rank]

    def augmented(self, images, targets, count, generator):
        """Images (B, 3, S, S) and targets of this rank, shifted and flipped; masks are flipped with their images. Drawn
        for all `count` samples of the global batch, and so the same whatever the number of ranks."""
        shifts = torch.randint(0, 2 * self.pad + 1, (count, 2), generator=generator)
        flips = torch.rand(count, generator=generator) < 0.5
        shifts, flips = (self.own_part(x).to(images.device, non_blocking=True) for x in (shifts, flips))
        if self.split.masks:
            targets = torch.where(flips[:, None, None], targets.flip(2), targets)
        return pad_crop_flip(images, shifts, flips, self.pad), targets

    def in_order(self, batch_size):
        """(indices, *images, targets) of every sample once. Whole batches are dealt to the ranks in turn, so a sample's
        batch is the same for any number of processes, and so are its features to the last bit."""
        own = torch.arange(len(self.split)).split(batch_size)[self.world.rank :: self.world.size]
        for indices, parts in zip(own, self.fetch(own), strict=True):
            yield indices, *parts

    def fetch(self, batches):
        """(*images, targets) of each list of samples."""
        for *images, targets in self.decoded(batches):
            yield *(to_input(x, side) for x, side in zip(images, self.sides, strict=True)), targets

    def decoded(self, batches, key=()):
        """As `fetch`, but images are (B, 3, S, S) uint8; from the device's memory, or by workers. `key` is for what is
        drawn at random."""
        if self.resident is None:
            found = self.by_workers(batches, key)
        else:
            on_device = (batch.to(self.world.device, non_blocking=True) for batch in batches)
            found = ([part[indices] for part in self.resident] for indices in on_device)
        for *images, targets in found:
            if self.split.masks:
                targets = targets.long().masked_fill_(targets == VOID, -100)
            yield *images, targets

    def by_workers(self, batches, key):
        """The parts of each list of samples, put together from the pieces that workers decode."""
        if self.workers is None:
            self.workers = self.start_workers(max(map(len, batches), default=0))
        pieces = [batch.split(PIECE) for batch in batches]
        self.requests[:] = [(indices.tolist(), key) for batch in pieces for indices in batch]
        decoded = iter(self.workers)
        for batch in pieces:
            received = []  # [part, ...] of each piece, on the device
            for _ in batch:
                parts = next(decoded)
                if isinstance(parts, InputError):
                    raise parts
                received.append([part.to(self.world.device, non_blocking=True) for part in parts])
            joined = [torch.cat(part) for part in zip(*received, strict=True)]
            del parts, received  # on a CPU they are in shared memory
            yield joined

    def start_workers(self, batch_size):
        """A DataLoader that gives what self.requests lists, in this order, whenever it is iterated. Raises InputError
        where /dev/shm cannot hold the images between workers and training: a worker would die of a bus error."""
        workers = self.args.workers
        options = {"sampler": self.requests, "batch_size": None, "collate_fn": lambda parts: parts}
        if not workers:
            return DataLoader(self.decoder, **options)
        images = batch_size + workers * PREFETCH * min(PIECE, batch_size)
        needed = images * self.sample_bytes * int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        if os.path.isdir("/dev/shm") and needed > (free := shutil.disk_usage("/dev/shm").free):
            raise InputError(f"--workers {workers}: up to {needed / 1e9:.2f} GB of images are in shared memory at a "
                             f"time, and /dev/shm has {free / 1e9:.2f} GB; take fewer or 0, or give the container more "
                             "(docker run --ipc=host)")  # fmt: skip
        options |= {"num_workers": workers, "prefetch_factor": PREFETCH, "persistent_workers": True}
        return DataLoader(
            self.decoder,
            **options,
            pin_memory=self.world.device.type == "cuda",
            multiprocessing_context="fork",  # functions cannot be pickled
            worker_init_fn=lambda worker: os.setpgid(0, 0),  # signals to the group are for the run
        )

    def decode_all(self, first):
        """Every part of all samples, stacked, on the device. Each rank decodes its share, adds zero to the others'."""
        world, count = self.world, len(self.split)
        stores = [torch.zeros(count, *part.shape, dtype=part.dtype, device=world.device) for part in first]
        own = range(world.rank, count, world.size)
        with ThreadPoolExecutor(max(1, self.args.workers)) as pool:
            decoded = progress(pool.map(self.decoder.decode, own), "decode", world, len(own))
            for i, parts in zip(own, decoded, strict=True):
                for store, part in zip(stores, parts, strict=True):
                    store[i] = part
        all_reduce(*stores)
        return stores
