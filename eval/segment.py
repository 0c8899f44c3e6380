"""Semantic segmentation: UPerNet on a fine-tuned encoder, or one linear layer on a frozen one.

    python -m eval.segment --checkpoint runs/cae_v2_vit_b --data ade20k --num_classes 150 --reduce_zero_label
    torchrun --nproc_per_node=8 -m eval.segment ... (the same)
    python -m eval.segment --checkpoint mae.pth --data camvid --num_classes 11 --ignore_index 11 --head linear
    python -m eval.segment --eval_only --out runs/cae_v2_vit_b/segment_upernet --data ade20k

Data: `images/{train,val}/X.jpg` with `annotations/{train,val}/X.png`, a class id per pixel (ADE20K's `training`
and `validation` are fine), names in `classes.txt` beside them if there; or `scenes`, the built-in images.

  crop (B, 3, H, W) - ViT - taps after blocks 3, 5, 7, 11 of 12 - x4, x2, x1, x0.5 - UPerNet - (B, K, H, W)

Training: UPerNet's recipe of CAE v2's and MAE's ADE20K runs, 160,000 steps of 16 crops [cae_v2.md (g), mfm_mae.md
(f)]; Beyond Masking's protocol is not known, it runs under the same. Test: whole images, short side resized to
`--short_side`, windows of the crop's size each two thirds of it apart, the logits averaged where windows
overlap and resized to the label map. One confusion matrix over all images and processes gives
  mIoU  mean of right / (truth + predicted - right) over the classes that occur in truth or prediction,
  aAcc  share of the labelled pixels that is right,   mAcc  mean over the classes in truth of that share.
The same command resumes; on a CPU bit for bit, on a GPU resizing adds in no fixed order. A run on several GPUs
normalises in the heads by SyncBatchNorm, any other by GroupNorm (32 groups), and its first line says so.

Sources: [code] CAE v2's configurations (written for CAE v1), [mae] the MAE runs in mfm_mae.md. We decided:
  [D1] No relative position bias in the blocks, no fresh layer scale for MAE: the authors have them, and gain
       from them what we do not know. The position table is resized (bicubic) and frozen, as theirs [code].
  [D2] ViT-Ti and S: ViT-B's recipe. 24 blocks and more: ViT-L's. Other depths: taps at 1/3, 1/2, 2/3, 1.
  [D3] UPerNet's inside: laterals and pools 1x1, fusions 3x3, each without bias, then norm and ReLU; dropout of
       whole channels; bilinear resizing; torch's initial weights.
  [D4] The loss is the sum of cross-entropies over a crop / (H W), ignored pixels counting 0, and the mean over
       crops: so all processes and micro batches average over equal counts.
  [D5] Photometric distortion: torchvision's RandomPhotometricDistort in range and probability (brightness
       x 7/8 to 9/8, contrast and saturation x 0.5 to 1.5, hue +-0.05, each for half of the crops, contrast
       before or after the rest), channels not swapped, on the crop. Ten tries for a crop that 0.75 allows.
  [D6] Linear warm-up is a factor on the poly schedule. bf16 autocast for fp16. Class token undecayed.
  [D7] `--head linear`: normed tokens of the last block, AdamW, lr 1e-3, 10,000 steps; a quick reading.

Dimension key: B batch, D encoder width, C head width, K classes, N patches, h x w grid of patches, H x W crop.
"""

import contextlib
import dataclasses
import math
import os
import sys
import time
import typing
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image, ImageDraw
from torch import nn
from torchvision.transforms.v2 import functional as TF
from tqdm import tqdm

import common
from common import flag
from eval.protocol import EvalConfig, append_result, open_checkpoint, random_encoder

IGNORE = 255  # in label maps once read: no class, no loss, no score
RECIPES = {
    "base": dict(steps=160_000, lr=1e-4, layer_decay=0.65, drop_path=0.1),  # [code] [mae]
    "large": dict(steps=160_000, lr=4e-5, layer_decay=0.95, drop_path=0.15),  # [code]
    "linear": dict(steps=10_000, lr=1e-3, layer_decay=1.0, drop_path=0.0),  # [D7]
}


