"""The ground that the method files stand on: a ViT, masks, data, the plumbing of a training run.

It names no method and calls nothing back: whatever differs between the papers (corruption, target,
loss, initialisation, recipe, loop) stands in the method files. Each piece can be lifted out alone.

    1  ViT               the encoder, with the state-dict keys of timm's VisionTransformer
    2  patches, masks    patchify, sin-cos tables, which tokens are hidden
    3  randomness        every draw is a pure function of (seed, where in the run): nothing to save
    4  data              any folder of images, ImageNet's layout, CIFAR-10, the built-in scenes
    5  processes         rank, world, device; plain `python` is one process, torchrun is many
    6  optimisation      parameter groups, learning rate as a function of the step, micro batches
    7  run folder        atomic checkpoints, resume by the same command, the log
    8  pictures          labelled panels, a colour map
    9  command line      a frozen dataclass is the whole command line

Dimension key: B batch, C channels, H W image height and width, P patch side, N patches, V visible,
M masked, D width, K picked tokens.
"""

import argparse
import contextlib
import dataclasses
import difflib
import errno
import hashlib
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import typing
from pathlib import Path

import torch
import torch.distributed
import torch.nn.functional as F
from einops import rearrange
from PIL import Image, ImageDraw
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import nn
from torchvision import datasets
from torchvision.transforms.v2 import functional as TF
from tqdm import tqdm

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
VERSION = 1  # of the files written here


# --------------------------------------------------------------------------------------------------
# 1  ViT


class DropPath(nn.Module):
    """Stochastic depth: drops a residual branch for whole samples, and rescales the kept ones."""

    def __init__(self, rate=0.0):
        super().__init__()
        self.rate = rate

    def forward(self, x):
        if not self.training or self.rate == 0.0:
            return x
        keep = 1.0 - self.rate
        return x * x.new_empty(x.shape[0], 1, 1).bernoulli_(keep).div_(keep)


class LayerScale(nn.Module):
    """A learnable gain per channel on a residual branch."""

    def __init__(self, dim, init_value):
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), float(init_value)))

    def forward(self, x):
        return x * self.gamma


class Attention(nn.Module):
    """Multi-head self-attention; the rows of `qkv` are ordered q, k, v, head-major inside each."""

    def __init__(self, dim, num_heads):
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"width {dim} is not a multiple of {num_heads} heads")
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):
        q, k, v = rearrange(self.qkv(x), "b n (qkv h d) -> qkv b h n d", qkv=3, h=self.num_heads)
        x = F.scaled_dot_product_attention(q, k, v)
        return self.proj(rearrange(x, "b h n d -> b n (h d)"))


class Mlp(nn.Module):
    """Linear, exact GELU, linear."""

    def __init__(self, dim, hidden_dim):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm transformer block: x + Attn(LN(x)), then x + MLP(LN(x))."""

    def __init__(self, dim, num_heads, mlp_ratio=4.0, init_values=None, drop_path=0.0):
        super().__init__()
        scale = (lambda: LayerScale(dim, init_values)) if init_values is not None else nn.Identity
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, num_heads)
        self.ls1 = scale()
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.ls2 = scale()
        self.drop_path = DropPath(drop_path)

    def forward(self, x):
        x = x + self.drop_path(self.ls1(self.attn(self.norm1(x))))
        return x + self.drop_path(self.ls2(self.mlp(self.norm2(x))))


class PatchEmbed(nn.Module):
    """Holds the patch projection as the convolution that timm's key names and shapes expect."""

    def __init__(self, patch_size, in_chans, dim):
        super().__init__()
        self.proj = nn.Conv2d(in_chans, dim, patch_size, stride=patch_size)

    def forward(self, patches):
        """(B, V, C*P*P) flattened patches to (B, V, D): a convolution whose kernel is its stride is
        a matrix product per patch, so hidden patches need not be embedded at all."""
        return F.linear(patches, self.proj.weight.flatten(1), self.proj.bias)


class ViT(nn.Module):
    """Vision transformer with the state-dict keys of timm's VisionTransformer (num_classes=0).

    Pre-norm, LayerNorm eps 1e-6, exact GELU. Sizes and patch may be `(H, W)` pairs, any number of
    channels works. The position table is fixed (no gradient) and starts as sin-cos, column first;
    a method with another table calls `set_positions`. Linear layers start Xavier-uniform with zero
    biases, the class token from N(0, 0.02), as in MAE [code]; a method that differs says so itself.
    Raises ValueError for an image that the patch does not tile, heads that do not divide the width.
    """

    def __init__(self, img_size=224, patch_size=16, in_chans=3, embed_dim=768, depth=12,
                 num_heads=12, mlp_ratio=4.0, class_token=True, init_values=None,
                 drop_path_rate=0.0):
        super().__init__()
        self.img_size, self.patch_size = pair(img_size), pair(patch_size)
        if any(size % patch for size, patch in zip(self.img_size, self.patch_size)):
            raise ValueError(f"image size {self.img_size} is not a multiple of the patch size "
                             f"{self.patch_size}")
        self.grid = tuple(size // patch for size, patch in zip(self.img_size, self.patch_size))
        # What a file must carry so that the same encoder can be built again.
        self.config = dict(img_size=list(self.img_size), patch_size=list(self.patch_size),
                           in_chans=in_chans, embed_dim=embed_dim, depth=depth,
                           num_heads=num_heads, mlp_ratio=mlp_ratio, class_token=class_token,
                           init_values=init_values)
        tokens = math.prod(self.grid) + class_token
        self.patch_embed = PatchEmbed(self.patch_size, in_chans, embed_dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim)) if class_token else None
        self.pos_embed = nn.Parameter(torch.zeros(1, tokens, embed_dim), requires_grad=False)
        rates = torch.linspace(0, drop_path_rate, depth, device="cpu").tolist()
        self.blocks = nn.ModuleList(Block(embed_dim, num_heads, mlp_ratio, init_values, rate)
                                    for rate in rates)
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        xavier_init(self)
        nn.init.xavier_uniform_(self.patch_embed.proj.weight.data.flatten(1))
        if class_token:
            nn.init.normal_(self.cls_token, std=0.02)
        self.set_positions(sincos_2d(embed_dim, self.grid))

    def set_positions(self, table):
        """Sets the fixed position table from (N, D); a class token has a row of zeros before it."""
        with torch.no_grad():
            self.pos_embed.zero_()
            self.pos_embed[0, -len(table):] = table.to(self.pos_embed)

    def embed(self, images, mask=None):
        """(B, C, H, W) images to (B, 1+V, D) tokens before the first block."""
        expected = (self.config["in_chans"], *self.img_size)
        if images.ndim != 4 or tuple(images.shape[1:]) != expected:
            raise ValueError(f"images of shape {tuple(images.shape)} were given, this ViT expects "
                             f"(B, {expected[0]}, {expected[1]}, {expected[2]})")
        P, Q = self.patch_size
        patches = rearrange(images, "b c (h p) (w q) -> b (h w) (c p q)", p=P, q=Q)  # (B, N, C*P*P)
        positions = self.pos_embed[:, -patches.shape[1]:].expand(len(images), -1, -1)  # (B, N, D)
        if mask is not None:
            visible_ids = split_ids(mask)[0].to(images.device, non_blocking=True)  # (B, V)
            patches, positions = pick(patches, visible_ids), pick(positions, visible_ids)
        x = self.patch_embed(patches) + positions  # (B, V, D)
        if self.cls_token is None:
            return x
        cls = (self.cls_token + self.pos_embed[:, :1]).expand(len(x), -1, -1)  # (B, 1, D)
        return torch.cat([cls, x], dim=1)  # (B, 1+V, D)

    def forward(self, images, mask=None):
        """Images (B, C, H, W), mask (B, N) bool with True = hidden, to normed tokens (B, 1+V, D).

        Only visible tokens are computed, in ascending patch order, class token first.
        """
        x = self.embed(images, mask)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def layers(self, images, indices, mask=None, norm=False):
        """Outputs of the blocks in `indices` (0-based, negative counts from the end), each
        (B, 1+V, D), with the final norm applied if `norm`."""
        depth = len(self.blocks)
        if not all(-depth <= index < depth for index in indices):
            raise ValueError(f"block indices {list(indices)} are outside a depth of {depth}")
        x, outputs = self.embed(images, mask), []
        for block in self.blocks:
            x = block(x)
            outputs.append(x)
        return [self.norm(outputs[index]) if norm else outputs[index] for index in indices]


