"""Semantic segmentation: UPerNet on an encoder that trains along, or one linear layer on a frozen one.

    python -m eval.segment --checkpoint runs/cae_v2_vit_b --data ade20k --num_classes 150 --reduce_zero_label
    torchrun --nproc_per_node=8 -m eval.segment --checkpoint ...                    the same on eight GPUs
    python -m eval.segment --checkpoint mae.pth --data camvid --num_classes 11 --ignore_index 11 --head linear
    python -m eval.segment --eval_only --checkpoint runs/cae_v2_vit_b/segment_upernet/last.pt --data ade20k

  crop (B, 3, H, W) - ViT - outputs of blocks 3, 5, 7, 11 - x4, x2, x1, x0.5 - UPerNet - logits (B, K, H, W)

Data: `images/{train,val}/X.jpg` and `annotations/{train,val}/X.png` with a class id per pixel (ADE20K's names
`training` and `validation` will do), class names in `classes.txt` if there; or `scenes`, the built-in images.
Training: 160,000 steps of 16 crops, the recipe of CAE v1 and v2 [code] and of MAE, on which MFM builds. None
is known for Beyond Masking, which takes the same. The same command resumes, on a CPU bit for bit (a GPU adds
up gradients of resized maps in no fixed order). Several GPUs normalise in UPerNet by SyncBatchNorm, anything
else by GroupNorm: the first line says which. Test: whole images with the short side of a crop, in windows of
a crop's size, two thirds of it apart; logits are averaged where windows overlap and resized to the label map.
From one confusion matrix over all images and processes:
  mIoU  right / (truth + predicted - right), mean over the classes that occur in the truth or the prediction
  aAcc  share of the labelled pixels that is right      mAcc  the same per class of the truth, their mean

Sources: [code] the authors' configurations. Where they are silent or we differ:
  [D1] No relative position bias in the blocks and, for MAE, no new layer scale; the authors add them here.
       The position table is resized (bicubic) and stays frozen, as theirs [code].
  [D2] No recipe is released for ViT-Ti and S: ViT-B's. ViT-L's holds from 24 blocks on. Depths other than 12
       and 24 are read at the same places: after 1/3, 1/2, 2/3 and all of the blocks.
  [D3] Inside UPerNet: laterals and pools 1x1, fusions 3x3, no bias, norm and ReLU; dropout of whole channels.
  [D4] The loss is a crop's sum of cross-entropies / (H W), with 0 for ignored pixels, and its mean over
       crops: equal counts on all processes and micro batches.
  [D5] Photometric distortion in the ranges of torchvision's RandomPhotometricDistort, each step for half of
       the crops, channels not swapped. Ten tries for a crop that the limit of 0.75 allows.
  [D6] Warm-up is a factor on the poly schedule. bf16 autocast instead of fp16. No decay on the class token.
  [D7] `--head linear`, a quick reading: normed tokens of the last block, AdamW, 10,000 steps, lr 1e-3.

Dimension key: B batch, D encoder width, C UPerNet's width, K classes, N patches, h x w grid, H x W crop.
"""

import contextlib
import dataclasses
import math
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
from eval.protocol import (EvalConfig, append_result, check_writable, layer_groups, open_checkpoint,
                           random_encoder)

IGNORE = 255  # in label maps, once read: no class, no loss, no score
RECIPES = {
    "base": dict(steps=160_000, lr=1e-4, layer_decay=0.65, drop_path=0.1),  # [code]
    "large": dict(steps=160_000, lr=4e-5, layer_decay=0.95, drop_path=0.15),  # [code]
    "linear": dict(steps=10_000, lr=1e-3, layer_decay=1.0, drop_path=0.0),  # [D7]
}