@dataclasses.dataclass(frozen=True)
class Config(EvalConfig):
    """The whole command line."""

    data: str = flag("", "a folder with images/ and annotations/, or `scenes`")
    head: typing.Literal["upernet", "linear"] = flag("upernet", "linear: the encoder stays frozen")
    img_size: int = flag(512, "pixels of a crop's and a window's side [code]")
    short_side: int = flag(0, "pixels of an image's short side before random scaling (default: the crop's)")
    num_classes: int = flag(0, "classes (default: the lines of classes.txt)")
    ignore_index: int = flag(255, "id of pixels without a label")
    reduce_zero_label: bool = flag(False, "id 0 is without a label too, and 1 is the first class (ADE20K)")
    random_init: bool = flag(False, "an encoder of that shape with random weights: the floor")
    batch_size: int = flag(16, "crops per step over all processes [code]")
    micro_batch: int = flag(0, "crops computed at once (default: a process's share)")
    steps: int = flag(-1, "training steps (default: 160,000 [code], linear 10,000)")
    warmup_steps: int = flag(1500, "steps of linear warm-up from 1e-6 of the rate [code]")
    lr: float = flag(-1.0, "peak learning rate (default: 1e-4, from 24 blocks on 4e-5 [code], linear 1e-3)")
    layer_decay: float = flag(-1.0, "factor on lr per block down (default: 0.65, from 24 blocks on 0.95 [code])")
    drop_path: float = flag(-1.0, "stochastic depth of the last block (default: 0.1, from 24 on 0.15 [code])")
    weight_decay: float = flag(0.05, "AdamW; betas 0.9, 0.999 [code]")
    channels: int = flag(0, "width of UPerNet (default: the encoder's [code])")
    out: str = flag("", "folder of the run (default: segment_HEAD beside the checkpoint)")
    eval_only: bool = flag(False, "test last.pt in --out; all but data, device and workers is as it was")
    precision: typing.Literal["auto", "bf16", "fp32"] = flag("auto", "auto: bf16 on GPU, else fp32")
    save_every: int = flag(2000, "steps between checkpoints")
    max_steps: int = flag(0, "stop at this step, counted from 0; the schedule stays as it is")
    log_every: int = flag(50, "steps between log lines")
    fresh: bool = flag(False, "start a new numbered folder instead of going on with the run")

    def __post_init__(self):
        if not self.checkpoint and self.eval_only and self.out:
            object.__setattr__(self, "checkpoint", self.out)
        super().__post_init__()
        common.check_range(self, 0, "short_side", "num_classes", "ignore_index", "micro_batch", "warmup_steps",
                           "weight_decay", "channels", "max_steps")
        common.check_range(self, 1, "img_size", "save_every", "log_every")
        if self.num_classes > IGNORE:
            raise ValueError(f"--num_classes {self.num_classes} is more than {IGNORE}, which label maps allow")


def with_recipe(config, depth):
    """The configuration with what was not given taken from the recipe of the head and the depth [D2].

    Raises ValueError for values that make no sense.
    """
    name = "linear" if config.head == "linear" else "large" if depth >= 24 else "base"
    missing = {key: value for key, value in RECIPES[name].items() if getattr(config, key) == -1}
    short_side = config.short_side or config.img_size
    config = dataclasses.replace(config, **missing, short_side=short_side)
    common.check_range(config, 1, "steps")
    common.check_range(config, None, "lr", "layer_decay")
    common.check_range(config, 0, "drop_path")
    if config.warmup_steps >= config.steps:
        raise ValueError(f"--warmup_steps {config.warmup_steps} must be less than --steps {config.steps}")
    if config.layer_decay > 1 or config.drop_path >= 1:
        raise ValueError("--layer_decay is at most 1 and --drop_path below 1")
    return config


# --------------------------------------------------------------------------------------------------------------
# Data


class LabelMaps(torch.utils.data.Dataset):
    """Images with label maps: `dataset[index]` is (uint8 image (3, h, w), ids (h, w), name of the map).

    `images` is a `common.Images`; `maps` another one, of which only the paths are used, or a tensor (n, h, w).
    """

    def __init__(self, images, maps, classes, name):
        self.images, self.maps, self.classes, self.name = images, maps, tuple(classes), name

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        if isinstance(self.maps, torch.Tensor):
            return self.images[index][0], self.maps[index], f"scene {index}"
        path = self.maps.path(index)
        return self.images[index][0], read_ids(path), path


def read_ids(path):
    """An annotation as a tensor of ids (h, w); of a PNG with a palette, the places in it.

    Raises ValueError that names the file where it cannot be read or is a colour image.
    """
    try:
        with Image.open(path) as image:
            ids = torch.from_numpy(np.array(image).astype(np.int32))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} cannot be read as a label map ({type(error).__name__}: {error}): replace "
                         "the file") from error
    if ids.ndim != 2:
        raise ValueError(f"{path} has {ids.shape[2]} channels, a label map has one, with a class id per pixel")
    return ids


