"""Batches of a split, on a process's device.

    decode    file -> RGB uint8 square        once, into the device's memory, up to 4 GiB a split; else by workers
    augment   crop after zero padding, flip   whole batches, on the device (segmentation: flip)
    resize    bicubic to the network's side, ImageNet's mean and std          whole batches, on the device

The sequence of global batches, and what augmentation does to each sample, are functions of seed, epoch and step alone:
the number of processes, workers and accumulation steps changes neither.

Shapes: B images, H W pixels, S side of a decoded image, M side of a map of labels.
"""

import math
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch.utils.data import DataLoader

from common.cli import InputError
from common.distributed import all_reduce, progress
from common.images import pad_crop_flip, random_crop, resize_mask, square, stretch, to_input

VOID = 255  # in masks: a pixel that takes no part
RESIDENT_BYTES = 4 * 2**30
ORDER, AUGMENT, CROP, LINEAR, WRONG_LABELS = range(5)  # what a stream of random numbers is for


def random_generator(purpose, *key):
    """A generator whose numbers belong to `purpose` and `key`, whatever was drawn elsewhere."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence((purpose, *key)).generate_state(1)[0]))


class Loader:
    """Batches of a split on this process's device: `epoch` for training, `in_order` for evaluation, `fetch` for any
    lists of samples.

    Images are (B, 3, image_size, image_size) float32; for segmentation there may be several, one for each of `sides`.
    Targets are (B,) int64, or masks (B, M, M) int64 with M = args.map_size and -100 for void, as PyTorch's losses
    have it; with `native` a list of masks (H, W) uint8 as their files have them.
    """

    def __init__(self, split, args, world, *, augment=False, sides=None, native=False):
        self.split, self.args, self.world = split, args, world
        self.augment, self.native = augment, native
        self.sides = sides or [args.image_size]
        self.resized_crop = augment and args.resized_crop
        self.pad = 0 if self.resized_crop or split.masks else args.crop_size // 8  # 4 for CIFAR, 8 for Tiny-ImageNet
        first = self.decode(0)
        streams = native or self.resized_crop or len(split) * sum(part.nbytes for part in first) > RESIDENT_BYTES
        self.resident = None if streams else self.decode_all(first)

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
        """Images (B, S, S, 3) and targets of this rank, shifted and flipped; masks are flipped with their images. Drawn
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
        """As `fetch`, but images are (B, S, S, 3) uint8; from the device's memory, or by workers. `key` is for what is
        drawn at random."""
        if self.resident is None:
            found = self.by_workers(batches, key)
        else:
            own = (batch.to(self.world.device, non_blocking=True) for batch in batches)
            found = ([part[indices] for part in self.resident] for indices in own)
        for *images, targets in found:
            if self.split.masks and not self.native:
                targets = targets.long().masked_fill_(targets == VOID, -100)
            yield *images, targets

    def by_workers(self, batches, key):
        """The parts of each list of samples; masks as their files have them are a list."""

        def load(indices):
            try:
                *images, targets = zip(*[self.decode(i, key) for i in indices.tolist()], strict=True)
            except InputError as error:  # as a value: the DataLoader would wrap it into a traceback
                return error
            targets = list(targets) if self.native else torch.stack(targets)
            return [*map(torch.stack, images), targets]

        options = {"num_workers": self.args.workers, "pin_memory": self.world.device.type == "cuda"}
        if self.args.workers:  # fork: functions cannot be pickled; setpgid: signals to the group are for the run
            options |= {"multiprocessing_context": "fork", "worker_init_fn": lambda worker: os.setpgid(0, 0)}
        # An item is a batch's indices; collate_fn decodes them, in the worker.
        for parts in DataLoader(list(batches), batch_size=None, collate_fn=load, **options):
            if isinstance(parts, InputError):
                raise parts
            yield [x if isinstance(x, list) else x.to(self.world.device, non_blocking=True) for x in parts]

    def decode(self, i, key=()):
        """The parts of sample i: pixels (S, S, 3) uint8 for each side, and target or mask."""
        image, target = self.split.read(i)
        if self.split.masks:
            mask = torch.from_numpy(target)
            if not self.native:
                mask = resize_mask(mask, self.args.map_size)
            return [*(stretch(image, side) for side in self.sides), mask]
        if self.resized_crop:
            pixels = random_crop(image, self.args.crop_size, random_generator(CROP, *key, i).initial_seed())
        else:
            pixels = square(image, self.args.crop_size, self.args.resize_size)
        return [pixels, torch.tensor(target)]

    def decode_all(self, first):
        """Every part of all samples, stacked, on the device. Each rank decodes its share, adds zero to the others'."""
        world, count = self.world, len(self.split)
        stores = [torch.zeros(count, *part.shape, dtype=part.dtype) for part in first]
        own = range(world.rank, count, world.size)
        with ThreadPoolExecutor(max(1, self.args.workers)) as pool:
            decoded = progress(pool.map(self.decode, own), "decode", world, len(own))
            for i, parts in zip(own, decoded, strict=True):
                for store, part in zip(stores, parts, strict=True):
                    store[i] = part
        stores = [store.to(world.device) for store in stores]
        all_reduce(*stores)
        return stores