@dataclasses.dataclass(frozen=True)
class Config(EvalConfig):
    """The whole command line."""

    data: str = flag("data/ade20k", "a folder with images/ and annotations/, or `scenes`")
    head: typing.Literal["upernet", "linear"] = flag("upernet", "linear: the encoder is frozen")
    img_size: int = flag(512, "pixels of a crop's and a window's side [code]")
    num_classes: int = flag(0, "classes (default: as many as classes.txt has lines)")
    ignore_index: int = flag(255, "id of pixels without a label")
    reduce_zero_label: bool = flag(False, "id 0 has no label either, and 1 is the first class (ADE20K)")
    random_init: bool = flag(False, "random weights in an encoder of that shape: the floor")
    batch_size: int = flag(16, "crops per step over all processes [code]")
    micro_batch: int = flag(0, "crops computed at once (default: a process's share)")
    steps: int = flag(-1, "of training (default: by recipe, like the three following ones)")
    lr: float = flag(-1.0, "peak learning rate")
    layer_decay: float = flag(-1.0, "factor on the learning rate per block down")
    drop_path: float = flag(-1.0, "stochastic depth of the last block, rising linearly to it")
    warmup_steps: int = flag(1500, "steps of linear warm-up, from 1e-6 of the rate [code]")
    weight_decay: float = flag(0.05, "AdamW; betas are torch's 0.9, 0.999 [code]")
    channels: int = flag(0, "UPerNet's width (default: the encoder's [code])")
    out: str = flag("", "folder of the run (default: segment_HEAD beside the checkpoint)")
    eval_only: bool = flag(False, "only test: --checkpoint is last.pt of a segmentation run")
    precision: typing.Literal["auto", "bf16", "fp32"] = flag("auto", "auto: bf16 on GPU, else fp32")
    save_every: int = flag(2000, "steps between checkpoints")
    max_steps: int = flag(0, "stop at this step, counted from 0; the schedule stays as it is")
    log_every: int = flag(50, "steps between log lines")
    fresh: bool = flag(False, "start a new numbered folder instead of going on with the run")

    def __post_init__(self):
        super().__post_init__()
        common.check_range(self, 0, "num_classes", "micro_batch", "warmup_steps", "weight_decay",
                           "channels", "max_steps")
        common.check_range(self, 1, "img_size", "save_every", "log_every")
        if self.num_classes > IGNORE:
            raise ValueError(f"--num_classes {self.num_classes} is above {IGNORE}, the most that work here")


def with_recipe(config, depth):
    """The configuration, with what was not given taken from the recipe for its head and depth [D2]."""
    name = "linear" if config.head == "linear" else "large" if depth >= 24 else "base"
    config = dataclasses.replace(config, **{
        key: value for key, value in RECIPES[name].items() if getattr(config, key) == -1})
    common.check_range(config, None, "steps", "lr", "layer_decay")
    common.check_range(config, 0, "drop_path")
    if config.warmup_steps >= config.steps or config.layer_decay > 1 or config.drop_path >= 1:
        raise ValueError(f"--warmup_steps {config.warmup_steps} must be below --steps {config.steps}, "
                         f"--drop_path {config.drop_path:g} below 1, --layer_decay {config.layer_decay:g} at "
                         "most 1")
    return config


# ------------------------------------------------------------------------------------------------------------
# Data


class LabelMaps(torch.utils.data.Dataset):
    """Images with label maps: `dataset[index]` is (uint8 image (3, h, w), ids of the file, its name).

    `images` is a `common.Images`; `maps` another one, of which the paths are used, or a tensor (n, h, w).
    """

    def __init__(self, images, maps, classes, name):
        self.images, self.maps, self.classes, self.name = images, maps, tuple(classes), name

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        image = self.images[index][0]
        if isinstance(self.maps, torch.Tensor):
            return image, self.maps[index], f"scene {index}"
        path = self.maps.path(index)
        try:
            with Image.open(path) as file:
                return image, torch.from_numpy(np.array(file).astype(np.int32)), path
        except (OSError, SyntaxError, ValueError) as error:
            raise ValueError(f"{path} cannot be read as a label map: {error}") from error


def to_labels(image, ids, name, config):
    """Ids of an annotation as labels (h, w) uint8: 0 .. K-1, or IGNORE.

    Raises ValueError with the file's name for a map of another size than its image and for an id of no class.
    """
    if ids.shape != image.shape[1:]:
        sizes = [" x ".join(map(str, shape)) for shape in (ids.shape, image.shape[1:])]
        raise ValueError(f"{name} is {sizes[0]}, but its image has {sizes[1]} pixels: a label map holds one "
                         "id for each pixel")
    ids = ids.int()
    ignored = ids == config.ignore_index
    if config.reduce_zero_label:
        ignored, ids = ignored | (ids == 0), ids - 1
    wrong = ids[~ignored & ((ids < 0) | (ids >= config.num_classes))]
    if len(wrong):
        raise ValueError(f"{name} holds the id {wrong[0] + config.reduce_zero_label}, which is none of the "
                         f"{config.num_classes} classes and not --ignore_index {config.ignore_index}")
    return ids.masked_fill(ignored, IGNORE).byte()


