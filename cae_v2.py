"""CAE v2: Context Autoencoder with CLIP Target (later title: with CLIP Latent Alignment).

Zhang et al., arXiv 2211.09799 (2022), TMLR 2023. Official code: Atten4Vis/CAE, folder project/CAEv2.

The idea in one sentence: a ViT that sees some patches of an image must give, for the patches that it sees
and for those that it does not, the features that a frozen CLIP image tower gives for the whole image.

    image ──────────────────────────── CLIP tower (frozen) ── targets (B, 1+N, C) ────────────┐
      │                                                                                       │
      └─ visible patches ── ViT encoder ── z (B, 1+V, R) ──────────────────┐                  │
                                │                                          ├─ LN, linear ── cosine
            mask token x M ── regressor (queries m attend to [z, m]) ── m ─┘   (B, 1+N, C)

Dimension key: B batch, N patches, V visible, M masked (V + M = N), D encoder width, R regressor width,
C teacher width, P patch side, H heads, d width of a head, T supervised tokens.

What differs from MAE (marked Δ below): the target is CLIP's features, not pixels; visible patches and the class
token are supervised too; masked tokens come from a cross-attention regressor, not a self-attention decoder;
masks are block-wise; small models hide few patches (15 % for ViT-Ti, 25 % for ViT-S, 50 % for ViT-B).

Sources: [code] the authors' code, [readme] their README, [abs] the abstract, [T] a third party. Where they
are silent, we decided:
  [D1] ViT-L: no script is released. Regressor 4 blocks x 1024, 16 heads (the released code would build
       12 heads of width 85), batch, schedule and augmentation as for ViT-B; mask 50 % and lr 1.5e-3 as in
       PanDerm's CAE v2 ViT-L [T].
  [D2] ViT-L's teacher is CLIP ViT-B/16, the only one in the released code; ViT-L/14 is one flag away.
  [D3] bf16 autocast without a loss scaler instead of fp16 with one; on a GPU the teacher's weights are cast
       to bf16 once (the authors: fp16).
  [D4] Augmentation on uint8 tensors instead of PIL images: the same operations in the same order, equal up to
       the rounding of one resize.
  [D5] The ablation of supervision positions is not released. `visible` averages over class token and visible
       patches, `masked` over masked patches.
  [D6] Every random draw is a function of (seed, epoch, image) or (seed, step); the authors seed with 0 + rank.
  [D7] A teacher that pools by averaging (the demo's) has no class token: its pooled embedding stands in for it.

Commands (all resume when repeated):
  python cae_v2.py --demo                                      built-in images and teacher, 2 minutes on a laptop
  python cae_v2.py --model vit_s --data ~/photos               one GPU, any folder of images
  torchrun --nproc_per_node=8 cae_v2.py --model vit_l          the paper's run: $IMAGENET or data/imagenet, 300 epochs
Expect in the demo: the loss falls from about 1.0 to below 0.5; a linear probe rises from about 27 % to above 80 %.
To use the method elsewhere, copy this file and common.py (and demo/ for `--data scenes` and `--teacher demo`).
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
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from safetensors.torch import load_file
from torch import nn
from torchvision.transforms import RandomResizedCrop, v2
from torchvision.transforms.v2 import functional as TF

import common
from common import flag

# ---------------------------------------------------------------------------------------------------
# Config

# Encoder width, depth, heads; regressor width, depth, heads; layer scale of the encoder; mask ratio.
# 12 heads for every size but Large: ViT-Ti and ViT-S differ from timm's 3 and 6 [code].
SIZES = {
    "vit_ti": dict(embed_dim=192, depth=12, num_heads=12, regressor_dim=96, regressor_depth=1, regressor_heads=12,
                   init_values=0.1, mask_ratio=30 / 196),  # [code]
    "vit_s": dict(embed_dim=384, depth=12, num_heads=12, regressor_dim=384, regressor_depth=1, regressor_heads=12,
                  init_values=0.1, mask_ratio=49 / 196),  # [code]
    "vit_b": dict(embed_dim=768, depth=12, num_heads=12, regressor_dim=768, regressor_depth=4, regressor_heads=12,
                  init_values=0.1, mask_ratio=98 / 196),  # [code]
    "vit_l": dict(embed_dim=1024, depth=24, num_heads=16, regressor_dim=1024, regressor_depth=4, regressor_heads=16,
                  init_values=1e-5, mask_ratio=98 / 196),  # [D1]; layer scale [readme]
    "vit_demo": dict(embed_dim=128, depth=4, num_heads=4, regressor_dim=128, regressor_depth=1, regressor_heads=4,
                     init_values=0.1, mask_ratio=0.5),  # for 32-pixel images, not of the paper
}

DEMO = dict(model="vit_demo", data="scenes", teacher="demo", img_size=32, patch_size=4, epochs=2, batch_size=64, lr=2e-3,
            warmup_epochs=0.1, drop_path=0.0, crop_min=0.6, workers=0, log_every=25)


@dataclass(frozen=True)
class Config(common.RunConfig):
    """The whole command line; flags that change no number come from common.RunConfig."""

    epochs: int = flag(300, "passes over the data [code]")
    batch_size: int = flag(2048, "images per step over all processes, 8 x 256 [code]")
    lr: float = flag(1.5e-3, "peak learning rate; absolute, belongs to batch 2048 [code]")
    min_lr: float = flag(1e-5, "learning rate at the end of the cosine [code]")
    warmup_epochs: float = flag(10, "epochs of linear warm-up from 0 [code]")
    weight_decay: float = flag(0.05, "AdamW, constant; betas are torch's default 0.9, 0.999 [code]")
    clip_grad: float = flag(3.0, "largest global L2 norm of the gradient [code]")
    drop_path: float = flag(0.1, "stochastic depth of the last block, rising linearly, encoder and regressor [code]")
    teacher: str = flag("ViT-B-16-quickgelu:openai", "open_clip NAME:TAG, NAME:FILE, or `demo` [code]")
    supervise: typing.Literal["both", "visible", "masked"] = flag("both", "which tokens are supervised [code] [D5]")
    mask: typing.Literal["block", "random"] = flag("block", "how hidden patches are chosen [code]")
    mask_ratio: float = flag(0.0, "share of hidden patches, rounded to a count (default by size, see SIZES)")
    img_size: int = flag(224, "pixels of the crop's side [code]")
    patch_size: int = flag(16, "pixels of a patch's side [code]")
    crop_min: float = flag(0.4, "smallest area of a random crop, as a share of the image [code]")
    color_jitter: float = flag(0.4, "brightness, contrast and saturation, always applied [code]")
    embed_dim: int = flag(0, "encoder width (default by size)")
    depth: int = flag(0, "encoder blocks (default by size)")
    num_heads: int = flag(0, "encoder heads (default by size)")
    regressor_dim: int = flag(0, "regressor width (default by size)")
    regressor_depth: int = flag(0, "regressor blocks (default by size)")
    regressor_heads: int = flag(0, "regressor heads (default by size)")
    init_values: float = flag(0.0, "layer scale of the encoder at the start, 0 = none (default by size)")

    def __post_init__(self):
        super().__post_init__()
        for name in ("epochs", "batch_size", "lr", "clip_grad", "img_size", "patch_size", "embed_dim", "depth", "num_heads",
                     "regressor_dim", "regressor_depth", "regressor_heads", "crop_min"):
            if not getattr(self, name) > 0:
                raise ValueError(f"--{name} {getattr(self, name)} must be greater than 0")
        if not 0 <= self.mask_ratio < 1 or self.num_masked >= self.grid**2:
            raise ValueError(f"--mask_ratio {self.mask_ratio} must leave at least one patch visible: give 0 to below 1")
        if self.supervise == "masked" and self.num_masked == 0:
            raise ValueError("--supervise masked needs hidden patches: give --mask_ratio above 0")
        if self.img_size % self.patch_size:
            raise ValueError(f"--img_size {self.img_size} is not a multiple of --patch_size {self.patch_size}")
        if not 0 <= self.warmup_epochs < self.epochs:
            raise ValueError(f"--warmup_epochs {self.warmup_epochs:g} must be shorter than the run of {self.epochs} epochs "
                             "(fractions such as 0.5 are fine)")

    @property
    def grid(self):
        return self.img_size // self.patch_size

    @property
    def num_masked(self):
        return round(self.mask_ratio * self.grid**2)


# ---------------------------------------------------------------------------------------------------
# Corrupt: which patches are hidden, and the crop that student and teacher share


def block_mask(grid, num_masked, rng):
    """One mask of rectangular blocks with exactly `num_masked` hidden cells, (rows, columns) nested lists of 0/1. Δ

    The rule of BEiT as the authors run it [code]: rectangles of random area and aspect are tried until the
    count is met; `rng` is a `random.Random`, so its draws can be compared with theirs one by one.
    """
    rows, columns = common.pair(grid)
    common.check_num_masked(num_masked, rows * columns)
    if num_masked and min(rows, columns) < 2:
        raise ValueError(f"block masks need a grid of at least 2 x 2 patches, not {rows} x {columns}: use random masks")
    mask, count = [[0] * columns for _ in range(rows)], 0
    while count < num_masked:
        left = num_masked - count
        # At least 16 cells are aimed at; `uniform` also takes its bounds the other way round.
        area = rng.uniform(16, left)
        aspect = math.exp(rng.uniform(math.log(0.3), math.log(1 / 0.3)))
        height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if not (0 < height < rows and 0 < width < columns):
            continue
        top, start = rng.randint(0, rows - height), rng.randint(0, columns - width)
        block = [row[start: start + width] for row in mask[top: top + height]]
        new = height * width - sum(map(sum, block))
        if 0 < new <= left:
            for row in mask[top: top + height]:
                row[start: start + width] = [1] * width
            count += new
    return mask


def block_masks(batch, grid, num_masked, generator=None):
    """(batch, N) bool, True = hidden, exactly `num_masked` in every row, in blocks (see `block_mask`).

    `generator` is a torch.Generator; each mask draws from a `random.Random` that it seeds.
    Raises ValueError for a count outside 0..N-1.
    """
    seeds = torch.randint(2**62, (batch,), generator=generator).tolist()
    masks = [block_mask(grid, num_masked, random.Random(seed)) for seed in seeds]
    return torch.tensor(masks, dtype=torch.bool).flatten(1)  # (B, N)


class Augment:
    """A training sample, made in a worker: student image, teacher image where its size differs, mask.

    Colour jitter and flip come before the crop, so they reach the teacher's image too [code]: both images
    are the same crop, resized twice. Images are uint8 (3, S, S), the mask is (N,) bool.
    """

    def __init__(self, config, teacher_size):
        self.config, self.teacher_size = config, teacher_size
        self.jitter = v2.ColorJitter(*[config.color_jitter] * 3) if config.color_jitter else nn.Identity()

    def __call__(self, image):
        config = self.config
        image = self.jitter(image)
        if torch.rand(()) < 0.5:
            image = TF.horizontal_flip(image)
        box = RandomResizedCrop.get_params(image, scale=(config.crop_min, 1.0), ratio=(3 / 4, 4 / 3))  # [code]
        sizes = [config.img_size] + [self.teacher_size] * (self.teacher_size != config.img_size)
        crops = [TF.resized_crop(image, *box, [size, size], TF.InterpolationMode.BICUBIC) for size in sizes]
        if config.mask == "block":
            mask = block_masks(1, config.grid, config.num_masked)
        else:
            mask = common.random_masks(1, config.grid**2, config.num_masked)
        return *crops, mask[0]


# ---------------------------------------------------------------------------------------------------
# Target: the tokens of a frozen CLIP image tower


@torch.no_grad()
def clip_targets(visual, images):
    """CLIP features of every token: images (B, 3, S, S), normalised for the tower, to (B, 1+N, C) float32. Δ

    ln_post and the projection are applied to all tokens, class token first, then patches in raster
    order [code]; open_clip itself projects the pooled token only. Nothing is normalised here.
    """
    pooled, patches = visual(images.to(visual.conv1.weight.dtype))  # (B, C), (B, N, width)
    return torch.cat([pooled[:, None], patches @ visual.proj], dim=1).float()  # (B, 1+N, C)


def load_teacher(spec, img_size):
    """The image tower of an open_clip model, frozen, in eval mode, for images of `img_size` pixels.

    `spec` is NAME:TAG (OpenAI's and other published weights, from the cache or the network), NAME:FILE
    (open_clip's .safetensors, .bin, .pt, or OpenAI's own .pt archive), or `demo`.
    Raises ValueError or FileNotFoundError with the one thing to do.
    """
    name, source, config = teacher_config(spec)
    mean_std = {}
    if spec != "demo" and not is_path(source):
        source, mean_std = published_weights(name, source, config)
    path = weights_file(Path(source).expanduser())
    state = read_weights(path, quick_gelu=bool(config.get("quick_gelu")))
    visual = image_tower(name)
    try:
        visual.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"{path} does not hold the weights of {name}: {str(error).splitlines()[1].strip()[:200]}") from error
    size, patch = common.pair(img_size), common.pair(visual.patch_size)
    if any(side % step for side, step in zip(size, patch)):
        raise ValueError(f"the teacher {name} has patches of {patch[0]} pixels, which do not tile {size[0]} x {size[1]}")
    grid = tuple(side // step for side, step in zip(size, patch))
    table = resize_positions(visual.positional_embedding.data, grid)
    visual.positional_embedding = nn.Parameter(table)
    visual.image_size, visual.grid_size, visual.output_tokens = size, grid, True
    visual.preprocess_cfg = {**visual.preprocess_cfg, **mean_std, "size": size}
    return visual.eval().requires_grad_(False)


def image_tower(name, device="cpu"):
    """The image tower of an open_clip model with random weights."""
    import open_clip
    logging.disable(logging.WARNING)  # open_clip warns that no weights are loaded: they come next
    try:
        return open_clip.create_model(name, pretrained=None, device=device).visual
    finally:
        logging.disable(logging.NOTSET)


def resize_positions(table, grid):
    """A position table (1+n, C) for another grid, (1+N, C): bilinear, class row kept [code]."""
    side = math.isqrt(len(table) - 1)
    if (side, side) == tuple(grid):
        return table
    cells = rearrange(table[1:], "(h w) c -> 1 c h w", h=side)
    cells = F.interpolate(cells, size=grid, mode="bilinear", align_corners=False)
    return torch.cat([table[:1], rearrange(cells, "1 c h w -> (h w) c")])  # (1+N, C)


def teacher_config(spec):
    """(open_clip name, tag or path, model configuration) of a teacher given as NAME:TAG_OR_PATH or `demo`."""
    import open_clip
    if spec == "demo":
        folder = Path(__file__).parent / "demo"
        if not (folder / "tiny_clip.safetensors").exists():
            raise FileNotFoundError("--teacher demo needs the folder demo/ beside cae_v2.py: copy it along, or name a CLIP model")
        open_clip.add_model_config(folder / "tiny_clip.json")
        name, source = "tiny_clip", str(folder / "tiny_clip.safetensors")
    else:
        name, _, source = spec.partition(":")
        if not source:
            raise ValueError(f"--teacher {spec} should read NAME:TAG or NAME:FILE, such as ViT-B-16-quickgelu:openai, or `demo`")
    config = open_clip.get_model_config(name)
    if config is None:
        raise ValueError(f"open_clip knows no model {name}: the names are listed by python -c "
                         "\"import open_clip; print(open_clip.list_models())\"")
    if not isinstance(config["vision_cfg"].get("layers"), int) or "patch_size" not in config["vision_cfg"]:
        raise ValueError(f"the image tower of {name} is not a plain ViT of open_clip: choose a ViT-... model")
    return name, source, config


def teacher_size(spec, grid):
    """Pixels of the teacher's input side that give it the student's grid: 224 for /16, 196 for /14 at 14 x 14."""
    return teacher_config(spec)[2]["vision_cfg"]["patch_size"] * grid


def is_path(source):
    return os.path.exists(os.path.expanduser(source)) or "/" in source or os.sep in source or \
        source.endswith((".pt", ".pth", ".bin", ".safetensors"))


def weights_file(path):
    """The file itself, or the one weights file of open_clip's usual names in a folder."""
    names = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin", "model.safetensors", "pytorch_model.bin")
    if path.is_dir():
        found = [path / name for name in names if (path / name).exists()]
        if not found:
            raise FileNotFoundError(f"the teacher's folder {path} holds none of {', '.join(names)}")
        return found[0]
    if not path.exists():
        raise FileNotFoundError(f"no teacher weights at {path}: check the path after the colon of --teacher")
    return path


def read_weights(path, quick_gelu):
    """The image tower's state dict from safetensors, a torch file, or OpenAI's TorchScript archive."""
    if path.suffix == ".safetensors":
        try:
            state = load_file(path)
        except Exception as error:  # safetensors has its own type for bad headers
            raise ValueError(f"{path} cannot be read as safetensors ({error})") from error
    elif zipfile.is_zipfile(path) and any("/code/" in name for name in zipfile.ZipFile(path).namelist()):
        # Only OpenAI publishes such archives, and all its models use QuickGELU: plain GELU would run without
        # a warning and give wrong features.
        if not quick_gelu:
            raise ValueError(f"{path} is OpenAI's archive, whose models use QuickGELU: add -quickgelu to the teacher's name")
        state = torch.jit.load(path, map_location="cpu").state_dict()
    else:
        state = common.read_checkpoint(path)
        state = state.get("state_dict", state)
    state = {name.removeprefix("module.").removeprefix("visual."): tensor.float() for name, tensor in state.items()
             if name.removeprefix("module.").startswith("visual.")}
    if not state:
        raise ValueError(f"{path} holds no image tower: no key begins with visual.")
    return state


def published_weights(name, tag, config):
    """Path and mean/std of published weights: the cache first, then the network, which gets 3 seconds to answer."""
    import huggingface_hub
    import open_clip
    published = open_clip.get_pretrained_cfg(name, tag)
    if not published:
        raise ValueError(f"open_clip knows no weights {tag} for {name}, only "
                         f"{', '.join(open_clip.list_pretrained_tags_by_model(name))}; or give a file")
    if bool(published.get("quick_gelu")) != bool(config.get("quick_gelu")):
        other = name.removesuffix("-quickgelu") if config.get("quick_gelu") else f"{name}-quickgelu"
        raise ValueError(f"the weights {tag} need another activation than {name} has: use --teacher {other}:{tag}")
    if not published.get("hf_hub"):
        raise ValueError(f"the weights {tag} of {name} must be fetched by hand: give their file as --teacher {name}:FILE")
    repository, file = published["hf_hub"].rstrip("/"), "open_clip_model.safetensors"
    mean_std = {key: published[key] for key in ("mean", "std") if key in published}
    try:
        return huggingface_hub.hf_hub_download(repository, file, local_files_only=True), mean_std
    except huggingface_hub.errors.LocalEntryNotFoundError:
        endpoint = huggingface_hub.constants.ENDPOINT
    page = f"{endpoint}/{repository}/resolve/main/{file}"
    if huggingface_hub.constants.HF_HUB_OFFLINE or not reachable(endpoint):
        raise FileNotFoundError(f"the teacher's weights are not in the cache and {endpoint} does not answer: on a machine with "
                                f"a network download {page} and pass it as --teacher {name}:/path/to/{file}")
    print(f"fetching the teacher's weights from {page}")
    return huggingface_hub.hf_hub_download(repository, file), mean_std


def reachable(url, seconds=3.0):
    """Whether a server answers within `seconds`, name look-up included (which has no time limit of its own)."""
    answered = threading.Event()

    def ask():
        try:
            urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=seconds).close()
        except urllib.error.HTTPError:
            pass  # an answer all the same
        except OSError:
            return
        answered.set()

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(seconds)
    return answered.is_set()


