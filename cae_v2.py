"""CAE v2: Context Autoencoder with CLIP Target (later title: with CLIP Latent Alignment).

Zhang et al., arXiv 2211.09799 (2022), TMLR 2023. Official code: Atten4Vis/CAE, project/CAEv2.

The idea in one sentence: a ViT that sees some patches of an image must give, for the patches it
sees and for those it does not, the features that a frozen CLIP tower gives for the whole image.

  image ---------------------------- CLIP tower (frozen) ---- targets (B, 1+N, C) -----+
    |                                                                                  |
    +- visible patches -- ViT encoder -- z (B, 1+V, R) -------------+                  |
                              |                                     +- LN, linear -- cosine
          mask token x M -- regressor: queries m look at [z, m] ----+  (B, 1+N, C)

Dimension key: B batch, N patches, V visible, M masked (V + M = N), D encoder width, R regressor
width, C teacher width, P patch side, H heads, d width of a head, T supervised tokens.

What differs from MAE (marked Δ): the target is CLIP's features, not pixels; visible patches and
the class token are supervised too; masked tokens come from a cross-attention regressor, not from a
self-attention decoder; masks are blocks; small models hide little (ViT-Ti 15 %, S 25 %, B 50 %).

Sources: [code] the authors' code, [readme] their README, [abs] the abstract, [T] a third party.
Where they are silent, we decided:
  [D1] ViT-L has no released script. Regressor of 4 blocks x 1024 with 16 heads (the released code
       would build 12 heads of width 85); batch, schedule and augmentation as for ViT-B; mask 50 %
       and lr 1.5e-3 as in PanDerm's ViT-L on CAE v2 [T].
  [D2] ViT-L's teacher is CLIP ViT-B/16, the only one in the released code; ViT-L/14 takes a flag.
  [D3] bf16 autocast without loss scaler instead of fp16 with one; in bf16 runs the teacher's
       weights are cast to bf16 once (authors: fp16).
  [D4] Augmentation on uint8 tensors instead of PIL images: the same operations in the same order,
       equal up to rounding.
  [D5] The ablation of supervision positions is not released: `visible` is the mean over class token
       and visible patches, `masked` over masked patches.
  [D6] Every draw is a function of (seed, epoch, image) or (seed, step); authors: seed 0 + rank.
  [D7] A teacher that averages patches (the demo's) has no class token: its pooled vector stands in.
  [D8] A step whose gradient is not finite is skipped and counted, as the authors' loss scaler did.

Commands (the same command again resumes):
  python cae_v2.py --demo                                  built-in images and teacher, on a laptop
  python cae_v2.py --model vit_s --data ~/photos           one GPU, any folder of images
  torchrun --nproc_per_node=8 cae_v2.py --model vit_l      the paper's run: ImageNet-1K, 300 epochs
To use the method elsewhere copy this file and common.py (and demo/ for `scenes` and `demo`).
"""

import json
import logging
import math
import os
import random
import threading
import typing
import urllib.error
import urllib.request
import zipfile
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn
from torchvision.transforms import RandomResizedCrop, v2
from torchvision.transforms.v2 import functional as TF

import common
from common import flag

# --------------------------------------------------------------------------------------------------
# Config

# 12 heads for ViT-Ti and ViT-S too, where timm has 3 and 6 [code].
SIZES = {
    "vit_ti": dict(embed_dim=192, depth=12, num_heads=12, regressor_dim=96, regressor_depth=1,
                   regressor_heads=12, init_values=0.1, mask_ratio=30 / 196),  # [code]
    "vit_s": dict(embed_dim=384, depth=12, num_heads=12, regressor_dim=384, regressor_depth=1,
                  regressor_heads=12, init_values=0.1, mask_ratio=49 / 196),  # [code]
    "vit_b": dict(embed_dim=768, depth=12, num_heads=12, regressor_dim=768, regressor_depth=4,
                  regressor_heads=12, init_values=0.1, mask_ratio=98 / 196),  # [code]
    "vit_l": dict(embed_dim=1024, depth=24, num_heads=16, regressor_dim=1024, regressor_depth=4,
                  regressor_heads=16, init_values=1e-5, mask_ratio=98 / 196),  # [D1] [readme]
    # Not of the paper: for 32-pixel images with patches of 4.
    "vit_demo": dict(embed_dim=128, depth=4, num_heads=4, regressor_dim=128, regressor_depth=1,
                     regressor_heads=4, init_values=0.1, mask_ratio=0.5),
}

DEMO = dict(model="vit_demo", data="scenes", teacher="demo", img_size=32, patch_size=4, epochs=2,
            batch_size=64, lr=3e-3, warmup_epochs=0.1, drop_path=0.0, crop_min=0.8, workers=0,
            log_every=25)