def find_maps(config, split):
    """The `LabelMaps` of --data for split "train" or "val".

    Raises FileNotFoundError or ValueError that names what is missing: a folder, an image, an annotation.
    """
    if config.data == "scenes":
        from demo.scenes import MAP_CLASSES, SEEDS, make_scenes
        scenes = make_scenes({"train": 1000, "val": 200}[split], config.img_size, SEEDS[split])
        return LabelMaps(common.Images(scenes.images), scenes.maps, MAP_CLASSES, f"scenes ({split})")
    root, found = Path(config.data).expanduser(), []
    for kind in ("images", "annotations"):
        names = {"train": ("train", "training"), "val": ("val", "validation")}[split]
        folder = next((root / kind / name for name in names if (root / kind / name).is_dir()), None)
        if folder is None:
            raise FileNotFoundError(f"--data {root} has no folder {kind}/{names[0]}/ or {kind}/{names[1]}/")
        files = common.list_images(folder)
        found.append({Path(path).relative_to(folder).with_suffix(""): path for path in files})
    alone = sorted(set(found[0]) ^ set(found[1]))
    if alone or not found[0]:
        path = (found[0] | found[1])[alone[0]] if alone else folder
        missing = "images" if path in found[1].values() else "annotations"
        raise ValueError(f"{path} has no partner in {root / missing}: each image has an annotation of "
                         "its name, and each annotation an image")
    images, maps = (common.Images([files[key] for key in sorted(files)]) for files in found)
    return LabelMaps(images, maps, class_names(root / "classes.txt", config.num_classes), f"{root} ({split})")


def class_names(path, num_classes):
    """The lines of classes.txt, or without that file the ids 0 .. K-1 themselves."""
    lines = path.read_text().split("\n") if path.exists() else map(str, range(num_classes))
    names = [line.strip() for line in lines if line.strip()]
    if not names or num_classes not in (0, len(names)):
        raise ValueError(f"{path} names {len(names)} classes, --num_classes {num_classes}: one must tell")
    return names


def scaled_size(size, short_side):
    """(h, w) with its short side resized to `short_side`, and its long side to no more than four times that:
    what "2048 x 512 with the aspect kept" means for a crop of 512 [code]."""
    factor = min(short_side / min(size), 4 * short_side / max(size))
    return [max(1, round(side * factor)) for side in size]


def resized(image, size):
    return TF.resize(image, size, TF.InterpolationMode.BILINEAR, antialias=True)


def pad(image, side, fill):
    """(C, h, w) to at least (C, side, side), with a value per channel below and to the right."""
    height, width = (max(length, side) for length in image.shape[1:])
    canvas = torch.tensor(fill, dtype=image.dtype)[:, None, None].repeat(1, height, width)
    canvas[:, :image.shape[1], :image.shape[2]] = image
    return canvas


MEAN_COLOUR = [round(255 * mean) for mean in common.IMAGENET_MEAN]


def uniform(low, high):
    return low + (high - low) * float(torch.rand(()))


class Augment:
    """A training crop, made in a worker: uint8 image (3, H, W) and labels (H, W)."""

    def __init__(self, config):
        self.config = config

    def __call__(self, image, ids, name):
        side, labels = self.config.img_size, to_labels(image, ids, name, self.config)
        size = scaled_size(labels.shape, side * uniform(0.5, 2.0))  # [code]
        image = resized(image, size)
        labels = TF.resize(labels[None], size, TF.InterpolationMode.NEAREST_EXACT)
        for attempt in range(10):
            top, left = (int(torch.randint(max(length - side, 0) + 1, ())) for length in size)
            crop = labels[:, top: top + side, left: left + side]
            counts = crop[crop != IGNORE].int().bincount()
            if len(counts) and counts.max() <= 0.75 * counts.sum():  # [code]
                break
        image = distort(image[:, top: top + side, left: left + side])
        if torch.rand(()) < 0.5:
            image, crop = image.flip(-1), crop.flip(-1)
        return pad(image, side, MEAN_COLOUR), pad(crop, side, [IGNORE])[0]