def to_labels(image, ids, name, config):
    """Ids (h, w) of an annotation as labels (h, w) uint8: 0 .. K-1, or IGNORE.

    Raises ValueError with the file's name where the map has another size than its image or an id no class.
    """
    if ids.shape != image.shape[1:]:
        raise ValueError(f"{name} is {ids.shape[0]} x {ids.shape[1]} pixels, but its image is "
                         f"{image.shape[1]} x {image.shape[2]}: a label map has its image's size")
    ids = ids.int()
    ignored = ids == config.ignore_index
    if config.reduce_zero_label:
        ignored, ids = ignored | (ids == 0), ids - 1
    wrong = ids[~ignored & ((ids < 0) | (ids >= config.num_classes))]
    if len(wrong):
        first = int(wrong[0]) + config.reduce_zero_label
        raise ValueError(f"{name} holds the class id {first}, which is none of the {config.num_classes} classes "
                         f"and not --ignore_index {config.ignore_index}: mend one of the three")
    return ids.masked_fill(ignored, IGNORE).byte()


def find_maps(config, split):
    """The `LabelMaps` of --data for split "train" or "val".

    Raises FileNotFoundError or ValueError with what is missing: a folder, an image, an annotation, classes.
    """
    if config.data == "scenes":
        from demo.scenes import MAP_CLASSES, SEEDS, make_scenes
        scenes = make_scenes({"train": 1000, "val": 200}[split], config.img_size, SEEDS[split])
        return LabelMaps(common.Images(scenes.images), scenes.maps, MAP_CLASSES, f"scenes ({split})")
    if not config.data:
        raise ValueError("--data is missing: give a folder with images/ and annotations/, or `scenes`")
    root, files = Path(config.data).expanduser(), {}
    for kind in ("images", "annotations"):
        names = {"train": ("train", "training"), "val": ("val", "validation")}[split]
        folder = next((root / kind / name for name in names if (root / kind / name).is_dir()), None)
        if folder is None:
            raise FileNotFoundError(f"{root} has no folder {kind}/{names[0]} or {kind}/{names[1]}")
        files[kind] = {os.path.splitext(os.path.relpath(path, folder))[0]: path
                       for path in common.list_images(folder)}
    for kind, other in (("images", "annotations"), ("annotations", "images")):
        alone = sorted(set(files[kind]) - set(files[other]))
        if alone:
            raise ValueError(f"{files[kind][alone[0]]} has no partner of that name in {other}/ ({len(alone)} of "
                             f"{len(files[kind])} {kind} have none): add it or remove the file")
    if not files["images"]:
        raise FileNotFoundError(f"{root}/images holds no image to {'test on' if split == 'val' else 'learn from'}")
    images, maps = (common.Images([files[kind][key] for key in sorted(files[kind])]) for kind in files)
    return LabelMaps(images, maps, class_names(root, config.num_classes), f"{root} ({split})")


def class_names(root, num_classes):
    """The lines of classes.txt, else the ids 0 .. K-1 themselves. Raises ValueError where both are missing."""
    listed = root / "classes.txt"
    if listed.exists():
        names = [line.strip() for line in listed.read_text().splitlines() if line.strip()]
        if num_classes not in (0, len(names)):
            raise ValueError(f"{listed} names {len(names)} classes, --num_classes says {num_classes}")
        return names
    if not num_classes:
        raise ValueError(f"how many classes there are is not known: give --num_classes, or their names in {listed}")
    return [str(index) for index in range(num_classes)]


def scaled_size(size, short_side):
    """(h, w) resized so that its short side is `short_side` and its long side at most four times that, which is
    what "2048 x 512, the aspect kept" means [code]."""
    factor = min(short_side / min(size), 4 * short_side / max(size))
    return [max(1, round(side * factor)) for side in size]


def resize_pair(image, labels, size):
    """Image (3, h, w) and labels (h, w), both uint8, at another size: bilinear, and the nearest pixel's label."""
    image = TF.resize(image, size, TF.InterpolationMode.BILINEAR, antialias=True)
    return image, TF.resize(labels[None], size, TF.InterpolationMode.NEAREST_EXACT)[0]


def uniform(low, high):
    return low + (high - low) * float(torch.rand(()))


class Augment:
    """A training crop, made in a worker: uint8 image (3, H, W) and labels (H, W), H = W = img_size."""

    def __init__(self, config):
        self.config = config

    def __call__(self, image, ids, name):
        config, side = self.config, self.config.img_size
        labels = to_labels(image, ids, name, config)
        short_side = config.short_side * uniform(0.5, 2.0)  # [code]
        image, labels = resize_pair(image, labels, scaled_size(labels.shape, short_side))
        top, left = self.choose_crop(labels)
        image, labels = (x[..., top: top + side, left: left + side] for x in (image, labels))
        if torch.rand(()) < 0.5:
            image, labels = image.flip(-1), labels.flip(-1)
        return pad(distort(image), side, PADDING), pad(labels[None], side, [IGNORE])[0]

    def choose_crop(self, labels):
        """Top and left edge of a crop of which no class fills more than 0.75 [code], if ten tries find one."""
        side = self.config.img_size
        for attempt in range(10):
            top, left = (int(torch.randint(max(length - side, 0) + 1, ())) for length in labels.shape)
            crop = labels[top: top + side, left: left + side]
            counts = crop[crop != IGNORE].int().bincount()
            if len(counts) and counts.max() <= 0.75 * counts.sum():
                break
        return top, left


