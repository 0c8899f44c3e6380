"""Semantic segmentation: UPerNet on an encoder that trains along, or one linear layer on a frozen one.

    python -m eval.segment --checkpoint runs/x --data ade20k --num_classes 150 --reduce_zero_label
    python -m eval.segment --checkpoint m.pth --data camvid --num_classes 11 --ignore_index 11 --head linear
    python -m eval.segment --eval_only --checkpoint runs/x/segment_upernet --data ade20k

    crop (B, 3, H, W) - ViT - blocks 3, 5, 7, 11 - x4, x2, x1, x0.5 - UPerNet - logits (B, K, H, W)

Data: images/{train,val}/X.jpg and annotations/{train,val}/X.png with a class id per pixel (`training` and
`validation` will do), class names in classes.txt if there is one; or the built-in `scenes`. All label maps
are read before the first step. Photos are turned upright, unless their label map fits only the stored one.
Training: as CAE v1 and v2 [code] and MAE, on which MFM builds; for Beyond Masking no recipe is known. Its
folder is segment_HEAD beside the checkpoint. The same command resumes, on a CPU bit for bit (a GPU adds up
gradients of resized maps in no fixed order). UPerNet has GroupNorm, and on several GPUs SyncBatchNorm.
Test: whole images with the short side of a crop, in windows of its size, two thirds of it apart; logits are
averaged where they overlap and resized to the label map. From one confusion matrix of all images:
  mIoU  right / (truth + predicted - right), mean over the classes that occur in the truth or the prediction
  aAcc  share of the labelled pixels that is right      mAcc  the same per class of the truth, their mean

Sources: [code] the authors' configurations. Where they are silent or we differ:
  [D1] No relative position bias in the blocks and, for MAE, no new layer scale; the authors add them here.
       The position table is resized (bicubic) and stays frozen, as theirs [code].
  [D2] ViT-Ti and S have no released recipe and take ViT-B's. ViT-L's holds from 24 blocks on. Depths other
       than 12 and 24 are read at the same places: after 1/3, 1/2, 2/3 and all of the blocks.
  [D3] In UPerNet laterals and pools 1x1, fusions 3x3, no bias, norm and ReLU; dropout of whole channels.
  [D4] The loss is the mean over all pixels of a crop, 0 for ignored ones: equal counts on all processes.
  [D5] Photometric distortion in the ranges of torchvision's RandomPhotometricDistort, each step for half of
       the crops, channels not swapped. Ten tries for a crop that the limit of 0.75 allows.
  [D6] Warm-up is a factor on the poly schedule. bf16 autocast instead of fp16. No decay on the class token.
  [D7] `--head linear`, a quick reading: normed tokens of the last block, AdamW, 10,000 steps, lr 1e-3.
Dimension key: B batch, D encoder width, C UPerNet's, K classes, N patches, H x W crop, h x w other size."""

import contextlib
import dataclasses
import functools
import json
import math
import sys
import time
import typing
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image, ImageDraw
from torch import nn
from torchvision.transforms.v2 import functional as TF
from torchvision.utils import draw_segmentation_masks
from tqdm import tqdm

if not __package__:  # started by its file name, Python does not find common.py
    raise SystemExit("error: start it in the folder of common.py as `python -m eval.segment`")
import common
from common import flag
from eval.data import read_text
from eval.protocol import (
    MEAN_COLOUR, EvalConfig, append_result, fit, layer_groups, look_through, normalise, open_checkpoint,
    open_run, random_encoder, read_annotated, set_drop_path, share_loader)

IGNORE = 255  # in label maps, once read: no class, no loss, no score
RECIPES = dict(base=dict(steps=160_000, lr=1e-4, layer_decay=0.65, drop_path=0.1),  # [code]
               large=dict(steps=160_000, lr=4e-5, layer_decay=0.95, drop_path=0.15),  # [code]
               linear=dict(steps=10_000, lr=1e-3, layer_decay=1.0, drop_path=0.0))  # [D7]