@dataclass(frozen=True)
class Config(common.RunConfig):
    """The whole command line; flags that change no number come from common.RunConfig."""

    epochs: int = flag(300, "passes over the data [code]")
    batch_size: int = flag(2048, "images per step over all processes, 8 x 256 [code]")
    lr: float = flag(1.5e-3, "peak learning rate; absolute, belongs to batch 2048 [code]")
    min_lr: float = flag(1e-5, "learning rate at the end of the cosine [code]")
    warmup_epochs: float = flag(10, "epochs of linear warm-up from 0 [code]")
    weight_decay: float = flag(0.05, "AdamW, constant; betas are torch's 0.9, 0.999 [code]")
    clip_grad: float = flag(3.0, "largest global L2 norm of the gradient [code]")
    drop_path: float = flag(0.1, "stochastic depth of the last block, rising linearly to it [code]")
    teacher: str = flag("ViT-B-16-quickgelu:openai", "NAME:TAG, NAME:FILE or `demo` [code] [D2]")
    supervise: typing.Literal["both", "visible", "masked"] = flag("both", "tokens [code] [D5]")
    mask: typing.Literal["block", "random"] = flag("block", "how hidden patches are chosen [code]")
    mask_ratio: float = flag(0.0, "share of hidden patches, rounded to a count (default by size)")
    img_size: int = flag(224, "pixels of the crop's side [code]")
    patch_size: int = flag(16, "pixels of a patch's side [code]")
    crop_min: float = flag(0.4, "smallest area of a random crop, as a share of the image [code]")
    color_jitter: float = flag(0.4, "brightness, contrast, saturation; always applied [code]")
    embed_dim: int = flag(0, "encoder width (default by size, like the following ones)")
    depth: int = flag(0, "encoder blocks")
    num_heads: int = flag(0, "encoder heads")
    regressor_dim: int = flag(0, "regressor width")
    regressor_depth: int = flag(0, "regressor blocks")
    regressor_heads: int = flag(0, "regressor heads")
    init_values: float = flag(0.0, "the encoder's layer scale at the start; 0 means none")

    def __post_init__(self):
        super().__post_init__()
        common.check_range(self, 1, "epochs", "batch_size", "img_size", "patch_size", "embed_dim",
                           "depth", "num_heads", "regressor_dim", "regressor_depth",
                           "regressor_heads")
        common.check_range(self, None, "lr", "clip_grad", "crop_min")
        common.check_range(self, 0, "min_lr", "warmup_epochs", "weight_decay", "drop_path",
                           "mask_ratio", "color_jitter", "init_values")
        if self.img_size % self.patch_size:
            raise ValueError(f"--img_size {self.img_size} is not a multiple of --patch_size "
                             f"{self.patch_size}")
        if self.num_masked >= self.grid**2:
            raise ValueError(f"--mask_ratio {self.mask_ratio:g} leaves no patch visible: give less")
        if self.supervise == "masked" and self.num_masked == 0:
            raise ValueError("--supervise masked needs hidden patches: give a larger --mask_ratio")
        if self.warmup_epochs >= self.epochs:
            raise ValueError(f"--warmup_epochs {self.warmup_epochs:g} must be shorter than the run "
                             f"of {self.epochs} epochs (fractions such as 0.5 are fine)")
        if self.crop_min > 1 or self.drop_path >= 1:
            raise ValueError("--crop_min is at most 1 and --drop_path below 1")

    @property
    def grid(self):
        return self.img_size // self.patch_size

    @property
    def num_masked(self):
        return round(self.mask_ratio * self.grid**2)


# --------------------------------------------------------------------------------------------------
# Corrupt: which patches are hidden, and the crop that student and teacher share


def block_mask(grid, num_masked, rng):
    """One mask of rectangles with exactly `num_masked` hidden cells, as rows of 0 and 1. Δ

    BEiT's rule as the authors run it [code]: rectangles of random area and aspect are tried until
    the count is met. `rng` is a `random.Random`, so that each draw can be compared with theirs.
    """
    rows, columns = common.pair(grid)
    common.check_num_masked(num_masked, rows * columns)
    if num_masked and min(rows, columns) < 2:
        raise ValueError(f"block masks need at least 2 x 2 patches, not {rows} x {columns}")
    mask, left, tries = [[0] * columns for _ in range(rows)], num_masked, 0
    while left:
        # At least 16 cells are aimed at [code]; with fewer left, `uniform` runs from 16 down. On a
        # few small grids nothing of that size fits: after 1000 failures in a row, aim lower.
        area, tries = rng.uniform(16 if tries < 1000 else 1, left), tries + 1
        aspect = math.exp(rng.uniform(math.log(0.3), math.log(1 / 0.3)))
        height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if not (0 < height < rows and 0 < width < columns):
            continue
        top, start = rng.randint(0, rows - height), rng.randint(0, columns - width)
        block = mask[top: top + height]
        new = height * width - sum(sum(row[start: start + width]) for row in block)
        if 0 < new <= left:
            for row in block:
                row[start: start + width] = [1] * width
            left, tries = left - new, 0
    return mask


def block_masks(batch, grid, num_masked, generator=None):
    """(batch, N) bool, True = hidden, exactly `num_masked` per row, in blocks (see `block_mask`).

    Each mask draws from a `random.Random` that the torch `generator` seeds.
    Raises ValueError for a count outside 0..N-1.
    """
    seeds = torch.randint(2**62, (batch,), generator=generator).tolist()
    masks = [block_mask(grid, num_masked, random.Random(seed)) for seed in seeds]
    return torch.tensor(masks, dtype=torch.bool).flatten(1)  # (B, N)