# ---------------------------------------------------------------------------------------------------
# Model


class CrossAttention(nn.Module):
    """Multi-head attention with queries, keys and values of its own input each. There is no key bias [code]."""

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
                   for x in (self.q(queries), self.k(keys), self.v(values)))  # (B, H, M | N | N, d)
        x = F.scaled_dot_product_attention(q, k, v)
        return self.proj(rearrange(x, "b h n d -> b n (h d)"))  # (B, M, R)


class RegressorBlock(nn.Module):
    """Mask queries look at the visible tokens and at themselves. Δ

    Queries and keys carry positions, values do not. Each of the three has its own LayerNorm. The output of
    `norm_2` is the new residual stream, not only the MLP's input [code].
    """

    def __init__(self, dim, num_heads, init_values, drop_path):
        super().__init__()
        self.norm_q, self.norm_k, self.norm_v, self.norm_2 = (nn.LayerNorm(dim, eps=1e-6) for _ in range(4))
        self.attn = CrossAttention(dim, num_heads)
        self.mlp = common.Mlp(dim, 4 * dim)
        scale = (lambda: common.LayerScale(dim, init_values)) if init_values else nn.Identity
        self.ls1, self.ls2 = scale(), scale()
        self.drop_path = common.DropPath(drop_path)

    def forward(self, m, z, m_positions, z_positions):
        """Mask queries m (B, M, R) and visible tokens z (B, V, R), with their positions, to new queries (B, M, R)."""
        context = torch.cat([z, m], dim=1)  # (B, N, R)
        positions = torch.cat([z_positions, m_positions], dim=1)  # (B, N, R)
        a = self.attn(self.norm_q(m + m_positions), self.norm_k(context + positions), self.norm_v(context))  # (B, M, R)
        u = self.norm_2(m + self.drop_path(self.ls1(a)))
        return u + self.drop_path(self.ls2(self.mlp(u)))


