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
import hashlib
import json
import math
import os
import sys
import time
import typing

import torch
import torch.nn.functional as F
import torchvision
from torchvision.transforms.v2 import functional as TF
from tqdm import tqdm

import common
from common import flag
from eval.encoders import find_file, load_encoder

# Added to the diagonal of the correlation matrix of the features, whose own diagonal is 1. In terms of the
# sum over n images: RIDGE * n. Fixed, so that no number was chosen by looking at the test images.
RIDGE = 1e-2


@dataclasses.dataclass(frozen=True)
class Config:
    """The whole command line."""

    checkpoint: str = flag("", "a file (ours, timm, MAE, CAE v2), or the folder of a run")
    data: str = flag("", "a folder with train/ and val/ (a folder per class), `cifar10` or `scenes` "
                         "(default: $IMAGENET, else data/imagenet)")
    pool: typing.Literal["mean", "cls"] = flag("mean", "mean of the patch tokens, or class token")
    num_heads: int = flag(0, "heads of the encoder (default: what the file says, else the usual)")
    seed: int = flag(0, "of the weights of the random encoder")
    batch_size: int = flag(256, "images computed at once; changes no number but in rounding")
    workers: int = flag(-1, "data-loading processes (default: the cores, at most 16; none for scenes)")
    device: typing.Literal["auto", "cuda", "mps", "cpu"] = flag("auto", "where to compute")

    def __post_init__(self):
        if not self.checkpoint:
            raise ValueError("--checkpoint is missing: give the encoder's file, or the folder of a run")
        if self.num_heads < 0 or self.seed < 0 or self.batch_size < 1:
            raise ValueError("--num_heads and --seed must not be negative, --batch_size must be at least 1")
        if self.workers < 0:
            workers = 0 if self.data == "scenes" else min(os.cpu_count() or 1, 16)
            object.__setattr__(self, "workers", workers)


class CentreViews(torch.utils.data.Dataset):
    """The images of a `common.Images` at one size (H, W), with their labels: (uint8 (3, H, W), label)."""

    def __init__(self, images, size):
        self.images, self.size = images, size

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        image, label = self.images[index]
        return centre_view(image, self.size), label


def centre_view(image, size):
    """The papers' view for tests, uint8 (3, h, w) to (3, H, W): short side to 256, bicubic, then the centre
    of 224 pixels, in proportion for other sizes. An image that has the size already stays as it is."""
    (height, width), (h, w) = size, image.shape[1:]
    if (h, w) == (height, width):
        return image
    scale = max(height / h, width / w) * 256 / 224
    # The long side rounds down, as torchvision's Resize does.
    resized = [math.floor(side * scale + 1e-6) for side in (h, w)]
    image = TF.resize(image, resized, TF.InterpolationMode.BICUBIC, antialias=True)
    return TF.center_crop(image, [height, width])


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


def check_classes(train, val):
    """The label of a class is its place in the list: two lists that differ would compare cats with dogs."""
    if train.classes != val.classes:
        only = sorted(set(train.classes) ^ set(val.classes))
        raise ValueError(f"the {len(train.classes)} classes of {train.name} and the {len(val.classes)} of "
                         f"{val.name} must be the same; in one of them only: {', '.join(only[:3])}"
                         f"{' ...' if len(only) > 3 else ''}")


def sha256(path):
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def main(argv=None):
    config, start = common.parse_config(Config, __doc__, argv=argv), time.perf_counter()
    checkpoint = find_file(config.checkpoint)
    log = checkpoint.parent / "eval.jsonl"
    if not os.access(log if log.exists() else log.parent, os.W_OK):
        raise ValueError(f"the result belongs in {log}, which cannot be written: copy the checkpoint to a "
                         "folder of your own")
    vit = load_encoder(checkpoint, **{"num_heads": config.num_heads} if config.num_heads else {})
    if config.pool == "cls" and vit.cls_token is None:
        raise ValueError(f"--pool cls: the encoder in {checkpoint} has no class token, use --pool mean")
    train, val = (common.find_data(config.data, split, vit.img_size[0]) for split in ("train", "val"))
    check_classes(train, val)
    torch.manual_seed(config.seed)
    random_vit = common.ViT(**vit.config)
    with common.processes(config.device) as processes:
        if processes.world > 1:
            raise ValueError("the linear probe runs in one process: start it with python, not torchrun")
        percent = {name: probe(encoder, train, val, config, processes.device)
                   for name, encoder in (("random_init", random_vit), ("accuracy", vit))}
    record = dict(
        kind="linear_probe", protocol="ridge", checkpoint=str(checkpoint), sha256=sha256(checkpoint),
        data=config.data, train=train.name, val=val.name, train_images=len(train), val_images=len(val),
        classes=len(train.classes), pool=config.pool, ridge=RIDGE, **percent, seed=config.seed,
        encoder=vit.config, view="torchvision uint8, bicubic antialias", device=str(processes.device),
        seconds=round(time.perf_counter() - start, 1), torch=torch.__version__,
        torchvision=torchvision.__version__, flags=dataclasses.asdict(config), command=" ".join(sys.argv))
    with open(log, "a") as file:
        file.write(json.dumps(record) + "\n")
    print(f"appended to {log}")
    floor, reached = percent["random_init"], percent["accuracy"]
    print(f"linear probe: random init {floor:.1f} %, pre-trained {reached:.1f} %")


if __name__ == "__main__":
    common.run_main(main)