class Augment:
    """Makes a training sample in a worker: student image, teacher image if its size differs, mask.

    Colour jitter and flip come before the crop, so the teacher sees them too [code]; both images
    are one crop, resized to each size. Images are uint8 (3, S, S) [D4], the mask is (N,) bool.
    """

    def __init__(self, config, teacher_size):
        self.config = config
        self.sizes = list(dict.fromkeys([config.img_size, teacher_size]))
        self.jitter = v2.ColorJitter(*[config.color_jitter] * 3)

    def __call__(self, image, label):  # labels have no use here
        config = self.config
        image = self.jitter(image)
        if torch.rand(()) < 0.5:
            image = TF.horizontal_flip(image)
        box = RandomResizedCrop.get_params(image, (config.crop_min, 1.0), ratio=(3 / 4, 4 / 3))
        crops = [TF.resized_crop(image, *box, [size, size], TF.InterpolationMode.BICUBIC)
                 for size in self.sizes]
        if config.mask == "block":
            mask = block_masks(1, config.grid, config.num_masked)
        else:
            mask = common.random_masks(1, config.grid**2, config.num_masked)
        return *crops, mask[0]


# --------------------------------------------------------------------------------------------------
# Target: the tokens of a frozen CLIP image tower


@torch.no_grad()
def clip_targets(visual, images):
    """Images (B, 3, S, S), normalised for the tower, to its tokens (B, 1+N, C) in float32. Δ

    ln_post and the projection are applied to all tokens, class token first, then patches in raster
    order [code]; open_clip itself projects the pooled one only [D7]. Nothing is normalised here.
    """
    visual.output_tokens = True  # open_clip's switch for the patches beside the pooled token
    pooled, patches = visual(images.to(visual.conv1.weight.dtype))
    return torch.cat([pooled[:, None], patches @ visual.proj], dim=1).float()  # (B, 1+N, C)


