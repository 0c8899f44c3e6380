"""What the method files share: a ViT, masks, data, and the plumbing of a training run.

It knows no paper: whatever differs between the methods (corruption, target, loss, initialisation,
recipe, loop) stands in their files.
1 ViT, 2 patches and masks, 3 randomness, 4 data, 5 optimisation; from there on plumbing, which is
part of no method: 6 processes, 7 files, 8 run, 9 pictures, 10 command line.

Decisions that all methods share:
  bf16 autocast without a loss scaler, where released code has fp16 with one: bf16 has fp32's range.
  Augmentation works on uint8 tensors instead of PIL images, equal up to rounding.
  A step whose gradient is not finite is skipped and counted, as a loss scaler would do.
  Draws have no state (section 3); released code seeds one generator per process.

Dimension key: B batch, C channels, H W image height and width, P Q patch height and width,
N patches, V visible, M masked, D width, K gathered tokens.
"""

import argparse
import collections
import concurrent.futures
import contextlib
import dataclasses
import functools
import hashlib
import io
import itertools
import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
import tarfile
import time
import typing
import zipfile
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows has no such locks
    fcntl = None
try:
    from torchcodec.decoders import decode_jpeg
except Exception:  # not installed, or without the libraries that it needs: it is the extra `fast`
    decode_jpeg = None

import numpy as np
import torch
import torch.distributed
import torch.nn.functional as F
from einops import rearrange
from PIL import Image, ImageDraw, UnidentifiedImageError
from safetensors import safe_open
from safetensors.torch import load_file, save
from torch import nn
from torchvision import datasets
from torchvision.transforms.v2 import functional as TF
from torchvision.utils import make_grid
from tqdm import tqdm

# PIL refuses larger images, as a small file could fill the memory.
Image.MAX_IMAGE_PIXELS = int(os.environ.get("MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS))
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
VERSION = 1  # of the files written here
EXIF = "images are turned upright"  # the rule, for those who compare numbers
PEAK_FLOPS = dict(A100=312e12, H100=989e12, H200=989e12)  # dense bf16, as the maker states

# ---- 1  ViT --------------------------------------------------------------------------------------
class LayerScale(nn.Module):
    """A learnable gain per channel on a residual branch."""

    def __init__(self, dim, init_value):
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), float(init_value)))

    def forward(self, x):
        return x * self.gamma


def attention(q, k, v):
    """softmax(q k^T / sqrt(d)) v of queries, keys and values (B, h, n, d): (B, h, n, d). In bf16 on
    a CPU it is written out: the backward pass of torch's is slow there (results/speed.md)."""
    if q.dtype == torch.bfloat16 and q.device.type == "cpu":
        return (q * q.shape[-1] ** -0.5 @ k.mT).softmax(dim=-1) @ v
    return F.scaled_dot_product_attention(q, k, v)


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
        return self.proj(rearrange(attention(q, k, v), "b h n d -> b n (h d)"))


class DropPath(nn.Module):
    """Stochastic depth: in training a branch is left out for a share `rate` of the samples, and the
    others are divided by the share that is kept. Blocks of all rates are one compiled program: of
    torchvision's, which draws from a distribution with the rate in it, each rate is one."""

    def __init__(self, rate):
        super().__init__()
        self.rate = rate

    def forward(self, x):
        if not self.training or self.rate == 0:
            return x
        kept = torch.rand(len(x), 1, 1, device=x.device) >= self.rate
        return x * (kept / (1 - self.rate)).to(x.dtype)


class Mlp(nn.Module):
    """Linear, exact GELU, linear."""

    def __init__(self, dim, hidden_dim):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm transformer block: x + Attn(LN(x)), then x + MLP(LN(x)); see `DropPath`."""

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

    def forward(self, x, ids=None):
        """Tokens (B, n, D) to (B, n, D); with `ids` (B, K) only those tokens pass the MLP and are
        given: (B, K, D)."""
        x = x + self.drop_path(self.ls1(self.attn(self.norm1(x))))
        x = x if ids is None else gather(x, ids)
        return x + self.drop_path(self.ls2(self.mlp(self.norm2(x))))


class PatchEmbed(nn.Module):
    """Holds the patch projection as the convolution that timm's key names and shapes expect."""

    def __init__(self, patch_size, in_chans, dim):
        super().__init__()
        self.proj = nn.Conv2d(in_chans, dim, patch_size, stride=patch_size)

    def forward(self, patches):
        """(B, V, C*P*Q) flattened patches to (B, V, D): a convolution whose kernel is its stride is
        a matrix product per patch, so hidden patches need not be embedded at all."""
        return F.linear(patches, self.proj.weight.flatten(1), self.proj.bias)


class ViT(nn.Module):
    """Vision transformer with the state-dict keys of timm's VisionTransformer (num_classes=0).

    Pre-norm, exact GELU. Sizes and patch may be `(H, W)` pairs, any number of channels works; mean
    and std are noted for those who normalise images. The position table is fixed (no gradient) and
    starts as sin-cos, column first; a method with another table calls `set_positions`. Linear
    layers start Xavier-uniform with zero biases, the class token from N(0, 0.02); a method that
    differs initialises anew.
    Raises ValueError for an image that the patch does not tile, heads that do not divide the width.
    """

    def __init__(self, img_size=224, patch_size=16, in_chans=3, embed_dim=768, depth=12,
                 num_heads=12, mlp_ratio=4.0, class_token=True, init_values=None,
                 drop_path_rate=0.0, norm_eps=1e-6, mean=IMAGENET_MEAN, std=IMAGENET_STD):
        super().__init__()
        self.img_size, self.patch_size = pair(img_size), pair(patch_size)
        if any(size % patch for size, patch in zip(self.img_size, self.patch_size)):
            raise ValueError(f"image size {self.img_size} is not a multiple of the patch size "
                             f"{self.patch_size}")
        self.grid = tuple(size // patch for size, patch in zip(self.img_size, self.patch_size))
        # What a file must carry so that the same encoder can be built again.
        self.config = dict(
            img_size=list(self.img_size), patch_size=list(self.patch_size), in_chans=in_chans,
            embed_dim=embed_dim, depth=depth, num_heads=num_heads, mlp_ratio=mlp_ratio,
            class_token=class_token, init_values=init_values, norm_eps=norm_eps, mean=list(mean),
            std=list(std))
        tokens = math.prod(self.grid) + class_token
        self.patch_embed = PatchEmbed(self.patch_size, in_chans, embed_dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim)) if class_token else None
        self.pos_embed = nn.Parameter(torch.zeros(1, tokens, embed_dim), requires_grad=False)
        rates = torch.linspace(0, drop_path_rate, depth, device="cpu").tolist()
        self.blocks = nn.ModuleList(Block(embed_dim, num_heads, mlp_ratio, init_values, rate)
                                    for rate in rates)
        self.norm = nn.LayerNorm(embed_dim)
        for module in self.modules():
            if isinstance(module, nn.LayerNorm):
                module.eps = norm_eps
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

    def embed(self, images, mask=None, ids_keep=None):
        """(B, C, H, W) images to (B, 1+V, D) tokens before the first block. Hidden are the
        patches where `mask` (B, N) is True, or those not in `ids_keep` (B, V), or none."""
        C, H, W = self.config["in_chans"], *self.img_size
        if images.ndim != 4 or tuple(images.shape[1:]) != (C, H, W):
            raise ValueError(f"images of shape {tuple(images.shape)} were given, this ViT expects "
                             f"(B, {C}, {H}, {W})")
        P, Q = self.patch_size
        patches = rearrange(images, "b c (h p) (w q) -> b (h w) (c p q)", p=P, q=Q)  # (B, N, C*P*Q)
        positions = self.pos_embed[:, -patches.shape[1]:].expand(len(images), -1, -1)  # (B, N, D)
        if mask is not None:
            ids_keep, _ = mask_to_ids(mask, images.device)  # (B, V), (B, M)
        if ids_keep is not None:
            patches, positions = gather(patches, ids_keep), gather(positions, ids_keep)
        x = self.patch_embed(patches) + positions  # (B, V, D)
        if self.cls_token is None:
            return x
        cls = (self.cls_token + self.pos_embed[:, :1]).expand(len(x), -1, -1)  # (B, 1, D)
        return torch.cat([cls, x], dim=1)  # (B, 1+V, D)

    def forward(self, images, mask=None, ids_keep=None):
        """Images (B, C, H, W), mask (B, N) bool with True = hidden, to normed tokens (B, 1+V, D).
        Only visible tokens are computed, in ascending patch order, class token first."""
        x = self.embed(images, mask, ids_keep)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def layers(self, images, indices, mask=None, norm=False, ids_keep=None):
        """Outputs of the blocks in `indices` (0-based, negative counts from the end), each
        (B, 1+V, D), with the final norm applied if `norm`."""
        depth = len(self.blocks)
        if not all(-depth <= index < depth for index in indices):
            raise ValueError(f"block indices {list(indices)} are outside a depth of {depth}")
        x, outputs = self.embed(images, mask, ids_keep), []
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
    """Keeps the key third of every qkv bias as it is, zero in a new ViT, for methods without it.

    A key bias adds the same number to all logits of a query, so it changes no output; frozen, it
    also stays at exactly zero instead of collecting rounding noise from the optimiser.
    """
    def zero_key_third(grad):
        q, k, v = grad.chunk(3)
        return torch.cat([q, torch.zeros_like(k), v])

    for block in vit.blocks:
        block.attn.qkv.bias.register_hook(zero_key_third)


# ---- 2  patches and masks ------------------------------------------------------------------------
def patchify(images, patch_size):
    """(B, C, H, W) to (B, N, P*Q*C): patches in raster order, each as (row, column, channel)."""
    P, Q = pair(patch_size)
    return rearrange(images, "b c (h p) (w q) -> b (h w) (p q c)", p=P, q=Q)