PADDING = [round(255 * mean) for mean in common.IMAGENET_MEAN]  # 0 after normalising, but for rounding


def pad(image, side, fill):
    """(C, h, w) to at least (C, side, side), with `fill` per channel below and to the right."""
    C, h, w = image.shape
    canvas = torch.tensor(fill, dtype=image.dtype)[:, None, None].repeat(1, max(h, side), max(w, side))
    canvas[:, :h, :w] = image
    return canvas


def distort(image):
    """Photometric distortion of a uint8 image (3, h, w) [D5]."""
    steps = [(TF.adjust_brightness, 0.875, 1.125), (TF.adjust_saturation, 0.5, 1.5),
             (TF.adjust_hue, -0.05, 0.05)]
    steps.insert(1 if torch.rand(()) < 0.5 else 3, (TF.adjust_contrast, 0.5, 1.5))
    for adjust, low, high in steps:
        if torch.rand(()) < 0.5:
            image = adjust(image, uniform(low, high))
    return image


class Views(torch.utils.data.Dataset):
    """What a test looks at: (uint8 image (3, h, w) with its short side resized, labels in the map's own size)."""

    def __init__(self, data, config):
        self.data, self.config = data, config

    def __len__(self):
        return len(self.data)

    def __getitem__(self, index):
        image, ids, name = self.data[index]
        labels = to_labels(image, ids, name, self.config)
        size = scaled_size(labels.shape, self.config.short_side)
        return TF.resize(image, size, TF.InterpolationMode.BILINEAR, antialias=True), labels


# --------------------------------------------------------------------------------------------------------------
# Model


def tap_blocks(depth):
    """The blocks that UPerNet reads, 0-based: 3, 5, 7, 11 of 12 and 7, 11, 15, 23 of 24 [code] [D2]."""
    return [max(round(depth * sixth / 6) - 1, 0) for sixth in (2, 3, 4, 6)]


def resize(x, size):
    return F.interpolate(x, size, mode="bilinear", align_corners=False)


def norm_layer(norm, channels):
    """`batch` (made a SyncBatchNorm in training), or `group`: GroupNorm with 32 groups, or as many as divide the
    channels with 4 in each: a pool of one cell has no other values to be normalised by."""
    groups = [count for count in range(1, 33) if channels % count == 0 and (channels >= 4 * count or count == 1)]
    return nn.BatchNorm2d(channels) if norm == "batch" else nn.GroupNorm(max(groups), channels)


def conv_norm(in_channels, channels, kernel, norm):
    return nn.Sequential(nn.Conv2d(in_channels, channels, kernel, padding=kernel // 2, bias=False),
                         norm_layer(norm, channels), nn.ReLU())


class UPerNet(nn.Module):
    """Four maps (B, D, h, w) of one ViT to logits (B, K, 4h, 4w), and the auxiliary head's (B, K, h, w).

    Pyramid pooling on the coarsest map, then a feature pyramid from coarse to fine, all levels fused.
    """

    def __init__(self, dim, num_classes, channels, norm):
        super().__init__()
        def double():
            return nn.ConvTranspose2d(dim, dim, 2, stride=2)

        # x4, x2, x1, x0.5, without a norm on the taps [code].
        self.rescale = nn.ModuleList([
            nn.Sequential(double(), norm_layer(norm, dim), nn.GELU(), double()), double(), nn.Identity(),
            nn.MaxPool2d(2)])
        self.pools = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(cells), conv_norm(dim, channels, 1, norm))
            for cells in (1, 2, 3, 6))  # [code]
        self.bottleneck = conv_norm(dim + 4 * channels, channels, 3, norm)
        self.laterals = nn.ModuleList(conv_norm(dim, channels, 1, norm) for level in range(3))
        self.smooth = nn.ModuleList(conv_norm(channels, channels, 3, norm) for level in range(3))
        self.fuse = conv_norm(4 * channels, channels, 3, norm)
        self.classify = nn.Sequential(nn.Dropout2d(0.1), nn.Conv2d(channels, num_classes, 1))  # [code]
        # On the third tap [code].
        self.auxiliary = nn.Sequential(conv_norm(dim, 256, 3, norm), nn.Dropout2d(0.1),
                                       nn.Conv2d(256, num_classes, 1))

    def pyramid(self, taps):
        """The taps at four strides: (B, D, 4h, 4w), (B, D, 2h, 2w), (B, D, h, w), (B, D, h/2, w/2)."""
        return [rescale(tap) for rescale, tap in zip(self.rescale, taps)]

    def forward(self, taps):
        *fine, coarse = self.pyramid(taps)
        pooled = [resize(pool(coarse), coarse.shape[2:]) for pool in self.pools]  # (B, C, h/2, w/2) each
        x = self.bottleneck(torch.cat([coarse, *pooled], dim=1))  # (B, C, h/2, w/2)
        levels = [x]
        for lateral, smooth, level in zip(self.laterals, self.smooth, reversed(fine)):
            x = lateral(level) + resize(x, level.shape[2:])  # (B, C, h, w), then 2h, then 4h
            levels.append(smooth(x))
        levels = [resize(level, x.shape[2:]) for level in levels]  # (B, C, 4h, 4w) each
        logits = self.classify(self.fuse(torch.cat(levels, dim=1)))  # (B, K, 4h, 4w)
        return logits, self.auxiliary(fine[2])