def load_teacher(spec, img_size):
    """The image tower of an open_clip model, frozen, in eval mode, for images of `img_size` pixels.

    `spec` is NAME:TAG (published weights, from the cache or the network), NAME:FILE (open_clip's
    .safetensors, .bin, .pt, or OpenAI's own .pt archive), or `demo`.
    Raises ValueError or FileNotFoundError that says what to do.
    """
    name, source, config = teacher_config(spec)
    mean_std = {}
    if spec != "demo" and not is_path(source):
        source, mean_std = published_weights(name, source, config)
    path = weights_file(Path(source).expanduser())
    state = tower_weights(path, quick_gelu=bool(config.get("quick_gelu")))
    visual = image_tower(name)
    try:
        visual.load_state_dict(state)
    except RuntimeError as error:
        message = f"{path} does not hold the weights of {name}: {common.reason(error)}"
        raise ValueError(message) from error
    size, patch = common.pair(img_size), common.pair(visual.patch_size)
    if any(side % step for side, step in zip(size, patch)):
        raise ValueError(f"the teacher {name} has patches of {patch[0]} pixels, which do not tile "
                         f"{size[0]} x {size[1]}")
    grid = tuple(side // step for side, step in zip(size, patch))
    table = resize_positions(visual.positional_embedding.data, grid)
    visual.positional_embedding = nn.Parameter(table)
    visual.image_size, visual.grid_size = size, grid
    visual.preprocess_cfg = {**visual.preprocess_cfg, **mean_std, "size": size}
    return visual.eval().requires_grad_(False)


def image_tower(name, device="cpu"):
    """The image tower of an open_clip model, with random weights."""
    import open_clip  # here, not above: no other method needs it
    logging.disable(logging.WARNING)  # it warns that no weights are loaded; they come next
    try:
        return open_clip.create_model(name, pretrained=None, device=device).visual
    finally:
        logging.disable(logging.NOTSET)


def resize_positions(table, grid):
    """A position table (1+n, C) of a square grid for another one, (1+N, C): bilinear [code]."""
    side = math.isqrt(len(table) - 1)
    if (side, side) == tuple(grid):
        return table
    cells = rearrange(table[1:], "(h w) c -> 1 c h w", h=side)
    cells = F.interpolate(cells, size=grid, mode="bilinear", align_corners=False)
    return torch.cat([table[:1], rearrange(cells, "1 c h w -> (h w) c")])  # (1+N, C)


def teacher_config(spec):
    """open_clip's name, the tag or path, and the model's configuration of a `--teacher` value."""
    import open_clip
    demo = Path(__file__).parent / "demo"
    if spec == "demo":
        spec = f"tiny_clip:{demo / 'tiny_clip.safetensors'}"
    name, _, source = spec.partition(":")
    if name == "tiny_clip":
        if not (demo / "tiny_clip.json").exists():
            raise FileNotFoundError("--teacher demo needs the folder demo/ beside cae_v2.py: copy "
                                    "it along, or name a CLIP model")
        open_clip.add_model_config(demo / "tiny_clip.json")
    if not source:
        raise ValueError(f"--teacher {spec} should read NAME:TAG or NAME:FILE, such as "
                         "ViT-B-16-quickgelu:openai, or `demo`")
    config = open_clip.get_model_config(name)
    if config is None:
        raise ValueError(f"open_clip knows no model {name}: python -c \"import open_clip; "
                         "print(open_clip.list_models())\" lists the names")
    vision = config["vision_cfg"]
    # CLIPA and CoCa pool before their last norm, so that their patch tokens never pass it.
    if not vision.get("patch_size") or {"final_ln_after_pool", "attentional_pool"} & set(vision):
        raise ValueError(f"the image tower of {name} is not open_clip's ViT: choose a ViT-...")
    return name, source, config


def teacher_size(spec, grid):
    """The teacher's image side that gives the student's grid: 14 x 14 is 224 at /16, 196 at /14."""
    return teacher_config(spec)[2]["vision_cfg"]["patch_size"] * grid


def is_path(source):
    return Path(source).expanduser().exists() or "/" in source or os.sep in source or \
        source.endswith((".pt", ".pth", ".bin", ".safetensors"))


# Under which names open_clip stores weights, in a folder or on the hub.
WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")


def weights_file(path):
    """The file itself, or the weights under one of open_clip's names in a folder."""
    if path.is_dir():
        found = [path / name for name in WEIGHTS if (path / name).exists()]
        if not found:
            raise FileNotFoundError(f"the teacher's folder {path} holds no {' or '.join(WEIGHTS)}")
        return found[0]
    if not path.exists():
        raise FileNotFoundError(f"no teacher weights at {path}: check the path in --teacher")
    return path


def tower_weights(path, quick_gelu):
    """The image tower's weights from safetensors, a torch file, or OpenAI's TorchScript archive."""
    if path.suffix == ".safetensors":
        state = common.read_safetensors(path)
    elif is_torchscript(path):
        # OpenAI publishes such archives, all of QuickGELU models; with plain GELU everything would
        # run without a warning and the features would be wrong.
        if not quick_gelu:
            raise ValueError(f"{path} is OpenAI's archive of a QuickGELU model: add -quickgelu to "
                             "the teacher's name")
        state = torch.jit.load(path, map_location="cpu").state_dict()
    else:
        state = common.read_weights(path, "state_dict")
    state = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    state = {name.removeprefix("visual."): tensor.float() for name, tensor in state.items()
             if name.startswith("visual.")}
    if not state:
        raise ValueError(f"{path} holds no CLIP image tower: no key begins with visual.")
    return state


def is_torchscript(path):
    return zipfile.is_zipfile(path) and any(
        "/code/" in name for name in zipfile.ZipFile(path).namelist())


def published_weights(name, tag, config):
    """Path and mean/std of published weights: the cache first, then the network if it answers."""
    import huggingface_hub
    import open_clip
    published = open_clip.get_pretrained_cfg(name, tag)
    if not published:
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(name))
        raise ValueError(f"open_clip has no weights {tag} for {name} (it has {tags or 'none'}); "
                         "a file would do too")
    if bool(published.get("quick_gelu")) != bool(config.get("quick_gelu")):
        other = name.removesuffix("-quickgelu") if config.get("quick_gelu") else f"{name}-quickgelu"
        raise ValueError(f"the weights {tag} need another activation than {name} has: give "
                         f"--teacher {other}:{tag}")
    if not published.get("hf_hub"):
        raise ValueError(f"the weights {tag} of {name} are not on the hub: fetch them by hand and "
                         f"give --teacher {name}:FILE")
    repository, server = published["hf_hub"].rstrip("/"), huggingface_hub.constants.ENDPOINT
    mean_std = {key: published[key] for key in ("mean", "std") if key in published}
    for file in WEIGHTS:
        with suppress(huggingface_hub.errors.LocalEntryNotFoundError):
            path = huggingface_hub.hf_hub_download(repository, file, local_files_only=True)
            return path, mean_std
    problem = "does not answer"
    if not huggingface_hub.constants.HF_HUB_OFFLINE and reachable(server):
        print(f"fetching the teacher's weights: {repository}", flush=True)
        for file in WEIGHTS:
            try:
                return huggingface_hub.hf_hub_download(repository, file), mean_std
            except (OSError, ValueError) as error:  # the hub's own errors are of these types
                problem = f"refused them ({type(error).__name__})"
    page = f"{server}/{repository}/resolve/main/{WEIGHTS[0]}"
    raise FileNotFoundError(
        f"the teacher's weights are not in the cache and {server} {problem}: download {page} "
        f"on a machine with a network and give --teacher {name}:/path/to/{WEIGHTS[0]}")


def reachable(url, seconds=3.0):
    """Whether a server answers within `seconds`; name look-up has no limit itself, so it counts."""
    answered = threading.Event()

    def ask():
        request = urllib.request.Request(url, method="HEAD")
        try:
            urllib.request.urlopen(request, timeout=seconds).close()
        except urllib.error.HTTPError:
            pass  # an answer all the same
        except OSError:
            return
        answered.set()

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(seconds)
    return answered.is_set()


# --------------------------------------------------------------------------------------------------
# Model


class CrossAttention(nn.Module):
    """Multi-head attention with its own input for each of q, k, v. There is no key bias [code]."""

    def __init__(self, dim, num_heads):
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"regressor width {dim} is not a multiple of {num_heads} heads")
        self.num_heads = num_heads
        self.q = nn.Linear(dim, dim)
        self.k = nn.Linear(dim, dim, bias=False)
        self.v = nn.Linear(dim, dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, queries, keys, values):
        q, k, v = (rearrange(x, "b n (h d) -> b h n d", h=self.num_heads)
                   for x in (self.q(queries), self.k(keys), self.v(values)))  # (B, H, M or N, d)
        x = F.scaled_dot_product_attention(q, k, v)
        return self.proj(rearrange(x, "b h n d -> b n (h d)"))  # (B, M, R)