def pair(size):
    """An int or an (H, W) pair, as a pair of ints."""
    return (int(size[0]), int(size[1])) if hasattr(size, "__len__") else (int(size), int(size))


def xavier_init(module):
    """Every Linear below `module`: Xavier-uniform weight (fused qkv as one matrix), zero bias."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


def freeze_key_bias(vit):
    """Keeps the key third of every qkv bias as it is (zero in a new ViT), for methods without one.

    A key bias adds the same number to all logits of a query, so it changes no output; frozen, it
    also stays at exactly zero instead of collecting rounding noise from the optimiser.
    """
    def zero_key_third(grad):
        q, k, v = grad.chunk(3)
        return torch.cat([q, torch.zeros_like(k), v])

    for block in vit.blocks:
        block.attn.qkv.bias.register_hook(zero_key_third)


def compile_blocks(blocks):
    """torch.compile per block, in place: state-dict keys stay clean, equal blocks share a program.

    Stochastic depth makes them unequal, by its rate; beyond its limit of programs, which is 8,
    torch would leave all further blocks as they are, tests included, with no more than a warning.
    """
    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, 4 * len(blocks))
    for block in blocks:
        block.compile()


# --------------------------------------------------------------------------------------------------
# 2  patches, masks


def patchify(images, patch_size):
    """(B, C, H, W) to (B, N, P*P*C): patches in raster order, each as (row, column, channel)."""
    P, Q = pair(patch_size)
    return rearrange(images, "b c (h p) (w q) -> b (h w) (p q c)", p=P, q=Q)


def unpatchify(tokens, patch_size, grid):
    """The inverse of `patchify`: (B, N, P*P*C) and the grid (rows, columns) to (B, C, H, W)."""
    (P, Q), (h, w) = pair(patch_size), pair(grid)
    return rearrange(tokens, "b (h w) (p q c) -> b c (h p) (w q)", p=P, q=Q, h=h, w=w)


def sincos_2d(dim, grid, first="column"):
    """Fixed 2-D sin-cos position table, (N, dim) float32, rows in raster order.

    With frequencies w_k = 10000^(-k / (dim/4)), k = 0 .. dim/4-1, one half of the width is
    [sin(c w), cos(c w)] of one integer coordinate, the other half that of the other one. Both
    orders exist: `first="column"` in facebookresearch/mae, `first="row"` in mmpretrain and CAE.
    """
    if dim % 4:
        raise ValueError(f"a 2-D sin-cos table needs a width that is a multiple of 4, not {dim}")
    if first not in ("column", "row"):
        raise ValueError(f"first is 'column' or 'row', not {first!r}")
    rows, columns = pair(grid)
    omega = 10000.0 ** (-torch.arange(dim // 4, device="cpu") / (dim / 4))  # (dim/4,)
    row, column = torch.meshgrid(torch.arange(rows, device="cpu"),
                                 torch.arange(columns, device="cpu"), indexing="ij")
    halves = []
    for coordinate in (column, row) if first == "column" else (row, column):
        angles = coordinate.flatten()[:, None] * omega  # (N, dim/4)
        halves += [angles.sin(), angles.cos()]
    return torch.cat(halves, dim=1)  # (N, dim)


def sinusoid_1d(dim, num_patches):
    """Fixed 1-D position table (N, dim), float32, over patches in raster order: channels 2k and
    2k+1 of patch n are the sine and the cosine of n / 10000^(2k / dim)."""
    n = torch.arange(num_patches, dtype=torch.float64, device="cpu")[:, None]
    j = torch.arange(dim, dtype=torch.float64, device="cpu")
    angles = n / 10000 ** (j // 2 * 2 / dim)  # (N, dim)
    return torch.where(j % 2 == 0, angles.sin(), angles.cos()).float()


def random_masks(batch, num_patches, num_masked, generator=None):
    """(batch, num_patches) bool, True = hidden: `num_masked` random patches in every row."""
    check_num_masked(num_masked, num_patches)
    noise = torch.rand(batch, num_patches, generator=generator)
    return noise.argsort(dim=1).argsort(dim=1) < num_masked


def check_num_masked(num_masked, num_patches):
    if not 0 <= num_masked < num_patches:
        raise ValueError(f"{num_masked} hidden patches were asked for, {num_patches} patches allow "
                         f"0 to {num_patches - 1}")


def split_ids(mask):
    """(B, N) bool mask to visible_ids (B, V) and masked_ids (B, M), both ascending.

    A mask on the CPU (where the loader makes it) costs the GPU no synchronisation.
    Raises ValueError unless every row hides the same number of patches.
    """
    num_masked = mask.sum(dim=1)
    M = int(num_masked[0])
    if not bool((num_masked == M).all()):
        raise ValueError("every row of a mask must hide the same number of patches, "
                         f"got {num_masked.tolist()}")
    order = mask.byte().argsort(dim=1, stable=True)  # (B, N)
    return order[:, : mask.shape[1] - M], order[:, mask.shape[1] - M:]


def pick(tokens, ids):
    """tokens (B, N, D) at ids (B, K): (B, K, D)."""
    return torch.take_along_dim(tokens, ids[:, :, None], dim=1)


# --------------------------------------------------------------------------------------------------
# 3  randomness


def seed_for(*key):
    """A 63-bit seed from ints and strings, the same on every machine and in every process."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "big") >> 1