@dataclasses.dataclass(frozen=True)
class Config(EvalConfig, common.TrainConfig):
    """The whole command line; flags that are not here come from these two classes."""
    data: str = flag("data/ade20k", "a folder with images/ and annotations/, or `scenes`")
    head: typing.Literal["upernet", "linear"] = flag("upernet", "linear: the encoder is frozen")
    img_size: int = flag(512, "pixels of a crop's and a window's side [code]", positive=True)
    num_classes: int = flag(0, "classes (default: as many as classes.txt has lines)")
    ignore_index: int = flag(255, "id of pixels without a label")
    reduce_zero_label: bool = flag(False, "id 0 has no label either, and 1 is the first class (ADE20K)")
    random_init: bool = flag(False, "random weights in an encoder of that shape: the baseline")
    batch_size: int = flag(16, "crops per step over all processes [code]", positive=True)
    steps: int = flag(-1, "of training (default: by recipe, like the next three)", positive=True)
    lr: float = flag(-1.0, "peak learning rate", positive=True)
    layer_decay: float = flag(-1.0, "factor on the learning rate per block down", positive=True)
    drop_path: float = flag(-1.0, "stochastic depth of the last block, rising linearly to it")
    warmup_steps: int = flag(1500, "steps of linear warm-up, from 1e-6 of the rate [code]")
    weight_decay: float = flag(0.05, "AdamW; betas are torch's 0.9, 0.999 [code]")
    channels: int = flag(0, "UPerNet's width (default: the encoder's [code])")
    eval_only: bool = flag(False, "only test: --checkpoint is a segmentation run's folder or last.pt")
    save_every: int = flag(2000, "steps between checkpoints", positive=True)


def with_recipe(config, num_classes, depth):
    """Fills in the recipe of the head and the depth [D2]. Raises ValueError for values that do not fit."""
    recipe = RECIPES["linear" if config.head == "linear" else "large" if depth >= 24 else "base"]
    recipe = {key: value for key, value in recipe.items() if getattr(config, key) == -1}
    config = dataclasses.replace(config, num_classes=num_classes, **recipe)
    if config.warmup_steps >= config.steps or config.layer_decay > 1 or config.drop_path >= 1:
        raise ValueError(f"--warmup_steps {config.warmup_steps} must be below --steps {config.steps}, "
                         "--drop_path below 1, and --layer_decay at most 1")
    return config


# ---- data ------------------------------------------------------------------------------------------------
class LabelMaps(torch.utils.data.Dataset):
    """`dataset[index]` is (uint8 image (3, h, w), ids of its label map (h, w) int32, the map's name).
    `images` is a `common.Images`; `maps` another one, whose paths are used, or a tensor (n, h, w)."""

    def __init__(self, images, maps, classes, name):
        self.images, self.maps, self.classes, self.name = images, maps, tuple(classes), name

    def __len__(self):
        return len(self.images)

    def fingerprint(self):  # as of `common.Images`
        maps = common.Images(self.maps) if isinstance(self.maps, torch.Tensor) else self.maps
        return self.images.fingerprint() + maps.fingerprint()

    def __getitem__(self, index):
        if isinstance(self.maps, torch.Tensor):
            return self.images[index][0], self.maps[index].int(), f"scene {index}"
        path = self.maps.path(index)
        try:
            with Image.open(path) as file:
                turn = common.exif_turn(file)
                ids = TF.pil_to_tensor(file if turn is None else file.transpose(turn)).squeeze(0).int()
        except (OSError, SyntaxError, ValueError) as error:
            raise ValueError(f"{path} cannot be read as a label map: {error}") from error
        return read_annotated(self.images.path(index), ids.shape[-2:], f"its label map {path}"), ids, path


def to_labels(image, ids, name, config):
    """Ids as labels (h, w) uint8: 0 .. K-1, or IGNORE. Raises ValueError for other shapes and other ids."""
    if ids.shape != image.shape[1:]:
        raise ValueError(f"{name} has the shape {tuple(ids.shape)}, its image {tuple(image.shape[1:])}")
    ignored = ids == config.ignore_index
    if config.reduce_zero_label:
        ignored, ids = ignored | (ids == 0), ids - 1
    wrong = ids[~ignored & ((ids < 0) | (ids >= config.num_classes))]
    if len(wrong):
        raise ValueError(f"{name} holds the id {wrong[0] + config.reduce_zero_label}, which is none of the "
                         f"{config.num_classes} classes and not --ignore_index {config.ignore_index}")
    return ids.masked_fill(ignored, IGNORE).byte()