class RegressorBlock(nn.Module):
    """Mask queries look at the visible tokens and at themselves. Δ

    Queries and keys carry positions, values do not; each of the three has its own LayerNorm. The
    output of `norm_2` is the new residual stream, not only the MLP's input [code].
    """

    def __init__(self, dim, num_heads, init_values, drop_path):
        super().__init__()
        for name in ("norm_q", "norm_k", "norm_v", "norm_2"):
            setattr(self, name, nn.LayerNorm(dim, eps=1e-6))
        self.attn = CrossAttention(dim, num_heads)
        self.mlp = common.Mlp(dim, 4 * dim)
        scale = (lambda: common.LayerScale(dim, init_values)) if init_values else nn.Identity
        self.ls1, self.ls2 = scale(), scale()
        self.drop_path = common.DropPath(drop_path)

    def forward(self, m, z, m_positions, z_positions):
        """Queries m (B, M, R), visible tokens z (B, V, R), positions: new queries (B, M, R)."""
        context = torch.cat([z, m], dim=1)  # (B, N, R)
        positions = torch.cat([z_positions, m_positions], dim=1)  # (B, N, R)
        a = self.attn(self.norm_q(m + m_positions), self.norm_k(context + positions),
                      self.norm_v(context))  # (B, M, R)
        u = self.norm_2(m + self.drop_path(self.ls1(a)))
        return u + self.drop_path(self.ls2(self.mlp(u)))


class CAEv2(nn.Module):
    """Encoder, regressor and one head for all tokens. `target_dim` is the teacher's width C.

    A `regressor_dim` other than `embed_dim` puts Linear + LayerNorm between encoder and the rest.
    `init_values` None or 0 means no layer scale; else it starts the encoder's, and the regressor's
    starts at 0.1 in any case, since the released code never passes its option on [code].
    """

    def __init__(self, img_size, patch_size, embed_dim, depth, num_heads, target_dim,
                 regressor_dim=None, regressor_depth=4, regressor_heads=12, init_values=0.1,
                 drop_path_rate=0.0):
        super().__init__()
        R, init_values = regressor_dim or embed_dim, init_values or None
        self.encoder = common.ViT(img_size, patch_size, embed_dim=embed_dim, depth=depth,
                                  num_heads=num_heads, init_values=init_values,
                                  drop_path_rate=drop_path_rate)
        grid = self.encoder.grid
        self.encoder.set_positions(common.sincos_2d(embed_dim, grid, first="row"))  # [code]
        self.adapter = nn.Identity() if R == embed_dim else nn.Sequential(
            nn.Linear(embed_dim, R), nn.LayerNorm(R, eps=1e-6))
        self.mask_token = nn.Parameter(torch.zeros(1, 1, R))
        positions = common.sincos_2d(R, grid, first="row")[None]  # (1, N, R)
        self.positions = nn.Parameter(positions.to(self.mask_token), requires_grad=False)
        rates = torch.linspace(0, drop_path_rate, regressor_depth, device="cpu").tolist()
        self.regressor = nn.ModuleList(
            RegressorBlock(R, regressor_heads, init_values and 0.1, rate) for rate in rates)
        self.head_norm = nn.LayerNorm(R, eps=1e-6)
        self.head = nn.Linear(R, target_dim)
        self._initialise()

    def _initialise(self):
        # The authors' outer class overrides the depth-scaled initialisation of BEiT that its parts
        # start with. What stays [code]: Linear Xavier-uniform with zero bias (a fused qkv as one
        # matrix); convolution and tokens a normal of std 0.02 cut at one sigma; LayerNorm 1 and 0.
        common.xavier_init(self)
        patch = self.encoder.patch_embed.proj
        for tensor in (patch.weight, self.encoder.cls_token, self.mask_token):
            nn.init.trunc_normal_(tensor, std=0.02, a=-0.02, b=0.02)
        nn.init.zeros_(patch.bias)
        common.freeze_key_bias(self.encoder)  # biases for q and v only [code]

    def features(self, images, visible_ids, masked_ids, mask, supervise):
        """What is supervised: {"cls": (B, 1, R), "visible": (B, V, R), "masked": (B, M, R)}."""
        z = self.adapter(self.encoder(images, mask))  # (B, 1+V, R)
        features = {}
        if supervise != "masked":  # Δ what the encoder saw is supervised too
            features.update(cls=z[:, :1], visible=z[:, 1:])
        if supervise != "visible" and masked_ids.shape[1]:
            positions = self.positions.expand(len(z), -1, -1)  # (B, N, R)
            z_positions = common.pick(positions, visible_ids)  # (B, V, R)
            m_positions = common.pick(positions, masked_ids)  # (B, M, R)
            m = self.mask_token.expand_as(m_positions)  # (B, M, R)
            for block in self.regressor:
                m = block(m, z[:, 1:], m_positions, z_positions)  # without the class token [code]
            features["masked"] = m
        return features

    def forward(self, images, mask, targets, supervise="both"):
        """Returns (loss, parts): parts are the detached means of "cls", "visible", "masked".

        images (B, 3, S, S), normalised; mask (B, N) bool, True = hidden, the same count per row;
        targets (B, 1+N, C), raw teacher tokens, class token first, then raster order.
        """
        if supervise not in ("both", "visible", "masked"):
            raise ValueError(f"supervise is 'both', 'visible' or 'masked', not {supervise!r}")
        visible_ids, masked_ids = (ids.to(images.device, non_blocking=True)
                                   for ids in common.split_ids(mask))  # (B, V), (B, M)
        if supervise == "masked" and masked_ids.shape[1] == 0:
            raise ValueError("supervise='masked' needs hidden patches, but the mask hides none")
        expected = (len(images), 1 + mask.shape[1], self.head.out_features)
        if tuple(targets.shape) != expected:
            raise ValueError(f"targets of shape {tuple(targets.shape)} were given, expected is "
                             f"{expected}: class token and patches, of the teacher's width")
        features = self.features(images, visible_ids, masked_ids, mask, supervise)
        labels = dict(cls=targets[:, :1], visible=common.pick(targets[:, 1:], visible_ids),
                      masked=common.pick(targets[:, 1:], masked_ids))
        answers = self.answer(features)  # (B, T, C)
        distances = cosine_distance(answers, torch.cat([labels[name] for name in features], dim=1))
        parts = distances.detach().split([tokens.shape[1] for tokens in features.values()], dim=1)
        return distances.mean(), {name: part.mean() for name, part in zip(features, parts)}

    def answer(self, features):
        """One LayerNorm and one linear layer for all supervised tokens: (B, T, C)."""
        return self.head(self.head_norm(torch.cat(list(features.values()), dim=1)))