def distort(image):
    """Photometric distortion of a uint8 image (3, h, w); contrast comes before or after colour [D5]."""
    steps = [(TF.adjust_brightness, 0.875, 1.125), (TF.adjust_saturation, 0.5, 1.5),
             (TF.adjust_hue, -0.05, 0.05)]
    steps.insert(1 if torch.rand(()) < 0.5 else 3, (TF.adjust_contrast, 0.5, 1.5))
    for adjust, low, high in steps:
        if torch.rand(()) < 0.5:
            image = adjust(image, uniform(low, high))
    return image


class Views(torch.utils.data.Dataset):
    """What a test looks at: (uint8 image (3, h, w), short side as a crop, labels in their own size)."""

    def __init__(self, data, config):
        self.data, self.config = data, config

    def __len__(self):
        return len(self.data)

    def __getitem__(self, index):
        image, ids, name = self.data[index]
        labels = to_labels(image, ids, name, self.config)
        return resized(image, scaled_size(labels.shape, self.config.img_size)), labels


# ------------------------------------------------------------------------------------------------------------
# Model


def tap_blocks(depth):
    """The blocks that UPerNet reads, 0-based: 3, 5, 7, 11 of 12 and 7, 11, 15, 23 of 24 [code] [D2]."""
    return [max(round(depth * sixths / 6) - 1, 0) for sixths in (2, 3, 4, 6)]


def upsample(x, size):
    return F.interpolate(x, size, mode="bilinear", align_corners=False)


def norm_layer(norm, channels):
    """`batch`, or `group`: GroupNorm with 32 groups, or as many as divide the channels with 4 in each, since
    a pool of one cell has no other values to be normalised by."""
    groups = [count for count in range(1, 33) if channels % count == 0 and channels >= 4 * count]
    return nn.BatchNorm2d(channels) if norm == "batch" else nn.GroupNorm(max(groups, default=1), channels)


