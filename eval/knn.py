"""k nearest neighbours: are images of one class close together in the frozen features? Nothing is trained.

    python -m eval.knn --checkpoint runs/cae_v2_vit_b --data ~/imagenet
    torchrun --nproc_per_node=8 -m eval.knn --checkpoint mae_pretrain_vit_base.pth --pool cls

Each image is seen once (`protocol.centre_view`); its feature is the mean of the patch tokens or the class
token (`--pool`) after the final norm, scaled to length 1. The k training images with the largest cosine
similarity (not approximated) vote for their classes with weight exp(similarity / 0.07); k is 10 to 200.
Each process tests its share of the images against all training images, whose features it holds in memory
(ImageNet, width 768: 4 GB). Another number of processes changes a result only where rounding breaks a tie.
Dimension key: B images at once, k neighbours, D width, K classes, n images."""

import dataclasses
import time
import typing

import torch
import torch.nn.functional as F

if not __package__:  # started by its file name, Python does not find common.py
    raise SystemExit("error: start it in the folder of common.py as `python -m eval.knn`")
import common
from common import flag
from eval.data import find_train_and_val
from eval.protocol import (EvalConfig, all_gather, append_result, check_pool, frozen_tokens,
                           only_main_prints, open_checkpoint, random_encoder)

NEIGHBOURS, TEMPERATURE = (10, 20, 100, 200), 0.07
BLOCK = 128  # test images at once: their similarities to all of ImageNet take 0.7 GB


@dataclasses.dataclass(frozen=True)
class Config(EvalConfig):
    """The whole command line."""
    pool: typing.Literal["mean", "cls"] = flag("mean", "mean of the patch tokens, or class token")
    random_init: bool = flag(False, "a random encoder of the same shape: the baseline")


def extract(vit, images, config, dist):
    """(features (n, D) of length 1, labels (n,)) of this process's share of `images`, on the device."""
    features, labels = [], []
    for pooled, batch_labels in frozen_tokens(vit, images, config.batch_size, config, dist, config.pool):
        features.append(F.normalize(pooled, dim=1))  # (B, D)
        labels.append(batch_labels.to(dist.device))  # (B,)
    return torch.cat(features), torch.cat(labels)


def vote(similarities, labels, num_classes, counts):
    """{k: class (B,) for which the k nearest vote}, from similarities and labels (B, k), nearest first."""
    weights = (similarities / TEMPERATURE).exp()  # (B, k)
    empty = weights.new_zeros(len(weights), num_classes)  # (B, K)
    return {k: empty.scatter_add(1, labels[:, :k], weights[:, :k]).argmax(dim=1) for k in counts}


def knn(vit, train, val, config, dist):
    """{k: per cent of `val` that k neighbours in `train` get right}. Raises ValueError for few images."""
    counts = [k for k in NEIGHBOURS if k <= len(train)]
    if not counts:
        raise ValueError(f"{train.name} holds {len(train)} images, fewer than {NEIGHBOURS[0]} neighbours")
    bank, bank_labels = (all_gather(part, len(train), dist) for part in extract(vit, train, config, dist))
    features, labels = extract(vit, val, config, dist)
    right = torch.zeros(len(counts), device=dist.device)
    for queries, answers in zip(features.split(BLOCK), labels.split(BLOCK)):
        similarities, ids = (queries @ bank.T).topk(counts[-1], dim=1)  # (B, k)
        winners = vote(similarities, bank_labels[ids], len(train.classes), counts)
        right += torch.stack([winners[k].eq(answers).sum() for k in counts])
    return {k: 100 * count / len(val) for k, count in zip(counts, dist.all_reduce(right).tolist())}


def main(argv=None):
    config, started = common.parse_config(Config, __doc__, argv=argv), time.perf_counter()
    checkpoint, vit = open_checkpoint(config)
    check_pool(config.pool, vit, checkpoint)
    train, val, sets = find_train_and_val(config.data, vit.img_size[0])
    encoder = random_encoder(vit, config.seed) if config.random_init else vit
    weights = "random init" if config.random_init else "pre-trained"
    with common.distributed(config.device) as dist, only_main_prints(dist):
        common.say(f"data     {sets}")
        percent = knn(encoder, train, val, config, dist)
        if dist.is_main:
            append_result(
                "knn", checkpoint, vit, config, started, data=config.data, train=train.name, val=val.name,
                train_images=len(train), val_images=len(val), classes=len(val.classes), pool=config.pool,
                weights=weights, temperature=TEMPERATURE, accuracy=percent, device=str(dist.device),
                features="cached features, no augmentation")
            each = ", ".join(f"{value:.1f} % with {k}" for k, value in percent.items())
            print(f"kNN, {weights}: {each} neighbours")


if __name__ == "__main__":
    common.run_main(main)