# The authors' names (the spelling is theirs) and ours, replaced in this order.
OFFICIAL_NAMES = (
    ("regresser.regressor_blocks.", "regressor."), ("encoder_to_regresser_norm.", "adapter.1."),
    ("encoder_to_regresser.", "adapter.0."), ("decoder.norm.", "head_norm."),
    ("decoder.head.", "head."), (".norm1_q.", ".norm_q."), (".norm1_k.", ".norm_k."),
    (".norm1_v.", ".norm_v."), (".norm2_cross.", ".norm_2."), (".mlp_cross.", ".mlp."),
    (".cross_attn.q_bias", ".attn.q.bias"), (".cross_attn.v_bias", ".attn.v.bias"),
    (".cross_attn.", ".attn."), (".gamma_1_cross", ".ls1.gamma"), (".gamma_2_cross", ".ls2.gamma"),
    (".gamma_1", ".ls1.gamma"), (".gamma_2", ".ls2.gamma"),
)


def load_official(model, state_dict):
    """Loads the authors' pre-training weights, under their key names, into a `CAEv2`, strictly.

    Every key is used, or is `regresser.norm.*` (never applied by the released model) or, without
    layer scale, a `gamma_*_cross` of ones. Raises ValueError naming what is missing or too much.
    """
    state, own = {}, model.state_dict()
    for name, tensor in state_dict.items():
        ours = name
        for theirs, replacement in OFFICIAL_NAMES:
            ours = ours.replace(theirs, replacement)
        state[ours] = tensor
    if "rd_pos_embed" in state:
        state["positions"] = state.pop("rd_pos_embed")[:, 1:]  # the class token's row has no use
    for name in own:
        q_name, v_name = (name.replace("qkv.bias", key) for key in ("q_bias", "v_bias"))
        if name.endswith("attn.qkv.bias") and {q_name, v_name} <= set(state):
            q, v = state.pop(q_name), state.pop(v_name)
            state[name] = torch.cat([q, torch.zeros_like(q), v])
    for name in set(state) - set(own):
        scale = name.startswith("regressor.") and name.endswith(".gamma")
        if name.startswith("regresser.norm.") or (scale and bool((state[name] == 1).all())):
            del state[name]
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        message = f"not the weights of this CAE v2 model: {common.reason(error)}"
        raise ValueError(message) from error


# --------------------------------------------------------------------------------------------------
# Loss


def cosine_distance(answers, targets):
    """1 - cosine of answers and targets, both (B, T, C), as (B, T), in fp32 or better. Δ

    The loss is its flat mean over class, visible and masked tokens [code]: with M of N patches
    hidden, the masked ones weigh M / (1+N), 15 % for ViT-Ti. It is no sum of two means.
    """
    dtype = torch.promote_types(answers.dtype, torch.float32)
    return 1 - F.cosine_similarity(answers.to(dtype), targets.to(dtype), dim=-1)


# --------------------------------------------------------------------------------------------------
# Preview