# --------------------------------------------------------------------------------------------------
# 4  data

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm", ".tif", ".tiff")


class Images(torch.utils.data.Dataset):
    """Images with optional labels: `dataset[index]` is (uint8 image (3, H, W), label or -1).

    `source` is a list of files, or a uint8 tensor (n, 3, H, W). File names are held as two tensors:
    a list of a million strings would be copied into every worker, as Python counts references.
    """

    def __init__(self, source, labels=None, classes=(), name=""):
        self.name, self.classes, self.pixels = name, tuple(classes), None
        self.labels = torch.as_tensor(labels) if labels is not None else None
        if isinstance(source, torch.Tensor):
            self.pixels = source
        else:
            encoded = [os.fsencode(path) for path in source]
            self.names = torch.frombuffer(bytearray(b"".join(encoded) or b" "), dtype=torch.uint8)
            self.ends = torch.tensor([len(path) for path in encoded]).cumsum(0)

    def __len__(self):
        return len(self.pixels) if self.pixels is not None else len(self.ends)

    def path(self, index):
        start = int(self.ends[index - 1]) if index else 0
        return os.fsdecode(self.names[start: int(self.ends[index])].numpy().tobytes())

    def __getitem__(self, index):
        label = int(self.labels[index]) if self.labels is not None else -1
        if self.pixels is not None:
            return self.pixels[index], label
        return read_image(self.path(index)), label


def read_image(path):
    """An image file as a uint8 RGB tensor (3, H, W); an EXIF rotation is ignored, as torchvision
    does. Raises ValueError that names the file."""
    try:
        with Image.open(path) as image:
            return TF.pil_to_tensor(image.convert("RGB"))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} cannot be read as an image ({type(error).__name__}: {error}): "
                         "replace or remove the file") from error


def find_data(spec, split, img_size=32, num_scenes=16_000):
    """The images that `--data SPEC` names, as an `Images`; split is "pretrain", "train" or "val".

    SPEC is `scenes` (built in), `cifar10` (torchvision's files under $CIFAR10 or data/), or a
    folder: ImageNet's layout (train/ and val/, validation/ or test/, with a folder per class; val/
    also flat with a list, see `listed_labels`), or, for pre-training, any folder of images, flat or
    nested. Empty: $IMAGENET or data/imagenet.
    Raises FileNotFoundError or ValueError with what is missing; the first image is read to be sure.
    """
    if spec == "scenes":
        return scenes_data(split, img_size, num_scenes)
    if spec == "cifar10":
        return cifar10_data(split)
    root = Path(spec or os.environ.get("IMAGENET") or "data/imagenet").expanduser()
    if not root.is_dir():
        raise FileNotFoundError(
            f"no data folder at {root}: give one with --data FOLDER (any folder of images, or "
            "ImageNet's train/ and val/), set the variable IMAGENET, or try the built-in --demo")
    names = ("val", "validation", "test") if split == "val" else ("train",)
    folder = next((root / name for name in names if (root / name).is_dir()), None)
    if folder is None and split != "pretrain":
        raise FileNotFoundError(f"{root} has no folder {'/ or '.join(names)}/ with images to "
                                f"{'test on' if split == 'val' else 'learn from'}, by class")
    folder = folder or root
    files = list_images(folder)
    if not files:
        raise FileNotFoundError(f"{folder} holds no image ({', '.join(EXTENSIONS)})")
    if split == "pretrain":
        images = Images(files, name=str(folder))
    else:
        tops = [os.path.relpath(path, folder).split(os.sep) for path in files]
        loose = next((path for path, parts in zip(files, tops) if len(parts) == 1), None)
        names = [parts[0] for parts in tops]
        if loose and split == "val" and all(len(parts) == 1 for parts in tops):
            names = listed_labels(files, folder)
        elif loose:
            raise ValueError(f"{loose} lies outside the class folders of {folder}: "
                             "give each class a folder of its own")
        ids = {name: index for index, name in enumerate(sorted(set(names)))}
        images = Images(files, [ids[name] for name in names], ids, name=str(folder))
    images[0]
    return images


def listed_labels(files, folder):
    """The class names of the images in a flat validation folder, from the list that comes with it.

    The list is LOC_val_solution.csv, val.txt, or the folder's one .txt or .csv file; the first two
    may lie beside the folder too. The first two words of a line are a file name (the ending may be
    missing) and a class: its name (WNID), or its place among the sorted folders of train/, from 0.
    Raises FileNotFoundError or ValueError unless every image has one line, and every line an image.
    """
    known = [where / name for where in (folder, folder.parent)
             for name in ("LOC_val_solution.csv", "val.txt") if (where / name).is_file()]
    texts = [path for path in sorted(folder.iterdir()) if path.suffix in (".txt", ".csv")]
    if not known and len(texts) != 1:
        raise FileNotFoundError(
            f"{folder} holds images without class folders, and no list of their classes: put "
            "LOC_val_solution.csv or val.txt (lines of file name and class) into it")
    path = (known or texts)[0]
    lines = [re.split(r"[,\s]+", line.strip()) for line in path.read_text().splitlines()]
    listed = {Path(words[0]).stem: words[1] for words in lines if len(words) > 1 and words[1]}
    if "ImageId" in listed:
        del listed["ImageId"]  # the head of LOC_val_solution.csv
    stems = [Path(file).stem for file in files]
    odd = sorted(set(stems) ^ listed.keys())
    if odd:
        where = "the list only" if odd[0] in listed else "the folder only"
        raise ValueError(f"the list {path} names {len(listed)} images and {folder} holds "
                         f"{len(stems)}; {odd[0]} is in {where}: use the list of these images")
    train = folder.parent / "train"
    classes = sorted(entry.name for entry in train.iterdir() if entry.is_dir())
    if set(listed.values()) <= set(classes) or not all(map(str.isdigit, listed.values())):
        return [listed[stem] for stem in stems]
    wrong = next((name for name in listed.values() if int(name) >= len(classes)), None)
    if wrong:
        raise ValueError(f"the list {path} holds the class index {wrong}, and the {len(classes)} "
                         f"class folders of {train} are counted from 0: use a list that fits them")
    return [classes[int(listed[stem])] for stem in stems]