class LinearHead(nn.Module):
    """One linear layer on each token of a map (B, D, h, w): logits (B, K, h, w)."""

    def __init__(self, dim, num_classes):
        super().__init__()
        self.classify = nn.Conv2d(dim, num_classes, 1)

    def forward(self, taps):
        return self.classify(taps[0]), None


class Segmenter(nn.Module):
    """An encoder and a head: images (B, 3, H, W) to logits (B, K, H, W) and auxiliary logits, or None.

    `--head linear` freezes the encoder. Raises ValueError where the grid is too small to be halved.
    """

    def __init__(self, encoder, num_classes, head="upernet", channels=0, norm="group"):
        super().__init__()
        if min(encoder.grid) < 2:
            raise ValueError(f"an image of {encoder.img_size} has only {encoder.grid} patches: UPerNet needs 2 x 2")
        dim = encoder.config["embed_dim"]
        self.encoder, self.linear = encoder, head == "linear"
        if self.linear:
            self.taps, self.head = [-1], LinearHead(dim, num_classes)
            encoder.requires_grad_(False)
        else:
            self.taps = tap_blocks(len(encoder.blocks))
            self.head = UPerNet(dim, num_classes, channels or dim, norm)
            encoder.norm.requires_grad_(False)  # not used

    def forward(self, images):
        h, w = self.encoder.grid
        taps = self.encoder.layers(images, self.taps, norm=self.linear)  # (B, 1+N, D) each
        maps = [rearrange(tap[:, -h * w:], "b (h w) d -> b d h w", h=h) for tap in taps]  # (B, D, h, w) each
        return [x if x is None else resize(x.float(), images.shape[2:]) for x in self.head(maps)]  # (B, K, H, W)


def pixel_loss(logits, labels):
    """Cross-entropy of logits (B, K, H, W) and labels (B, H, W), summed, over B H W: ignored pixels too [D4]."""
    return F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="sum") / labels.numel()


# --------------------------------------------------------------------------------------------------------------
# Test


def window_starts(length, window, stride):
    """Where windows begin along a side: every `stride` pixels, the last one flush with the end."""
    last = max(length - window, 0)
    return [min(start, last) for start in range(0, last + stride, stride)] if last else [0]


@torch.no_grad()
def slide(model, image, stride, batch, device, precision="auto"):
    """Logits (K, h, w) float32 of a uint8 image (3, h, w): the mean over the windows that see a pixel.

    A window has the encoder's image size; an image smaller than that is padded, and the padding's logits go.
    """
    (H, W), (h, w) = model.encoder.img_size, image.shape[1:]
    image = pad(image, max(H, W), PADDING) if h < H or w < W else image
    corners = [(top, left) for top in window_starts(image.shape[1], H, stride)
               for left in window_starts(image.shape[2], W, stride)]
    total, count = 0, torch.zeros(image.shape[1:], device=device)
    for first in range(0, len(corners), batch):
        some = corners[first: first + batch]
        windows = torch.stack([image[:, top: top + H, left: left + W] for top, left in some]).to(device)
        with common.autocast(device, precision):
            logits = model(common.normalise(windows))[0]  # (B, K, H, W)
        if not torch.is_tensor(total):
            total = logits.new_zeros(logits.shape[1], *image.shape[1:])
        for (top, left), window in zip(some, logits):
            total[:, top: top + H, left: left + W] += window
            count[top: top + H, left: left + W] += 1
    return (total / count)[:, :h, :w]