def find_maps(config, split):
    """The `LabelMaps` of --data for split "train" or "val". Raises FileNotFoundError or ValueError."""
    if config.data == "scenes":
        from demo.scenes import MAP_CLASSES, SEEDS, make_scenes
        scenes = make_scenes({"train": 1000, "val": 200}[split], config.img_size, SEEDS[split])
        return LabelMaps(common.Images(scenes.images), scenes.maps, MAP_CLASSES, f"scenes ({split})")
    root, found = Path(config.data).expanduser(), []
    for kind in ("images", "annotations"):
        short, long = {"train": ("train", "training"), "val": ("val", "validation")}[split]
        folder = root / kind / (long if (root / kind / long).is_dir() else short)
        files = common.list_images(folder)
        found.append({Path(path).relative_to(folder).with_suffix(""): path for path in files})
    alone = found[0].keys() ^ found[1].keys()
    if alone:
        raise ValueError(f"{(found[0] | found[1])[min(alone)]} has no partner in images/ or annotations/")
    file, count = root / "classes.txt", config.num_classes
    lines = read_text(file).split("\n") if file.exists() else map(str, range(count))
    classes = [line.strip() for line in lines if line.strip()]
    if not classes or count not in (0, len(classes)) or len(classes) > IGNORE:
        raise ValueError(f"--num_classes is {count}, {file} has {len(classes)} names: give one of them, "
                         f"or the same number, from 1 to {IGNORE}")
    images, maps = (common.Images([files[key] for key in sorted(files)]) for files in found)
    return LabelMaps(images, maps, classes, f"{root} ({split})")


def pixel_counts(config, sample):
    """The pixels of each class in a sample of `LabelMaps`, and those that are ignored."""
    labels, K = to_labels(*sample, config), config.num_classes
    return labels.flatten().int().clamp(max=K).bincount(minlength=K + 1).tolist()


def check_maps(data, split, config, folder, dist):
    """Reads all label maps of a set, each process its share, and prints what is in them; label_maps.json in
    the run's `folder` keeps the counts for when the run goes on. Raises ValueError for a map that cannot be
    used, and where fewer than two classes have a pixel."""
    file, known, key, K = folder / "label_maps.json", {}, None, config.num_classes
    if dist.is_main:
        with contextlib.suppress(OSError, ValueError):
            known = json.loads(file.read_text())
        maps = [] if isinstance(data.maps, torch.Tensor) else map(data.maps.path, range(len(data)))
        files = [(path, Path(path).stat().st_size) for path in maps]
        key = common.seed_for(data.name, files, config.img_size, K, config.ignore_index,
                              config.reduce_zero_label)
    old = known.get(split, {})
    if dist.all_reduce(torch.tensor(int(dist.is_main and old.get("key") == key))):
        counts = torch.tensor(old.get("pixels", [0] * (K + 1)))
    else:
        keep = functools.partial(pixel_counts, config)
        rows = look_through(data, f"label maps ({split})", config, dist, keep)
        counts = torch.tensor(rows, dtype=torch.int64).reshape(-1, K + 1).sum(dim=0)
    *pixels, ignored = dist.all_reduce(counts).tolist()
    lacking = [name for name, count in zip(data.classes, pixels) if not count]
    names = ", ".join(lacking[:5]) + f" and {len(lacking) - 5} more" * (len(lacking) > 5)
    share = f"{100 * ignored / (ignored + sum(pixels)):.1f} % of the pixels"
    if len(lacking) > K - 2:
        none, first = f", none of {names}" * bool(names), int(config.reduce_zero_label)
        zero = " and 0 (--reduce_zero_label)" * first
        raise ValueError(f"{data.name} has pixels of {K - len(lacking)} of {K} classes{none}, and id "
                         f"{config.ignore_index} (--ignore_index){zero} has {share}: give two classes or "
                         f"more, with the ids {first}, {first + 1} and so on")
    if dist.is_main:
        print(f"labels   {split}: {len(data):,} maps, {share} ignored", flush=True)
        if lacking:
            sys.stderr.write(f"warning: no pixel of {names} in the label maps of {data.name}\n")
        known[split] = dict(key=key, pixels=[*pixels, ignored])
        common.write_atomically(file, lambda path: path.write_text(json.dumps(known)))