class CAEv2(nn.Module):
    """Encoder, regressor and one shared head. `target_dim` is the teacher's projected width C.

    `regressor_dim` other than `embed_dim` puts a linear layer and a LayerNorm between encoder and the rest.
    `init_values` None or 0 means no layer scale at all; else it starts the encoder's, while the regressor's starts
    at 0.1 whatever the encoder's is, since the released code never passes the option on [code].
    """

    def __init__(self, img_size, patch_size, embed_dim, depth, num_heads, target_dim, regressor_dim=None,
                 regressor_depth=4, regressor_heads=12, init_values=0.1, drop_path_rate=0.0):
        super().__init__()
        init_values, R = init_values or None, regressor_dim or embed_dim
        self.encoder = common.ViT(img_size, patch_size, embed_dim=embed_dim, depth=depth, num_heads=num_heads,
                                  init_values=init_values, drop_path_rate=drop_path_rate)
        self.encoder.set_positions(common.sincos_2d(embed_dim, self.encoder.grid, first="row"))  # [code]
        self.adapter = nn.Identity() if R == embed_dim else nn.Sequential(nn.Linear(embed_dim, R), nn.LayerNorm(R, eps=1e-6))
        self.mask_token = nn.Parameter(torch.zeros(1, 1, R))
        self.register_buffer("positions", common.sincos_2d(R, self.encoder.grid, first="row")[None])  # (1, N, R)
        rates = torch.linspace(0, drop_path_rate, regressor_depth, device="cpu").tolist()
        self.regressor = nn.ModuleList(RegressorBlock(R, regressor_heads, init_values and 0.1, rate) for rate in rates)
        self.head_norm = nn.LayerNorm(R, eps=1e-6)
        self.head = nn.Linear(R, target_dim)
        self._initialise()

    def _initialise(self):
        # The authors' outer class overrides the depth-scaled initialisation of BEiT that its parts begin with;
        # what stays [code]: Linear Xavier-uniform with zero bias (a fused qkv as one matrix), convolution and tokens
        # a normal of std 0.02 cut at one sigma, LayerNorm 1 and 0.
        common.xavier_init(self)
        for tensor in (self.encoder.patch_embed.proj.weight, self.encoder.cls_token, self.mask_token):
            nn.init.trunc_normal_(tensor, std=0.02, a=-0.02, b=0.02)
        nn.init.zeros_(self.encoder.patch_embed.proj.bias)
        common.freeze_key_bias(self.encoder)  # q and v biases only [code]

    def features(self, images, mask, supervise):
        """The supervised features before the head: {"cls": (B, 1, R), "visible": (B, V, R), "masked": (B, M, R)}."""
        visible_ids, masked_ids = (ids.to(images.device, non_blocking=True) for ids in common.split_ids(mask))  # (B, V), (B, M)
        z = self.adapter(self.encoder(images, mask))  # (B, 1+V, R)
        features = {}
        if supervise != "masked":
            features.update(cls=z[:, :1], visible=z[:, 1:])
        if supervise != "visible" and masked_ids.shape[1]:
            positions = self.positions.expand(len(z), -1, -1)  # (B, N, R)
            z_positions, m_positions = common.pick(positions, visible_ids), common.pick(positions, masked_ids)
            m = repeat(self.mask_token, "1 1 r -> b m r", b=len(z), m=masked_ids.shape[1])  # (B, M, R)
            for block in self.regressor:
                m = block(m, z[:, 1:], m_positions, z_positions)  # the class token takes no part [code]
            features["masked"] = m
        return features

    def forward(self, images, mask, targets, supervise="both"):
        """images (B, 3, S, S), mask (B, N) bool with True = hidden, targets (B, 1+N, C) raw teacher tokens, class token
        first, then raster order. Returns (loss, parts), parts being the detached means of "cls", "visible", "masked"."""
        if supervise not in ("both", "visible", "masked"):
            raise ValueError(f"supervise is 'both', 'visible' or 'masked', not {supervise!r}")
        visible_ids, masked_ids = (ids.to(images.device, non_blocking=True) for ids in common.split_ids(mask))
        if supervise == "masked" and masked_ids.shape[1] == 0:
            raise ValueError("supervise='masked' needs hidden patches, the mask hides none")
        features = self.features(images, mask, supervise)
        cls, patches = targets[:, :1], targets[:, 1:]
        labels = dict(cls=cls, visible=common.pick(patches, visible_ids), masked=common.pick(patches, masked_ids))
        answers = self.head(self.head_norm(torch.cat(list(features.values()), dim=1)))  # (B, T, C)
        distances = cosine_distance(answers, torch.cat([labels[name] for name in features], dim=1))  # (B, T)
        parts = distances.detach().split([tokens.shape[1] for tokens in features.values()], dim=1)
        return distances.mean(), {name: part.mean() for name, part in zip(features, parts)}