def predict(model, image, size, config, device):
    """Classes (h, w) at the label map's `size` for a uint8 image at the test's."""
    stride = max(config.img_size * 2 // 3, 1)  # 341 of 512 [code]
    logits = slide(model, image, stride, config.micro_batch or 16, device, config.precision)
    return resize(logits[None], size)[0].argmax(dim=0)


def confusion_matrix(labels, predicted, num_classes):
    """Counts (K, K) int64: row the true class, column the predicted one; IGNORE is left out."""
    kept = labels != IGNORE
    pairs = labels[kept].long() * num_classes + predicted[kept]
    return pairs.bincount(minlength=num_classes**2).view(num_classes, num_classes)


def scores(confusion):
    """Per cent: mIoU, aAcc, mAcc, the IoU per class (None where it occurs nowhere), and what predicting the
    commonest class everywhere would give. `confusion` as from `confusion_matrix`."""
    right, truth, answered = (x.double() for x in (confusion.diag(), confusion.sum(1), confusion.sum(0)))
    union, share = truth + answered - right, truth.max() / truth.sum()
    occurs = union > 0
    return dict(
        miou=100 * float((right[occurs] / union[occurs]).mean()),
        aacc=100 * float(right.sum() / truth.sum()),
        macc=100 * float((right[truth > 0] / truth[truth > 0]).mean()),
        commonest=dict(miou=100 * float(share / (truth > 0).sum()), aacc=100 * float(share)),
        iou=[100 * float(r / u) if u else None for r, u in zip(right, union)])


@torch.no_grad()
def evaluate(model, data, config, processes):
    """The confusion matrix (K, K) of all images, each seen by one process, summed over processes."""
    model.eval()
    mine = torch.utils.data.Subset(Views(data, config), range(processes.rank, len(data), processes.world))
    loader = torch.utils.data.DataLoader(mine, batch_size=None, num_workers=config.workers)
    confusion = torch.zeros(config.num_classes, config.num_classes, dtype=torch.int64, device=processes.device)
    for image, labels in tqdm(loader, "test", disable=None if processes.main else True, leave=False):
        predicted = predict(model, image, labels.shape, config, processes.device)
        confusion += confusion_matrix(labels.to(processes.device), predicted, config.num_classes)
    return processes.sum(confusion).cpu()


# --------------------------------------------------------------------------------------------------------------
# Pictures


def palette(count):
    """`count` colours (count, 3) uint8, each as far as can be from white, black, grey and all before it."""
    steps = torch.linspace(0, 255, 9)
    grid = torch.cartesian_prod(steps, steps, steps)
    weights = torch.tensor([2.0, 4.0, 3.0])  # the eye tells greens best

    def distance(colour):
        return ((grid - colour).square() * weights).sum(dim=1)

    nearest = torch.stack([distance(torch.full((3,), grey)) for grey in (0.0, 128.0, 255.0)]).amin(dim=0)
    chosen = []
    for _ in range(count):
        chosen.append(grid[nearest.argmax()])
        nearest = torch.minimum(nearest, distance(chosen[-1]))
    return torch.stack(chosen).byte()


def overlay(image, labels, colours):
    """A uint8 image (3, h, w) half covered with the colours of its labels (h, w), but where they are IGNORE."""
    paint = rearrange(colours[labels.long().clamp(max=len(colours) - 1)], "h w c -> c h w")
    return torch.where(labels == IGNORE, image, (image.int() + paint) // 2).byte()


def draw_overlays(path, model, data, config, device, count=6):
    """Draws image, truth and prediction of `count` test images, spread over the data, with a legend."""
    colours, width, seen, views, rows = palette(config.num_classes), 260, set(), Views(data, config), []
    for index in torch.linspace(0, len(data) - 1, min(count, len(data))).long().tolist():
        image, labels = views[index]
        predicted = predict(model, image, labels.shape, config, device).cpu()
        seen |= set(labels[labels != IGNORE].tolist()) | set(predicted.unique().tolist())
        image = data.images[index][0]
        panels = [image, overlay(image, labels, colours), overlay(image, predicted, colours)]
        rows.append([TF.to_pil_image(panel) for panel in panels])
        rows[-1] = [panel.resize((width, round(width * panel.height / panel.width))) for panel in rows[-1]]
    entries, columns = sorted(seen), 5
    height = sum(row[0].height + 4 for row in rows) + 20
    sheet = Image.new("RGB", (3 * (width + 4) + 4, height + 18 * math.ceil(len(entries) / columns) + 4), "white")
    draw = ImageDraw.Draw(sheet)
    for column, caption in enumerate(("image", "truth", "prediction")):
        draw.text((4 + column * (width + 4), 4), caption, fill="black")
    top = 20
    for row in rows:
        for column, panel in enumerate(row):
            sheet.paste(panel, (4 + column * (width + 4), top))
        top += row[0].height + 4
    for place, index in enumerate(entries):
        x, y = 4 + place % columns * (sheet.width // columns), height + 18 * (place // columns)
        draw.rectangle((x, y, x + 14, y + 12), fill=tuple(colours[index].tolist()), outline="black")
        draw.text((x + 20, y), data.classes[index][:22], fill="black")
    common.write_atomically(path, lambda temporary: sheet.save(temporary, format="PNG"))


# --------------------------------------------------------------------------------------------------------------
# Train


def layer_groups(model, decay, weight_decay):
    """AdamW groups with a `scale` for the learning rate: 1 for heads, decay^(depth + 1 - id) in the encoder, where
    id is 0 for the patch projection and the class token and i + 1 for block i [code]."""
    depth, groups = len(model.encoder.blocks), {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        words, layer = name.split("."), depth + 1
        if words[0] == "encoder":
            layer = int(words[2]) + 1 if words[1] == "blocks" else 0
        wd = weight_decay if common.decays(name, parameter) and words[-1] != "cls_token" else 0.0
        group = dict(params=[], weight_decay=wd, scale=decay ** (depth + 1 - layer))
        groups.setdefault((layer, wd), group)["params"].append(parameter)
    return list(groups.values())


def learning_rate(step, peak, warmup_steps, total_steps):
    """Poly schedule of power 1 down to 0, times a linear warm-up from 1e-6 [code] [D6]."""
    warmup = min(1.0, 1e-6 + (1 - 1e-6) * step / max(warmup_steps, 1))
    return peak * warmup * (1 - step / total_steps)


def set_drop_path(vit, rate):
    """Stochastic depth of a ViT as if built with `rate`: rising linearly from 0."""
    for block, own in zip(vit.blocks, torch.linspace(0, rate, len(vit.blocks)).tolist()):
        block.drop_path.rate = own


def describe(config, model, plan, processes, train, val, folder, norm):
    """Prints the recipe and what it costs."""
    total, encoder = (sum(p.numel() for p in part.parameters()) for part in (model, model.encoder))
    with torch.device("meta"):
        copy = Segmenter(common.ViT(**model.encoder.config), config.num_classes, config.head, config.channels, norm)
        crop = torch.empty(1, 3, config.img_size, config.img_size)
    def step():
        sum(x.sum() for x in copy.train()(crop) if x is not None).backward()
    flops = common.count_flops(step)
    linear = config.head == "linear"
    what = "one linear layer, encoder frozen" if linear else f"UPerNet on blocks {model.taps}"
    reason = f"{processes.world} processes on {processes.device.type}"
    norms = "" if linear else f", {'SyncBatchNorm' if norm == 'batch' else 'GroupNorm'} ({reason})"
    print(f"segment  {what}{norms}: {total:,} parameters, {encoder:,} of them in the encoder\n"
          f"data     {len(train):,} images in {train.name}, {len(val):,} to test on, {config.num_classes} classes\n"
          f"crops    {config.img_size} pixels, short side {config.short_side} x 0.5 to 2.0\n"
          f"lr       {config.lr:.2e} at the peak, x {config.layer_decay:g} per block down, drop path "
          f"{config.drop_path:g}\n"
          f"batch    {plan.batch_size} = {processes.world} processes x {plan.accumulation} micro batches x "
          f"{plan.micro_batch} crops\n"
          f"steps    {plan.total_steps:,}, {plan.total_steps / plan.steps_per_epoch:.1f} epochs, "
          f"{config.warmup_steps:,} of warm-up\n"
          f"cost     {flops / 1e9:.1f} GFLOP per crop and step, {flops * plan.batch_size * plan.total_steps:.1e} "
          f"FLOP for the run; its time is estimated after 50 steps\n"
          f"files    {folder}/: config.json, log.jsonl, last.pt, overlays.png", flush=True)


def build(encoder, config, norm):
    """The model with the head's weights drawn from the seed."""
    torch.manual_seed(config.seed)
    return Segmenter(encoder, config.num_classes, config.head, config.channels, norm)


def train(encoder, data, config, run, processes):
    """Training from start to end: lr, forward, backward, step, log, save. Returns (model, whether it is whole)."""
    device = processes.device
    plan = common.make_plan(len(data), config.batch_size, config.micro_batch, 1, processes.world)
    plan = dataclasses.replace(plan, total_steps=config.steps)
    synchronised = processes.world > 1 and device.type == "cuda"
    norm = run.state["norm"] if run.state else "batch" if synchronised else "group"
    if norm == "batch" and not synchronised:
        raise ValueError(f"the run in {run.folder} began with SyncBatchNorm on several GPUs: go on with several")
    set_drop_path(encoder, config.drop_path)
    model = build(encoder, config, norm)
    if norm == "batch":
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    model.to(device)
    optimizer = torch.optim.AdamW(layer_groups(model, config.layer_decay, config.weight_decay), config.lr, fused=True)
    if processes.main:
        describe(config, model, plan, processes, data, find_maps(config, "val"), run.folder, norm)
    samples = common.Samples(data, Augment(config), config.seed)
    start = run.begin(processes, plan, model, optimizer, len(data))
    parallel = model if processes.world == 1 else nn.parallel.DistributedDataParallel(model)
    batches = iter(common.training_loader(samples, plan, processes, config, start, run.stop))

    model.train()
    for step in range(start, run.stop):
        lr = learning_rate(step, config.lr, config.warmup_steps, plan.total_steps)
        for group in optimizer.param_groups:
            group["lr"] = lr * group["scale"]

        for micro in range(plan.accumulation):
            images, labels = (x.to(device, non_blocking=True) for x in run.next_batch(batches))
            torch.manual_seed(common.seed_for(config.seed, "step", step, plan.first_row(micro, processes)))
            more_to_come = processes.world > 1 and micro < plan.accumulation - 1
            with parallel.no_sync() if more_to_come else contextlib.nullcontext():
                with common.autocast(device, config.precision):
                    logits, auxiliary = parallel(common.normalise(images))
                loss = pixel_loss(logits, labels.long())
                if auxiliary is not None:
                    loss = loss + 0.4 * pixel_loss(auxiliary, labels.long())  # [code]
                (loss / plan.accumulation).backward()
            run.record(loss=loss)

        grad_norm = nn.utils.clip_grad_norm_(model.parameters(), math.inf)  # measured, not clipped
        run.update(optimizer, grad_norm)

        run.log(step + 1, lr, grad_norm)
        stopping = run.stopping()
        if (step + 1) % config.save_every == 0 or step + 1 == run.stop or stopping:
            run.save(model, optimizer, step + 1, encoder=encoder.config, norm=norm, num_classes=config.num_classes)
        if stopping:
            break
    run.close()
    return model, run.stop == plan.total_steps


# --------------------------------------------------------------------------------------------------------------
# Main


def report(model, config, folder, path, processes, started):
    """Tests the model; the main process draws, prints, and appends the result line beside `path`."""
    data = find_maps(config, "val")
    result = scores(evaluate(model, data, config, processes))
    if not processes.main:
        return
    draw_overlays(folder / "overlays.png", model, data, config, processes.device)
    append_result("segment", path, model.encoder, config, started, protocol=config.head, data=config.data,
                  val=data.name, val_images=len(data), random_init=config.random_init, **result)
    print(f"segmentation ({config.head}{', random init' * config.random_init}): mIoU {result['miou']:.1f}, aAcc "
          f"{result['aacc']:.1f}, mAcc {result['macc']:.1f} % (the commonest class everywhere: mIoU "
          f"{result['commonest']['miou']:.1f}, aAcc {result['commonest']['aacc']:.1f} %); drew "
          f"{folder / 'overlays.png'}")


def test_only(config, processes, started):
    """--eval_only: the model in last.pt, which is all that is needed beside the data."""
    path = run_folder(config) / "last.pt"
    state = common.read_checkpoint(path)
    if state.get("kind") != "segmentation":
        raise ValueError(f"{path} is not from a segmentation run: give the run's folder with --out")
    config = dataclasses.replace(Config(**state["config"]), num_classes=state["num_classes"], workers=config.workers,
                                 device=config.device, data=config.data or state["config"]["data"])
    model = build(common.ViT(**state["encoder"]), config, state["norm"])
    model.load_state_dict(state["model"])
    report(model.to(processes.device), config, path.parent, path, processes, started)


def run_folder(config):
    """--out, or a folder beside the checkpoint that is named after the head."""
    if config.out:
        return Path(config.out)
    path = Path(config.checkpoint).expanduser()
    name = f"segment_{config.head}{'_random' * config.random_init}"
    return (path if path.is_dir() else path.parent) / name


def main(argv=None):
    config, started = common.parse_config(Config, __doc__, argv=argv), time.perf_counter()
    with common.processes(config.device) as processes:
        if config.eval_only:
            return test_only(config, processes, started)
        data = find_maps(config, "train")
        config = dataclasses.replace(config, num_classes=len(data.classes))
        with contextlib.redirect_stdout(sys.stdout if processes.main else None):
            path, encoder = open_checkpoint(config)
        config = with_recipe(config, len(encoder.blocks))
        if config.random_init:
            encoder = random_encoder(encoder, config.seed)
        run = common.Run("segment", config, run_folder(config), "segmentation")
        if run.finished:
            if processes.main:
                print(f"the run in {run.folder}/ is finished, step {run.start}: --eval_only --out {run.folder} "
                      "tests it again, --fresh starts anew")
            return
        model, whole = train(encoder, data, config, run, processes)
        if whole:
            report(model, config, run.folder, path, processes, started)


if __name__ == "__main__":
    common.run_main(main)