@torch.no_grad()
def preview(path, config, model, teacher, batch, device):
    """Draws a batch of `Augment` as rows: image | visible patches | cosine of answer and target per
    patch | similarity of the teacher's patches to one of them."""
    model.eval()
    student, teacher_images, mask = inputs(batch, teacher, device)
    targets = clip_targets(teacher, teacher_images)  # (B, 1+N, C)
    ids = dict(zip(("visible", "masked"), (ids.to(device) for ids in common.split_ids(mask))))
    features = model.features(student, ids["visible"], ids["masked"], mask, config.supervise)
    features.pop("cls", None)
    asked = torch.cat([ids[name] for name in features], dim=1)  # (B, T)
    answers = model.answer(features)  # (B, T, C)
    cosines = 1 - cosine_distance(answers, common.pick(targets[:, 1:], asked))  # (B, T)
    (h, w), rows = model.encoder.grid, []
    centre = h // 2 * w + w // 2
    for i, image in enumerate(batch[0].to(device).float() / 255):
        hidden = F.interpolate(rearrange(mask[i].to(device).float(), "(h w) -> 1 1 h w", h=h),
                               size=image.shape[1:])[0]  # (1, H, W)
        agreement = torch.full((3, h * w), 0.5, device=device)
        agreement[:, asked[i]] = common.colour_map(cosines[i][None].float())[:, 0]
        similar = F.cosine_similarity(targets[i, 1:], targets[i, 1 + centre], dim=-1)  # (N,)
        similar = (similar - similar.min()) / (similar.max() - similar.min()).clamp(min=1e-6)
        similar = common.colour_map(similar[None])[:, 0]  # (3, N)
        similar[:, centre] = torch.tensor([1.0, 0.2, 0.2], device=device)
        maps = [rearrange(tokens, "c (h w) -> c h w", h=h) for tokens in (agreement, similar)]
        rows.append([image, torch.where(hidden > 0, 0.5, image), *maps])
    common.save_panels(
        path, rows, ["image", "visible patches", "answer vs teacher", "teacher: one patch"],
        "3rd: cosine, dark 0 to yellow 1, grey if not asked.  4th: similarity to the red patch, "
        "per image.")


# --------------------------------------------------------------------------------------------------
# Train


def inputs(batch, teacher, device):
    """A batch of `Augment` to (student images, teacher images, mask), images float32 on the device,
    each with its own mean and std. The mask stays on the CPU, where `split_ids` reads it."""
    *crops, mask = batch
    crops = [crop.to(device, non_blocking=True) for crop in crops]
    cfg = teacher.preprocess_cfg
    return common.normalise(crops[0]), common.normalise(crops[-1], cfg["mean"], cfg["std"]), mask


def build(config, target_dim):
    """The model of a configuration, with weights drawn from its seed."""
    torch.manual_seed(config.seed)
    return CAEv2(config.img_size, config.patch_size, config.embed_dim, config.depth,
                 config.num_heads, target_dim, config.regressor_dim, config.regressor_depth,
                 config.regressor_heads, config.init_values, config.drop_path)


def start_from(model, path):
    """--init FILE: our last.pt or encoder.safetensors, or the authors' pre-training checkpoint."""
    if path.endswith(".safetensors"):
        target, state = model.encoder, common.read_safetensors(path)
    else:
        target, state = model, common.read_weights(path, "model")
    with common.init_errors(path):
        if any(name.startswith("decoder.") for name in state):  # the authors' name of the head
            load_official(model, state)
        else:
            target.load_state_dict(state)


def prepare(config, processes, init):
    """(teacher, model) on the device. The main process fetches weights, the others wait for it."""
    if not processes.main:
        processes.wait()
    teacher = load_teacher(config.teacher, teacher_size(config.teacher, config.grid))
    if processes.main:
        processes.wait()
    # Cast once [D3]: autocast would cast the weights anew in each step.
    bf16 = common.uses_bf16(processes.device, config.precision)
    teacher.to(processes.device, torch.bfloat16 if bf16 else torch.float32)
    model = build(config, teacher.output_dim)
    if init:
        start_from(model, init)
    if config.supervise == "visible" or config.num_masked == 0:  # the regressor does not run
        model.regressor.requires_grad_(False)
        model.mask_token.requires_grad_(False)
    return teacher, model.to(processes.device)


def train(config, run, processes):
    """Pre-training from start to end: lr, forward, backward, step, log, save."""
    device = processes.device
    images = common.find_data(config.data, "pretrain", config.img_size)
    plan = common.make_plan(len(images), config.batch_size, config.micro_batch, config.epochs,
                            processes.world)
    teacher, model = prepare(config, processes, "" if run.state else config.init)
    samples = common.Samples(images, Augment(config, teacher.image_size[0]), config.seed)
    if common.uses_compile(device, config.compile):
        for blocks in (model.encoder.blocks, model.regressor, teacher.transformer.resblocks):
            common.compile_blocks(blocks)
    groups = common.parameter_groups(model, config.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=config.lr, fused=True)
    if processes.main:
        data = f"{len(images):,} images in {images.name}"
        describe(config, model, plan, processes, data, run.folder)
    start = run.begin(processes, plan, model, optimizer, len(images))
    parallel = model if processes.world == 1 else nn.parallel.DistributedDataParallel(
        model, gradient_as_bucket_view=True)
    warmup_steps = round(config.warmup_epochs * plan.steps_per_epoch)
    save_every = config.save_every or plan.steps_per_epoch
    batches = iter(common.training_loader(samples, plan, processes, config, start, run.stop))

    model.train()
    for step in range(start, run.stop):
        lr = common.learning_rate(step, config.lr, warmup_steps, plan.total_steps, config.min_lr)
        for group in optimizer.param_groups:
            group["lr"] = lr

        for micro in range(plan.accumulation):
            student, teacher_images, mask = inputs(run.next_batch(batches), teacher, device)
            targets = clip_targets(teacher, teacher_images)
            # Drop path is the one draw made here; seeded so, it needs no saved generator [D6].
            row = plan.first_row(micro, processes)
            torch.manual_seed(common.seed_for(config.seed, "step", step, row))
            more_to_come = processes.world > 1 and micro < plan.accumulation - 1
            with parallel.no_sync() if more_to_come else nullcontext():
                with common.autocast(device, config.precision):
                    loss, parts = parallel(student, mask, targets, config.supervise)
                (loss / plan.accumulation).backward()
            run.record(loss=loss, **parts)

        grad_norm = nn.utils.clip_grad_norm_(model.parameters(), config.clip_grad)
        run.update(optimizer, grad_norm)  # skips a step whose gradient is not finite [D8]

        run.log(step + 1, lr, grad_norm)
        stopping = run.stopping()
        if (step + 1) % save_every == 0 or step + 1 == run.stop or stopping:
            run.save(model, optimizer, step + 1)
            if processes.main:
                picture = run.folder / "preview.png"
                preview(picture, config, model, teacher, common.preview_batch(samples), device)
                model.train()
        if stopping:
            break
    run.close()