# The authors' names [code, spelling theirs] and ours.
OFFICIAL_NAMES = (
    ("regresser.regressor_blocks.", "regressor."), ("encoder_to_regresser_norm.", "adapter.1."),
    ("encoder_to_regresser.", "adapter.0."), ("decoder.norm.", "head_norm."), ("decoder.head.", "head."),
    (".norm1_q.", ".norm_q."), (".norm1_k.", ".norm_k."), (".norm1_v.", ".norm_v."), (".norm2_cross.", ".norm_2."),
    (".cross_attn.q_bias", ".attn.q.bias"), (".cross_attn.v_bias", ".attn.v.bias"), (".cross_attn.", ".attn."),
    (".mlp_cross.", ".mlp."), (".gamma_1_cross", ".ls1.gamma"), (".gamma_2_cross", ".ls2.gamma"),
    (".gamma_1", ".ls1.gamma"), (".gamma_2", ".ls2.gamma"),
)


def load_official(model, state_dict):
    """Loads the authors' pre-training weights (their key names) into a `CAEv2`, strictly.

    Every key is used, or is `regresser.norm.*` (which the released model never applies), or, without layer scale, a
    `gamma_*_cross` of ones. Raises ValueError that names missing keys, further keys, and wrong shapes.
    """
    own = model.state_dict()
    state, unused = {}, []
    for name, tensor in state_dict.items():
        ours = name
        for theirs, replacement in OFFICIAL_NAMES:
            ours = ours.replace(theirs, replacement)
        if name == "rd_pos_embed":
            state["positions"] = tensor[:, 1:]  # the class token takes no part in the regressor
        elif name.endswith("attn.q_bias") and name.startswith("encoder."):
            v_bias = state_dict.get(name.replace("q_bias", "v_bias"))
            if v_bias is not None:
                state[ours.replace("q_bias", "qkv.bias")] = torch.cat([tensor, torch.zeros_like(tensor), v_bias])
        elif name.endswith("attn.v_bias") and name.startswith("encoder.") and name.replace("v_bias", "q_bias") in state_dict:
            pass  # joined with its q_bias
        elif ours in own:
            state[ours] = tensor
        elif not (name.startswith("regresser.norm.") or (name.endswith("_cross") and bool((tensor == 1).all()))):
            unused.append(name)
    missing = [name for name in own if name not in state]
    if missing or unused:
        raise ValueError(f"not the weights of this CAE v2 model: missing {missing[:5] or 'nothing'}, unknown {unused[:5] or 'nothing'}")
    wrong = [f"{name} {tuple(state[name].shape)} instead of {tuple(own[name].shape)}" for name in own if state[name].shape != own[name].shape]
    if wrong:
        raise ValueError(f"the weights have other sizes than this CAE v2 model: {'; '.join(wrong[:3])}")
    model.load_state_dict(state)


