"""k nearest neighbours: do images of one class lie together in the frozen features? Nothing is trained.

    python -m eval.knn --checkpoint runs/cae_v2_vit_b --data ~/imagenet
    torchrun --nproc_per_node=8 -m eval.knn --checkpoint mae_pretrain_vit_base.pth --pool cls

Each image is seen once (`protocol.centre_view`); its feature is the mean of the patch tokens (`--pool mean`)
or the class token (`--pool cls`) after the final norm, scaled to length 1. The k training images with the
largest cosine similarity vote for their classes with weight exp(similarity / 0.07), for k = 10, 20, 100, 200
in one pass; no neighbour is approximated. `--random_init` takes a random encoder of that shape: the floor.

Every process extracts the features of its share of the images and tests its share against all training
images, whose features it holds (ImageNet, width 768: 4 GB); similarities are computed in blocks. Another
number of processes, or another block, changes a number only where rounding breaks a tie.

Dimension key: B test images, C training images at once, D width, K classes, n training images.
"""

import dataclasses
import math
import time
import typing

import torch
import torch.nn.functional as F

import common
from common import flag
from eval.protocol import (EvalConfig, append_result, check_classes, check_pool, frozen_tokens, gather,
                           open_checkpoint, pool_tokens, random_encoder)

NEIGHBOURS = (10, 20, 100, 200)
TEMPERATURE = 0.07
BLOCK = 65_536  # training images whose similarities are in memory at once, and 1024 test images


@dataclasses.dataclass(frozen=True)
class Config(EvalConfig):
    """The whole command line."""

    pool: typing.Literal["mean", "cls"] = flag("mean", "mean of the patch tokens, or class token")
    random_init: bool = flag(False, "a random encoder of the same shape: the floor")


def extract(vit, images, config, processes):
    """(features (n, D) of length 1, labels (n,)) of this process's share of `images`, on the device."""
    features, labels = [], []
    for tokens, batch_labels in frozen_tokens(vit, images, config.batch_size, config, processes):
        features.append(F.normalize(pool_tokens(tokens, config.pool, math.prod(vit.grid)), dim=1))  # (B, D)
        labels.append(batch_labels.to(processes.device))
    return torch.cat(features), torch.cat(labels)


def nearest(queries, bank, k, block=BLOCK):
    """The k largest similarities of (B, D) queries to the rows of a bank (n, D), and their rows: (B, k)."""
    similarities, ids = queries[:, :0], queries[:, :0].long()
    for first in range(0, len(bank), block):
        found = queries @ bank[first: first + block].T  # (B, C)
        similarities = torch.cat([similarities, found], dim=1)  # (B, k+C)
        new_ids = torch.arange(first, first + found.shape[1], device=ids.device).expand(found.shape)
        similarities, best = similarities.topk(min(k, similarities.shape[1]), dim=1)  # (B, k)
        ids = torch.cat([ids, new_ids], dim=1).gather(1, best)  # (B, k)
    return similarities, ids


def vote(similarities, neighbour_labels, num_classes, counts=NEIGHBOURS):
    """{k: class (B,) for which the k nearest neighbours vote}; both arguments (B, k), the nearest first."""
    weights, votes, done, winners = (similarities / TEMPERATURE).exp(), 0, 0, {}
    for k in counts:
        new = slice(done, k)
        votes = votes + weights.new_zeros(len(weights), num_classes).scatter_add(
            1, neighbour_labels[:, new], weights[:, new])  # (B, K)
        winners[k], done = votes.argmax(dim=1), k
    return winners


def knn(vit, train, val, config, processes):
    """{k: per cent of `val` that k neighbours in `train` get right}, for each k up to their number."""
    counts = [k for k in NEIGHBOURS if k <= len(train)]
    if not counts:
        raise ValueError(f"{train.name} holds {len(train)} images, fewer than {NEIGHBOURS[0]} neighbours")
    bank, bank_labels = (gather(part, len(train), processes)
                         for part in extract(vit, train, config, processes))
    right = torch.zeros(len(counts), device=processes.device)
    for queries, labels in zip(*(part.split(1024) for part in extract(vit, val, config, processes))):
        similarities, ids = nearest(queries, bank, counts[-1])
        winners = vote(similarities, bank_labels[ids], len(train.classes), counts)
        right += torch.stack([winners[k].eq(labels).sum() for k in counts])
    return {k: 100 * count / len(val) for k, count in zip(counts, processes.sum(right).tolist())}


def main(argv=None):
    config, started = common.parse_config(Config, __doc__, argv=argv), time.perf_counter()
    checkpoint, vit = open_checkpoint(config)
    check_pool(config.pool, vit, checkpoint)
    train, val = (common.find_data(config.data, split, vit.img_size[0]) for split in ("train", "val"))
    check_classes(train, val)
    with common.processes(config.device) as processes:
        encoder = random_encoder(vit, config.seed) if config.random_init else vit
        weights = "random init" if config.random_init else "pre-trained"
        percent = knn(encoder, train, val, config, processes)
        if processes.main:
            append_result("knn", checkpoint, vit, config, started, data=config.data, train=train.name,
                          val=val.name, train_images=len(train), val_images=len(val),
                          classes=len(val.classes), pool=config.pool, weights=weights,
                          temperature=TEMPERATURE, seed=config.seed, device=str(processes.device),
                          accuracy={str(k): value for k, value in percent.items()},
                          features="cached features, no augmentation")
            each = ", ".join(f"{value:.1f} % with {k}" for k, value in percent.items())
            print(f"kNN, {weights}: {each} neighbours")


if __name__ == "__main__":
    common.run_main(main)