def conv(in_channels, channels, kernel, norm):
    return nn.Sequential(nn.Conv2d(in_channels, channels, kernel, padding=kernel // 2, bias=False),
                         norm_layer(norm, channels), nn.ReLU())


class UPerNet(nn.Module):
    """Four maps (B, D, h, w) of a ViT to logits (B, K, 4h, 4w), and an auxiliary head's (B, K, h, w)."""

    def __init__(self, dim, num_classes, channels, norm):
        super().__init__()
        twice = [nn.ConvTranspose2d(dim, dim, 2, stride=2) for _ in range(3)]
        self.rescale = nn.ModuleList([  # no norm on the taps themselves [code]
            nn.Sequential(twice[0], norm_layer(norm, dim), nn.GELU(), twice[1]), twice[2], nn.Identity(),
            nn.MaxPool2d(2)])
        self.pools = nn.ModuleList(nn.Sequential(nn.AdaptiveAvgPool2d(cells), conv(dim, channels, 1, norm))
                                   for cells in (1, 2, 3, 6))  # [code]
        self.bottleneck = conv(dim + 4 * channels, channels, 3, norm)
        self.laterals = nn.ModuleList(conv(dim, channels, 1, norm) for _ in range(3))
        self.smooth = nn.ModuleList(conv(channels, channels, 3, norm) for _ in range(3))
        self.fuse = conv(4 * channels, channels, 3, norm)
        self.classify = nn.Sequential(nn.Dropout2d(0.1), nn.Conv2d(channels, num_classes, 1))  # [code]
        self.auxiliary = nn.Sequential(conv(dim, 256, 3, norm), nn.Dropout2d(0.1),
                                       nn.Conv2d(256, num_classes, 1))  # [code]

    def forward(self, taps):
        # (B, D, 4h, 4w), 2h, h, and (B, D, h/2, w/2)
        *finer, coarse = [rescale(tap) for rescale, tap in zip(self.rescale, taps)]
        pooled = [upsample(pool(coarse), coarse.shape[2:]) for pool in self.pools]  # (B, C, h/2, w/2) each
        x = self.bottleneck(torch.cat([coarse, *pooled], dim=1))  # (B, C, h/2, w/2)
        levels = [x]
        for lateral, smooth, level in zip(self.laterals, self.smooth, reversed(finer)):
            x = lateral(level) + upsample(x, level.shape[2:])  # (B, C, h, w), then 2h, 4h
            levels.append(smooth(x))
        levels = [upsample(level, x.shape[2:]) for level in levels]  # (B, C, 4h, 4w) each
        logits = self.classify(self.fuse(torch.cat(levels, dim=1)))  # (B, K, 4h, 4w)
        return logits, self.auxiliary(finer[2])  # the third tap's [code]


class Segmenter(nn.Module):
    """An encoder with a head: images (B, 3, H, W) to logits (B, K, H, W) and a list of auxiliary ones."""

    def __init__(self, encoder, config, norm):
        super().__init__()
        dim, self.encoder, self.linear = encoder.config["embed_dim"], encoder, config.head == "linear"
        if min(encoder.grid) < 2:
            raise ValueError(f"a crop of {config.img_size} pixels has {encoder.grid} patches, too few")
        torch.manual_seed(config.seed)
        if self.linear:
            self.taps, self.head = [-1], nn.Conv2d(dim, config.num_classes, 1)
            encoder.requires_grad_(False)
        else:
            self.taps = tap_blocks(len(encoder.blocks))
            self.head = UPerNet(dim, config.num_classes, config.channels or dim, norm)
            encoder.norm.requires_grad_(False)  # of no use here
            rates = torch.linspace(0, config.drop_path, len(encoder.blocks), device="cpu").tolist()
            for block, rate in zip(encoder.blocks, rates):
                block.drop_path.rate = rate

    def forward(self, images):
        h, w = self.encoder.grid
        taps = self.encoder.layers(images, self.taps, norm=self.linear)  # (B, 1+N, D) each
        maps = [rearrange(tap[:, -h * w:], "b (h w) d -> b d h w", h=h) for tap in taps]  # (B, D, h, w) each
        logits = [self.head(maps[0])] if self.linear else self.head(maps)
        logits, *auxiliary = [upsample(x.float(), images.shape[2:]) for x in logits]  # (B, K, H, W) each
        return logits, auxiliary


def pixel_loss(logits, labels):
    """Cross-entropy of logits (B, K, H, W) and labels (B, H, W): the sum of them / (B H W) [D4]."""
    return F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="sum") / labels.numel()


# ------------------------------------------------------------------------------------------------------------
# Test


def window_starts(length, window, stride):
    """Where windows begin along a side: every `stride` pixels, the last one flush with the end."""
    last = max(length - window, 0)
    return [*range(0, last, stride), last]


@torch.no_grad()
def slide(model, image, stride, config, device):
    """Logits (K, h, w) float32 of a uint8 image (3, h, w): the mean over all windows that see a pixel."""
    h, w = image.shape[1:]
    side, batch = config.img_size, config.micro_batch or 16
    image = pad(image, side, MEAN_COLOUR)
    corners = [(top, left) for top in window_starts(image.shape[1], side, stride)
               for left in window_starts(image.shape[2], side, stride)]
    total = torch.zeros(config.num_classes, *image.shape[1:], device=device)
    count = torch.zeros(image.shape[1:], device=device)
    for some in (corners[first: first + batch] for first in range(0, len(corners), batch)):
        windows = torch.stack([image[:, top: top + side, left: left + side] for top, left in some]).to(device)
        with common.autocast(device, config.precision):
            logits = model(common.normalise(windows))[0]  # (B, K, H, W)
        for (top, left), window in zip(some, logits):
            total[:, top: top + side, left: left + side] += window
            count[top: top + side, left: left + side] += 1
    return (total / count)[:, :h, :w]