# ---------------------------------------------------------------------------------------------------
# Loss


def cosine_distance(answers, targets):
    """1 - cosine between answers and targets, both (B, T, C), as (B, T), in fp32 or better. Δ

    The loss is its flat mean over class, visible and masked tokens [code]: with M of N patches hidden, the masked
    ones weigh M / (1+N), which is 15 % for ViT-Ti; it is no sum of two means.
    """
    with torch.autocast(answers.device.type, enabled=False):
        dtype = torch.promote_types(answers.dtype, torch.float32)
        return 1 - F.cosine_similarity(answers.to(dtype), targets.to(dtype), dim=-1)


# ---------------------------------------------------------------------------------------------------
# Preview


@torch.no_grad()
def preview(path, config, model, teacher, samples, device):
    """Draws samples: image | visible patches | cosine of answer and target per patch | teacher's similarity to a patch."""
    student, teacher_images, mask = inputs(samples, teacher, device)
    model.eval()
    targets = clip_targets(teacher, teacher_images)  # (B, 1+N, C)
    features = model.features(student, mask, config.supervise)
    features.pop("cls", None)
    visible_ids, masked_ids = common.split_ids(mask)
    ids = torch.cat([dict(visible=visible_ids, masked=masked_ids)[name] for name in features], dim=1).to(device)  # (B, T)
    answers = model.head(model.head_norm(torch.cat(list(features.values()), dim=1)))  # (B, T, C)
    cosines = 1 - cosine_distance(answers, common.pick(targets[:, 1:], ids))  # (B, T)
    grid, rows = model.encoder.grid, []
    for i, image in enumerate(samples[0]):
        image = image.to(device).float() / 255
        hidden = rearrange(mask[i].to(device), "(h w) -> 1 h w", h=grid[0])  # (1, h, w)
        # Grey for hidden patches; in the map of cosines, grey for patches that nobody asked about.
        seen = torch.where(F.interpolate(hidden[None].float(), size=image.shape[1:])[0] > 0, 0.5, image)
        asked = torch.zeros(hidden.numel(), dtype=torch.bool, device=device).index_fill_(0, ids[i], True)
        values = torch.zeros(hidden.numel(), device=device).index_copy_(0, ids[i], cosines[i].float())
        agreement = torch.where(rearrange(asked, "(h w) -> 1 h w", h=grid[0]), common.colour_map(rearrange(values, "(h w) -> h w", h=grid[0])), 0.5)
        centre = grid[0] // 2 * grid[1] + grid[1] // 2
        similar = F.cosine_similarity(targets[i, 1:], targets[i, 1 + centre], dim=-1)  # (N,)
        similar = (similar - similar.min()) / (similar.max() - similar.min()).clamp(min=1e-6)
        similar = common.colour_map(rearrange(similar, "(h w) -> h w", h=grid[0]))
        similar[:, centre // grid[1], centre % grid[1]] = torch.tensor([1.0, 0.2, 0.2], device=device)
        rows.append([image, seen, agreement, similar])
    common.save_panels(path, rows, ["image", "visible patches", "answer vs teacher", "teacher, one patch"],
                       "3rd: cosine, dark 0 to yellow 1, grey: not asked.  4th: similarity to the red patch, scaled per image.")


# ---------------------------------------------------------------------------------------------------
# Train


def inputs(batch, teacher, device):
    """A batch of `Augment` to (student images, teacher images, mask): float32 on the device, each with its own mean/std.

    The mask stays on the CPU, where `split_ids` reads it without making the GPU wait.
    """
    *crops, mask = batch
    crops = [crop.to(device, non_blocking=True) for crop in crops]
    student = common.normalise(crops[0])
    return student, common.normalise(crops[-1], teacher.preprocess_cfg["mean"], teacher.preprocess_cfg["std"]), mask


def build(config, target_dim):
    """The model of a configuration, with weights drawn from its seed."""
    torch.manual_seed(config.seed)
    return CAEv2(config.img_size, config.patch_size, config.embed_dim, config.depth, config.num_heads, target_dim, config.regressor_dim,
                 config.regressor_depth, config.regressor_heads, config.init_values, config.drop_path)


def start_from(model, path):
    """Loads --init FILE: our last.pt or encoder.safetensors, or the authors' pre-training checkpoint."""
    if str(path).endswith(".safetensors"):
        if not os.path.isfile(path):
            raise FileNotFoundError(f"no checkpoint file at {path}")
        state, target = load_file(path), model.encoder
    else:
        state, target = common.read_checkpoint(path), model
        ours = state.get("method") == "cae_v2"
        state = state.get("model", state)
        if not ours:
            return load_official(model, state)
    try:
        target.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"--init {path} does not fit this model: {str(error).splitlines()[1].strip()[:200]}") from error


