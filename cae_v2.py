"""CAE v2: Context Autoencoder with CLIP Target (later title: with CLIP Latent Alignment).

Zhang et al., arXiv 2211.09799 (2022), TMLR 2023. Official code: Atten4Vis/CAE, project/CAEv2.

The idea in one sentence: a ViT that sees some patches of an image must give, for the patches it
sees and for those it does not, the features that a frozen CLIP tower gives for the whole image.

Why: were pixels the target, there would be nothing to learn at a patch that is seen. CLIP's feature
of a patch is not in its pixels: it says what the patch is in its image, a wing of this bird. To
give it at a visible patch the encoder must understand the rest of the image from what is left, and
the error reaches every visible token directly; that of a hidden one comes through another network,
the regressor. So little needs to be hidden, and less for a small model, since it guesses worse.

  image ---------------------------- CLIP tower (frozen) ---- targets (B, 1+N, C) -----+
    |                                                                                  |
    +- visible patches -- ViT encoder, adapter -- z (B, 1+V, R) ----+                  |
                              |                                     +- LN, linear -- cosine
          mask token x M -- regressor: queries m look at the -------+  pred, 1+N tokens
                            visible tokens of z and at m

  loss = 1/(1+N) sum over all tokens t, class token, visible and masked, of (1 - cos(y_t, c_t))
In the code: y `pred`, c `target`; `cls`, `visible`, `masked` in the log are the parts of the error.

Dimension key: B batch, N patches, V visible, M masked (V + M = N), D encoder width, R regressor
width, C teacher width, P patch side, S image side, h heads, d width of a head, T tokens.

What differs from MAE (marked Δ): target and loss, CLIP's features and a cosine, not pixels; visible
patches and the class token are supervised too; masked tokens come from a cross-attention regressor,
not from a self-attention decoder; masks are blocks; small models hide little (Ti 15 %, S 25, B 50).

Recipe (bare command, ViT-B): epochs 300, batch_size 2048, lr 1.5e-3, min_lr 1e-5,
warmup_epochs 10, weight_decay 0.05, clip_grad 3.0, drop_path 0.1, mask_ratio 0.5, img_size 224,
patch_size 16, crop_min 0.4, color_jitter 0.4

Sources: [code] the authors' code, [readme] their README, [T] a third party. Our decisions, where
these are silent (those that all methods share: top of common.py):
  [D1] ViT-L has no released script: a regressor of 4 x 1024 with 16 heads (the released code: 12
       of width 85), mask 50 % and lr 1.5e-3 as PanDerm's ViT-L on CAE v2 [T], the rest as ViT-B.
  [D2] ViT-L's teacher is CLIP ViT-B/16, the only one in the released code; ViT-L/14 takes a flag.
  [D3] In bf16 runs the teacher's weights are cast to bf16 once (authors: fp16).
  [D4] The ablation (--supervise) is not released: mean over class token and visible, or masked.
  [D5] A teacher that averages patches (the demo's) has no class token: the pooled vector is taken.
  [D6] On a few small grids no block of the smallest area fits; after 1000 tries smaller ones may.
  [D7] For another grid open_clip resizes the teacher's position table, bicubic; authors: bilinear.
  [D8] Colours are jittered on the device, after the crop, in fp32; authors: in the worker, on the
       whole image, cut to 8 bits 3 times: 1.4 of a mean difference of 1.5 of 255 (500 photos).

Commands (the same command again resumes; --out is runs/cae_v2_MODEL):
  python cae_v2.py --demo                                  built-in images and teacher, on a laptop
  python cae_v2.py --model vit_s --data ~/photos           one GPU, any folder of images
  torchrun --nproc_per_node=8 cae_v2.py --model vit_l      the paper's run: ImageNet-1K, 300 epochs
To use the method elsewhere copy this file and common.py (and demo/ for `scenes` and `demo`).
"""

import logging
import math
import os
import random
import typing
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms.v2 import functional as TF

import common
from common import flag

# --------------------------------------------------------------------------------------------------
# Config

METHOD = "cae_v2"  # in files and in the name of the run's folder

COLUMNS = ("embed_dim", "depth", "num_heads", "regressor_dim", "regressor_depth", "regressor_heads",
           "init_values")
