"""Linear probe: what a straight line through frozen features knows, beside the same encoder at random.

    python -m eval.linear_probe --checkpoint runs/cae_v2_demo/encoder.safetensors --data scenes
    python -m eval.linear_probe --checkpoint mae_pretrain_vit_base.pth --data ~/imagenet --pool cls

The encoder is frozen and in eval mode. Each image is seen once, without augmentation; its feature is the
mean of the patch tokens (`--pool mean`) or the class token (`--pool cls`) after the final norm. Features are
standardised with the statistics of the training images (the BatchNorm without affine of the papers' probe),
and ridge regression to one-hot labels, solved in closed form, is the classifier. There is nothing to tune
and nothing is drawn: the same command gives the same number. Of the features only a D x D matrix is kept,
so the data may have any size. The same is done for a random encoder of the same shape: the floor.

This is not the papers' protocol (LARS, 90 epochs, random crops), which costs far more, gives other numbers,
and is to come as a mode of its own: compare the numbers of this file with one another only.

The papers probe the class token. The mean is the default here, because every encoder has patch tokens while
some have no class token and some methods do not train it: one default lets methods be compared.

Result: one line, and a JSON line with all that is needed to repeat it in eval.jsonl beside the checkpoint.

Dimension key: B batch, N patches, D width, K classes, n images, H image height and width.
"""

import dataclasses
import time
import typing

import torch
import torch.nn.functional as F
from tqdm import tqdm

import common
from common import flag
from eval.protocol import (CentreViews, EvalConfig, append_result, check_classes, open_checkpoint,
                           random_encoder)

# Added to the diagonal of the correlation matrix of the features, whose own diagonal is 1. In terms of the
# sum over n images: RIDGE * n. Fixed, so that no number was chosen by looking at the test images.
RIDGE = 1e-2


@dataclasses.dataclass(frozen=True)
class Config(EvalConfig):
    """The whole command line."""

    pool: typing.Literal["mean", "cls"] = flag("mean", "mean of the patch tokens, or class token")


@torch.no_grad()
def extract(vit, images, config, device):
    """Yields the features of all images in order, and their labels: (B, D) float64 and (B,), on the CPU."""
    vit.eval().to(device)
    loader = torch.utils.data.DataLoader(CentreViews(images, vit.img_size), config.batch_size,
                                         num_workers=config.workers, pin_memory=device.type == "cuda")
    for batch, labels in tqdm(loader, images.name, len(loader), leave=False, disable=None):
        tokens = vit(common.normalise(batch.to(device, non_blocking=True)))  # (B, 1+N, D)
        N = vit.grid[0] * vit.grid[1]
        features = tokens[:, 0] if config.pool == "cls" else tokens[:, -N:].mean(dim=1)  # (B, D)
        if not features.isfinite().all():
            raise ValueError("the encoder gives features that are not finite: its training went wrong")
        yield features.cpu().double(), labels


def fit_ridge(batches, num_classes, ridge=RIDGE):
    """Ridge regression of one-hot labels y on standardised features z, in one pass over (x, labels) batches.

    Minimises mean |z W + b - y|^2 + ridge |W|^2 with z = (x - mean) / sqrt(variance + 1e-6) over all x. That
    takes no more than sums over the images: of x, y, x x^T and x y^T.
    Returns (weight (D, K), bias (K,)) float64, for x itself: the standardisation is folded in.
    """
    n, x_sum, y_sum, xx, xy = 0, 0, 0, 0, 0
    for features, labels in batches:
        targets = F.one_hot(labels, num_classes).double()  # (B, K)
        n += len(features)
        x_sum = x_sum + features.sum(dim=0)  # (D,)
        y_sum = y_sum + targets.sum(dim=0)  # (K,)
        xx = xx + features.T @ features  # (D, D)
        xy = xy + features.T @ targets  # (D, K)
    mean, share = x_sum / n, y_sum / n
    covariance = xx / n - mean.outer(mean)  # (D, D)
    std = (covariance.diagonal() + 1e-6).sqrt()
    correlation = covariance / std.outer(std)
    cross = (xy / n - mean.outer(share)) / std[:, None]  # (D, K)
    correlation.diagonal().add_(ridge)
    weight = torch.linalg.solve(correlation, cross) / std[:, None]  # (D, K)
    return weight, share - mean @ weight


def accuracy(batches, weight, bias):
    """Per cent of the images in (features, labels) batches whose largest output is their label's."""
    right = count = 0
    for features, labels in batches:
        right += int((features @ weight + bias).argmax(dim=1).eq(labels).sum())
        count += len(labels)
    return 100 * right / count


def probe(vit, train, val, config, device):
    """Per cent of `val` that the ridge classifier of `train` gets right on the frozen features of `vit`."""
    weight, bias = fit_ridge(extract(vit, train, config, device), len(train.classes))
    return accuracy(extract(vit, val, config, device), weight, bias)


def main(argv=None):
    config, started = common.parse_config(Config, __doc__, argv=argv), time.perf_counter()
    checkpoint, vit = open_checkpoint(config)
    if config.pool == "cls" and vit.cls_token is None:
        raise ValueError(f"--pool cls: the encoder in {checkpoint} has no class token, use --pool mean")
    train, val = (common.find_data(config.data, split, vit.img_size[0]) for split in ("train", "val"))
    check_classes(train, val)
    encoders = dict(random_init=random_encoder(vit, config.seed), accuracy=vit)
    with common.processes(config.device) as processes:
        if processes.world > 1:
            raise ValueError("the linear probe runs in one process: start it with python, not torchrun")
        percent = {name: probe(encoder, train, val, config, processes.device)
                   for name, encoder in encoders.items()}
    append_result("linear_probe", checkpoint, vit, config, started, protocol="ridge", data=config.data,
                  train=train.name, val=val.name, train_images=len(train), val_images=len(val),
                  classes=len(train.classes), pool=config.pool, ridge=RIDGE, **percent, seed=config.seed,
                  device=str(processes.device))
    floor, reached = percent["random_init"], percent["accuracy"]
    print(f"linear probe: random init {floor:.1f} %, pre-trained {reached:.1f} %")


if __name__ == "__main__":
    common.run_main(main)