def train(config, run, processes):
    """Pre-training, start to end: lr, forward, backward, step, log, save."""
    device = processes.device
    images = common.find_data(config.data, "pretrain", config.img_size)
    plan = common.make_plan(len(images), config.batch_size, config.micro_batch, config.epochs, processes.world)
    teacher, model = prepare(config, processes)
    samples = common.Samples(images, Augment(config, teacher.image_size[0]), config.seed)
    if config.compile == "on" or (config.compile == "auto" and device.type == "cuda"):
        for blocks in (model.encoder.blocks, model.regressor, teacher.transformer.resblocks):
            common.compile_blocks(blocks)
    optimizer = torch.optim.AdamW(common.parameter_groups(model, config.weight_decay), lr=config.lr, fused=True)
    if processes.main:
        describe(config, run, plan, images, model, processes)
    start = run.begin(processes, plan, model, optimizer, len(images))
    parallel = model if processes.world == 1 else nn.parallel.DistributedDataParallel(
        model, broadcast_buffers=False, gradient_as_bucket_view=True)
    warmup_steps = round(config.warmup_epochs * plan.steps_per_epoch)
    stop = min(config.max_steps or plan.total_steps, plan.total_steps)
    save_every = config.save_every or plan.steps_per_epoch
    batches = iter(common.training_loader(samples, plan, processes, config, start, stop))

    model.train()
    failures = 0
    for step in range(start, stop):
        lr = common.learning_rate(step, config.lr, warmup_steps, plan.total_steps, config.min_lr)
        for group in optimizer.param_groups:
            group["lr"] = lr

        for micro in range(plan.accumulation):
            student, teacher_images, mask = inputs(run.next_batch(batches), teacher, device)
            targets = clip_targets(teacher, teacher_images)
            # Drop path is the one draw made here; with a seed of its own it needs no saved generator.
            torch.manual_seed(common.seed_for(config.seed, "step", step, plan.first_row(micro, processes)))
            last = micro == plan.accumulation - 1
            with nullcontext() if last or processes.world == 1 else parallel.no_sync():
                with common.autocast(device, config.precision):
                    loss, parts = parallel(student, mask, targets, config.supervise)
                (loss / plan.accumulation).backward()
            run.record(loss=loss, **parts)

        # One wait for the device per step buys that a bad batch never reaches the weights. The norm is
        # that of the summed gradient, so all processes decide alike.
        grad_norm = nn.utils.clip_grad_norm_(model.parameters(), config.clip_grad)
        if grad_norm.isfinite():
            optimizer.step()
            failures = 0
        else:
            run.skipped, failures = run.skipped + 1, failures + 1
            if failures == 10:
                raise ValueError(f"ten steps in a row up to {step + 1} had no finite gradient: the last checkpoint in {run.folder} is "
                                 "good; start again from it with --init, --fresh and a lower --lr, or with --precision fp32")
        optimizer.zero_grad(set_to_none=True)

        run.log(step + 1, lr, grad_norm)
        run.expect(step + 1)
        stopping = run.stopping()
        if (step + 1) % save_every == 0 or step + 1 == stop or stopping:
            run.save(model, optimizer, step + 1)
            if processes.main:
                preview(run.folder / "preview.png", config, model, teacher, first_samples(samples), device)
                model.train()
        if stopping:
            break
    run.close()
    return step + 1