# --------------------------------------------------------------------------------------------------
# Main


def describe(config, model, plan, processes, data, folder):
    """Prints the resolved recipe, with its numbers as equations."""
    total, encoder = (sum(p.numel() for p in part.parameters()) for part in (model, model.encoder))
    scaled = config.lr * plan.batch_size / 2048
    note = f" (linear scaling from the paper's 2048 would give {scaled:.2e})"
    print(f"CAE v2   {config.model}: {total:,} parameters, {encoder:,} of them in the encoder\n"
          f"task     {config.num_masked} of {config.grid**2} patches hidden ({config.mask}), "
          f"supervised: {config.supervise}, teacher: {config.teacher}\n"
          f"data     {data}\n"
          f"lr       {config.lr:.2e} at the peak, absolute{note if scaled != config.lr else ''}\n"
          f"{common.describe(config, plan, processes, folder)}", flush=True)


def dry_run(config, folder):
    """Prints recipe and cost without data, weights or a GPU: models on torch's meta device."""
    name, _, clip = teacher_config(config.teacher)
    N, M, size = config.grid**2, config.num_masked, teacher_size(config.teacher, config.grid)
    processes = common.Processes(0, int(os.environ.get("WORLD_SIZE", 1)), torch.device("cpu"))
    plan = common.make_plan(1_281_167, config.batch_size, config.micro_batch, config.epochs,
                            processes.world)
    with torch.device("meta"):
        model, teacher = build(config, clip["embed_dim"]), image_tower(name, "meta")
        teacher.positional_embedding = nn.Parameter(torch.empty(1 + N, clip["vision_cfg"]["width"]))
        targets = torch.empty(1, 1 + N, clip["embed_dim"])
        image, teacher_image = (torch.empty(1, 3, side, side) for side in (config.img_size, size))
    mask = common.random_masks(1, N, M)
    flops = common.count_flops(lambda: model(image, mask, targets, config.supervise)[0].backward())
    teacher_flops = common.count_flops(lambda: clip_targets(teacher, teacher_image))
    # Saved activations under bf16: about 36 bytes per width, token and block (a rule of thumb).
    activations = 36 * (config.embed_dim * (1 + N - M) * config.depth
                        + config.regressor_dim * N * config.regressor_depth)
    weights, frozen = (sum(p.numel() for p in part.parameters()) for part in (model, teacher))
    memory = (16 * weights + 2 * frozen + activations * plan.micro_batch) / 2**30
    describe(config, model, plan, processes, "1,281,167 images assumed (ImageNet-1K)", folder)
    print(f"cost     {(flops + teacher_flops) / 1e9:.1f} GFLOP per image and step, "
          f"{teacher_flops / 1e9:.1f} of them in the teacher of {frozen:,} parameters\n"
          f"memory   roughly {memory:.1f} GiB per process in bf16\n"
          f"recipe   {json.dumps(vars(config))}")


def main(argv=None):
    config = common.parse_config(Config, __doc__, SIZES, DEMO, argv)
    out = config.out or f"runs/cae_v2_{'demo' if config.demo else config.model}"
    if config.dry_run:
        return dry_run(config, out)
    run = common.Run("cae_v2", config, out)
    if config.preview:
        return draw(config, run)
    if run.finished:
        return print(f"the run in {run.folder}/ is finished, step {run.start}: preview.png, "
                     "log.jsonl, encoder.safetensors, last.pt lie there; --fresh starts anew")
    with common.processes(config.device) as processes:
        train(config, run, processes)
        if processes.main:
            print(f"done: {run.folder}/ holds preview.png, log.jsonl, encoder.safetensors, last.pt")


def draw(config, run):
    """--preview: from last.pt if there is one, else from --init, else untrained."""
    images = common.find_data(config.data, "pretrain", config.img_size, num_scenes=100)
    with common.processes(config.device) as processes:
        teacher, model = prepare(config, processes, "" if run.state else config.init)
        if run.state:
            model.load_state_dict(run.state["model"])
        samples = common.Samples(images, Augment(config, teacher.image_size[0]), config.seed)
        batch = common.preview_batch(samples)
        preview(config.preview, config, model, teacher, batch, processes.device)
    weights = run.checkpoint if run.state else config.init or "untrained weights"
    print(f"drew {config.preview} from {weights}")


if __name__ == "__main__":
    common.run_main(main)
