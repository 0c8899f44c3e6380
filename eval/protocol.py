"""What the evaluations share: their flags, the view of an image in tests, class lists, the result line.

Dimension key: B batch, H x W size of the view, h x w size of the image as it is.
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
import torchvision
from torchvision.transforms.v2 import functional as TF

import common
from common import flag
from eval.encoders import find_file, load_encoder


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """The flags of every evaluation that trains no encoder."""

    checkpoint: str = flag("", "a file (ours, timm, MAE, CAE v2 ...), or the folder of a run")
    data: str = flag("", "a folder with train/ and val/ (a folder per class), `cifar10` or `scenes` "
                         "(default: $IMAGENET, else data/imagenet)")
    img_size: int = flag(0, "pixels of the image's side (default: the encoder's own)")
    num_heads: int = flag(0, "heads of the encoder (default: what the file says, else the usual)")
    seed: int = flag(0, "of everything that is drawn")
    batch_size: int = flag(256, "images computed at once; changes no number but in rounding")
    workers: int = flag(-1, "data-loading processes (default: the cores, at most 16; none for scenes)")
    device: typing.Literal["auto", "cuda", "mps", "cpu"] = flag("auto", "where to compute")

    def __post_init__(self):
        if not self.checkpoint:
            raise ValueError("--checkpoint is missing: give the encoder's file, or the folder of a run")
        common.check_range(self, 0, "img_size", "num_heads", "seed")
        common.check_range(self, 1, "batch_size")
        if self.workers < 0:
            workers = 0 if self.data == "scenes" else min(os.cpu_count() or 1, 16)
            object.__setattr__(self, "workers", workers)


def open_checkpoint(config, **override):
    """(path, encoder) of the flags --checkpoint, --img_size, --num_heads; `override` as in `load_encoder`.

    Raises ValueError where the result line, which belongs beside the checkpoint, could not be written.
    """
    path = find_file(config.checkpoint)
    log = path.parent / "eval.jsonl"
    if not os.access(log if log.exists() else log.parent, os.W_OK):
        raise ValueError(f"the result belongs in {log}, which cannot be written: copy the checkpoint to a "
                         "folder of your own")
    given = {name: getattr(config, name) for name in ("img_size", "num_heads") if getattr(config, name)}
    return path, load_encoder(path, in_chans=3, **given, **override)


def random_encoder(vit, seed):
    """A ViT of the same shape with random weights: the floor that stands beside a result."""
    torch.manual_seed(seed)
    return common.ViT(**vit.config)


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


def append_result(kind, checkpoint, vit, config, started, **facts):
    """Appends the JSON line of a result to eval.jsonl beside the checkpoint, with all that is needed to
    repeat it: the file's hash, flags, seed, versions, command. `started` is `time.perf_counter()` at the
    start. Call it in the main process only."""
    record = dict(
        kind=kind, **facts, checkpoint=str(checkpoint), sha256=sha256(checkpoint), encoder=vit.config,
        view="torchvision uint8, bicubic antialias", seconds=round(time.perf_counter() - started, 1),
        torch=torch.__version__, torchvision=torchvision.__version__, flags=dataclasses.asdict(config),
        command=" ".join(sys.argv))
    log = checkpoint.parent / "eval.jsonl"
    with open(log, "a") as file:
        file.write(json.dumps(record) + "\n")
    print(f"appended to {log}")