def prepare(config, processes):
    """(teacher, model) on the device. The main process fetches the teacher's weights, the others wait and read its cache."""
    if not processes.main:
        processes.wait()
    teacher = load_teacher(config.teacher, teacher_size(config.teacher, config.grid))
    if processes.main:
        processes.wait()
    # Cast once: autocast would cast the weights again in each step.
    teacher.to(processes.device, torch.bfloat16 if common.uses_bf16(processes.device, config.precision) else torch.float32)
    model = build(config, teacher.output_dim)
    if config.init:
        start_from(model, config.init)
    if config.supervise == "visible" or config.num_masked == 0:
        for parameter in [model.mask_token, *model.regressor.parameters()]:
            parameter.requires_grad_(False)  # the regressor does not run
    return teacher, model.to(processes.device)


def first_samples(samples, count=6):
    """The same few samples each time, so that pictures of a run can be compared."""
    return torch.utils.data.default_collate([samples[0, index % len(samples.images)] for index in range(count)])


# ---------------------------------------------------------------------------------------------------
# Main


def describe(config, run, plan, images, model, processes):
    """Prints the resolved recipe: what will be trained on what, with numbers as equations."""
    def millions(parameters):
        return f"{sum(parameter.numel() for parameter in parameters) / 1e6:.2f} M"

    scaled = config.lr * config.batch_size / 2048
    note = "" if config.batch_size == 2048 else f"; not scaled to this batch, linear scaling would give {scaled:.2e}"
    print(f"CAE v2 {config.model}: {millions(model.parameters())} parameters, encoder {millions(model.encoder.parameters())}; "
          f"{config.num_masked} of {config.grid**2} patches hidden ({config.mask}), supervised: {config.supervise}\n"
          f"teacher  {config.teacher}\n"
          f"data     {len(images)} images in {images.name}\n"
          f"batch    {plan.batch_size} = {processes.world} processes x {plan.accumulation} micro batches x {plan.micro_batch} images\n"
          f"lr       {config.lr:.2e} peak, absolute as in the paper's code at batch 2048{note}\n"
          f"steps    {plan.total_steps} = {config.epochs} epochs x {plan.steps_per_epoch} (warm-up {config.warmup_epochs:g} epochs)"
          f"{f', from step {run.start}' if run.start else ''}\n"
          f"device   {processes.device} x {processes.world}, precision {'bf16' if common.uses_bf16(processes.device, config.precision) else 'fp32'}\n"
          f"files    {run.folder}/: config.json, log.jsonl, last.pt, encoder.safetensors, preview.png", flush=True)