def list_images(folder):
    """All image files below `folder`, sorted: every process and every run sees the same order.

    Raises OSError for a folder that may not be read, which would else be missing without a word.
    """
    def refuse(error):
        raise error

    found = []
    for path, folders, files in os.walk(folder, onerror=refuse, followlinks=True):
        folders.sort()
        found += [os.path.join(path, file) for file in sorted(files)
                  if file.lower().endswith(EXTENSIONS) and not file.startswith(".")]
    return found


def scenes_data(split, img_size, num_scenes):
    try:
        from demo.scenes import CLASSES, SEEDS, make_scenes
    except ImportError as error:
        raise FileNotFoundError("--data scenes needs the folder demo/ beside common.py: "
                                "copy it along, or give --data FOLDER") from error
    counts = {"pretrain": num_scenes, "train": 3_000, "val": 1_500}
    scenes = make_scenes(counts[split], size=img_size, seed=SEEDS[split])
    return Images(scenes.images, scenes.labels, CLASSES, name=f"scenes ({split})")


def cifar10_data(split):
    root = os.environ.get("CIFAR10") or "data"
    try:
        data = datasets.CIFAR10(root, train=split != "val")
    except RuntimeError as error:
        raise FileNotFoundError(
            f"no CIFAR-10 under {root}: set the variable CIFAR10 to the folder that holds "
            "cifar-10-batches-py, or fetch it with python -c \"import torchvision; "
            f"torchvision.datasets.CIFAR10('{root}', download=True)\"") from error
    pixels = rearrange(torch.from_numpy(data.data), "n h w c -> n c h w")
    return Images(pixels, data.targets, data.classes, "cifar10")


class Samples(torch.utils.data.Dataset):
    """Training samples: `samples[epoch, index]` is `transform(*images[index])`, so image and label.

    The transform draws from torch's default generator, seeded per (seed, epoch, index): a sample is
    the same in whatever worker, rank or order it is made. A file that cannot be read must not end a
    run in the middle of the night: the next file stands in for it, and a line on stderr names it.
    """

    def __init__(self, images, transform, seed):
        self.images, self.transform, self.seed = images, transform, seed

    def __getitem__(self, key):
        epoch, index = key
        for substitute in range(10):
            try:
                sample = self.images[(index + substitute) % len(self.images)]
                break
            except ValueError as error:
                if substitute == 9:
                    raise
                sys.stderr.write(f"warning: {error}; the next file stands in for it\n")
        torch.default_generator.manual_seed(seed_for(self.seed, "sample", epoch, index))
        return self.transform(*sample)


class MicroBatches(torch.utils.data.Sampler):
    """For steps start..stop-1, the (epoch, index) keys of this rank's micro batches, a list each.

    A step's global batch is a slice of the epoch's permutation; its rows are dealt out micro batch
    by micro batch, so 1 rank x 8 micro batches, 2 x 4 and 8 x 1 see the same images. The incomplete
    last batch of an epoch is dropped. One iterator runs through all epochs: workers start once.
    """

    def __init__(self, num_images, plan, processes, seed, start, stop):
        self.num_images, self.plan, self.processes = num_images, plan, processes
        self.seed, self.start, self.stop = seed, start, stop

    def __iter__(self):
        permuted = None
        for step in range(self.start, self.stop):
            epoch, position = divmod(step, self.plan.steps_per_epoch)
            if epoch != permuted:
                generator = torch.Generator().manual_seed(seed_for(self.seed, "order", epoch))
                order, permuted = torch.randperm(self.num_images, generator=generator), epoch
            first = position * self.plan.batch_size
            rows = order[first: first + self.plan.batch_size].tolist()
            for micro in range(self.plan.accumulation):
                first = self.plan.first_row(micro, self.processes)
                yield [(epoch, index) for index in rows[first: first + self.plan.micro_batch]]


def own_group(worker_id):
    """For a loader's worker: torchrun and a terminal signal the whole process group, but how a run
    stops is the main process's business, which would only see its workers die."""
    if hasattr(os, "setpgrp"):
        os.setpgrp()