SIZES = {model: dict(zip(COLUMNS, row)) for model, row in {
    "vit_ti": (192, 12, 12, 96, 1, 12, 0.1),  # [code], and so are 12 heads, where timm has 3
    "vit_s": (384, 12, 12, 384, 1, 12, 0.1),  # [code], where timm has 6
    "vit_b": (768, 12, 12, 768, 4, 12, 0.1),  # [code]
    "vit_l": (1024, 24, 16, 1024, 4, 16, 1e-5),  # [D1] [readme]
    "vit_demo": (128, 4, 4, 128, 1, 4, 0.1),  # ours, for 32-pixel images with patches of 4
}.items()}
DEPENDS = dict(mask_ratio=("model", dict(  # defaults by another flag: small models hide little Δ
    vit_ti=30 / 196, vit_s=49 / 196, vit_b=98 / 196, vit_l=98 / 196, vit_demo=0.2)))  # [code] [D1]

DEMO = dict(model="vit_demo", data="scenes", teacher="demo", img_size=32, patch_size=4, epochs=1,
            batch_size=64, lr=3e-3, warmup_epochs=0.1, drop_path=0.0, crop_min=0.8, workers=0,
            log_every=25)  # with 0.5 hidden, a model so small takes twice the steps


@dataclass(frozen=True)
class Config(common.RunConfig):
    """The recipe; the flags that are no part of it come from common.RunConfig."""

    epochs: int = flag(300, "passes over the data [code]", positive=True)
    batch_size: int = flag(2048, "images per step, all processes: 8 x 256 [code]", positive=True)
    lr: float = flag(1.5e-3, "peak rate; absolute, belongs to batch 2048 [code]", positive=True)
    min_lr: float = flag(1e-5, "learning rate at the end of the cosine [code]")
    warmup_epochs: float = flag(10, "epochs of linear warm-up from 0 [code]")
    weight_decay: float = flag(0.05, "AdamW, constant; betas are torch's 0.9, 0.999 [code]")
    clip_grad: float = flag(3.0, "largest global L2 norm of the gradient [code]", positive=True)
    drop_path: float = flag(0.1, "stochastic depth of the last block, rising linearly to it [code]")
    teacher: str = flag("ViT-B-16-quickgelu:openai", "NAME:TAG, NAME:FILE or `demo` [code] [D2]")
    supervise: typing.Literal["both", "visible", "masked"] = flag("both", "tokens [code] [D4]")
    mask: typing.Literal["block", "random"] = flag("block", "how hidden patches are chosen [code]")
    mask_ratio: float = flag(0.0, "share of hidden patches, rounded to a count (default by size)")
    img_size: int = flag(224, "pixels of the crop's side [code]", positive=True)
    patch_size: int = flag(16, "pixels of a patch's side [code]", positive=True)
    crop_min: float = flag(0.4, "smallest crop's share of the image's area [code]", positive=True)
    color_jitter: float = flag(0.4, "brightness, contrast, saturation; always applied [code]")

    def __post_init__(self):
        super().__post_init__()
        if not (self.supervise == "masked") <= self.num_masked < self.num_patches:
            raise ValueError(f"--mask_ratio {self.mask_ratio:g} must leave a patch visible, and "
                             "hide one for --supervise masked")
        if self.crop_min > 1 or self.drop_path >= 1:
            raise ValueError("--crop_min is at most 1 and --drop_path below 1")

    grid = property(lambda self: self.img_size // self.patch_size)
    num_masked = property(lambda self: round(self.mask_ratio * self.num_patches))
    peak_lr = property(lambda self: self.lr)  # absolute: not scaled with the batch [code]


# --------------------------------------------------------------------------------------------------
# Corrupt: which patches are hidden, and the crop that student and teacher share
def block_mask(grid, num_masked, rng):
    """One mask of rectangles with exactly `num_masked` hidden cells, as rows of 0 and 1. Δ
    BEiT's rule as the authors run it [code]: rectangles of random area and aspect are tried until
    the count is met; one that hides nothing new, or more than is left, is thrown away. `rng` is a
    `random.Random`, so that each draw can be compared with theirs."""
    rows, columns = common.pair(grid)
    if not 0 <= num_masked < rows * columns or (num_masked and min(rows, columns) < 2):
        raise ValueError(f"{num_masked} hidden patches do not fit into {rows} x {columns} in "
                         "blocks of 2 x 2 and more, with one patch visible")
    mask, left, tries = [[0] * columns for _ in range(rows)], num_masked, 0
    while left:
        # At least 16 cells are aimed at [code]; with fewer left, `uniform` runs from 16 down.
        area, tries = rng.uniform(16 if tries < 1000 else 1, left), tries + 1  # [D6]
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
    """(batch, N) bool, True = hidden, exactly `num_masked` per row: a `block_mask` each, drawn by a
    `random.Random` that `generator` seeds. Raises ValueError for a count outside 0..N-1."""
    seeds = torch.randint(2**62, (batch,), generator=generator).tolist()
    masks = [block_mask(grid, num_masked, random.Random(seed)) for seed in seeds]
    return torch.tensor(masks, dtype=torch.bool).flatten(1)  # (B, N)


def draw_colours(image, strength):
    """Colour jitter for a whole image uint8 (3, H, W), as what `recolour` does to crops of it:
    brightness, contrast and saturation in a random order, as rows (a, b, c), (3, 3) float32.
    Contrast needs the mean grey of the whole image, here of each fourth row and column [D8]."""
    image, rows, mean = image[None, :, ::4, ::4].float(), [], None
    for kind in torch.randperm(3).tolist():
        f = torch.empty(()).uniform_(max(0, 1 - strength), 1 + strength).item()
        mean = TF.rgb_to_grayscale(image).mean().item() if kind == 1 else mean
        rows.append([(f, 0, 0), (f, 0, (1 - f) * (mean or 0)), (f, 1 - f, 0)][kind])
        image = recolour(image, torch.tensor([rows[-1:]])) if mean is None else image
    return torch.tensor(rows)


def recolour(images, colours):
    """Images (B, 3, H, W) of 0..255 in float32 and colours (B, 3, 3) to images: three times each
    becomes a * image + b * grey + c, cut at 0 and 255; unlike in torchvision, not rounded [D8]."""
    for a, b, c in rearrange(colours, "b three abc -> three abc b 1 1 1"):
        images = torch.addcmul(b * TF.rgb_to_grayscale(images) + c, a, images).clamp_(0, 255)
    return images


class Augment:
    """Makes a training sample in a worker: student image, teacher image if its size differs, both
    uint8 (3, S, S), colours (3, 3), mask (N,) bool. The teacher sees the same colours and flip
    [code]; both images are one crop, resized to each size."""

    def __init__(self, config, teacher_size):
        self.config, self.sizes = config, list(dict.fromkeys([config.img_size, teacher_size]))

    def __call__(self, image, label):  # labels have no use here
        config, colours = self.config, draw_colours(image, self.config.color_jitter)
        box = RandomResizedCrop.get_params(image, (config.crop_min, 1.0), ratio=(3 / 4, 4 / 3))
        crops = [TF.resized_crop(image, *box, [size, size], TF.InterpolationMode.BICUBIC)
                 for size in self.sizes]
        if torch.rand(()) < 0.5:
            crops = [TF.horizontal_flip(crop) for crop in crops]
        mask = block_masks(1, config.grid, config.num_masked) if config.mask == "block" else \
            common.random_masks(1, config.num_patches, config.num_masked)
        return *crops, colours, mask[0]


def inputs(batch, teacher, device):
    """Turns a batch of `Augment` into (student images, teacher images, mask): images (B, 3, S, S)
    on the device, each with its own mean and std, the mask (B, N) on the CPU."""
    *parts, mask = batch
    *crops, colours = (part.to(device, non_blocking=True) for part in parts)
    # With other colours the teacher would ask for what the student cannot see.
    crops, cfg = [recolour(crop.float(), colours) for crop in crops], teacher.preprocess_cfg
    return common.normalise(crops[0]), common.normalise(crops[-1], cfg["mean"], cfg["std"]), mask


# --------------------------------------------------------------------------------------------------
# Target: the tokens of a frozen CLIP image tower
@torch.no_grad()
def clip_targets(visual, images):
    """Images (B, 3, S, S), normalised for the tower, to its tokens (B, 1+N, C) in float32. Δ
    ln_post and the projection are applied to all tokens, class token first, then patches in raster
    order [code]; open_clip itself projects the pooled one only [D5]. The projection leads to the
    space that images and captions share: a patch's vector says what would be written about it."""
    visual.output_tokens = True  # open_clip's switch for the patches beside the pooled token
    pooled, patches = visual(images.to(visual.conv1.weight.dtype))
    return torch.cat([pooled[:, None], patches @ visual.proj], dim=1).float()  # (B, 1+N, C)


def load_teacher(spec, img_size):
    """The image tower of an open_clip model, frozen, in eval mode, for images of `img_size` pixels.
    `spec` is NAME:TAG (published weights, from the cache or the network), NAME:FILE (open_clip's
    .safetensors, .bin or .pt), or `demo`. Raises ValueError or FileNotFoundError."""
    import open_clip  # here, not above: no other method needs it
    from huggingface_hub import constants, try_to_load_from_cache
    name, source, config = teacher_config(spec)
    if any(side % config["vision_cfg"]["patch_size"] for side in common.pair(img_size)):
        raise ValueError(f"the patches of the teacher {name} do not tile {img_size} pixels")
    published = open_clip.get_pretrained_cfg(name, source) or {}
    # With another activation everything would run, and the features would be wrong.
    if published and bool(published.get("quick_gelu")) != bool(config.get("quick_gelu")):
        raise ValueError(f"the weights {source} need another activation than {name} has: write "
                         "-quickgelu behind the name, or leave it out")
    page, _, file = published.get("hf_hub", "").rpartition("/")
    files = [file] if file else ["open_clip_model.safetensors", "open_clip_pytorch_model.bin"]
    found = [try_to_load_from_cache(page, file) for file in files if page]
    cached = [path for path in found if isinstance(path, str)]  # not None, nor a mark of absence
    if page and not cached and os.environ.get("RANK", "0") == "0":  # its retries may take a minute
        print(f"fetching the teacher's weights from {constants.ENDPOINT}/{page}; without a network "
              f"download {files[0]} there and give --teacher {name}:FILE", flush=True)
    source = [*cached, os.path.expanduser(source)][0]  # a file needs no network
    logging.disable()  # open_clip's own lines; what went wrong is said below
    try:
        visual = open_clip.create_model(name, source, require_pretrained=True,
                                        force_image_size=common.pair(img_size)).visual  # [D7]
        visual.preprocess_cfg |= {key: published[key] for key in ("mean", "std") if published}
        return visual.eval().requires_grad_(False)
    except Exception as error:  # open_clip, torch, the hub and safetensors have a dozen types
        why = " ".join(str(error).split())[:200]
        if "TorchScript" in why:
            why = ("OpenAI's archive: torch.save its torch.jit.load(FILE, 'cpu').state_dict() less "
                   "context_length, input_resolution and vocab_size, and give that")
        elif os.path.isfile(source):
            common.read_checkpoint(source)  # says it better where the file itself is bad
        if "visual.trunk" in str(error):
            why = "its image tower is one of timm's, the teacher must be a ViT of open_clip's own"
        raise ValueError(f"--teacher {spec}: no weights of {name} from {source}: {why}") from error
    finally:
        logging.disable(logging.NOTSET)


def teacher_config(spec):
    """open_clip's name, the tag or file, and the model's configuration of a `--teacher` value."""
    import open_clip
    demo = os.path.join(os.path.dirname(__file__), "demo", "tiny_clip")
    open_clip.add_model_config(f"{demo}.json")  # if there is one
    if spec == "demo" and not os.path.exists(f"{demo}.json"):
        raise FileNotFoundError("--teacher demo needs the folder demo/ beside cae_v2.py: copy it")
    name, _, source = (f"tiny_clip:{demo}.safetensors" if spec == "demo" else spec).partition(":")
    config = open_clip.get_model_config(name)  # None for hf-hub: a model there may have own layers
    if not source or config is None:
        raise ValueError(f"--teacher {spec} should read NAME:TAG or NAME:FILE, NAME of open_clip."
                         "list_models(), not hf-hub, such as ViT-B-16-quickgelu:openai, or `demo`")
    # In CLIPA and CoCa patch tokens never pass the last norm; timm's towers and ResNets are others.
    vision = config["vision_cfg"]
    if not vision.get("patch_size") or {"final_ln_after_pool", "attentional_pool"} & set(vision):
        raise ValueError(f"the image tower of {name} is not open_clip's own ViT, with a last norm "
                         "for every token: choose a ViT-... of OpenAI, LAION, DataComp or DFN")
    return name, source, config


def teacher_size(spec, grid):
    """The teacher's image side that gives the student's grid: 14 x 14 is 224 at /16, 196 at /14."""
    return teacher_config(spec)[2]["vision_cfg"]["patch_size"] * grid


# --------------------------------------------------------------------------------------------------
# Model
class CrossAttention(nn.Module):
    """Multi-head attention with its own input for each of q, k, v. There is no key bias [code]: it
    would add the same number to all logits of a query."""

    def __init__(self, dim, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.q = nn.Linear(dim, dim)
        self.k = nn.Linear(dim, dim, bias=False)
        self.v = nn.Linear(dim, dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, queries, keys, values):
        q, k, v = (rearrange(x, "b n (h d) -> b h n d", h=self.num_heads)
                   for x in (self.q(queries), self.k(keys), self.v(values)))
        x = common.attention(q, k, v)  # (B, h, M, d)
        return self.proj(rearrange(x, "b h n d -> b n (h d)"))  # (B, M, R)


class RegressorBlock(nn.Module):
    """Mask queries look at the visible tokens and at themselves. Δ
    Only the queries are changed: the encoder's tokens pass all blocks as they are, so that the
    encoder has to understand the image and the regressor only to guess the rest. Queries and keys
    carry positions, values do not; each of the three has its own LayerNorm [code]."""

    def __init__(self, dim, num_heads, init_values, drop_path):
        super().__init__()
        self.norm_q, self.norm_k, self.norm_v, self.norm_2 = (
            nn.LayerNorm(dim, eps=1e-6) for _ in range(4))
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
        # Not pre-norm as elsewhere: what `norm_2` gives is the new residual stream [code].
        u = self.norm_2(m + self.drop_path(self.ls1(a)))
        return u + self.drop_path(self.ls2(self.mlp(u)))


class CAEv2(nn.Module):
    """Encoder, regressor and one head for all tokens. `target_dim` is the teacher's width C.
    A `regressor_dim` other than `embed_dim` puts Linear + LayerNorm between encoder and the rest.
    `init_values` starts the encoder's layer scale; the regressor's then starts at 0.1, since the
    released code never passes its option on [code]. None or 0: neither has one."""

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
        self.regressor = nn.ModuleList(RegressorBlock(
            R, regressor_heads, 0.1 if init_values else None, rate) for rate in rates)
        self.head_norm = nn.LayerNorm(R, eps=1e-6)
        self.head = nn.Linear(R, target_dim)
        # The authors' outer class overrides BEiT's start [code]: Linear Xavier-uniform, bias 0 (qkv
        # as one); convolution and tokens a normal of std 0.02 cut at one sigma; norms 1 and 0.
        common.xavier_init(self)
        patch = self.encoder.patch_embed.proj
        for tensor in (patch.weight, self.encoder.cls_token, self.mask_token):
            nn.init.trunc_normal_(tensor, std=0.02, a=-0.02, b=0.02)
        nn.init.zeros_(patch.bias)
        common.freeze_key_bias(self.encoder)  # biases for q and v only [code]

    def predict(self, images, ids_keep, ids_masked, supervise="both"):
        """The pred of all supervised tokens, {"cls": (B, 1, C), "visible": (B, V, C), "masked":
        (B, M, C)}: one LayerNorm and one linear layer for all of them."""
        z = self.adapter(self.encoder(images, ids_keep=ids_keep))  # (B, 1+V, R)
        # What the encoder saw is supervised too: that gradient passes no network but the head. Δ
        tokens = {} if supervise == "masked" else dict(cls=z[:, :1], visible=z[:, 1:])
        # A hidden patch starts as the same token everywhere, known by its position alone, and in
        # each block of the regressor it reads what the encoder made of the visible ones, and what
        # the other hidden ones have become. Without the class token [code].
        if supervise != "visible" and ids_masked.shape[1]:
            positions = self.positions.expand(len(z), -1, -1)  # (B, N, R)
            z_positions = common.gather(positions, ids_keep)  # (B, V, R)
            m_positions = common.gather(positions, ids_masked)  # (B, M, R)
            m = self.mask_token.expand_as(m_positions)  # (B, M, R)
            for block in self.regressor:
                m = block(m, z[:, 1:], m_positions, z_positions)
            tokens["masked"] = m
        pred = self.head(self.head_norm(torch.cat(list(tokens.values()), dim=1)))  # (B, T, C)
        return dict(zip(tokens, pred.split([x.shape[1] for x in tokens.values()], dim=1)))

    def forward(self, images, mask, targets, supervise="both"):
        """Normalised images (B, 3, S, S), mask (B, N) bool, True = hidden, and targets (B, 1+N, C),
        raw teacher tokens, class token first, then raster order, to (loss, parts): parts are the
        detached means of "cls", "visible", "masked"."""
        if supervise not in ("both", "visible", "masked"):
            raise ValueError(f"supervise is 'both', 'visible' or 'masked', not {supervise!r}")
        ids_keep, ids_masked = common.mask_to_ids(mask, images.device)  # (B, V), (B, M)
        if supervise == "masked" and ids_masked.shape[1] == 0:
            raise ValueError("supervise='masked' needs hidden patches, but the mask hides none")
        if targets.shape != (wanted := (len(images), 1 + mask.shape[1], self.head.out_features)):
            raise ValueError(f"targets of shape {tuple(targets.shape)} were given, not {wanted}")
        # A token's target is the teacher's of the same place, which saw the hidden patches too.
        target = dict(cls=targets[:, :1], visible=common.gather(targets[:, 1:], ids_keep),
                      masked=common.gather(targets[:, 1:], ids_masked))
        pred = self.predict(images, ids_keep, ids_masked, supervise)
        errors = {name: cosine_distance(pred[name], target[name]) for name in pred}
        parts = {name: error.detach().mean() for name, error in errors.items()}
        return torch.cat(list(errors.values()), dim=1).mean(), parts


def build(config, target_dim):
    """The model of a configuration, with weights drawn from its seed."""
    torch.manual_seed(config.seed)
    model = CAEv2(config.img_size, config.patch_size, target_dim=target_dim,
                  drop_path_rate=config.drop_path, **SIZES[config.model])
    if config.supervise == "visible" or config.num_masked == 0:  # the regressor does not run
        model.regressor.requires_grad_(False)
        model.mask_token.requires_grad_(False)
    return model


def example(config):
    """(model, inputs of one image, the teacher's run) on torch's meta device, for --dry_run."""
    import open_clip
    name, _, clip = teacher_config(config.teacher)
    logging.disable()  # that the weights are random
    with torch.device("meta"):
        size, model = teacher_size(config.teacher, config.grid), build(config, clip["embed_dim"])
        teacher = open_clip.create_model(name, device="meta", force_image_size=size).visual
        targets = torch.empty(1, 1 + config.num_patches, clip["embed_dim"])
        images, teacher_images = (torch.empty(1, 3, S, S) for S in (config.img_size, size))
    logging.disable(logging.NOTSET)
    inputs = images, common.random_masks(1, config.num_patches, config.num_masked), targets
    return model, (*inputs, config.supervise), lambda: clip_targets(teacher, teacher_images)


# --------------------------------------------------------------------------------------------------
# Loss
def cosine_distance(pred, target):
    """1 - cosine of pred and target, both (B, T, C), as (B, T), in fp32 (float64 stays). Δ
    The loss is the flat mean over class, visible and masked tokens [code]: with M of N patches
    hidden, the masked ones weigh M / (1+N), 15 % for ViT-Ti. It is no sum of two means."""
    dtype = torch.promote_types(pred.dtype, torch.float32)
    return 1 - F.cosine_similarity(pred.to(dtype), target.to(dtype), dim=-1)


# --------------------------------------------------------------------------------------------------
# Preview
@torch.no_grad()
def preview(path, config, model, teacher, batch, device):
    """Draws a batch of `Augment` as rows: image | visible patches | cosine of pred and target."""
    model.eval()
    (student, teacher_images, mask), h = inputs(batch, teacher, device), model.encoder.grid[0]
    targets = clip_targets(teacher, teacher_images)[:, 1:]  # (B, N, C)
    ids = dict(zip(("visible", "masked"), common.mask_to_ids(mask, device)))
    pred = model.predict(student, *ids.values(), config.supervise)
    cosines = torch.full(mask.shape, -1.0, device=device)  # (B, N), where nothing is supervised
    for name in pred.keys() & ids.keys():
        errors = cosine_distance(pred[name], common.gather(targets, ids[name]))
        cosines.scatter_(1, ids[name], (1 - errors).clamp(min=0).nan_to_num())
    images = common.unnormalise(student)  # (B, 3, S, S)
    hidden, cosines = (rearrange(x, "b (h w) -> b h w", h=h) for x in (mask.to(images), cosines))
    seen = images.where(F.interpolate(hidden[:, None], images.shape[-2:]) == 0, 0.5)  # (B, 3, S, S)
    maps = [common.colour_map(x).where(x >= 0, 0.5) for x in cosines]
    common.save_panels(path, list(zip(images, seen, maps)),
                       ["image", "visible patches", "pred vs teacher"],
                       "3rd: cosine, dark 0 to yellow 1; grey: not supervised.")


# --------------------------------------------------------------------------------------------------
# Train
def train(config, run, dist):
    """Pre-training from start to end: lr, target, forward, backward, step, log, save."""
    device = dist.device
    images = common.find_data(config.data, "pretrain", config.img_size, cache=run.folder)
    # Every process asks for the weights; the hub's own lock lets one of a machine fetch them.
    teacher = load_teacher(config.teacher, teacher_size(config.teacher, config.grid))
    if common.uses_bf16(device, config.precision):
        teacher.bfloat16()  # once [D3]: autocast would cast the weights anew in each step
    samples = common.Samples(images, Augment(config, teacher.image_size[0]), config.seed)
    model, teacher = run.load(build(config, teacher.output_dim)).to(device), teacher.to(device)
    if config.preview:
        batch = common.preview_batch(samples)
        return preview(config.preview, config, model, teacher, batch, device)
    common.compile_blocks(config, device, model, teacher)
    groups = common.parameter_groups(model, config.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=config.peak_lr, fused=True)
    # Plans the batches, prints the recipe, restores the optimiser of a stopped run, starts loading.
    plan, parallel = run.prepare(dist, samples, model, optimizer)
    warmup_steps = round(config.warmup_epochs * plan.steps_per_epoch)

    model.train()
    for step in run.steps():  # up to the last, or --max_steps, or a signal
        lr = common.learning_rate(step, config.peak_lr, warmup_steps, plan.total_steps,
                                  config.min_lr)
        for group in optimizer.param_groups:
            group["lr"] = lr

        for micro, batch in enumerate(run.micro_batches()):
            student, teacher_images, mask = inputs(batch, teacher, device)
            targets = clip_targets(teacher, teacher_images)
            # Drop path is the one draw made here; seeded so, it needs no saved generator.
            row = plan.first_row(micro, dist)
            torch.manual_seed(common.seed_for(config.seed, "step", step, row))
            # Several processes average their gradients once a step, in its last backward pass.
            parallel.require_backward_grad_sync = micro == plan.accumulation - 1
            with common.autocast(device, config.precision):
                loss, parts = parallel(student, mask, targets, config.supervise)
            (loss / plan.accumulation).backward()
            run.record(loss=loss, **parts)

        grad_norm = nn.utils.clip_grad_norm_(model.parameters(), config.clip_grad)
        if run.may_step(optimizer, grad_norm):  # a gradient that is not finite changes nothing
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        if run.log(step + 1, lr, grad_norm) and dist.is_main:  # True: it is time to save
            run.save(model, optimizer, step + 1, model.encoder)
            run.draw(lambda path: preview(
                path, config, model, teacher, common.preview_batch(samples), device))
            model.train()


# --------------------------------------------------------------------------------------------------
# Main
def main(argv=None):
    config = common.parse_config(Config, __doc__, SIZES, DEMO, argv, DEPENDS)
    common.main(METHOD, config, example, train)


if __name__ == "__main__":
    common.run_main(main)