def dry_run(config):
    """Prints parameters, operations, memory and recipe without data, weights or a GPU: the models are built without storage."""
    name, _, teacher_cfg = teacher_config(config.teacher)
    size = teacher_size(config.teacher, config.grid)
    world = int(os.environ.get("WORLD_SIZE", 1))
    plan = common.make_plan(1_281_167, config.batch_size, config.micro_batch, config.epochs, world)
    with torch.device("meta"):
        model = build(config, teacher_cfg["embed_dim"])
        teacher = image_tower(name, "meta")
    teacher.positional_embedding = nn.Parameter(torch.empty(1 + config.grid**2, teacher.conv1.out_channels, device="meta"))
    teacher.output_tokens = True
    mask = common.random_masks(1, config.grid**2, config.num_masked)
    image, targets = torch.empty(1, 3, config.img_size, config.img_size, device="meta"), []
    teacher_flops = common.count_flops(lambda: targets.append(clip_targets(teacher, image.new_empty(1, 3, size, size))))
    flops = common.count_flops(lambda: model(image, mask, targets[0], config.supervise)[0].backward())
    parameters, frozen = sum(p.numel() for p in model.parameters()), sum(p.numel() for p in teacher.parameters())
    encoder = sum(p.numel() for p in model.encoder.parameters())
    V, M = config.grid**2 - config.num_masked, config.num_masked
    # Rule of thumb: 36 bytes x width x tokens x blocks of saved activations per image under bf16 autocast.
    activations = 36 * (config.embed_dim * (1 + V) * config.depth + config.regressor_dim * (V + M) * config.regressor_depth)
    memory = 16 * parameters + 2 * frozen + activations * plan.micro_batch
    print(f"CAE v2 {config.model}, nothing is loaded or trained\n"
          f"parameters  {parameters:,} (encoder {encoder:,}), teacher {config.teacher} {frozen:,}\n"
          f"operations  {(flops + teacher_flops) / 1e9:.1f} GFLOP per image and step, of which the teacher {teacher_flops / 1e9:.1f}\n"
          f"memory      about {memory / 2**30:.1f} GiB per process at micro batch {plan.micro_batch} (a rule of thumb for bf16)\n"
          f"batch       {plan.batch_size} = {world} processes x {plan.accumulation} micro batches x {plan.micro_batch} images\n"
          f"steps       {plan.total_steps} = {config.epochs} epochs x {plan.steps_per_epoch}, for ImageNet-1K's 1,281,167 images\n"
          f"recipe      {json.dumps({name: value for name, value in vars(config).items() if value != ''})}")


def main(argv=None):
    config = common.parse_config(Config, __doc__, SIZES, DEMO, argv)
    if config.dry_run:
        return dry_run(config)
    run = common.Run("cae_v2", config, "runs/cae_v2_demo" if config.demo else f"runs/cae_v2_{config.model}")
    if config.preview:
        return draw(config, run)
    if run.finished:
        return print(f"the run in {run.folder} is finished at step {run.start}; its encoder is {run.folder / 'encoder.safetensors'}. "
                     "Give --fresh for a new run.")
    with common.processes(config.device) as processes:
        step = train(config, run, processes)
    if processes.main:
        print(f"stopped at step {step}; {run.folder}/ holds preview.png, log.jsonl, encoder.safetensors and last.pt")
    run.exit()


def draw(config, run):
    """--preview: from last.pt if there is one, else from --init, else untrained."""
    images = common.find_data(config.data, "pretrain", config.img_size, num_scenes=100)
    with common.processes(config.device) as processes:
        teacher, model = prepare(config, processes)
        if run.state:
            model.load_state_dict(run.state["model"])
        samples = common.Samples(images, Augment(config, teacher.image_size[0]), config.seed)
        teacher.float()
        preview(config.preview, config, model, teacher, first_samples(samples), processes.device)
    print(f"drew {config.preview} from {run.checkpoint if run.state else config.init or 'untrained weights'}")


if __name__ == "__main__":
    common.run_main(main)