def predict(model, image, size, config, device):
    """The classes (h, w) of a test image, at the `size` of its label map."""
    logits = slide(model, image, max(config.img_size * 2 // 3, 1), config, device)  # 341 of 512 [code]
    return upsample(logits[None], size)[0].argmax(dim=0)


def confusion_matrix(labels, predicted, num_classes):
    """Counts (K, K) int64 over labelled pixels: the row is the true class, the column the predicted one."""
    kept = labels != IGNORE
    pairs = labels[kept].long() * num_classes + predicted[kept]
    return rearrange(pairs.bincount(minlength=num_classes**2), "(k l) -> k l", k=num_classes)


def scores(confusion):
    """mIoU, aAcc, mAcc and the IoU of each class (None: it occurs nowhere) of a confusion matrix, and what it
    gives to say the commonest class everywhere; all in per cent. Raises ValueError for an empty matrix."""
    if not confusion.any():
        raise ValueError("no pixel of the test's label maps has a label: look at --ignore_index")
    confusion = confusion.double()
    right, truth, predicted = confusion.diag(), confusion.sum(dim=1), confusion.sum(dim=0)  # (K,) each
    iou, recall = 100 * right / (truth + predicted - right), 100 * right / truth  # nan: no such class
    share = 100 * truth / truth.sum()
    return dict(miou=float(iou.nanmean()), aacc=float(100 * right.sum() / truth.sum()),
                macc=float(recall.nanmean()), commonest_aacc=float(share.max()),
                commonest_miou=float(share.max() / (truth > 0).sum()),
                iou=[None if math.isnan(value) else round(value, 2) for value in iou.tolist()])


def evaluate(model, data, config, processes):
    """The confusion matrix (K, K) of all images; each process tests its share."""
    model.eval()
    mine = torch.utils.data.Subset(Views(data, config), range(processes.rank, len(data), processes.world))
    loader = torch.utils.data.DataLoader(mine, batch_size=None, num_workers=config.workers)
    confusion = torch.zeros([config.num_classes] * 2, dtype=torch.int64, device=processes.device)
    for image, labels in tqdm(loader, "test", leave=False, disable=None if processes.main else True):
        predicted = predict(model, image, labels.shape, config, processes.device)
        confusion += confusion_matrix(labels.to(processes.device), predicted, config.num_classes)
    return processes.sum(confusion).cpu()


def palette(count):
    """(count, 3) uint8: each colour is as far as can be from black, grey, white and all colours before it."""
    steps = torch.linspace(0, 255, 9)
    grid = torch.cartesian_prod(steps, steps, steps)  # (729, 3)
    chosen = [torch.full((3,), grey) for grey in (0.0, 128.0, 255.0)]
    while len(chosen) < count + 3:
        # Green counts most and red least, as for the eye.
        differences = grid[:, None] - torch.stack(chosen)  # (729, n, 3)
        distances = (differences.square() * torch.tensor([2.0, 4.0, 3.0])).sum(dim=2)  # (729, n)
        chosen.append(grid[distances.amin(dim=1).argmax()])
    return torch.stack(chosen[3:]).byte()


def overlay(image, labels, colours):
    """A uint8 image (3, h, w), grey below the colours of its labels (h, w) but where they are IGNORE."""
    grey = image.float().mean(dim=0)
    paint = rearrange(colours[labels.long().clamp(max=len(colours) - 1)], "h w c -> c h w")
    return torch.where(labels == IGNORE, image, 0.4 * grey + 0.6 * paint).byte()


def draw_overlays(path, model, data, config, device, count=6):
    """Draws a few test images, their truth and the prediction, with a legend of the classes that occur."""
    colours, views, seen, top, width = palette(config.num_classes), Views(data, config), set(), 0, 320
    sheet = Image.new("RGB", (3 * width, 20_000), "white")
    draw = ImageDraw.Draw(sheet)
    for index in torch.linspace(0, len(data) - 1, min(count, len(data))).long().tolist():
        view, labels = views[index]
        image, predicted = data[index][0], predict(model, view, labels.shape, config, device).cpu()
        seen |= {*labels.unique().tolist(), *predicted.unique().tolist()} - {IGNORE}
        panels = [image, overlay(image, labels, colours), overlay(image, predicted, colours)]
        for column, panel in enumerate(panels):
            panel = TF.to_pil_image(panel)
            panel = panel.resize((width - 4, round(width * panel.height / panel.width)))
            sheet.paste(panel, (column * width, top))
        top += panel.height + 4
    for place, index in enumerate(sorted(seen)):
        x, y = place % 5 * width * 3 // 5 + 4, top + place // 5 * 18
        draw.rectangle((x, y, x + 14, y + 12), fill=tuple(colours[index].tolist()), outline="black")
        draw.text((x + 20, y), data.classes[index][:24], fill="black")
    draw.text((4, y + 20), "image | truth | prediction; without colour: no label", fill="black")
    sheet = sheet.crop((0, 0, sheet.width, y + 38))
    common.write_atomically(path, lambda temporary: sheet.save(temporary, format="PNG"))


def report(model, config, folder, path, processes, started, **facts):
    """Tests the model; the main process draws, appends the result line beside `path`, with the `facts` about
    its training, and says the scores."""
    data = find_maps(config, "val")
    result = scores(evaluate(model, data, config, processes))
    if processes.main:
        draw_overlays(folder / "overlays.png", model, data, config, processes.device)
        append_result("segment", path, model.encoder, config, started, protocol=config.head, data=config.data,
                      val=data.name, val_images=len(data), random_init=config.random_init, **result,
                      **facts, seed=config.seed, device=str(processes.device))
        name = f"{config.head}{', random init' * config.random_init}"
        print(f"segmentation ({name}): mIoU {result['miou']:.1f}, aAcc {result['aacc']:.1f}, mAcc "
              f"{result['macc']:.1f} %; the commonest class everywhere: mIoU {result['commonest_miou']:.1f}, "
              f"aAcc {result['commonest_aacc']:.1f} %; pictures in {folder}/overlays.png")


# ------------------------------------------------------------------------------------------------------------
# Train


def learning_rate(step, config):
    """Poly schedule of power 1 down to 0, times a linear warm-up from 1e-6 [code] [D6]."""
    warmup = min(1.0, 1e-6 + (1 - 1e-6) * step / max(config.warmup_steps, 1))
    return config.lr * warmup * (1 - step / config.steps)


def describe(config, model, plan, processes, data, val, folder, norm):
    """Prints the recipe and what it costs."""
    total, encoder = (sum(p.numel() for p in part.parameters()) for part in (model, model.encoder))
    with torch.device("meta"):
        copy = Segmenter(common.ViT(**model.encoder.config), config, norm)
        crop = torch.empty(1, 3, config.img_size, config.img_size)

    def step():
        logits, auxiliary = copy(crop)
        sum([logits, *auxiliary]).sum().backward()

    flops, name = common.count_flops(step), {"batch": "SyncBatchNorm", "group": "GroupNorm"}[norm]
    what = f"UPerNet on blocks {model.taps}, {name} ({processes.world} processes, {processes.device.type})"
    what = "a linear layer on frozen tokens" if model.linear else what
    print(f"segment  {what}: {total:,} parameters, {encoder:,} of them in the encoder\n"
          f"data     {len(data):,} images in {data.name}, {len(val):,} to test, {len(data.classes)} classes\n"
          f"batch    {plan.batch_size} = {processes.world} processes x {plan.accumulation} micro batches x "
          f"{plan.micro_batch} crops of {config.img_size} pixels\n"
          f"steps    {config.steps:,}, {config.steps / plan.steps_per_epoch:.1f} epochs, "
          f"{config.warmup_steps:,} of warm-up\n"
          f"lr       {config.lr:.2e} at the peak, x {config.layer_decay:g} per block down\n"
          f"cost     {flops / 1e9:.1f} GFLOP per crop and step, {flops * plan.batch_size * config.steps:.1e} "
          f"FLOP in all\nfiles    {folder}/: config.json, log.jsonl, last.pt, overlays.png", flush=True)


def train(encoder, data, config, run, processes):
    """Training from start to end: lr, forward, backward, step, log, save. Returns the model."""
    device, val = processes.device, find_maps(config, "val")
    Views(val, config)[0]  # read now, not after days
    plan = common.make_plan(len(data), config.batch_size, config.micro_batch, 1, processes.world)
    plan = dataclasses.replace(plan, total_steps=config.steps)
    several_gpus = processes.world > 1 and device.type == "cuda" and config.head == "upernet"
    norm = run.state["norm"] if run.state else "batch" if several_gpus else "group"
    if norm == "batch" and not several_gpus:
        raise ValueError(f"the run in {run.folder} has SyncBatchNorm: go on with several GPUs, as it began")
    model = Segmenter(encoder, config, norm).to(device)
    if norm == "batch":
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    groups = layer_groups(model, encoder, config.weight_decay, config.layer_decay)
    optimizer = torch.optim.AdamW(groups, lr=config.lr, fused=True)
    if processes.main:
        describe(config, model, plan, processes, data, val, run.folder, norm)
    start = run.begin(processes, plan, model, optimizer, len(data))
    parallel = model if processes.world == 1 else nn.parallel.DistributedDataParallel(
        model, gradient_as_bucket_view=True)
    samples = common.Samples(data, Augment(config), config.seed)
    batches = iter(common.training_loader(samples, plan, processes, config, start, run.stop))

    model.train()
    for step in range(start, run.stop):
        lr = learning_rate(step, config)
        for group in optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]

        for micro in range(plan.accumulation):
            images, labels = (x.to(device, non_blocking=True) for x in run.next_batch(batches))
            # Drop path and dropout are drawn here; seeded so, they need no saved generator.
            torch.manual_seed(common.seed_for(config.seed, "step", step, plan.first_row(micro, processes)))
            more_to_come = processes.world > 1 and micro < plan.accumulation - 1
            with parallel.no_sync() if more_to_come else contextlib.nullcontext():
                with common.autocast(device, config.precision):
                    logits, auxiliary = parallel(common.normalise(images))
                loss = pixel_loss(logits, labels.long())
                loss = loss + sum(0.4 * pixel_loss(other, labels.long()) for other in auxiliary)  # [code]
                (loss / plan.accumulation).backward()
            run.record(loss=loss)

        grad_norm = nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
        run.update(optimizer, grad_norm)

        run.log(step + 1, lr, grad_norm)
        stopping = run.stopping()
        if (step + 1) % config.save_every == 0 or step + 1 == run.stop or stopping:
            run.save(model, optimizer, step + 1, encoder=encoder.config, norm=norm)
        if stopping:
            run.close()
            sys.exit(1)  # in a process that agreed to stop and has not been asked itself
    run.close()
    return model, dict(train=data.name, train_images=len(data), norm=norm)


def test_only(config, processes, started):
    """--eval_only: last.pt holds all that is needed beside the data."""
    path = Path(config.checkpoint).expanduser()
    path = path / "last.pt" if path.is_dir() else path
    state = common.read_checkpoint(path)
    check_writable(path)
    if state.get("kind") != "segmentation":
        raise ValueError(f"{path} is not from a segmentation run: --eval_only tests the last.pt of one")
    own = {name: getattr(config, name) for name in (
        "data", "device", "workers", "micro_batch", "precision", "eval_only")}
    config = dataclasses.replace(Config(**state["config"]), **own)
    model = Segmenter(common.ViT(**state["encoder"]), config, state["norm"])
    model.load_state_dict(state["model"])
    report(model.to(processes.device), config, path.parent, path, processes, started, step=state["step"],
           norm=state["norm"])


def main(argv=None):
    config, started = common.parse_config(Config, __doc__, argv=argv), time.perf_counter()
    with common.processes(config.device) as processes:
        if config.eval_only:
            return test_only(config, processes, started)
        with contextlib.redirect_stdout(sys.stdout if processes.main else None):
            path, encoder = open_checkpoint(config)
        data = find_maps(config, "train")
        config = with_recipe(dataclasses.replace(config, num_classes=len(data.classes)), len(encoder.blocks))
        if config.random_init:
            encoder = random_encoder(encoder, config.seed)
        out = config.out or path.parent / f"segment_{config.head}{'_random' * config.random_init}"
        run = common.Run("segment", config, out, "segmentation")
        if not run.finished:
            model, facts = train(encoder, data, config, run, processes)
            if run.stop == config.steps:
                return report(model, config, run.folder, path, processes, started, step=run.stop, **facts)
        if processes.main:
            print(f"the run in {run.folder}/ is at its last step (--fresh starts anew); to test it: "
                  f"--eval_only --checkpoint {run.folder}/last.pt --data {config.data}")


if __name__ == "__main__":
    common.run_main(main)