def scaled_size(size, short_side):
    """(h, w) with its short side resized to `short_side`, its long side to at most 4 times that [code]."""
    factor = min(short_side / min(size), 4 * short_side / max(size))
    return [max(1, round(side * factor)) for side in size]


def pad(image, side, fill):
    """Fills up an image (..., h, w) to at least (..., side, side), below and to the right."""
    h, w = image.shape[1:]
    return TF.pad(image, [0, 0, max(side - w, 0), max(side - h, 0)], fill)


def augment(config, image, ids, name):
    """A training crop, made in a worker: uint8 image (3, H, W) and labels (H, W)."""
    side, labels = config.img_size, to_labels(image, ids, name, config)
    size = scaled_size(labels.shape, side * (0.5 + 1.5 * float(torch.rand(()))))  # [code]
    labels = TF.resize(labels[None], size, TF.InterpolationMode.NEAREST_EXACT)
    for attempt in range(10):  # [D5]
        top, left = (int(torch.randint(max(length - side, 0) + 1, ())) for length in size)
        crop = labels[:, top: top + side, left: left + side]
        counts = crop[crop != IGNORE].int().bincount()
        if len(counts) and counts.max() <= 0.75 * counts.sum():  # [code]
            break
    image = distort(TF.resize(image, size)[:, top: top + side, left: left + side])
    if torch.rand(()) < 0.5:
        image, crop = image.flip(-1), crop.flip(-1)
    return pad(image, side, MEAN_COLOUR), pad(crop, side, IGNORE)[0]  # (3, H, W), (H, W)


def distort(image):
    """Photometric distortion of a uint8 image (3, h, w); contrast comes before or after colour [D5]."""
    steps = [(TF.adjust_brightness, 0.875, 1.125), (TF.adjust_saturation, 0.5, 1.5),
             (TF.adjust_hue, -0.05, 0.05)]
    steps.insert(1 if torch.rand(()) < 0.5 else 3, (TF.adjust_contrast, 0.5, 1.5))
    for adjust, low, high in steps:
        if torch.rand(()) < 0.5:
            image = adjust(image, low + (high - low) * float(torch.rand(())))
    return image


# ---- model -----------------------------------------------------------------------------------------------
def out_indices(depth):
    """The blocks that UPerNet reads, 0-based: 3, 5, 7, 11 of 12 and 7, 11, 15, 23 of 24 [code] [D2]."""
    return [max(round(depth * sixths / 6) - 1, 0) for sixths in (2, 3, 4, 6)]


def upsample(x, size):
    return F.interpolate(x, size, mode="bilinear", align_corners=False)


def norm_layer(norm, channels):
    """`batch`, or `group`: 32 groups, or as many as leave 4 channels in each: a pool may have one cell."""
    groups = [count for count in range(1, 33) if channels % count == 0 and channels >= 4 * count]
    return nn.BatchNorm2d(channels) if norm == "batch" else nn.GroupNorm(max(groups, default=1), channels)