def preview_batch(samples, count=6):
    """The same few samples each time, so that the pictures of a run can be compared; from all over
    the data, since files come sorted by class."""
    keys = [(0, index * len(samples.images) // count) for index in range(count)]
    return torch.utils.data.default_collate([samples[key] for key in keys])


def training_loader(samples, plan, processes, config, start, stop, collate=None):
    """A DataLoader over this rank's micro batches, from step `start` to before step `stop`.

    Warns where the workers' batches may not fit in shared memory, which kills them without a word.
    """
    keys = MicroBatches(len(samples.images), plan, processes, config.seed, start, stop)
    if config.workers and os.path.isdir("/dev/shm") and processes.main:
        tensors = [value for value in samples[0, 0] if isinstance(value, torch.Tensor)]
        size = sum(tensor.nbytes for tensor in tensors) * plan.micro_batch / 2**30
        need = 2 * size * config.workers * int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        free = shutil.disk_usage("/dev/shm").free / 2**30
        if need > free:
            print(f"warning: the loader may need {need:.1f} GiB of shared memory, /dev/shm has "
                  f"{free:.1f}: lower --workers, or raise docker's --shm-size", file=sys.stderr)
    return torch.utils.data.DataLoader(
        samples, batch_sampler=keys, num_workers=config.workers, worker_init_fn=own_group,
        pin_memory=processes.device.type == "cuda", collate_fn=collate)


def normalise(images, mean=IMAGENET_MEAN, std=IMAGENET_STD):
    """uint8 images (B, 3, H, W) to float32, with the mean and std given for the range 0..1."""
    mean, std = (torch.tensor(value, device=images.device)[:, None, None] for value in (mean, std))
    return (images.float() / 255 - mean) / std


# --------------------------------------------------------------------------------------------------
# 5  processes


@dataclasses.dataclass(frozen=True)
class Processes:
    """The three facts of distributed training, and what follows from them."""

    rank: int
    world: int
    device: torch.device

    @property
    def main(self):
        """Only this process prints, saves and draws."""
        return self.rank == 0

    def wait(self):
        if self.world > 1:
            torch.distributed.barrier()

    def sum(self, tensor):
        """The sum of a tensor over all processes."""
        if self.world > 1:
            torch.distributed.all_reduce(tensor)
        return tensor


@contextlib.contextmanager
def processes(device="auto"):
    """Joins the processes that torchrun started, or is one process under plain `python`."""
    rank, world, local = (int(os.environ.get(name, default))
                          for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    if device == "auto":
        mps = torch.backends.mps.is_available()
        device = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    if device == "cuda":
        if local >= torch.cuda.device_count():
            raise ValueError(f"process {local} finds {torch.cuda.device_count()} GPUs on this "
                             "machine: start fewer (--nproc_per_node) or give --device cpu")
        torch.cuda.set_device(local)
    if device == "mps" and not torch.backends.mps.is_available():
        raise ValueError("--device mps was given, but this machine has no MPS: use --device cpu")
    if world > 1:
        torch.distributed.init_process_group("nccl" if device == "cuda" else "gloo")
    try:
        yield Processes(rank, world, torch.device(device, local if device == "cuda" else None))
    finally:
        if world > 1:
            torch.distributed.destroy_process_group()


# --------------------------------------------------------------------------------------------------
# 6  optimisation


@dataclasses.dataclass(frozen=True)
class Plan:
    """How a global batch becomes micro batches, and epochs become steps."""

    batch_size: int  # global, as papers state it
    micro_batch: int  # images that one process computes at once
    accumulation: int  # micro batches per step and process
    steps_per_epoch: int
    total_steps: int

    def first_row(self, micro, processes):
        """The row of the global batch at which this rank's micro batch begins."""
        return (micro * processes.world + processes.rank) * self.micro_batch


def make_plan(num_images, batch_size, micro_batch, epochs, world):
    """The `Plan` of a run. `micro_batch` 0: the largest divisor of a process's share up to 256.

    Raises ValueError for a batch that the processes cannot share or the data cannot fill.
    """
    if batch_size > num_images:
        raise ValueError(f"the data hold {num_images} images, less than one batch of {batch_size}: "
                         f"give --batch_size {num_images} or less")
    if batch_size % world:
        raise ValueError(f"--batch_size {batch_size} is not a multiple of {world} processes")
    share = batch_size // world
    divisors = [size for size in range(1, share + 1) if share % size == 0]
    if not micro_batch:
        micro_batch = max(size for size in divisors if size <= 256)
    if micro_batch not in divisors:
        nearest = min(divisors, key=lambda size: abs(size - micro_batch))
        raise ValueError(f"--micro_batch {micro_batch} does not divide the {share} images of a "
                         f"process ({batch_size} / {world}): the nearest that does is {nearest}")
    steps = num_images // batch_size
    return Plan(batch_size, micro_batch, share // micro_batch, steps, epochs * steps)


def learning_rate(step, peak, warmup_steps, total_steps, floor=0.0, start=0.0):
    """Linear from `start` to `peak` in step warmup_steps - 1, then half a cosine to `floor`."""
    if step < warmup_steps:
        return start + (peak - start) * step / max(warmup_steps - 1, 1)
    progress = (step - warmup_steps) / max(total_steps - warmup_steps, 1)
    return floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * progress))


def decays(name, parameter):
    """timm's rule, which most follow: no weight decay on vectors and on what is named `.bias`."""
    return parameter.ndim >= 2 and not name.endswith(".bias")


def parameter_groups(model, weight_decay, decays=decays):
    """AdamW groups of the trainable parameters: those that decay, and the rest."""
    decay, rest = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (decay if decays(name, parameter) else rest).append(parameter)
    return [dict(params=decay, weight_decay=weight_decay), dict(params=rest, weight_decay=0.0)]


def autocast(device, precision):
    """Autocast for the forward pass; bf16 has fp32's range, so there is no loss scaler."""
    return torch.autocast(device.type, torch.bfloat16, enabled=uses_bf16(device, precision))


def uses_bf16(device, precision):
    """`auto` means bf16 on a GPU, fp32 elsewhere."""
    return precision == "bf16" or (precision == "auto" and device.type == "cuda")


def uses_compile(device, choice):
    """`auto` means torch.compile on a GPU, none elsewhere."""
    return choice == "on" or (choice == "auto" and device.type == "cuda")


def count_flops(run):
    """Floating-point operations of `run()`, by torch's counter; works on the meta device too."""
    from torch.utils.flop_counter import FlopCounterMode
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


# --------------------------------------------------------------------------------------------------
# 7  run folder


def write_atomically(path, write):
    """`write(temporary path)`, then rename: who is killed in between leaves the old file whole."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.tmp{path.suffix}")
    try:
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:  # of a full disk, say, which tells no name
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)


def save_state(state, path):
    """torch.save, with the OSError of a full disk as such; torch makes a RuntimeError of it."""
    try:
        torch.save(state, path)
    except RuntimeError as error:
        raise OSError(errno.EIO, "cannot be written, the disk may be full", str(path)) from error


def save_encoder(vit, path, **info):
    """Writes a ViT as safetensors under timm's names; metadata: its configuration and `info`."""
    tensors = {name: tensor.cpu().contiguous() for name, tensor in vit.state_dict().items()}
    # One key: safetensors writes several in random order, and equal runs should give equal files.
    about = dict(kind="encoder", version=VERSION, **info, config=vit.config)
    metadata = dict(about=json.dumps(about))
    write_atomically(path, lambda temporary: temporary.write_bytes(save(tensors, metadata)))


def read_checkpoint(path):
    """A .pt or .pth file as a dict of plain data. Raises FileNotFoundError or ValueError.

    Published MAE and CAE files carry an argparse.Namespace, which is allowed; nothing else is.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"no checkpoint file at {path}")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises a dozen types for files that are not its own
        refused = re.search(r"GLOBAL (\S+)", str(error))
        reason = (str(error).strip() or "it is empty or cut off").splitlines()[0]
        if refused:
            reason = (f"it holds an object of type {refused[1]}, which could run code; only tensors"
                      " and plain data are read, so save the weights alone")
        raise ValueError(f"{path} cannot be read as a checkpoint: {reason}") from error
    if not isinstance(state, dict):
        raise ValueError(f"{path} holds a {type(state).__name__}, not a dictionary of weights")
    return state


def read_weights(path, *keys):
    """The state dict in a .pt or .pth file: under the first of `keys` there, or the file itself."""
    state = read_checkpoint(path)
    state = next((state[key] for key in keys if key in state), state)
    if not isinstance(state, dict) or not all(isinstance(name, str) for name in state):
        raise ValueError(f"{path} holds no weights by name")
    return state


def reason(error):
    """The first informative line of load_state_dict's long message."""
    return str(error).splitlines()[1].strip()[:200]


@contextlib.contextmanager
def init_errors(path):
    """Makes one sentence that names --init of what is wrong with the weights loaded within it."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"--init {path}: {error}") from error
    except RuntimeError as error:
        raise ValueError(f"--init {path} does not fit this model: {reason(error)}") from error


def read_safetensors(path):
    """A .safetensors file as a dict of tensors. Raises FileNotFoundError or ValueError."""
    if not os.path.isfile(path):
        raise FileNotFoundError(f"no file at {path}")
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} cannot be read as safetensors ({error})") from error


def commit():
    """The commit of this code, such as 84e6c24 or 84e6c24-dirty; None where git knows none."""
    folder = os.path.dirname(os.path.abspath(__file__))
    command = ["git", "-C", folder, "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


# What may differ when the same command starts again; any other changed field stops.
MAY_CHANGE = {"workers", "log_every", "save_every", "device", "micro_batch", "max_steps",
              "out", "demo", "fresh", "preview", "dry_run"}


class Run:
    """The folder of a run: config.json, log.jsonl, last.pt, encoder.safetensors, preview.png.

    `state` is the content of last.pt, or None in a new folder. Nothing is written before `begin`.
    """

    def __init__(self, method, config, out, kind="pretraining"):
        self.method, self.config, self.kind = method, config, kind
        self.folder, number = Path(out), 1
        while config.fresh and self.folder.exists():
            number += 1
            self.folder = Path(f"{out}-{number}")
        self.checkpoint, self.state = self.folder / "last.pt", None
        if self.checkpoint.exists():
            self.state = read_checkpoint(self.checkpoint)
            self._check_same_run()
        self.start = self.state["step"] if self.state else 0
        total = self.state["total_steps"] if self.state else math.inf
        self.finished = self.start >= min(config.max_steps or total, total)

    def _check_same_run(self):
        if self.state.get("method") != self.method:
            raise ValueError(f"{self.checkpoint} is not from {self.method}: give another --out")
        for name, now in dataclasses.asdict(self.config).items():
            before = self.state["config"].get(name, now)
            if name not in MAY_CHANGE and before != now:
                raise ValueError(
                    f"--{name} was {before!r} when the run in {self.folder} started and is {now!r} "
                    "now: give the old value to go on, or --fresh or another --out for a new run")

    def begin(self, processes, plan, model, optimizer, num_images):
        """Restores an interrupted run, writes config.json, trims the log; gives the first step."""
        self.processes, self.plan, self.num_images = processes, plan, num_images
        self.skipped = self.failures = 0
        if self.state:
            if self.state["num_images"] != num_images:
                raise ValueError(
                    f"the run in {self.folder} started with {self.state['num_images']} images, now "
                    f"there are {num_images}: restore the data, or give --fresh for a new run")
            model.load_state_dict(self.state["model"])
            optimizer.load_state_dict(self.state["optimizer"])
            self.skipped = self.state["skipped"]
            self.state = None  # frees its memory
        if processes.main:
            facts = dict(dataclasses.asdict(self.config), **dataclasses.asdict(plan),
                         method=self.method, world=processes.world, num_images=num_images,
                         torch=torch.__version__, commit=commit(), command=" ".join(sys.argv))
            write_atomically(self.folder / "config.json",
                             lambda path: path.write_text(json.dumps(facts, indent=1)))
            self._trim_log()
        self.bar = tqdm(total=plan.total_steps, initial=self.start, unit="step",
                        disable=None if processes.main else True)
        self.sums, self.count, self.waited, self.logged = {}, 0, 0.0, self.start
        self.clock = time.perf_counter()
        self.stop = min(self.config.max_steps or plan.total_steps, plan.total_steps)
        self.signal = None
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._remember_signal)
        return self.start

    def _remember_signal(self, number, frame):
        self.signal = number

    def _trim_log(self):
        """Drops lines after the checkpoint, and a line that a killed process left half-written."""
        log = self.folder / "log.jsonl"
        if log.exists():
            whole = [line for line in log.read_text().splitlines(True) if line.endswith("}\n")]
            kept = [line for line in whole if json.loads(line)["step"] <= self.start]
            write_atomically(log, lambda path: path.write_text("".join(kept)))

    def next_batch(self, batches):
        """The loader's next micro batch, the waiting counted."""
        before = time.perf_counter()
        batch = next(batches)
        self.waited += time.perf_counter() - before
        return batch

    def update(self, optimizer, grad_norm):
        """The optimiser's step, unless the gradient is not finite: that is skipped and counted.

        Waiting for the device here, once a step, buys that no bad gradient ever reaches the
        weights. The norm is that of the summed gradient, so all processes decide alike.
        Raises ValueError after ten bad steps in a row.
        """
        if grad_norm.isfinite():
            optimizer.step()
            self.failures = 0
        else:
            self.skipped, self.failures = self.skipped + 1, self.failures + 1
            if self.failures == 10:
                raise ValueError("no finite gradient in ten steps: start again with --fresh and a "
                                 "lower --lr, from a checkpoint with --init")
        optimizer.zero_grad(set_to_none=True)

    def record(self, **values):
        """Adds scalars to the averages of the next log line, without waiting for the device."""
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0) + value.detach().float()
        self.count += 1

    def log(self, step, lr, grad_norm):
        """Counts a finished step; every `log_every` steps one JSON line and one readable line."""
        self.bar.update(1)
        self._expect(step)
        if step % self.config.log_every and step != self.stop:
            return
        sums = self.processes.sum(torch.stack(list(self.sums.values())))
        means = (sums / self.count / self.processes.world).tolist()
        now = time.perf_counter()
        per_step = (now - self.clock) / (step - self.logged)
        entry = dict(
            step=step, epoch=round(step / self.plan.steps_per_epoch, 4),
            **dict(zip(self.sums, means)), lr=lr, grad_norm=float(grad_norm),
            images_per_s=round(self.plan.batch_size / per_step, 1),
            data_wait=round(self.waited / (now - self.clock), 3),
            memory_gb=round(memory_gb(self.processes.device), 2),
            eta_s=round((self.plan.total_steps - step) * per_step), skipped=self.skipped)
        losses = "  ".join(f"{name} {mean:.4f}" for name, mean in zip(self.sums, means))
        self.sums, self.count, self.waited, self.clock, self.logged = {}, 0, 0.0, now, step
        if self.processes.main:
            with open(self.folder / "log.jsonl", "a") as file:
                finite = {name: value if math.isfinite(value) else None
                          for name, value in entry.items()}  # JSON knows no NaN
                file.write(json.dumps(finite) + "\n")
            self._print(entry, losses)

    def _print(self, entry, losses):
        speed = f"{entry['images_per_s']:.0f} img/s  wait {entry['data_wait']:.0%}"
        self.bar.set_postfix_str(speed)
        tqdm.write(
            f"step {entry['step']}/{self.plan.total_steps}  epoch {entry['epoch']:.2f}  {losses}  "
            f"lr {entry['lr']:.2e}  grad {entry['grad_norm']:.2f}  {speed}  "
            f"{entry['memory_gb']:.1f} GB  left {duration(entry['eta_s'])}")
        if entry["data_wait"] > 0.25:
            tqdm.write(f"  input-bound: {entry['data_wait']:.0%} of the time waits for images; "
                       f"more --workers may help (now {self.config.workers} per process, "
                       f"{os.cpu_count()} cores)")

    def _expect(self, step):
        """Says after 50 steps how long the run will take; the first 10 warm up and do not count."""
        if step - self.start == 10:
            self.opened = time.perf_counter()
        if step - self.start == 50 and self.processes.main:
            per_step, left = (time.perf_counter() - self.opened) / 40, self.plan.total_steps - step
            tqdm.write(f"expect {duration(left * per_step)} for the remaining {left} steps, "
                       f"at {self.plan.batch_size / per_step:.0f} img/s")

    def stopping(self):
        """Whether any process was asked to stop (SIGTERM, SIGINT), agreed by all."""
        if self.processes.world == 1:
            return self.signal is not None
        flag = torch.tensor(float(self.signal is not None), device=self.processes.device)
        return bool(self.processes.sum(flag) > 0)

    def save(self, model, optimizer, step, export=None, **more):
        """Writes last.pt, all that resuming needs, and encoder.safetensors, all others need.

        `export` is the ViT for others, by default `model.encoder`, if there is one; `more` is plain
        data or tensors, found in `state` on resuming.
        """
        if self.processes.main:
            state = dict(kind=self.kind, method=self.method, version=VERSION,
                         config=dataclasses.asdict(self.config), step=step,
                         total_steps=self.plan.total_steps, num_images=self.num_images,
                         skipped=self.skipped, model=model.state_dict(),
                         optimizer=optimizer.state_dict(), **more)
            # The encoder first: whoever is killed in between finds both made again on resuming.
            export = export or getattr(model, "encoder", None)
            if export is not None:  # None: it is frozen, and has a file of its own
                save_encoder(export, self.folder / "encoder.safetensors",
                             method=self.method, step=step)
            write_atomically(self.checkpoint, lambda path: save_state(state, path))

    def close(self):
        self.bar.close()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if self.signal is not None:
            # The state is saved; the exit code tells a scheduler that the run is not finished.
            tqdm.write("stopped by a signal after saving: the same command goes on from here")
            sys.exit(128 + self.signal)


def memory_gb(device):
    """Peak memory in GiB: of the GPU, or of this process on other devices."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    try:
        import resource
    except ImportError:  # Windows
        return 0.0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)


def duration(seconds):
    """Seconds in words: 95 s, 12 min, 7.5 h."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def describe(config, plan, processes, folder):
    """The lines of a recipe that all runs have in common: batch, steps, device, files."""
    bf16 = uses_bf16(processes.device, config.precision)
    return (f"batch    {plan.batch_size} = {processes.world} processes x {plan.accumulation} micro "
            f"batches x {plan.micro_batch} images\n"
            f"steps    {plan.total_steps} = {config.epochs} epochs x {plan.steps_per_epoch}, "
            f"{config.warmup_epochs:g} epochs of warm-up\n"
            f"device   {processes.device}, {'bf16' if bf16 else 'fp32'}\n"
            f"files    {folder}/: config.json, log.jsonl, last.pt, encoder.safetensors, "
            "preview.png")


# --------------------------------------------------------------------------------------------------
# 8  pictures


def save_panels(path, rows, captions, note="", labels=()):
    """Writes rows of (3, H, W) float images in 0..1 as one PNG: captions on top, a note below, and
    a label left of each row, if there are any."""
    side, gap, head, margin = 168, 6, 22, 90 if labels else 6
    sheet = Image.new("RGB", (margin + len(captions) * (side + gap),
                              head + len(rows) * (side + gap) + (head if note else 0)), "white")
    draw = ImageDraw.Draw(sheet)
    for line, label in enumerate(labels):
        draw.text((gap, head + line * (side + gap) + side // 2), label, fill="black")
    for column, caption in enumerate(captions):
        left = margin + column * (side + gap)
        draw.text((left, 5), caption, fill="black")
        for line, row in enumerate(rows):
            pixels = (row[column].float().clamp(0, 1) * 255).round().byte().cpu()
            image = Image.fromarray(rearrange(pixels, "c h w -> h w c").contiguous().numpy())
            # Nearest, so that patches keep their edges and small images stay honest.
            image = image.resize((side, side), Image.NEAREST)
            sheet.paste(image, (left, head + line * (side + gap)))
    draw.text((gap, sheet.height - head + 3), note, fill="black")
    write_atomically(path, lambda temporary: sheet.save(temporary, format="PNG"))


def colour_map(values):
    """(H, W) values in 0..1 to (3, H, W): dark violet, teal, green, yellow, rising in lightness."""
    anchors = torch.tensor([[0.19, 0.07, 0.33], [0.13, 0.45, 0.56], [0.37, 0.76, 0.38],
                            [0.99, 0.91, 0.14]], device=values.device)
    place = values.clamp(0, 1) * (len(anchors) - 1)
    low = place.long().clamp(max=len(anchors) - 2)
    share = (place - low)[..., None]
    return rearrange(anchors[low] * (1 - share) + anchors[low + 1] * share, "h w c -> c h w")


# --------------------------------------------------------------------------------------------------
# 9  command line


def flag(default, help):
    """A dataclass field that is also a command-line flag; the help names a default's source."""
    return dataclasses.field(default=default, metadata=dict(help=help))


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """The flags that every pre-training script shares and that are no part of a recipe."""

    model: str = flag("vit_b", "size of the encoder")
    data: str = flag("", "a folder, `cifar10` or `scenes` (default: $IMAGENET or data/imagenet)")
    out: str = flag("", "folder of the run (default: runs/METHOD_MODEL)")
    seed: int = flag(0, "of weights, order of images, crops, masks and drop path")
    micro_batch: int = flag(0, "images computed at once (default: a process's share, at most 256)")
    workers: int = flag(-1, "loader processes (default: this process's share of cores, at most 16)")
    precision: typing.Literal["auto", "bf16", "fp32"] = flag("auto", "auto: bf16 on GPU, else fp32")
    compile: typing.Literal["auto", "on", "off"] = flag("auto", "torch.compile; auto: on a GPU")
    device: typing.Literal["auto", "cuda", "mps", "cpu"] = flag("auto", "where to compute")
    init: str = flag("", "file with the weights to start from")
    save_every: int = flag(0, "steps between checkpoints (default: an epoch)")
    max_steps: int = flag(0, "stop at this step, counted from 0; the schedule stays as it is")
    log_every: int = flag(20, "steps between log lines")
    demo: bool = flag(False, "a small run on the built-in images, about two minutes on a laptop")
    dry_run: bool = flag(False, "print the recipe and its cost; needs neither data nor weights")
    preview: str = flag("", "draw what the model sees and answers to this PNG, then exit")
    fresh: bool = flag(False, "start a new numbered folder instead of going on with the run")

    def __post_init__(self):
        check_range(self, 0, "micro_batch", "save_every", "max_steps", "seed")
        check_range(self, 1, "log_every")
        if self.seed >= 2**63:
            raise ValueError(f"--seed {self.seed} must be below 2**63")
        if self.workers < 0:
            share = (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
            object.__setattr__(self, "workers", min(share, 16))


def check_range(config, lowest, *names):
    """Raises ValueError for a field below `lowest`; `lowest` None asks for more than 0."""
    for name in names:
        value = getattr(config, name)
        if not (value > 0 if lowest is None else value >= lowest):
            raise ValueError(f"--{name} {value:g} must be "
                             f"{'greater than 0' if lowest is None else f'at least {lowest}'}")


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise ValueError(f"{message} (--help lists the flags)")


def parse_config(Config, description, sizes=None, demo=None, argv=None):
    """The command line as a frozen `Config`; its fields are the flags, `-` and `_` spell the same.

    Order: default < size preset `sizes[model]` < `demo` values (with --demo) < what was typed.
    Raises ValueError for unknown, abbreviated or badly typed flags.
    """
    parser = Parser(description=description, allow_abbrev=False, argument_default=argparse.SUPPRESS,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    types, fields = typing.get_type_hints(Config), dataclasses.fields(Config)
    for field in fields:
        names = dict.fromkeys([f"--{field.name}", f"--{field.name.replace('_', '-')}"])
        options = dict(dest=field.name, help=field.metadata["help"].replace("%", "%%"))
        if types[field.name] is bool:
            parser.add_argument(*names, action="store_true", **options)
            continue
        if field.default not in ("", -1, 0):
            options["help"] += f" (default: {field.default})"
        choices = typing.get_args(types[field.name]) or None
        if field.name == "model" and sizes:
            choices = list(sizes)
        kind = str if choices else types[field.name]
        parser.add_argument(*names, type=kind, choices=choices,
                            metavar=None if choices else kind.__name__.upper(), **options)
    typed, unknown = parser.parse_known_args(argv)
    if unknown:
        known = [f"--{field.name}" for field in fields]
        word = "--" + unknown[0].split("=")[0].lstrip("-").replace("-", "_")
        near = difflib.get_close_matches(word, known, n=1)
        hint = f", did you mean {near[0]}?" if near else ""
        parser.error(f"unknown argument {unknown[0]}{hint}")
    values = {**(demo if demo and "demo" in typed else {}), **vars(typed)}
    preset = sizes[values.get("model", Config.model)] if sizes else {}
    return Config(**{**preset, **values})


OUT_OF_MEMORY = (
    "out of memory: run the same command with a smaller --micro_batch (half of the present one is "
    "a good try); the global batch stays the same, and the run goes on from its last checkpoint")


def run_main(main):
    """Runs a script's `main`; what the user can mend becomes one sentence and exit code 1.

    The main process says it; the others wait a little and speak only if that one lives on.
    """
    rank = int(os.environ.get("RANK", 0))
    try:
        return main()
    except (ValueError, FileNotFoundError) as error:
        # From a loader's worker the sentence comes below a traceback.
        message = (str(error).strip() or repr(error)).splitlines()[-1].removeprefix("ValueError: ")
    except OSError as error:
        message = f"{error.strerror or error}: {error.filename or 'a file of this run'}"
    except (torch.OutOfMemoryError, MemoryError):
        message = OUT_OF_MEMORY
    except RuntimeError as error:
        if not re.search("can't allocate memory|not enough memory", str(error)):
            time.sleep(3 * (rank > 0))
            raise
        message = OUT_OF_MEMORY
    time.sleep(3 * (rank > 0))
    print(f"error: {message}" + (f" [process {rank}]" if rank else ""), file=sys.stderr, flush=True)
    sys.exit(1)