def unpatchify(tokens, patch_size, grid):
    """The inverse of `patchify`: (B, N, P*Q*C) and the grid (rows, columns) to (B, C, H, W)."""
    (P, Q), (h, w) = pair(patch_size), pair(grid)
    return rearrange(tokens, "b (h w) (p q c) -> b c (h p) (w q)", p=P, q=Q, h=h, w=w)


def sincos_2d(dim, grid, first="column"):
    """Fixed 2-D sin-cos position table, (N, dim) float32, rows in raster order. With frequencies
    w_k = 10000^(-k / (dim/4)), k = 0 .. dim/4-1, one half of the width is [sin(c w), cos(c w)] of
    one integer coordinate, the other half that of the other one. Both orders are in use, `first=
    "column"` and `first="row"`; an encoder needs the one it was trained with."""
    if dim % 4 or first not in ("column", "row"):
        raise ValueError(f"dim is a multiple of 4, not {dim}; first column or row, not {first!r}")
    omega = 10000.0 ** (-torch.arange(dim // 4, device="cpu") / (dim / 4))  # (dim/4,)
    row, column = torch.cartesian_prod(*(torch.arange(n, device="cpu") for n in pair(grid))).T
    places = (column, row) if first == "column" else (row, column)
    x, y = (place[:, None] * omega for place in places)  # (N, dim/4), (N, dim/4)
    return torch.cat([x.sin(), x.cos(), y.sin(), y.cos()], dim=1)  # (N, dim)


def sinusoid_1d(dim, num_patches):
    """Fixed 1-D position table (N, dim), float32, over patches in raster order: channels 2k and
    2k+1 of patch n are the sine and the cosine of n / 10000^(2k / dim)."""
    n = torch.arange(num_patches, dtype=torch.float64, device="cpu")[:, None]
    j = torch.arange(dim, dtype=torch.float64, device="cpu")
    angles = n / 10000 ** (j // 2 * 2 / dim)  # (N, dim)
    return torch.where(j % 2 == 0, angles.sin(), angles.cos()).float()


def random_masks(batch, num_patches, num_masked, generator=None):
    """(batch, num_patches) bool, True = hidden: `num_masked` random patches in every row.
    Raises ValueError for a count outside 0 .. num_patches - 1."""
    if not 0 <= num_masked < num_patches:
        raise ValueError(f"{num_masked} hidden patches were asked for, {num_patches} patches allow "
                         f"0 to {num_patches - 1}")
    noise = torch.rand(batch, num_patches, generator=generator, device="cpu")
    rank = noise.argsort(dim=1).argsort(dim=1)  # the place of each patch in a random order
    return rank < num_masked


def mask_to_ids(mask, device):
    """(B, N) bool mask to ids_keep (B, V) and ids_masked (B, M), both ascending, on `device`. The
    mask comes on the CPU, from the loader's pinned memory: it is counted there, as asking a GPU
    would make the CPU wait. Raises ValueError unless every row hides the same number."""
    counts = mask.sum(dim=1).tolist()
    if len(set(counts)) != 1:
        raise ValueError(f"every row of a mask must hide the same number of patches, got {counts}")
    hidden, V = mask.to(device, non_blocking=True), mask.shape[1] - counts[0]
    order = hidden.byte().argsort(dim=1, stable=True)  # (B, N) visible patches first
    return order[:, :V], order[:, V:]


def gather(tokens, ids):
    """tokens (B, N, D) at ids (B, K): (B, K, D)."""
    return tokens.gather(1, ids[:, :, None].expand(-1, -1, tokens.shape[2]))


# ---- 3  randomness -------------------------------------------------------------------------------
def seed_for(*key):
    """A 63-bit seed from ints and strings, the same on every machine and in every process."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "big") >> 1


# ---- 4  data -------------------------------------------------------------------------------------
EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm", ".tif", ".tiff")


class Images(torch.utils.data.Dataset):
    """Images with optional labels: `dataset[index]` is (uint8 image (3, H, W), label or -1).
    `source` is a list of files, or a uint8 tensor (n, 3, H, W). File names are one array of bytes:
    a list of a million strings would be copied into every worker, as Python counts references.
    A member of a tar archive is SHARD\\0MEMBER\\0OFFSET\\0SIZE."""

    def __init__(self, source, labels=None, classes=(), name=""):
        self.name, self.classes = name, tuple(classes)
        self.labels = torch.as_tensor(labels) if labels is not None else None
        self.pixels = source if isinstance(source, torch.Tensor) else None
        self.files = np.array([os.fsencode(path) for path in source] if self.pixels is None else [])

    def __len__(self):
        return len(self.files if self.pixels is None else self.pixels)

    def path(self, index):
        """The file's path, or SHARD/MEMBER."""
        return "/".join(os.fsdecode(self.files[index]).split("\0")[:2])

    def fingerprint(self):
        """A hash of the files' names below their common folder and sizes in bytes, or of the
        pixels: the same data, wherever they are."""
        hasher = hashlib.blake2b(digest_size=16)
        if self.pixels is not None:
            hasher.update(self.pixels.contiguous().numpy())
        start = len(os.path.commonprefix([os.path.dirname(min(self.files, default=b"")) + b"/",
                                          os.path.dirname(max(self.files, default=b"")) + b"/"]))
        for file in self.files.tolist():
            _, *member = file.split(b"\0")
            with contextlib.suppress(OSError):  # gone: its name is then missing, too
                name, size = member[::2] or (file[start:], b"%d" % os.stat(file).st_size)
                hasher.update(b"%s\0%s\0" % (name, size))
        return hasher.hexdigest()

    def __getitem__(self, index):
        file = self.pixels is None and os.fsdecode(self.files[index])
        image = read_image(file) if file else self.pixels[index]
        limit = 16 * min(image.shape[1:])
        if max(image.shape[1:]) > limit:  # resized by its short side a line would fill the memory
            image = TF.center_crop(image, [min(side, limit) for side in image.shape[1:]])
        return image, int(self.labels[index]) if self.labels is not None else -1


def read_image(path, size=None):
    """An image file, or member of a tar archive (see `Images`), as a uint8 RGB tensor (3, H, W),
    turned upright if its EXIF tag says so, unless an annotation's `size` (H, W) is that of the
    stored image alone. Raises ValueError with the file and the reason."""
    place, path = str(path), "/".join(str(path).split("\0")[:2])
    try:
        content = read_bytes(place)
        with Image.open(io.BytesIO(content)) as image:
            if decode_jpeg and image.format == "JPEG" and image.mode == "RGB" \
                    and "exif" not in image.info:
                with contextlib.suppress(RuntimeError):  # PIL says below what is wrong
                    return decode_jpeg(torch.frombuffer(content, dtype=torch.uint8))  # the same
            turn, image = exif_turn(image, size), eight_bits(image).convert("RGB")
            return TF.pil_to_tensor(image if turn is None else image.transpose(turn))
    except Image.DecompressionBombError as error:
        raise ValueError(f"{path}: {error}; the variable MAX_IMAGE_PIXELS, set to the pixels of "
                         "your largest image, allows it") from error
    except (OSError, SyntaxError, ValueError, MemoryError, RuntimeError) as error:
        why = isinstance(error, UnidentifiedImageError) and os.path.isfile(path) and foreign(path)
        raise ValueError(f"{path} cannot be read as an image ({why or repr(error)}): replace or "
                         "remove the file") from error


def read_bytes(path):
    """The content of a file or of a member of a tar archive. Raises ValueError or OSError."""
    shard, *member = path.split("\0")
    if not member:
        if not os.path.isfile(shard):  # a pipe would be waited for
            raise ValueError("there is no such file")
        return bytearray(Path(shard).read_bytes())
    file, offset, size = open_shard(shard, os.getpid()), *map(int, member[1:])
    file.seek(offset)
    if len(content := bytearray(file.read(size))) < size:
        raise ValueError("its archive is cut off")
    return content


@functools.lru_cache(maxsize=64)
def open_shard(path, process):
    """A tar archive, opened once in each process: workers must not share a place in the file."""
    return open(path, "rb")


def exif_turn(image, size=None):
    """What `PIL.Image.transpose` is to be called with to see an image as its EXIF tag says, or
    None; None too, if an annotation's `size` (H, W) is that of the stored image alone."""
    image.load()  # TIFF files are turned in here, and lose the tag
    try:
        turn = {2: 0, 3: 3, 4: 1, 5: 5, 6: 4, 7: 6, 8: 2}.get(image.getexif().get(0x0112))
    except Exception:  # PIL raises what it likes for a damaged tag, which is no reason to stop
        return None
    turned = image.size[::-1] if turn in (2, 4, 5, 6) else image.size
    stored_alone = size and turned != tuple(size[::-1]) == image.size
    return None if stored_alone else turn


def eight_bits(image):
    """Grey PIL images of 9 to 16 bits with 8: the largest value that the bits can hold is white.
    PIL itself would cut at 255. Raises ValueError where white or the bands are not known."""
    tags = image.tag_v2 if image.format == "TIFF" else {}
    if tags.get(277, 1) > len(image.getbands()):  # SamplesPerPixel
        raise ValueError(f"it has {tags[277]} bands; save red, green and blue alone")
    if image.mode[0] not in "IF":
        return image
    if image.mode == "F" or image.mode == "I" and image.format not in ("PNG", "PPM"):
        raise ValueError("its grey values have 32 bits, or a sign; save them with 8 or 16 bits")
    white = 2 ** tags.get(258, (16,))[0] - 1  # BitsPerSample
    grey = (np.asarray(image).astype(np.uint32) * 255 + white // 2) // white
    return Image.fromarray((255 - grey if tags.get(262) == 0 else grey).astype(np.uint8))


def find_data(spec, split="pretrain", img_size=32, num_scenes=16_000, cache=None):
    """The images that `--data SPEC` names, as an `Images`; split is "pretrain", "train" or "val".

    SPEC is `scenes` (built in), `cifar10` (torchvision's files under $CIFAR10 or data/), or a
    folder of images, flat or nested; of ImageNet's layout train/ is taken, or for "val" the first
    of val/, valid/, validation/, test/ (labels: eval/data.py). Empty: $IMAGENET or data/imagenet.
    Or SPEC is a tar archive or a folder of them, whose names then hold `train` or `val` where they
    are mixed; their index is kept in the folder `cache`.
    Raises FileNotFoundError or ValueError with what is missing, or if no image can be read.
    """
    if spec in ("scenes", "cifar10"):
        return built_in_data(spec, split, img_size, num_scenes)
    root = Path(spec or os.environ.get("IMAGENET") or "data/imagenet").expanduser()
    archive = root.suffix == ".tar" and root.is_file()
    if not archive and not root.is_dir():
        raise FileNotFoundError(
            f"no data folder at {root}: give one with --data FOLDER (any folder of images, or "
            "ImageNet's train/ and val/), set the variable IMAGENET, or try the built-in --demo")
    inside = [] if archive else sorted(entry.name for entry in os.scandir(root) if entry.is_dir())
    there = {name.lower(): root / name for name in inside}
    names = ("val", "valid", "validation", "test", "testing")
    names = names if split == "val" else ("train", "training")
    folder = next((there[name] for name in names if name in there), root)
    shards = [root] if archive else sorted(folder.glob("*.tar"))
    named = [shard for shard in shards if any(name in shard.name.lower() for name in names)]
    shards = named or shards * (folder != root or split == "pretrain")
    if folder == root and split != "pretrain" and not shards:
        raise FileNotFoundError(f"{root} has no folder {'/ or '.join(names)}/ with images by class "
                                "and no .tar archive with such a name")
    files, names = index_shards(shards, cache) if shards else (list_images(folder), "")
    classes, labels = np.unique(names, return_inverse=True)
    known = "" not in classes
    images = Images(files, labels if known else None, classes.tolist() * known, str(folder))
    readable(images, 0)  # raises now
    return images


def list_images(folder):
    """All image files below `folder`, sorted: every process and every run sees the same order.
    Hidden files and folders are left out, and each folder is listed once, however many links lead
    to it. The main process says what other files there are. Raises FileNotFoundError if there is no
    image, and OSError for a folder that may not be read, which would be missing silently."""
    listed, others, seen = {}, collections.Counter(), set()
    real, links = [str(folder)], []
    while real or links:  # links come after all folders that are really here
        path = real.pop() if real else links.pop(0)
        place, entries = os.stat(path), sorted(os.scandir(path), key=lambda entry: entry.name)
        a_run = {".lock", "log.jsonl"} <= {entry.name for entry in entries}  # its pictures: no data
        if (place.st_dev, place.st_ino) in seen or a_run:
            continue
        seen.add((place.st_dev, place.st_ino))
        listed[path] = []
        for entry in entries:
            if entry.name.startswith((".", "@eaDir")):
                continue
            if entry.is_dir():
                (links if entry.is_symlink() else real).append(entry.path)
            elif entry.name.lower().endswith(EXTENSIONS) and entry.is_file():
                listed[path].append(entry.name)
            else:
                ending = Path(entry.name).suffix.lower() or "no ending"
                others[ending if entry.is_file() else "no file"] += 1
    order = sorted(listed, key=lambda path: path.split(os.sep))
    found = [os.path.join(path, file) for path in order for file in listed[path]]
    if not found:
        raise FileNotFoundError(f"{folder} holds no image ({', '.join(EXTENSIONS)})")
    if others and os.environ.get("RANK", "0") == "0":
        kinds = ", ".join(f"{kind} ({count})" for kind, count in others.most_common(8))
        say(f"left out {others.total()} files of other endings in {folder}: {kinds}")
    return found


def index_shards(shards, cache=None):
    """(files, class names) of the images in tar archives: files as `Images` takes them; a name is
    that of WebDataset's .cls member, or of the image's folder, or "". Class archives in an archive,
    as ImageNet comes, are folders. The folder `cache` keeps the index until an archive changes.
    Raises ValueError with the name of a damaged archive, FileNotFoundError without images."""
    main, cache = os.environ.get("RANK", "0") == "0", cache and Path(cache, ".shards.npz")
    about = repr([(str(shard), shard.stat().st_size, shard.stat().st_mtime) for shard in shards])
    with contextlib.suppress(Exception), np.load(cache) as kept:
        if str(kept["about"]) == about:
            return kept["files"], kept["names"]
    files, names, told = [], [], {}
    for shard in tqdm(shards, "indexing", leave=False, disable=None if main else True):
        with open(shard, "rb") as file:
            for member, offset, size in walk_shard(file, shard):
                key = shard, re.sub(r"\.[^/]*$", "", member)
                if member.endswith(".cls"):
                    file.seek(offset)
                    told[key] = file.read(size).decode().strip()
                else:
                    files.append(os.fsencode(f"{shard}\0{member}\0{offset}\0{size}"))
                    names.append(key)
    if not files:
        raise FileNotFoundError(f"{shards[0]} holds no image ({', '.join(EXTENSIONS)})")
    names = [told.get(key, "") if told else Path(key[1]).parent.name for key in names]
    if cache and main:
        content = io.BytesIO()
        np.savez(content, about=about, files=files, names=names)
        write_atomically(cache, lambda path: path.write_bytes(content.getbuffer()))
    return files, names


def walk_shard(file, shard, folder=""):
    """Yields (name, offset, size) of the images and .cls members of an open tar archive, and of the
    archives in it. Raises ValueError for an archive that is damaged, cut off or compressed."""
    try:
        with tarfile.open(fileobj=file, mode="r:") as archive:
            for member in archive:
                name = folder + member.name.removeprefix("./")
                if not member.isfile() or Path(name).name.startswith("."):
                    continue
                if name.endswith(".tar"):
                    file.seek(member.offset_data)
                    yield from walk_shard(file, shard, name.removesuffix(".tar") + "/")
                elif name.lower().endswith((*EXTENSIONS, ".cls")):
                    yield name, member.offset_data, member.size
            file.seek(archive.offset)  # tarfile takes a damaged header for the end
            if file.read(512) != bytes(512):
                raise tarfile.ReadError(f"it is damaged or cut off at byte {archive.offset:,}")
    except tarfile.TarError as error:
        raise ValueError(f"{shard} cannot be read as a tar archive ({error}): copy it anew; a "
                         "compressed one must be unpacked to a plain .tar") from error


def built_in_data(spec, split, img_size, num_scenes):
    """`scenes` or `cifar10`, with labels. Raises FileNotFoundError where files are missing."""
    if spec == "scenes":
        try:
            from demo.scenes import CLASSES, SEEDS, make_scenes
        except ImportError as error:
            raise FileNotFoundError("--data scenes needs the folder demo/ beside common.py: "
                                    "copy it along, or give --data FOLDER") from error
        count = {"pretrain": num_scenes, "train": 3_000, "val": 1_500}[split]
        scenes = make_scenes(count, size=img_size, seed=SEEDS[split])
        return Images(scenes.images, scenes.labels, CLASSES, name=f"scenes ({split})")
    root = os.environ.get("CIFAR10") or "data"
    try:
        data = datasets.CIFAR10(root, train=split != "val")
    except RuntimeError as error:
        raise FileNotFoundError(f"no CIFAR-10 under {root} ($CIFAR10, else data/): torchvision."
                                f"datasets.CIFAR10('{root}', download=True) fetches it") from error
    pixels = rearrange(torch.from_numpy(data.data), "n h w c -> n c h w")
    return Images(pixels, data.targets, data.classes, "cifar10")


class Samples(torch.utils.data.Dataset):
    """Training samples: `samples[epoch, index]` is `transform(*images[index])`, so image and label.

    The transform draws from torch's default generator, seeded per (seed, epoch, index): a sample is
    the same in whatever worker, rank or order it is made. (With no workers that is the training
    process's own generator: what is drawn in a loop must be seeded there, too.) A file that cannot
    be read must not end a long run: the next one takes its place."""

    def __init__(self, images, transform, seed):
        self.images, self.transform, self.seed = images, transform, seed
        self.bad = torch.zeros(len(images), dtype=torch.bool).share_memory_()  # seen by all workers

    def replaced(self):
        """How many files could not be read so far."""
        return int(self.bad.sum())

    def __getitem__(self, key):
        epoch, index = key
        sample = readable(self.images, index, self.bad)
        torch.default_generator.manual_seed(seed_for(self.seed, "sample", epoch, index))
        return self.transform(*sample)


def readable(images, index, bad=None):
    """images[index], or the first after it that can be read; of the others `bad` takes note, and
    each is said once. Raises ValueError after ten."""
    for place in range(index, index + 10):
        try:
            return images[place % len(images)]
        except ValueError as error:
            if place == index + 9:
                raise
            if bad is None or not bad[place % len(images)]:
                say(f"warning: {error}; the next file stands in for it", sys.stderr)
            if bad is not None:
                bad[place % len(images)] = True


def micro_batch_keys(num_images, plan, dist, seed, start, stop):
    """For steps start .. stop-1, yields lists of (epoch, index): this rank's micro batches.

    A step's global batch is a slice of the epoch's permutation; its rows are dealt out micro batch
    by micro batch, so 1 rank x 8 micro batches, 2 x 4 and 8 x 1 see the same images. The incomplete
    last batch of an epoch is dropped. Workers start once for all epochs.
    """
    permuted = None
    for step in range(start, stop):
        epoch, position = divmod(step, plan.steps_per_epoch)
        if epoch != permuted:
            generator = torch.Generator().manual_seed(seed_for(seed, "order", epoch))
            order, permuted = torch.randperm(num_images, generator=generator), epoch
        rows = order[position * plan.batch_size:][: plan.batch_size].tolist()
        for micro in range(plan.accumulation):
            first = plan.first_row(micro, dist)
            yield [(epoch, index) for index in rows[first: first + plan.micro_batch]]


def preview_batch(samples, count=6):
    """The same few samples each time, so that the pictures of a run can be compared; from all over
    the data, since files come sorted by class."""
    keys = [(0, index * len(samples.images) // count) for index in range(count)]
    return torch.utils.data.default_collate([samples[key] for key in keys])


def normalise(images, mean=IMAGENET_MEAN, std=IMAGENET_STD):
    """Images (B, 3, H, W) of 0..255 to float32, with mean and std given for the range 0..1."""
    images = images.float()
    mean, std = (channels(tuple(value), images.device, images.dtype) for value in (mean, std))
    return (images / 255 - mean) / std


def unnormalise(images, mean=IMAGENET_MEAN, std=IMAGENET_STD):
    """Normalised images (B, 3, H, W) back to the range 0..1."""
    mean, std = (channels(tuple(value), images.device, images.dtype) for value in (mean, std))
    return images * std + mean


@functools.cache
def channels(values, device, dtype):
    """A number per channel as (C, 1, 1), copied to the device once: each copy would wait for it."""
    return torch.tensor(values, device=device, dtype=dtype)[:, None, None]


# ---- 5  optimisation -----------------------------------------------------------------------------
def learning_rate(step, peak, warmup_steps, total_steps, end=0.0, start=0.0):
    """Linear from `start`, reaching `peak` in step warmup_steps - 1, then half a cosine down, which
    would reach `end` in the step after the last."""
    if step < warmup_steps:
        return start + (peak - start) * step / max(warmup_steps - 1, 1)
    progress = (step - warmup_steps) / max(total_steps - warmup_steps, 1)
    return end + (peak - end) * 0.5 * (1 + math.cos(math.pi * progress))


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


def uses_bf16(device, precision):
    """`--precision auto` means bf16 on a GPU, fp32 elsewhere."""
    return precision == "bf16" or (precision == "auto" and device.type == "cuda")


def autocast(device, precision):
    """bf16 or not, for the forward pass alone."""
    return torch.autocast(device.type, torch.bfloat16, enabled=uses_bf16(device, precision))


# ==================================================================================================
# From here on plumbing, which is part of no method: how runs start, stop, save and are logged.
# ---- 6  processes --------------------------------------------------------------------------------
@dataclasses.dataclass(frozen=True)
class Dist:
    """The three facts of distributed training. Only the process `is_main` prints, saves, draws."""

    rank: int
    world: int
    device: torch.device

    @property
    def is_main(self):
        return self.rank == 0

    def all_reduce(self, tensor):
        """The sum of a tensor over all processes, in place."""
        if self.world > 1:
            torch.distributed.all_reduce(tensor)
        return tensor


@contextlib.contextmanager
def distributed(device="auto"):
    """Yields the `Dist` of this process: one of those that torchrun started, or the only one."""
    rank, world, local = (int(os.environ.get(name, default))
                          for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    if device == "auto":
        mps = torch.backends.mps.is_available()
        device = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    gpu = torch.device("cuda", local) if device == "cuda" else None
    if gpu and local >= torch.cuda.device_count():
        raise ValueError(f"process {local} finds {torch.cuda.device_count()} GPUs on this machine: "
                         "start fewer (--nproc_per_node) or give --device cpu")
    if gpu:
        torch.cuda.set_device(gpu)
    if world > 1:  # gloo beside NCCL: what processes agree on need not wait for a GPU
        torch.distributed.init_process_group("cpu:gloo,cuda:nccl" if gpu else "gloo", device_id=gpu)
    yield Dist(rank, world, gpu or torch.device(device))
    if world > 1:  # not after an error: NCCL would wait for the others, who wait for this process
        torch.distributed.destroy_process_group()


@dataclasses.dataclass(frozen=True)
class Plan:
    """How a global batch becomes micro batches, and epochs become steps."""

    batch_size: int  # global, as papers state it
    micro_batch: int  # images that one process computes at once
    accumulation: int  # micro batches per step and process
    steps_per_epoch: int
    total_steps: int

    def first_row(self, micro, dist):
        """The row of the global batch at which this rank's micro batch begins."""
        return (micro * dist.world + dist.rank) * self.micro_batch


def make_plan(num_images, batch_size, micro_batch, epochs, world):
    """The `Plan` of a run. `micro_batch` 0: the largest divisor of a process's share up to 256.
    Raises ValueError for a batch that the processes cannot share or the data cannot fill."""
    if batch_size > num_images:
        raise ValueError(f"{num_images} images are less than one batch of {batch_size}: give "
                         f"--batch_size {num_images} or less")
    share, rest = divmod(batch_size, world)
    if rest:
        raise ValueError(f"--batch_size {batch_size} is not a multiple of {world} processes")
    divisors = [size for size in range(1, share + 1) if share % size == 0]
    micro_batch = micro_batch or max(size for size in divisors if size <= 256)
    if micro_batch not in divisors:
        nearest = min(divisors, key=lambda size: abs(size - micro_batch))
        raise ValueError(f"--micro_batch {micro_batch} does not divide the {share} images of a "
                         f"process ({batch_size} / {world}): the nearest that does is {nearest}")
    steps = num_images // batch_size
    return Plan(batch_size, micro_batch, share // micro_batch, steps, epochs * steps)


def compiles(config, device):
    """`--compile auto` means on a GPU only."""
    return config.compile == "on" or (config.compile == "auto" and device.type == "cuda")


def compile_blocks(config, device, *models):
    """torch.compile per transformer block (whatever has an `mlp`), in place: state-dict keys stay
    clean, equal blocks share a program. A model's function `loss`, too, where it has one."""
    if compiles(config, device):
        for part in [part for model in models for part in model.modules()]:
            if hasattr(part, "mlp"):
                part.compile()
            elif hasattr(part, "loss"):
                part.loss = torch.compile(part.loss)


# ---- 7  files ------------------------------------------------------------------------------------
def say(text, file=None):
    """Prints without the control characters that a file name may hold; a closed terminal or a full
    disk behind it ends nothing."""
    with contextlib.suppress(OSError, ValueError):
        tqdm.write(re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "?", text), file)


def write_atomically(path, write, keep=""):
    """`write(temporary path)`, then rename: a kill in between leaves the old file whole, which
    stays as `keep`, if given. All is on the disk before it returns."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")
    try:
        temporary.unlink(missing_ok=True)  # if somebody put a link there, it is not followed
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        if keep and path.exists():
            path.with_name(keep).unlink(missing_ok=True)
            try:
                os.link(path, path.with_name(keep))  # a second name: `path` stays at each moment
            except OSError:  # a file system without links
                os.replace(path, path.with_name(keep))
        os.replace(temporary, path)
        if os.name == "posix":  # the new name, too, is to survive a power cut
            folder = os.open(path.parent, os.O_RDONLY)
            os.fsync(folder)
            os.close(folder)
    except (OSError, RuntimeError) as error:  # torch makes a RuntimeError of a full disk
        why = getattr(error, "strerror", None) or "cannot be written, the disk may be full"
        raise OSError(getattr(error, "errno", None), why, str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)


def digest(tensors):
    """A hash of {name: tensor}: safetensors itself does not notice a flipped bit."""
    hasher = hashlib.blake2b(digest_size=16)
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        hasher.update(repr((name, tensor.dtype, tuple(tensor.shape))).encode())
        hasher.update(tensor.flatten().view(torch.uint8).numpy())
    return hasher.hexdigest()


def save_encoder(vit, path, **info):
    """Writes a ViT as safetensors under timm's names; metadata: its configuration and `info`."""
    tensors = {name: tensor.cpu().contiguous() for name, tensor in vit.state_dict().items()}
    write_encoder(tensors, vit.config, path, **info)


def on_host(tree):
    """A copy of nested dicts and lists with all tensors on the CPU; those of a GPU come into pinned
    memory, and are there after the next `synchronize`."""
    if isinstance(tree, dict):
        return {key: on_host(value) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(map(on_host, tree))
    if not isinstance(tree, torch.Tensor):
        return tree
    cuda = tree.device.type == "cuda"
    copy = torch.empty_like(tree, device="cpu", pin_memory=cuda)
    return copy.copy_(tree, non_blocking=cuda)


def write_encoder(tensors, config, path, **info):
    """`save_encoder` of a state dict on the CPU, of a ViT of this configuration."""
    # One key: safetensors writes several in random order, and equal runs should give equal files.
    about = json.dumps(dict(kind="encoder", version=VERSION, digest=digest(tensors), **info,
                            config=config))
    write_atomically(path, lambda file: file.write_bytes(save(tensors, dict(about=about))))


def read_checkpoint(path):
    """A .safetensors, .pt or .pth file as a dict of tensors and plain data, and of the
    argparse.Namespace that published files carry. Code in it is not run, but refused by name. What
    the file holds to check itself, our digest or the sums of torch's zip, must be right.
    Raises FileNotFoundError or ValueError."""
    if not os.path.isfile(path):
        raise FileNotFoundError(f"no checkpoint file at {path}")
    try:
        if str(path).endswith(".safetensors"):
            tensors, about = load_file(path), read_about(path)
            if about.get("digest") not in (None, digest(tensors)):
                raise ValueError("digest")
            return tensors
        if zipfile.is_zipfile(path) and zipfile.ZipFile(path).testzip():
            raise ValueError("sum")
        with torch.serialization.safe_globals([argparse.Namespace]):
            return dict(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:  # torch raises a dozen types for files that are not its own
        code = re.search(r"GLOBAL (\S+)", str(error))
        why = (f"an object of type {code[1]} in it could run code; save the weights alone" if code
               else foreign(path) or "it is cut off, damaged, or of another kind than it says")
        raise ValueError(f"{path} cannot be read as a checkpoint: {why}") from error


def read_about(path):
    """What we note in a .safetensors file beside the tensors; {} in files of others."""
    with contextlib.suppress(Exception), safe_open(path, "pt") as file:
        about = json.loads(file.metadata()["about"])
        return about if isinstance(about, dict) else {}
    return {}


def check_tensors(found, wanted, what):
    """Raises ValueError unless {name: tensor} has the names, shapes and types that are wanted, and
    no number that is not finite: torch itself would stop with a traceback, or not at all."""
    for name in [*wanted, *found]:
        have, want = (tuple(part[name].shape) if isinstance(part.get(name), torch.Tensor) else None
                      for part in (found, wanted))
        if have != want or found[name].is_floating_point() != wanted[name].is_floating_point():
            raise ValueError(f"{what} does not fit this model: {name} is {have} there and {want} "
                             "here, or of another type")
    if not all_finite(found.values()):
        raise ValueError(f"{what} holds numbers that are not finite: its training went wrong")


def all_finite(tensors):
    """Whether no tensor holds a NaN or an infinity; the device is waited for once."""
    floats = [tensor for tensor in tensors if isinstance(tensor, torch.Tensor)
              and tensor.is_floating_point() and tensor.numel()]
    return not floats or bool(nn.utils.get_total_norm(floats, math.inf).isfinite())


# The first bytes of what often lies where weights or an image should be.
ARCHIVE, TIFF = "an archive: unpack it", "a TIFF of bands or bits that PIL does not know"
FOREIGN = {b"version https://git-lfs": "a Git LFS pointer: `git lfs pull` fetches the file itself",
           b"<": "a web page: download the file again", b"\x1f\x8b": ARCHIVE, b"BZh": ARCHIVE,
           b"\xfd7zXZ": ARCHIVE, b"7z\xbc": ARCHIVE, b"Rar!": ARCHIVE, b"II*\0": TIFF,
           b"MM\0*": TIFF, b"\x89HDF": "an HDF5 file, of Keras for example"}


def foreign(path):
    """What a file is that is neither weights nor an image, by its first bytes; "" if not known."""
    with open(path, "rb") as file:
        head = file.read(300)
    for start, what in FOREIGN.items():
        if head.lstrip(b"\xef\xbb\xbf \r\n").startswith(start):
            return f"it is {what}"
    with contextlib.suppress(zipfile.BadZipFile):
        if not any(name.endswith("data.pkl") for name in zipfile.ZipFile(path).namelist()):
            return "it is a zip archive: unpack it"
        return "it is a file of torch.save: name it .pt" * str(path).endswith(".safetensors")
    if head[8:9] == b"{" and not str(path).endswith(".safetensors"):
        return "it is a safetensors file: name it .safetensors"
    text = re.fullmatch(rb"[\t\r\n -~]*", head)
    return (f"it is a text, {head[:40].decode()!r}" if head else "it is empty") if text else ""


def load_init(model, path):
    """--init: our own last.pt, or an encoder.safetensors, which leaves everything else as it is, or
    a run's folder. A fixed position table for another image size stays as the model made it.
    Raises FileNotFoundError or ValueError for any other file."""
    path = Path(path).expanduser()
    inside = [path / name for name in ("last.pt", "encoder.safetensors") if (path / name).exists()]
    path = [*inside, path][0]
    part, state = model.encoder if path.suffix == ".safetensors" else model, read_checkpoint(path)
    own, state = part.state_dict(), state["model"] if state.get("kind") == "pretraining" else state
    if state.keys() != own.keys():
        raise ValueError(f"--init {path} is neither a last.pt of this method nor an encoder."
                         f"safetensors: `python -m eval.encoders {path} NEW.safetensors` makes one "
                         "of what others publish")
    for name, tensor in own.items():
        if "pos" in name and state[name].shape != tensor.shape:
            state[name] = tensor
    check_tensors(state, own, f"--init {path}")
    part.load_state_dict(state)
    if os.environ.get("RANK", "0") == "0":
        print(f"weights  {path}{'' if part is model else ', the encoder alone'}")


def commit():
    """The commit of this code, such as 84e6c24 or 84e6c24-dirty; None where git knows none."""
    command = ["git", "-C", str(Path(__file__).resolve().parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.strip() or None
    except OSError:
        return None


# ---- 8  run --------------------------------------------------------------------------------------
# What may differ when the same command starts again; any other changed field stops.
MAY_CHANGE = {"workers", "log_every", "save_every", "device", "micro_batch", "max_steps", "max_bad",
              "data_changed", "out", "demo", "fresh", "preview", "dry_run"}
# What a last.pt holds.
STATE = dict(kind=str, method=str, version=int, config=dict, step=int, total_steps=int,
             num_images=int, skipped=int, model=dict, optimizer=dict)
SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2")
           if hasattr(signal, name)]
SAVE_SECONDS = 600  # at least, between the checkpoints that are made at an epoch's end


class Run:
    """The folder of a run, and what every training loop needs: its steps, its batches, its log.

    Files: config.json, log.jsonl, last.pt, encoder.safetensors, preview.png; previous.pt is the
    last.pt before. `state` is the content of last.pt, or of previous.pt where that one is damaged,
    {} in a new folder. Nothing is written before `begin`, but an index of archives."""

    def __init__(self, method, config, out, kind="pretraining"):
        self.method, self.config, self.kind, self.lock = method, config, kind, None
        self.folder, number = Path(out), 1
        restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0  # by torchrun
        while config.fresh and self.folder.exists():
            number += 1
            if restarted and not Path(f"{out}-{number}").exists():
                break  # --fresh was for the first start
            self.folder = Path(f"{out}-{number}")
        if (self.folder / ".lock").exists() and not getattr(config, "preview", ""):
            self.claim()
        self.checkpoint, self.state, self.damaged = self.folder / "last.pt", {}, []
        for path in (self.checkpoint, self.folder / "previous.pt"):
            if path.exists() and not self.state:
                try:
                    self.state = self._read(path)
                except ValueError as error:
                    self.damaged.append(str(error))
        if self.damaged and not self.state:
            raise ValueError(f"{' and '.join(self.damaged)}: there is nothing to go on from, "
                             "--fresh starts anew")
        told = self.damaged or self.state and not self.checkpoint.exists()
        if told and os.environ.get("RANK", "0") == "0":
            say("warning: " + "; ".join([*self.damaged, "the run goes on from previous.pt, step "
                                         f"{self.state['step']}"]), sys.stderr)
        if self.state.get("method", method) != method:
            raise ValueError(f"{self.checkpoint} is not from {method}: give another --out")
        before = dict(self.state.get("config", {}))
        if "fingerprint" in self.state:  # the files themselves are compared, wherever they are
            before.pop("data", None)
        for name, now in vars(config).items():
            if name not in MAY_CHANGE and before.get(name, now) != now:
                raise ValueError(f"--{name} was {before[name]!r} when the run in {self.folder} "
                                 f"started and is {now!r} now: give the old value to go on, or "
                                 "--fresh or another --out for a new run")
        self.start, total = self.state.get("step", 0), self.state.get("total_steps", math.inf)
        self.finished = self.start >= min(config.max_steps or total, total)

    def _read(self, path):
        """The content of a last.pt. Raises ValueError for anything else."""
        state = read_checkpoint(path)
        lacking = [name for name, kind in STATE.items() if not isinstance(state.get(name), kind)]
        if lacking:
            raise ValueError(f"{path} is no state of a run: it has no {lacking[0]}")
        if state["version"] != VERSION:
            raise ValueError(f"{path} has the version {state['version']}, this code {VERSION}")
        if not all_finite(state["model"].values()):
            raise ValueError(f"{path} holds weights that are not finite")
        return state

    def claim(self):
        """One process at a time writes here, a second one stops: `flock` is a lock that the kernel
        frees when its process ends, in whatever way."""
        if fcntl is None or self.lock or os.environ.get("RANK", "0") != "0":
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        self.lock = open(self.folder / ".lock", "a+")
        me = f"{os.getpid()} on {socket.gethostname()}"
        os.register_at_fork(after_in_child=self.lock.close)  # a worker may live a little longer
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self.lock.seek(0)
            if (holder := self.lock.read()) != me:
                raise ValueError(f"a run is going on in {self.folder}, process {holder}: wait for "
                                 "it, or give another --out") from error
        except OSError:
            say(f"warning: {self.folder} is on a file system without locks: nothing keeps a second "
                "run from writing there", sys.stderr)
        self.lock.truncate(0)
        print(me, end="", file=self.lock, flush=True)

    def load(self, model):
        """The model with the weights of last.pt, or else of --init, or else as it is."""
        if self.state:
            check_tensors(self.state["model"], model.state_dict(), f"the state in {self.folder}")
            model.load_state_dict(self.state["model"])
        elif self.config.init:
            load_init(model, self.config.init)
        return model

    def prepare(self, dist, samples, model, optimizer):
        """What pre-training does before its first step: plans the batches, prints the recipe,
        begins. Gives the plan and the model, of several processes in DistributedDataParallel."""
        config, images = self.config, samples.images
        plan = make_plan(len(images), config.batch_size, config.micro_batch, config.epochs,
                         dist.world)
        data = f"{len(images):,} images in {images.name}"
        describe(config.facts, config, model, plan, dist, data, self.folder)
        self.begin(dist, plan, samples, model, optimizer)
        if dist.world > 1:
            model = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
        return plan, model

    def begin(self, dist, plan, samples, model, optimizer, collate=None):
        """Restores an interrupted run, writes config.json, starts the loader. Log lines after the
        checkpoint are dropped, and one that a killed process left half-written."""
        self.claim()
        config, state = self.config, self.state
        self.dist, self.plan, self.samples = dist, plan, samples
        self.num_images, self.fingerprint = len(samples.images), samples.images.fingerprint()
        self._compare_processes()
        if not state:
            self._check_folder()
        changed = state.get("fingerprint", self.fingerprint) != self.fingerprint or \
            state.get("num_images", self.num_images) != self.num_images
        if changed and not config.data_changed:
            raise ValueError(f"the run in {self.folder} started with {state['num_images']} images, "
                             f"now there are {self.num_images}, or others: restore them, or accept "
                             "it with --data_changed, or start anew with --fresh")
        if state:
            check_tensors(state["model"], model.state_dict(), f"the state in {self.folder}")
            check_optimizer(state, optimizer, f"the state in {self.folder}")
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            if dist.is_main and state.get("exif") != EXIF:
                say(f"exif     this run began under another rule; from here on {EXIF}")
        self.state = {}  # frees the memory of the old weights when this is done
        self.skipped, self.bad_steps = state.get("skipped", 0), state.get("bad_steps", [])
        self.failures, self.due, self.cut, self.unwritten, self.totals = 0, False, False, "", {}
        self.flags, self.question, self.saving, self.told = [], None, None, False
        # The averages of the next log line go on where they stood, in the main process.
        self.count, sums = state.get("count", 0), state.get("sums", {}) if dist.is_main else {}
        self.sums = {name: value.to(dist.device) for name, value in sums.items()}
        if dist.is_main:
            self._begin_log(changed)
        self.stop = min(config.max_steps or plan.total_steps, plan.total_steps)
        keys = micro_batch_keys(self.num_images, plan, dist, config.seed, self.start, self.stop)
        self.loader = iter(torch.utils.data.DataLoader(
            samples, batch_sampler=keys, num_workers=num_workers(config), collate_fn=collate,
            worker_init_fn=leave_group, pin_memory=dist.device.type == "cuda"))
        self.bar = tqdm(total=plan.total_steps, initial=self.start, unit="step",
                        disable=None if dist.is_main else True)
        self.waited, self.logged, self.now = 0.0, self.start, self.start
        self.clock, self.signal, self.stopping = time.perf_counter(), None, False
        self.saved, self.writer = self.clock, concurrent.futures.ThreadPoolExecutor(1)
        self.parent = os.getppid()
        for number in SIGNALS:
            signal.signal(number, self._remember)

    def _compare_processes(self):
        """Raises ValueError in all processes where one differs: a folder that only one machine
        sees, or other data, would go on to the end and mean nothing."""
        facts = dict(vars(self.config), step=self.start, images=self.fingerprint, commit=commit())
        everyone = [facts] * self.dist.world
        if self.dist.world > 1:
            torch.distributed.all_gather_object(everyone, facts)
        for rank, name in itertools.product(range(self.dist.world), facts):
            one, other = everyone[0][name], everyone[rank][name]
            if one != other:
                raise ValueError(f"process {rank} has another {name} than process 0, {other!r} and "
                                 f"{one!r}: all must see the same files and flags")

    def _check_folder(self):
        """Raises ValueError where a new run would replace results, or write among files of others.
        Allowed is what a run leaves that was killed before it first saved."""
        started = json_or_none(self.folder / "config.json") or {}
        first = started.get("save_every") or started.get("steps_per_epoch", 0)
        allowed, encoder = {"eval.jsonl", "label_maps.json"}, self.folder / "encoder.safetensors"
        files = {path.name for path in self.folder.glob("[!.]*") if path.is_file()} - allowed
        steps = [line["step"] for line in read_log(self.folder)[0]]
        steps += [read_about(encoder).get("step", math.inf)] * encoder.exists()
        if files and (max(steps, default=0) > first or started.get("method") != self.method):
            raise ValueError(f"{self.folder} holds {min(files)} and more, but no last.pt to go on "
                             "from: --fresh starts in a new folder beside it")

    def _begin_log(self, changed):
        """Sets aside what damaged the log, drops what comes after the checkpoint, writes
        config.json."""
        for path in self.folder.glob(".*.tmp.*"):  # of a process that was killed while it wrote
            path.unlink(missing_ok=True)
        if self.damaged and self.checkpoint.exists():
            os.replace(self.checkpoint, self.folder / "last.pt.damaged")
        config_file, log = self.folder / "config.json", self.folder / "log.jsonl"
        starts = (json_or_none(config_file) or {}).get("starts", []) if self.start else []
        now = dict(step=self.start, torch=torch.__version__, commit=commit(),
                   command=" ".join(sys.argv))
        facts = dict(vars(self.config), **vars(self.plan), **now, method=self.method, exif=EXIF,
                     world=self.dist.world, num_images=self.num_images, starts=[*starts, now])
        write_atomically(config_file, lambda path: path.write_text(json.dumps(facts, indent=1)))
        kept, broken = read_log(self.folder)
        kept = [line for line in kept if line["step"] <= self.start]
        if changed:
            kept.append(dict(step=self.start, data_changed=self.num_images))
        if broken:
            say(f"warning: {len(broken)} damaged lines of {log} go to log.jsonl.broken", sys.stderr)
            with open(self.folder / "log.jsonl.broken", "ab") as file:
                file.write(b"".join(broken))
        text = "".join(json.dumps(line) + "\n" for line in kept)
        write_atomically(log, lambda path: path.write_text(text))

    def _remember(self, number, frame):
        """The first signal asks to save and stop, a second one ends at once, whatever hangs; under
        torchrun, which sends one of its own after Ctrl-C, a second later."""
        patience = 1.0 if "TORCHELASTIC_RUN_ID" in os.environ else 0.0
        if self.signal and time.perf_counter() - self.signalled >= patience:
            os._exit(128 + number)
        self.signal = self.signal or number
        self.signalled = time.perf_counter()

    def steps(self):
        """The steps still to do. They end early after a signal (SIGTERM, Ctrl-C ...), once the loop
        has saved; then the exit code, 128 + signal, tells a scheduler that the run is not finished.
        Raises ValueError at the end of a run of which nothing is to be kept."""
        for self.now in range(self.start, self.stop):
            yield self.now
            if self.stopping:
                break
        if self.question:  # of which nobody needs the answer
            self.question[0].wait()
        self.finish_saving()
        self.bar.close()
        for number in SIGNALS:
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if self.stopping:
            if self.dist.is_main:
                how = "in a skipped step, so not saved" if self.due else "after saving"
                say(f"stopped by a signal {how}: the same command, without --fresh, goes on")
            sys.exit(128 + (self.signal or signal.SIGTERM))
        if self.due:
            raise ValueError("the last step was skipped, without a finite gradient, so it was not "
                             "saved: with more steps the same command goes on from before")
        if 2 * self.skipped > self.stop:
            raise ValueError(f"{self.skipped} of {self.stop} steps were skipped, without a finite "
                             "gradient: no result, start again with --fresh and a lower --lr")

    def micro_batches(self, whole=False):
        """This process's micro batches of one step; the time that each is waited for is counted.
        After a signal a step of several ends early, undone, unless it must be `whole`."""
        sums, count = dict(self.sums), self.count
        for micro in range(self.plan.accumulation):
            if micro and not whole and self._agreed()[0]:
                self.cut, self.sums, self.count = True, sums, count
                break
            before = time.perf_counter()
            batch = next(self.loader)
            self.waited += time.perf_counter() - before
            yield batch

    def _agreed(self):
        """(whether a process got a signal, or has lost the torchrun that started it, whether the
        main one last saved ten minutes ago). Of several processes it is the answer to the question
        before this one, which has come long since: no process waits here for a slower one."""
        if "TORCHELASTIC_RUN_ID" in os.environ and os.getppid() != self.parent:
            self.signal = self.signal or signal.SIGTERM
        late = self.dist.is_main and time.perf_counter() - self.saved >= SAVE_SECONDS
        mine = torch.tensor([self.signal is not None, late]).int()
        if self.dist.world == 1:
            return mine.tolist()
        before, self.question = self.question, (
            torch.distributed.all_reduce(mine, async_op=True), mine)
        if before is None:
            return [0, 0]
        before[0].wait()
        return before[1].tolist()

    def record(self, **values):
        """Adds scalars to the averages of the next log line, without waiting for the device."""
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0) + value.detach().float()
        self.count += 1

    def may_step(self, optimizer, grad_norm):
        """Whether the optimiser may step; a gradient that is not finite is counted, and changes no
        weight and no moment. Fused AdamW finds that out on the device, by the attribute that
        torch's GradScaler sets, so that nothing waits: for it the answer is True. All processes
        have the same averaged gradient."""
        if self.cut:
            return False
        bad = ~grad_norm.isfinite()
        self.flags.append(bad)
        if optimizer.defaults.get("fused") and self.dist.device.type != "mps":
            optimizer.found_inf = bad.float()
            return True
        return not bad

    def _count_bad(self):
        """Reads what `may_step` found since the last time. Raises ValueError after ten bad steps in
        a row, or a hundred in a thousand."""
        flags = torch.stack(self.flags).tolist() if self.flags else []
        for step, bad in enumerate(flags, self.now + (not self.cut) - len(flags)):
            self.failures, self.skipped = bad * (self.failures + 1), self.skipped + bad
            self.bad_steps = [other for other in self.bad_steps if other > step - 1000]
            self.bad_steps += [step] * bad
            if self.failures == 10 or len(self.bad_steps) == 100:
                raise ValueError("no finite gradient in ten steps, or in a hundred of the last "
                                 "1000: start again with --fresh, a lower --lr, and a checkpoint "
                                 "as --init")
        self.flags = []

    def log(self, step, lr, grad_norm):
        """Counts a finished step, and writes a line every --log_every steps. True when it is time
        to save: every --save_every steps, or at an epoch's end ten minutes after the last time; at
        the end, and after a signal to any process; never while steps are skipped."""
        stopping, late = self._agreed()
        self.stopping, plan = self.cut or bool(stopping), self.plan
        if self.saving and self.saving.done():  # raises what went wrong
            self.finish_saving()
        every = self.config.save_every
        self.due |= step % every == 0 if every else step % plan.steps_per_epoch == 0 and bool(late)
        self.due |= step == self.stop or self.stopping
        if self.due or step % self.config.log_every == 0:
            self._count_bad()
        if not self.cut:
            with contextlib.suppress(OSError, ValueError):  # a bar on a closed terminal
                self.bar.update(1)
            if step % self.config.log_every == 0 or step == self.stop:
                self._write_line(step, lr, grad_norm)
        if not self.due or self.failures:
            return False
        self.due, self.totals, self.saved = False, {}, time.perf_counter()
        if self.sums:  # all processes', as only the main one saves
            totals = self.dist.all_reduce(torch.stack(list(self.sums.values())).cpu())
            self.totals = dict(zip(self.sums, totals))
        return True

    def _write_line(self, step, lr, grad_norm):
        sums = self.dist.all_reduce(torch.stack(list(self.sums.values())))
        means, now = (sums / self.count / self.dist.world).tolist(), time.perf_counter()
        passed = max(now - self.clock, 1e-6)  # a clock may jump
        seconds = passed / (step - self.logged)  # per step
        line = dict(step=step, epoch=round(step / self.plan.steps_per_epoch, 4),
                    **dict(zip(self.sums, means)), lr=lr, grad_norm=float(grad_norm),
                    images_per_s=round(self.plan.batch_size / seconds, 1),
                    data_wait=round(self.waited / passed, 3),  # share of the time
                    eta_s=round((self.plan.total_steps - step) * seconds), skipped=self.skipped,
                    replaced=self.samples.replaced())
        if self.dist.device.type == "cuda":
            line["memory_gb"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
        wait, rate = line["data_wait"], line["images_per_s"]
        if wait > 0.1 and self.logged > self.start and self.dist.is_main and not self.told:
            self.told = True
            say(f"waiting  for images {wait:.0%} of the time: {rate:.0f} come in a second, and the "
                f"steps could take {rate / (1 - min(wait, 0.99)):.0f}. What helps is more cores "
                "(--workers) or smaller files (eval.shrink); eval.speed --data measures it")
        self.waited, self.clock, self.logged = 0.0, now, step
        self.check_images()
        if step % self.config.log_every == 0:  # not at a --max_steps in between
            self.sums, self.count = {}, 0
        if self.dist.is_main:
            finite = {name: value if math.isfinite(value) else None for name, value in line.items()}
            words = "  ".join(f"{name} {value:.4g}" for name, value in list(line.items())[1:])
            say(f"step {step}/{self.plan.total_steps}  {words}")
            self.write(finite)  # JSON knows no NaN

    def check_images(self):
        """Raises ValueError where too many images cannot be read."""
        bad, share = self.samples.replaced(), self.config.max_bad
        if bad > (share * self.num_images if share >= 0 else max(10, 0.001 * self.num_images)):
            raise ValueError(f"{bad} of {self.num_images} images cannot be read: mend them, or "
                             "accept so many with --max_bad")

    def write(self, line):
        """Appends a line to the log; one that cannot be written now is written with the next."""
        self.unwritten += json.dumps(line) + "\n"
        try:
            with open(self.folder / "log.jsonl", "a") as file:
                file.write(self.unwritten)
            self.unwritten = ""
        except OSError as error:
            say(f"warning: {self.folder}/log.jsonl: {error.strerror}; the line is written with the "
                "next one", sys.stderr)

    def save(self, model, optimizer, step, export=None, **more):
        """Writes last.pt, all that resuming needs, and encoder.safetensors, all that others need:
        `export`, a ViT, None where it is frozen and has a file of its own. `more` is plain data or
        tensors, found in `state` on resuming. All is copied at once; a thread writes it beside the
        next steps, and what goes wrong there is raised by `log` or at the end. Call it in the main
        process only. Raises ValueError instead of saving what is not finite."""
        step -= self.cut  # which was not done
        moments = [value for entry in optimizer.state.values() for value in entry.values()
                   if isinstance(value, torch.Tensor)]
        if not all_finite([*model.state_dict().values(), *moments]):
            raise ValueError(f"weights or moments are not finite after step {step}, which is not "
                             "saved: start again with --fresh and a lower --lr")
        self.finish_saving()
        if export is not None:
            more["encoder"] = export.config  # the number of heads is in no weight
        state = dict(kind=self.kind, method=self.method, version=VERSION, config=vars(self.config),
                     step=step, total_steps=self.plan.total_steps, num_images=self.num_images,
                     fingerprint=self.fingerprint, skipped=self.skipped, bad_steps=self.bad_steps,
                     sums=self.totals, count=self.count, exif=EXIF, model=model.state_dict(),
                     optimizer=optimizer.state_dict(), **more)
        state, tensors = on_host(state), on_host(export.state_dict()) if export is not None else {}
        if self.dist.device.type == "cuda":
            torch.cuda.synchronize()

        def write():
            # The encoder first: after a kill in between a resumed run makes both again.
            if tensors:
                write_encoder(tensors, state["encoder"], self.folder / "encoder.safetensors",
                              method=self.method, step=step)
            write_atomically(self.checkpoint, lambda path: torch.save(state, path), "previous.pt")

        self.saving = self.writer.submit(write)

    def finish_saving(self):
        """Waits for the thread that writes. Raises OSError where it could not."""
        if self.saving:
            saving, self.saving = self.saving, None
            saving.result()

    def draw(self, preview):
        """`preview(path)` draws preview.png; whatever happens there is no reason to end a run."""
        try:
            with torch.compiler.set_stance("force_eager"):  # no programs for a few images
                preview(self.folder / "preview.png")
        except Exception as error:
            say(f"warning: no preview.png ({type(error).__name__}: {error})", sys.stderr)


def check_optimizer(state, optimizer, what):
    """Raises ValueError unless a state's moments have the shapes of the parameters: fused AdamW
    would crash, or, without any, silently start anew."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    try:
        entries = state["optimizer"]["state"]
        moments = [(parameters[index], value) for index, entry in entries.items()
                   for value in entry.values() if isinstance(value, torch.Tensor)]
        fits = [len(group["params"]) for group in state["optimizer"]["param_groups"]] == [
            len(group["params"]) for group in optimizer.param_groups] \
            and all(not value.ndim or value.shape == p.shape for p, value in moments) \
            and len({frozenset(entry) for entry in entries.values()}) <= 1 \
            and (entries or state["step"] == state["skipped"])
    except (KeyError, TypeError, IndexError, AttributeError):
        fits = False
    if not fits or not all_finite([value for _, value in moments]):
        raise ValueError(f"{what} has an optimiser that does not fit this model, or is not finite")


def json_or_none(path):
    """The dict in a JSON file, or None."""
    with contextlib.suppress(OSError, ValueError):
        content = json.loads(Path(path).read_bytes())
        return content if isinstance(content, dict) else None


def read_log(folder):
    """The lines of a run's log as ([dict ...], [bytes that are no such line ...]); a last line that
    was cut off is left out."""
    lines, broken, log = [], [], Path(folder) / "log.jsonl"
    for raw in log.read_bytes().splitlines(True) if log.is_file() else []:
        try:
            line = json.loads(raw)
            lines.append(line if isinstance(line["step"], int) and raw.endswith(b"\n") else 1 / 0)
        except (ValueError, TypeError, KeyError, ZeroDivisionError):
            broken += [raw] * raw.endswith(b"\n")
    return lines, broken


def leave_group(worker_id):
    """For a loader's worker: torchrun and a terminal send signals to the whole process group. The
    training process is to stop in order, and would find its workers dead."""
    if hasattr(os, "setpgrp"):
        os.setpgrp()


def num_workers(config):
    """--workers, or this process's share of the cores, at most 24; the scenes need none."""
    if config.workers >= 0:
        return config.workers
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    share = cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return 0 if config.data == "scenes" else min(share, 24)


# ---- 9  pictures ---------------------------------------------------------------------------------
def save_panels(path, rows, captions, note="", side=168):
    """Writes rows of (3, H, W) images in 0..1 as one PNG: captions on top, a note below. Enlarged
    without smoothing, so that patches keep their edges and small images stay honest."""
    panels = [F.interpolate(image[None].float(), (side, side))[0] for row in rows for image in row]
    grid = make_grid(torch.stack(panels).clamp(0, 1).cpu(), len(captions), padding=6, pad_value=1)
    sheet = TF.to_pil_image(TF.pad(grid, [0, 16, 0, 20], fill=1))
    draw = ImageDraw.Draw(sheet)
    for column, caption in enumerate(captions):
        draw.text((6 + column * (side + 6), 5), caption, fill="black")
    draw.text((6, sheet.height - 18), note, fill="black")
    write_atomically(path, lambda temporary: sheet.save(temporary, format="PNG"))


def check_picture(path):
    """Raises ValueError unless `path` is a new file that ends in .png, or a picture already."""
    path = Path(path)
    if path.suffix != ".png" or path.exists() and path.read_bytes()[:4] != b"\x89PNG":
        raise ValueError(f"{path} should be a new file that ends in .png: nothing else is replaced")


def colour_map(values):
    """(H, W) values in 0..1 to (3, H, W): dark violet, teal, green, yellow, rising in lightness."""
    anchors = torch.tensor([[0.19, 0.07, 0.33], [0.13, 0.45, 0.56], [0.37, 0.76, 0.38],
                            [0.99, 0.91, 0.14]], device=values.device)
    place = values.clamp(0, 1) * 3
    low = place.long().clamp(max=2)
    share = (place - low)[..., None]
    return rearrange(anchors[low] * (1 - share) + anchors[low + 1] * share, "h w c -> c h w")


# ---- 10  command line ----------------------------------------------------------------------------
def flag(default, help, positive=False):
    """A dataclass field that is also a command-line flag; the help names a default's source.
    Numbers are at least 0, or above it where they must be `positive`."""
    return dataclasses.field(default=default, metadata=dict(help=help, positive=positive))


@dataclasses.dataclass(frozen=True)
class MachineConfig:
    """The flags of every script. Raises ValueError for a number that is out of its range."""

    seed: int = flag(0, "of everything that is drawn")
    workers: int = flag(-1, "loader processes (default: this process's share of cores, at most 24)")
    precision: typing.Literal["auto", "bf16", "fp32"] = flag("auto", "auto: bf16 on GPU, else fp32")
    device: typing.Literal["auto", "cuda", "mps", "cpu"] = flag("auto", "where to compute")

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value, positive = getattr(self, field.name), field.metadata["positive"]
            if isinstance(value, (int, float)) and value != field.default \
                    and not (0 <= value < 2**63 and (value or not positive)):
                raise ValueError(f"--{field.name} {value:g} must be finite and at least 0"
                                 f"{', and not 0' * positive}")


@dataclasses.dataclass(frozen=True)
class TrainConfig(MachineConfig):
    """The flags of every script that trains."""

    out: str = flag("", "folder of the run (default: see above)")
    micro_batch: int = flag(0, "images computed at once (default: a process's share, at most 256)")
    compile: typing.Literal["auto", "on", "off"] = flag("auto", "torch.compile; auto: on a GPU")
    save_every: int = flag(0, "steps between checkpoints (default: at the end of an epoch, if ten "
                              "minutes have passed since the last one)")
    max_steps: int = flag(0, "stop at this step, counted from 0; the schedule stays as it is")
    log_every: int = flag(20, "steps between log lines", positive=True)
    max_bad: float = flag(-1.0, "share of images that may be unreadable (default: 0.001, or ten)")
    data_changed: bool = flag(False, "go on although the images are not those of the start")
    fresh: bool = flag(False, "start a new numbered folder instead of going on with the run")


@dataclasses.dataclass(frozen=True)
class RunConfig(TrainConfig):
    """The flags of every pre-training script that are no part of a recipe. A method's Config adds
    epochs, warmup_epochs, batch_size, lr, img_size, patch_size and `num_masked`."""

    model: str = flag("vit_b", "size of the encoder")
    data: str = flag("", "a folder, a .tar or a folder of them, `cifar10` or `scenes` (default: "
                         "$IMAGENET or data/imagenet)")
    init: str = flag("", "start from a last.pt or encoder.safetensors, or a run's folder")
    demo: bool = flag(False, "a small run on the built-in images, about two minutes on a laptop")
    dry_run: bool = flag(False, "print the recipe and its cost; needs neither data nor weights")
    preview: str = flag("", "draw what the model sees and predicts to this PNG, then exit")

    def __post_init__(self):
        super().__post_init__()
        if self.warmup_epochs >= self.epochs:
            raise ValueError(f"--warmup_epochs {self.warmup_epochs:g} must be shorter than the run "
                             f"of {self.epochs} epochs (fractions such as 0.5 are fine)")
        if self.img_size % self.patch_size:
            raise ValueError(f"--img_size {self.img_size} is not a multiple of --patch_size "
                             f"{self.patch_size}")

    @property
    def num_patches(self):
        return (self.img_size // self.patch_size) ** 2

    @property
    def run_name(self):  # how the default --out ends
        return "demo" if self.demo else self.model

    @property
    def peak_lr(self):  # the base rate is for 256 images
        return self.lr * self.batch_size / 256

    @property
    def facts(self):
        """Lines of the printed recipe, {label: text}."""
        lr = f"{self.peak_lr:.2e} at the peak (--lr {self.lr:.2e}, batch {self.batch_size})"
        return dict(model=self.model, lr=lr,
                    hidden=f"{self.num_masked} of {self.num_patches} patches")


def parse_config(Config, description, sizes=None, demo=None, argv=None, depends=None):
    """The command line as a frozen `Config`; its fields are the flags, `-` and `_` spell the same.

    Order: default < `depends` < `demo` values (with --demo) < what was typed; `sizes` are the
    choices of --model. `depends` holds defaults that follow another flag, as in
    {"mask_ratio": ("model", {"vit_ti": 0.15})}. Raises ValueError for what is no such flag.
    """
    def refuse(message):
        raise ValueError(f"{message} (--help lists the flags)")

    parser = argparse.ArgumentParser(
        description=description, allow_abbrev=False, argument_default=argparse.SUPPRESS,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = refuse
    types = typing.get_type_hints(Config)
    for field in dataclasses.fields(Config):
        kind, text = types[field.name], field.metadata["help"].replace("%", "%%")
        names = dict.fromkeys([f"--{field.name}", f"--{field.name.replace('_', '-')}"])
        choices = list(sizes) if sizes and field.name == "model" else typing.get_args(kind)
        if field.default not in ("", -1, 0):
            text += f" (default: {field.default})"
        options = dict(action="store_true") if kind is bool else dict(choices=choices) if choices \
            else dict(type=kind, metavar=kind.__name__.upper())
        parser.add_argument(*names, dest=field.name, help=text, **options)
    typed = vars(parser.parse_args(argv))
    values = typed if "demo" not in typed else {**demo, **typed}
    for name, (other, defaults) in (depends or {}).items():
        chosen = values.get(other, getattr(Config, other))
        if chosen in defaults:
            values.setdefault(name, defaults[chosen])
    return Config(**values)


def describe(facts, config, model, plan, dist, data, folder):
    """Prints the resolved recipe, its numbers as equations; `facts` are lines {label: text}."""
    total, encoder = (sum(p.numel() for p in part.parameters()) for part in (model, model.encoder))
    lines = dict(
        facts, model=f"{facts['model']}: {total:,} parameters, {encoder:,} of them in the encoder",
        data=data, batch=f"{plan.batch_size} = {dist.world} processes x {plan.accumulation} micro "
                         f"batches x {plan.micro_batch} images",
        steps=f"{plan.total_steps:,} = {plan.total_steps / plan.steps_per_epoch:g} epochs x "
              f"{plan.steps_per_epoch:,}",
        device=f"{dist.device}, {'bf16' if uses_bf16(dist.device, config.precision) else 'fp32'}",
        files=f"{folder}/: config.json, log.jsonl, last.pt, encoder.safetensors, pictures",
        recipe=json.dumps(vars(config)))
    if dist.is_main:
        say("\n".join(f"{label:8} {text}" for label, text in lines.items()))


def count_flops(run):
    """Floating-point operations of `run()`, by torch's counter; works on the meta device too."""
    from torch.utils.flop_counter import FlopCounterMode
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def dry_run(config, folder, model, inputs, *frozen):
    """Prints recipe and cost without data, weights or a GPU: `model` and the `inputs` of one image
    are on torch's meta device, and so is what the functions `frozen` run beside it."""
    dist = Dist(0, int(os.environ.get("WORLD_SIZE", 1)), torch.device("cpu"))
    plan = make_plan(1_281_167, config.batch_size, config.micro_batch, config.epochs, dist.world)
    data, kept = "1,281,167 images assumed (ImageNet-1K)", {}
    describe(config.facts, config, model, plan, dist, data, folder)

    def keep(tensor):
        kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        flops = count_flops(lambda: model(*inputs)[0].backward())
    teacher = sum(count_flops(run) for run in frozen)
    weights = {p.untyped_storage()._cdata: p.numel() for p in model.parameters()}
    # fp32 weight, gradient, two moments; under bf16 about half of what fp32 keeps for backward.
    memory = 16 * sum(weights.values()) + plan.micro_batch / 2 * sum(
        storage.nbytes() for key, storage in kept.items() if key not in weights)
    total = (flops + teacher) * plan.batch_size * plan.total_steps
    each = ", ".join(f"{gpu} {total / dist.world / 0.4 / 3600 / peak:.1f}"
                     for gpu, peak in PEAK_FLOPS.items())
    # last.pt: a weight, and two moments of those that are trained, in fp32.
    state = sum(p.numel() * (12 if p.requires_grad else 4) for p in model.parameters())
    encoder = sum(4 * p.numel() for p in model.encoder.parameters())
    print(f"cost     {(flops + teacher) / 1e9:.1f} GFLOP per image and step"
          f"{f', {teacher / 1e9:.1f} of them in the teacher' if frozen else ''}; "
          f"{total / 1e18:.1f} EFLOP in all\n"
          f"disk     last.pt and previous.pt {state / 2**30:.2f} GiB each, encoder.safetensors "
          f"{encoder / 2**30:.2f} GiB\n"
          f"memory   roughly {memory / 2**30:.1f} GiB per process in bf16\n"
          f"hours    {each}: an estimate, {dist.world} such GPUs at 40 % of their dense bf16 peak")


def main(method, config, example, train):
    """What `python METHOD.py` does: the dry run, a picture, or a run, new or continued."""
    out = config.out or f"runs/{method}_{config.run_name}"
    if config.preview:
        check_picture(config.preview)
    if config.dry_run:
        return dry_run(config, out, *example(config))
    run = Run(method, config, out)
    made = f"{run.folder}/ holds preview.png, log.jsonl, encoder.safetensors, last.pt"
    weights = run.checkpoint if run.state else config.init or "untrained weights"
    if run.finished and not config.preview:
        return say(f"finished at step {run.start}: {made}; --fresh starts anew")
    with distributed(config.device) as dist:
        train(config, run, dist)
        if dist.is_main:
            say(f"drew {config.preview} from {weights}" if config.preview else f"done: {made}")


def run_main(main):
    """Runs a script's `main`; what the user can mend becomes one sentence and exit code 1.
    The main process says it; the others wait a little and print only if it is still alive."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    try:
        return main()
    except (ValueError, OSError) as error:  # a loader's worker puts a traceback above its sentence
        message = (str(error).strip() or repr(error)).splitlines()[-1].removeprefix("ValueError: ")
        if getattr(error, "strerror", None):
            message = f"{error.strerror}: {error.filename or 'a file of this run'}"
    except KeyboardInterrupt:
        message = "interrupted"
    except (RuntimeError, MemoryError) as error:
        if re.search("DataLoader worker .*(killed|exited)", str(error)):
            message = ("a loader's worker was killed, perhaps for its memory: the same command "
                       "with fewer --workers goes on from the last checkpoint")
        elif re.search("MemoryError|out of memory|allocate memory|enough memory", repr(error)):
            message = ("out of memory: the same command with half the --micro_batch goes on from "
                       "the last checkpoint, with the same batch; without training: --batch_size")
        else:
            raise
    time.sleep(3 * (rank > 0))
    say(f"error: {message}" + (f" [process {rank}]" if rank else ""), sys.stderr)
    # Of several processes one that fails must end at once: to clean up is to wait for the others.
    os._exit(1) if world > 1 else sys.exit(1)