def conv(in_channels, channels, kernel, norm):  # [D3]
    return nn.Sequential(nn.Conv2d(in_channels, channels, kernel, padding=kernel // 2, bias=False),
                         norm_layer(norm, channels), nn.ReLU())


class UPerNet(nn.Module):
    """Four maps (B, D, h, w) of a ViT to logits (B, K, 4h, 4w), and an auxiliary head's (B, K, h, w)."""

    def __init__(self, dim, num_classes, channels, norm):
        super().__init__()
        twice = [nn.ConvTranspose2d(dim, dim, 2, stride=2) for _ in range(3)]
        finest = nn.Sequential(twice[0], norm_layer(norm, dim), nn.GELU(), twice[1])
        # No norm on the encoder's outputs themselves [code].
        self.rescale = nn.ModuleList([finest, twice[2], nn.Identity(), nn.MaxPool2d(2)])
        self.pools = nn.ModuleList(nn.Sequential(nn.AdaptiveAvgPool2d(cells), conv(dim, channels, 1, norm))
                                   for cells in (1, 2, 3, 6))  # [code]
        self.bottleneck = conv(dim + 4 * channels, channels, 3, norm)
        self.laterals = nn.ModuleList(conv(dim, channels, 1, norm) for _ in range(3))
        self.smooth = nn.ModuleList(conv(channels, channels, 3, norm) for _ in range(3))
        self.fuse = conv(4 * channels, channels, 3, norm)
        self.classify = nn.Sequential(nn.Dropout2d(0.1), nn.Conv2d(channels, num_classes, 1))  # [code]
        self.auxiliary = nn.Sequential(
            conv(dim, 256, 3, norm), nn.Dropout2d(0.1), nn.Conv2d(256, num_classes, 1))  # [code]

    def forward(self, maps):
        # From fine to coarse: (B, D, 4h, 4w), (B, D, 2h, 2w), (B, D, h, w), (B, D, h/2, w/2).
        *finer, coarse = [rescale(x) for rescale, x in zip(self.rescale, maps)]
        pooled = [upsample(pool(coarse), coarse.shape[2:]) for pool in self.pools]  # (B, C, h/2, w/2) each
        x = self.bottleneck(torch.cat([coarse, *pooled], dim=1))  # (B, C, h/2, w/2)
        levels = [x]
        for lateral, smooth, level in zip(self.laterals, self.smooth, reversed(finer)):
            x = lateral(level) + upsample(x, level.shape[2:])  # twice as large each time
            levels.append(smooth(x))
        levels = [upsample(level, x.shape[2:]) for level in levels]  # (B, C, 4h, 4w) each
        logits = self.classify(self.fuse(torch.cat(levels, dim=1)))  # (B, K, 4h, 4w)
        return logits, self.auxiliary(finer[2])  # the third output's [code]


class Segmenter(nn.Module):
    """An encoder with a head: images (B, 3, H, W) to logits (B, K, H, W) and a list of auxiliary ones."""

    def __init__(self, encoder, config, norm):
        super().__init__()
        dim, self.encoder, self.linear = encoder.config["embed_dim"], encoder, config.head == "linear"
        torch.manual_seed(config.seed)
        if self.linear:
            self.out_indices, self.head = [-1], nn.Conv2d(dim, config.num_classes, 1)
            encoder.requires_grad_(False)
        else:
            self.out_indices = out_indices(len(encoder.blocks))
            self.head = UPerNet(dim, config.num_classes, config.channels or dim, norm)
            encoder.norm.requires_grad_(False)  # of no use here
            set_drop_path(encoder.blocks, config.drop_path)  # and nothing else is added [D1]

    def forward(self, images):
        h, w = self.encoder.grid
        outputs = self.encoder.layers(images, self.out_indices, norm=self.linear)  # (B, 1+N, D) each
        maps = [rearrange(x[:, -h * w:], "b (h w) d -> b d h w", h=h) for x in outputs]  # (B, D, h, w) each
        logits = [self.head(maps[0])] if self.linear else self.head(maps)
        logits, *auxiliary = [upsample(x.float(), images.shape[2:]) for x in logits]  # (B, K, H, W) each
        return logits, auxiliary


def pixel_loss(logits, labels):
    """Cross-entropy of logits (B, K, H, W) and labels (B, H, W): the sum of them / (B H W) [D4]."""
    return F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="sum") / labels.numel()


# ---- test ------------------------------------------------------------------------------------------------
@torch.no_grad()
def predict(model, image, config, device):
    """Logits (K, h, w) float32 of a uint8 image (3, h, w): the mean over all windows that see a pixel."""
    size, side = scaled_size(image.shape[1:], config.img_size), config.img_size
    stride, batch = max(side * 2 // 3, 1), config.micro_batch or 16  # 341 of 512 [code]
    view = pad(TF.resize(image, size), side, MEAN_COLOUR)
    # Windows begin every `stride` pixels; the last one ends with the image.
    tops, lefts = ([*range(0, length - side, stride), length - side] for length in view.shape[1:])
    corners = [(top, left) for top in tops for left in lefts]
    total = torch.zeros(config.num_classes, *view.shape[1:], device=device)
    count = torch.zeros(view.shape[1:], device=device)
    for some in (corners[first: first + batch] for first in range(0, len(corners), batch)):
        windows = torch.stack([view[:, top: top + side, left: left + side] for top, left in some])
        with common.autocast(device, config.precision):
            logits = model(normalise(windows, model.encoder, device))[0]  # (B, K, H, W)
        for (top, left), window in zip(some, logits):
            total[:, top: top + side, left: left + side] += window
            count[top: top + side, left: left + side] += 1
    mean = (total / count)[:, : size[0], : size[1]]  # without the padding
    return upsample(mean[None], image.shape[1:])[0]  # (K, h, w)


def confusion_matrix(labels, predicted, num_classes):
    """Counts (K, K) int64 over labelled pixels: the row is the true class, the column the predicted one."""
    kept = labels != IGNORE
    pairs = labels[kept].long() * num_classes + predicted[kept]
    return rearrange(pairs.bincount(minlength=num_classes**2), "(k l) -> k l", k=num_classes)  # (K, K)


def scores(confusion):
    """mIoU, aAcc, mAcc, IoU of each class (None: it occurs nowhere) from a confusion matrix, and what the
    commonest class would score if predicted everywhere; per cent. Raises ValueError without any label."""
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


def evaluate(model, data, config, dist):
    """The confusion matrix (K, K) of all images; each process tests its share."""
    model.eval()
    confusion = torch.zeros(config.num_classes, config.num_classes, dtype=torch.int64, device=dist.device)
    loader = share_loader(data, None, config, dist)
    for image, ids, name in tqdm(loader, "test", leave=False, disable=None if dist.is_main else True):
        labels = to_labels(image, ids, name, config).to(dist.device)
        predicted = predict(model, image, config, dist.device).argmax(dim=0)
        confusion += confusion_matrix(labels, predicted, config.num_classes)
    return dist.all_reduce(confusion).cpu()


def draw_overlays(path, model, data, config, device, count=6, side=240):
    """Draws a few test images, their truth and the prediction, and the names of their classes in colour."""
    rows, classes = [], torch.arange(config.num_classes)[:, None, None]
    colours = [f"hsv({137.5 * k % 360}, {60 + 20 * (k % 3)}%, 100%)" for k in range(config.num_classes)]
    for index in torch.linspace(0, len(data) - 1, min(count, len(data))).long().tolist():
        image, ids, name = data[index]
        predicted = predict(model, image, config, device).argmax(dim=0).byte().cpu()
        maps = torch.stack([to_labels(image, ids, name, config), predicted])
        size = [max(1, side * length // max(ids.shape)) for length in ids.shape]
        image, maps = TF.resize(image, size), TF.resize(maps, size, TF.InterpolationMode.NEAREST_EXACT)
        grey, legend = TF.rgb_to_grayscale(image, 3), Image.new("RGB", (side, side))
        for line, k in enumerate(maps[maps != IGNORE].unique().tolist()):
            ImageDraw.Draw(legend).text((8, 8 + 14 * line), data.classes[k], fill=colours[k])
        painted = [draw_segmentation_masks(grey, labels == classes, 0.6, colours) for labels in maps]
        rows.append([pad(x, side, 255) / 255 for x in (image, *painted, TF.pil_to_tensor(legend))])
    common.save_panels(path, rows, ["image", "truth", "prediction", "classes"], "grey: no label", side)


def report(model, config, folder, path, dist, started, **facts):
    """Tests; the main process draws, writes the result line beside `path`, with `facts`, prints scores."""
    data = find_maps(config, "val")
    result = scores(evaluate(model, data, config, dist))
    if dist.is_main:
        draw_overlays(folder / "overlays.png", model, data, config, dist.device)
        append_result("segment", path, model.encoder, config, started, protocol=config.head,
                      data=config.data, val=data.name, val_images=len(data), random_init=config.random_init,
                      **result, **facts, device=str(dist.device))
        print(f"segmentation ({config.head}): mIoU {result['miou']:.1f}, aAcc {result['aacc']:.1f}, mAcc "
              f"{result['macc']:.1f} %; the commonest class everywhere: mIoU {result['commonest_miou']:.1f}"
              f", aAcc {result['commonest_aacc']:.1f} %; pictures in {folder}/overlays.png")


# ---- train -----------------------------------------------------------------------------------------------
def learning_rate(step, config):
    """Poly schedule of power 1 down to 0, times a linear warm-up from 1e-6 [code] [D6]."""
    warmup = min(1.0, 1e-6 + (1 - 1e-6) * step / max(config.warmup_steps, 1))
    return config.lr * warmup * (1 - step / config.steps)


def train(encoder, data, config, run, dist):
    """Training from start to end. Returns the model, and facts for the result line."""
    device, val = dist.device, find_maps(config, "val")
    plan = common.make_plan(len(data), config.batch_size, config.micro_batch, 1, dist.world)
    plan = dataclasses.replace(plan, total_steps=config.steps)
    several_gpus = dist.world > 1 and device.type == "cuda" and config.head == "upernet"
    norm = run.state["norm"] if run.state else "batch" if several_gpus else "group"
    if norm == "batch" and not several_gpus:
        raise ValueError(f"the run in {run.folder} has SyncBatchNorm: go on with several GPUs, as it began")
    model = Segmenter(encoder, config, norm).to(device)
    model = nn.SyncBatchNorm.convert_sync_batchnorm(model) if norm == "batch" else model
    facts = dict(
        model="a linear layer" if model.linear else f"UPerNet on blocks {model.out_indices}, {norm} norm",
        lr=f"{config.lr:g} after {config.warmup_steps:,} steps, x {config.layer_decay:g} per block down")
    sets = f"{len(data):,} images in {data.name}, {len(val):,} to test, {len(data.classes)} classes"
    common.describe(facts, config, model, plan, dist, sets, run.folder)
    for maps, split in ((data, "train"), (val, "val")):  # raises now, not after days
        check_maps(maps, split, config, run.folder, dist)
    common.compile_blocks(config, device, encoder.blocks)
    groups = layer_groups(model, encoder, config.weight_decay, config.layer_decay)
    optimizer = torch.optim.AdamW(groups, lr=config.lr, fused=True)
    samples = common.Samples(data, functools.partial(augment, config), config.seed)
    run.begin(dist, plan, samples, model, optimizer)

    def compute_loss(model, batch):
        images, labels = (x.to(device, non_blocking=True) for x in batch)
        with common.autocast(device, config.precision):
            logits, auxiliary = model(normalise(images, encoder, device))
        loss = pixel_loss(logits, labels.long())
        return loss + sum(0.4 * pixel_loss(x, labels.long()) for x in auxiliary), {}  # [code]

    for step, lr, grad_norm in fit(config, run, dist, plan, model, optimizer, compute_loss,
                                   lambda step: learning_rate(step, config)):
        if run.log(step, lr, grad_norm) and dist.is_main:
            run.save(model, optimizer, step, encoder, encoder=encoder.config, norm=norm)
    return model, dict(train=data.name, train_images=len(data), norm=norm)


def test_only(config, dist, started):
    """--eval_only: last.pt holds all that is needed beside the data."""
    state, path = open_run(config.checkpoint, "segmentation")
    kept = ("data", "device", "workers", "micro_batch", "precision", "eval_only")
    own = {name: getattr(config, name) for name in kept}
    config = dataclasses.replace(Config(**state["config"]), **own)
    model = Segmenter(common.ViT(**state["encoder"]), config, state["norm"]).to(dist.device)
    model.load_state_dict(state["model"])
    report(model, config, path.parent, path, dist, started, step=state["step"], norm=state["norm"])


def main(argv=None):
    config, started = common.parse_config(Config, __doc__, argv=argv), time.perf_counter()
    with common.distributed(config.device) as dist:
        if config.eval_only:
            return test_only(config, dist, started)
        path, encoder = open_checkpoint(config, own_norm=config.head == "upernet")  # which reads no norm
        data = find_maps(config, "train")
        config = with_recipe(config, len(data.classes), len(encoder.blocks))
        encoder = random_encoder(encoder, config.seed) if config.random_init else encoder
        out = config.out or path.parent / f"segment_{config.head}{'_random' * config.random_init}"
        run = common.Run("segment", config, out, "segmentation")
        if not run.finished:
            model, facts = train(encoder, data, config, run, dist)
            if run.stop == config.steps:
                return report(model, config, run.folder, path, dist, started, step=run.stop, **facts)
        if dist.is_main:
            print(f"the run in {run.folder}/ stands where this command ends (--fresh starts anew); to test "
                  f"it: --eval_only --checkpoint {run.folder}/last.pt --data {config.data}")


if __name__ == "__main__":
    common.run_main(main)
