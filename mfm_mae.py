"""MFM: masked autoencoder (MAE) with multi-level feature fusion, called MFF in the released code.

Liu et al., "Improving Pixel-based MIM by Reducing Wasted Modeling Capability", arXiv 2308.00261,
ICCV 2023. Released code: open-mmlab/mmpretrain. Base method: He et al., MAE, arXiv 2111.06377.

The idea in one sentence: the decoder of MAE gets the shallow blocks' features directly [abs], so
that the deep blocks need not carry the detail of pixels up to the last layer (our reading).

  image -- visible patches -- ViT encoder: blocks 0 .. 11, each (B, 1+V, D)
                                  |   |   |      |
                                linear maps, weighted sum (the last block as it is)
                                           |
                                  the encoder's final norm      (B, 1+V, D)
                                           |
       mask token x M -------- decoder, all N places            (B, 1+N, E)
                                           |
              pixels of the M hidden patches: predicted (B, M, P*P*C), true ones: squared error

Dimension key: B batch, N patches, V visible, M masked (V + M = N), D encoder width, E decoder
width, P patch side, C channels, H W image height and width, L fused blocks, h heads, d width of a
head, T tokens.

What differs from MAE (marked Δ): the decoder reads several blocks, each but the last through its
own linear map, averaged with learnable weights before the final norm; the weights are logged and
decay; the image is resized and cropped with a margin, not a random resized crop; optionally the
target is a low-pass image (PixMIM). `--fuse none --augment rrc` is MAE, up to D7 and D8. Nothing of
the fusion is kept: encoder.safetensors is a plain ViT, whose last block alone is used downstream.

Sources: [code] mmpretrain's release, [mae] facebookresearch/mae, [fork] the first author's forks,
[abs] the abstract. The body of the paper was not at hand. Where these are silent or differ:
  [D1] Only depth 12 has a released set, 0,2,4,6,8,11. Other depths keep its spacing: six blocks,
       a sixth of the depth apart, then the last. 24: 0,4,8,12,16,23. ViT-S, -Ti use 12's set too.
  [D2] Resizing is bilinear, as released; the author's fork has bicubic there.
  [D3] bf16 autocast without loss scaler instead of fp16 with one.
  [D4] Augmentation on uint8 tensors instead of PIL images, equal up to rounding.
  [D5] New models have MAE's position tables, column first. mmpretrain's are row first, which is
       the same thing until weights are exchanged: a checkpoint brings its own tables.
  [D6] Every draw is a function of (seed, epoch, image); the released runs use seed 2 + rank.
  [D7] Weight decay by the released rule, with or without fusion: the fusion's logits decay, the
       class and mask tokens do not (in facebookresearch/mae they do).
  [D8] Warm-up starts at 1e-4 of the peak, as in the released 300 epochs (800 epochs: 1e-9, MAE: 0).
  [D9] Biases of the encoder's MLPs start at 0, as in MAE; in mmpretrain from N(0, 1e-6). The maps
       of the attention fusion, whose start is not known, start as all others.
  [D10] The radius of the low-pass filter, 40 at 224 pixels [fork], grows with the image.
  [D11] A step whose gradient is not finite is skipped and counted, as a loss scaler does.

Commands (the same command again resumes):
  python mfm_mae.py --demo [--fuse none]                   built-in images, on a laptop [MAE]
  python mfm_mae.py --model vit_s --data ~/photos          one GPU, any folder of images
  torchrun --nproc_per_node=8 mfm_mae.py --model vit_b     the released run: ImageNet, 300 epochs
To use the method elsewhere copy this file and common.py (and demo/ for `scenes`).
"""

import json
import os
import re
import typing
from contextlib import nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn
from torchvision.transforms import RandomCrop, RandomResizedCrop
from torchvision.transforms.v2 import functional as TF

import common
from common import flag

# --------------------------------------------------------------------------------------------------
# Config

# mmpretrain calls ViT-S `deit-small`; the decoders of ViT-S and -Ti are those of the fork.
SIZES = {
    "vit_ti": dict(embed_dim=192, depth=12, num_heads=3,
                   decoder_dim=192, decoder_depth=8, decoder_heads=12),  # [fork]
    "vit_s": dict(embed_dim=384, depth=12, num_heads=6,
                  decoder_dim=384, decoder_depth=8, decoder_heads=12),  # [fork]
    "vit_b": dict(embed_dim=768, depth=12, num_heads=12,
                  decoder_dim=512, decoder_depth=8, decoder_heads=16),  # [code]
    "vit_l": dict(embed_dim=1024, depth=24, num_heads=16,
                  decoder_dim=512, decoder_depth=8, decoder_heads=16),  # [mae]
    "vit_h": dict(embed_dim=1280, depth=32, num_heads=16, patch_size=14,
                  decoder_dim=512, decoder_depth=8, decoder_heads=16),  # [mae]
    # Not of the paper: for 32-pixel images with patches of 4.
    "vit_demo": dict(embed_dim=128, depth=4, num_heads=4,
                     decoder_dim=64, decoder_depth=1, decoder_heads=4),
}

# Many small steps: 500 of 64 images gained MAE 15 points, 1000 of 32 images 26 at the same cost.
DEMO = dict(model="vit_demo", data="scenes", img_size=32, patch_size=4, epochs=2, batch_size=32,
            lr=1.6e-2, warmup_epochs=0.2, norm_pix="off", workers=0, log_every=50)


@dataclass(frozen=True)
class Config(common.RunConfig):
    """The whole command line; flags that change no number come from common.RunConfig."""

    epochs: int = flag(300, "passes over the data; 800 is the other released run [code]")
    batch_size: int = flag(4096, "images per step over all processes, 8 x 512 [code]")
    lr: float = flag(1.5e-4, "base learning rate: for 256 images, scaled with the batch [code]")
    warmup_epochs: float = flag(40, "epochs of linear warm-up [code] [D8]")
    weight_decay: float = flag(0.05, "AdamW, constant; betas are 0.9, 0.95 [code] [D7]")
    mask_ratio: float = flag(0.75, "share of hidden patches; the visible count is cut off [code]")
    augment: typing.Literal["resize_crop", "rrc"] = flag("resize_crop", "crop [code], or MAE's")
    fuse: str = flag("", "blocks to fuse, from 0, such as 0,2,4,6,8,11 [code], or `none`: plain MAE"
                         " (default: by depth [D1])")
    fusion: typing.Literal["average", "uniform", "attention"] = flag("average", "how [code] [fork]")
    projection: typing.Literal["linear", "none"] = flag("linear", "of shallow blocks [code] [fork]")
    target: typing.Literal["pixels", "lowpass"] = flag("pixels", "image, or PixMIM's [code] [fork]")
    norm_pix: typing.Literal["on", "off"] = flag("on", "normalise the target per patch [code]")
    img_size: int = flag(224, "pixels of the crop's side [code]")
    patch_size: int = flag(16, "pixels of a patch's side [code]")
    embed_dim: int = flag(0, "encoder width (default by size, like the following ones)")
    depth: int = flag(0, "encoder blocks")
    num_heads: int = flag(0, "encoder heads")
    decoder_dim: int = flag(0, "decoder width")
    decoder_depth: int = flag(0, "decoder blocks")
    decoder_heads: int = flag(0, "decoder heads")

    def __post_init__(self):
        super().__post_init__()
        common.check_range(self, 1, "epochs", "batch_size", "patch_size", "embed_dim", "depth",
                           "num_heads", "decoder_dim", "decoder_depth", "decoder_heads")
        common.check_range(self, 5, "img_size")  # 4 pixels are reflected around it
        common.check_range(self, None, "lr", "mask_ratio")
        common.check_range(self, 0, "warmup_epochs", "weight_decay")
        if self.img_size % self.patch_size:
            raise ValueError(f"--img_size {self.img_size} is not a multiple of --patch_size "
                             f"{self.patch_size}")
        if not 0 < self.num_masked < self.grid**2:
            raise ValueError(f"--mask_ratio {self.mask_ratio:g} hides {self.num_masked} of "
                             f"{self.grid**2} patches: some must be hidden, some visible")
        if self.warmup_epochs >= self.epochs:
            raise ValueError(f"--warmup_epochs {self.warmup_epochs:g} must be shorter than the run "
                             f"of {self.epochs} epochs (fractions such as 0.5 are fine)")
        if not re.fullmatch(r"|none|\d+(,\d+)*", self.fuse):
            raise ValueError(f"--fuse {self.fuse} should read like 0,2,4,6,8,11, or none")
        check_fuse(self.fused_blocks, self.depth)

    @property
    def grid(self):
        return self.img_size // self.patch_size

    @property
    def num_masked(self):
        # The number of visible patches is truncated, in floating point [mae] [code].
        return self.grid**2 - int(self.grid**2 * (1 - self.mask_ratio))

    @property
    def fused_blocks(self):
        if self.fuse == "none":
            return ()
        if self.fuse:
            return tuple(int(index) for index in self.fuse.split(","))
        sixths = {k * self.depth // 6 for k in range(5)}  # [D1]
        return tuple(sorted(sixths | {self.depth - 1}))

    @property
    def peak_lr(self):
        return self.lr * self.batch_size / 256


def check_fuse(fuse, depth):
    """Raises ValueError unless `fuse` is empty, or rising block numbers that end with the last: no
    loss would reach the blocks behind the last fused one."""
    if fuse and not (list(fuse) == sorted(set(fuse)) and fuse[0] >= 0 and fuse[-1] == depth - 1):
        raise ValueError(f"fused blocks {','.join(map(str, fuse))} must rise from at least 0 to "
                         f"{depth - 1}, the last of {depth} blocks counted from 0")


# --------------------------------------------------------------------------------------------------
# Corrupt: the crop, and which patches are hidden


class Augment:
    """Makes a training sample in a worker: image uint8 (3, S, S) [D4], mask (N,) bool.

    `resize_crop`: short side to S, 4 pixels of reflection around, a crop of S anywhere [code]. Δ
    `rrc`: a random part of 20 to 100 % of the area, resized to S [mae]. Both flip every other one.
    """

    def __init__(self, config):
        self.config = config

    def __call__(self, image, label):  # labels have no use here
        S = self.config.img_size
        if self.config.augment == "rrc":
            box = RandomResizedCrop.get_params(image, (0.2, 1.0), ratio=(3 / 4, 4 / 3))
            crop = TF.resized_crop(image, *box, [S, S], TF.InterpolationMode.BICUBIC)
        else:
            image = TF.resize(image, [S], TF.InterpolationMode.BILINEAR)  # [D2]
            image = TF.pad(image, 4, padding_mode="reflect")
            crop = TF.crop(image, *RandomCrop.get_params(image, (S, S)))
        if torch.rand(()) < 0.5:
            crop = TF.horizontal_flip(crop)
        mask = common.random_masks(1, self.config.grid**2, self.config.num_masked)
        return crop, mask[0]


# --------------------------------------------------------------------------------------------------
# Target: the pixels of the hidden patches


def patch_statistics(patches):
    """Mean and standard deviation of each patch, (B, M, 1): unbiased, 1e-6 in the root [mae]."""
    mean, variance = patches.mean(dim=-1, keepdim=True), patches.var(dim=-1, keepdim=True)
    return mean, (variance + 1e-6).sqrt()


def pixel_targets(images, ids, patch_size, norm_pix):
    """Patches `ids` (B, M) of images (B, C, H, W) as targets (B, M, P*P*C), normalised each by its
    own mean and deviation if `norm_pix`. A vector is ordered (row, column, channel) [mae]."""
    patches = common.pick(common.patchify(images, patch_size), ids)  # (B, M, P*P*C)
    if norm_pix:
        mean, std = patch_statistics(patches)
        patches = (patches - mean) / std
    return patches


def unnormalise(images):
    """Undoes `common.normalise`: pixels in 0..1."""
    mean, std = (images.new_tensor(values)[:, None, None]
                 for values in (common.IMAGENET_MEAN, common.IMAGENET_STD))
    return images * std + mean


def low_pass(images):
    """The low frequencies of normalised images (B, 3, H, W), PixMIM's target [fork]. Δ

    A disc of the shifted spectrum is kept. Its centre lies half a pixel beside the zero frequency,
    and the spectrum is not shifted back: the result is complex, its modulus is the image [fork].
    """
    H, W = images.shape[-2:]
    pixels = unnormalise(images)
    spectrum = torch.fft.fftshift(torch.fft.fft2(pixels), dim=(-2, -1))
    rows, columns = (torch.arange(size, device=images.device) - (size - 1) / 2 for size in (H, W))
    disc = rows[:, None].square() + columns.square() <= (40 * min(H, W) / 224) ** 2  # [D10]
    change = torch.fft.ifft2(spectrum * disc).abs() - pixels
    return images + change / images.new_tensor(common.IMAGENET_STD)[:, None, None]


# --------------------------------------------------------------------------------------------------
# Model


def projections(dim, num_blocks, kind):
    """One map per fused block: its own linear layer [code], but the last block stays as it is. Δ"""
    maps = [nn.Linear(dim, dim) if kind == "linear" else nn.Identity()
            for _ in range(num_blocks - 1)]
    return nn.ModuleList([*maps, nn.Identity()])


class Fusion(nn.Module):
    """A weighted average of block outputs, class token included, for the decoder to read. Δ

    The weights, one number for a whole block, are the softmax of learnable logits that start equal
    [code]; not learnable, they give the plain mean (`uniform` [fork]).
    """

    def __init__(self, dim, num_blocks, projection, learnable):
        super().__init__()
        self.projections = projections(dim, num_blocks, projection)
        self.logits = nn.Parameter(torch.ones(num_blocks), requires_grad=learnable)

    @property
    def weights(self):
        return self.logits.softmax(dim=0)  # (L,)

    def forward(self, outputs):
        """A list of L block outputs (B, 1+V, D) to their average (B, 1+V, D)."""
        projected = [project(h) for project, h in zip(self.projections, outputs)]
        return sum(weight * f for weight, f in zip(self.weights, projected))


class AttentionFusion(nn.Module):
    """The last block's tokens look at all tokens of all fused blocks [fork]. Δ

    Each block adds its own learnable vector; there is no key bias and no residual path.
    """

    def __init__(self, dim, num_blocks, projection, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.projections = projections(dim, num_blocks, projection)
        self.block_embed = nn.Parameter(torch.zeros(num_blocks, 1, 1, dim))
        self.q, self.v, self.proj = (nn.Linear(dim, dim) for _ in range(3))
        self.k = nn.Linear(dim, dim, bias=False)
        nn.init.normal_(self.block_embed, std=0.02)

    def forward(self, outputs):
        """A list of L block outputs (B, 1+V, D) to one of the same shape."""
        projected = [project(h) + e
                     for project, h, e in zip(self.projections, outputs, self.block_embed)]
        tokens = torch.cat(projected, dim=1)  # (B, L*(1+V), D)
        q, k, v = (rearrange(x, "b t (h d) -> b h t d", h=self.num_heads)
                   for x in (self.q(projected[-1]), self.k(tokens), self.v(tokens)))
        x = F.scaled_dot_product_attention(q, k, v)  # (B, h, 1+V, d)
        return self.proj(rearrange(x, "b h t d -> b t (h d)"))  # (B, 1+V, D)


class MFMMAE(nn.Module):
    """Encoder, fusion, decoder. `fuse`: blocks counted from 0, ending with the last; () is MAE.

    `.encoder` is a plain ViT: the fusion lies outside and never feeds back into its blocks.
    Raises ValueError for blocks that are not there and for options of another name.
    """

    def __init__(self, img_size=224, patch_size=16, embed_dim=768, depth=12, num_heads=12,
                 decoder_dim=512, decoder_depth=8, decoder_heads=16, fuse=(0, 2, 4, 6, 8, 11),
                 fusion="average", projection="linear", target="pixels", norm_pix=True,
                 mlp_ratio=4.0, decoder_mlp_ratio=4.0):
        super().__init__()
        check_fuse(fuse, depth)
        for value, allowed in ((fusion, ("average", "uniform", "attention")),
                               (projection, ("linear", "none")), (target, ("pixels", "lowpass"))):
            if value not in allowed:
                raise ValueError(f"{value!r} is none of {', '.join(allowed)}")
        self.target, self.norm_pix, self.blocks = target, norm_pix, tuple(fuse) or (depth - 1,)
        self.encoder = common.ViT(img_size, patch_size, embed_dim=embed_dim, depth=depth,
                                  num_heads=num_heads, mlp_ratio=mlp_ratio)  # [D5]
        if len(self.blocks) == 1:  # the last block alone: MAE
            self.fusion = None
        elif fusion == "attention":
            self.fusion = AttentionFusion(embed_dim, len(fuse), projection, num_heads)
        else:
            self.fusion = Fusion(embed_dim, len(fuse), projection, learnable=fusion == "average")
        P, Q = self.encoder.patch_size
        self.decoder_embed = nn.Linear(embed_dim, decoder_dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_dim))
        table = F.pad(common.sincos_2d(decoder_dim, self.encoder.grid), (0, 0, 1, 0))  # (1+N, E)
        self.decoder_pos_embed = nn.Parameter(table[None].to(self.mask_token), requires_grad=False)
        self.decoder_blocks = nn.ModuleList(
            common.Block(decoder_dim, decoder_heads, decoder_mlp_ratio)
            for _ in range(decoder_depth))
        self.decoder_norm = nn.LayerNorm(decoder_dim, eps=1e-6)
        self.decoder_pred = nn.Linear(decoder_dim, P * Q * 3)
        self._initialise()

    def _initialise(self):
        # Linear Xavier-uniform with zero bias, the fusion's maps too [code] [D9]. The ViT has what
        # else MAE asks for: Xavier on the patch projection as a matrix, its bias as a convolution
        # starts, class token N(0, 0.02).
        common.xavier_init(self)
        nn.init.normal_(self.mask_token, std=0.02)

    @property
    def fusion_weights(self):
        """The share of each fused block, (L,), summing to 1; None for attention, which has none."""
        if self.fusion is None:
            return torch.ones(1)
        return getattr(self.fusion, "weights", None)

    def encode(self, images, mask):
        """What the decoder reads: visible tokens (B, 1+V, D), fused, then normed once [code]. Δ"""
        outputs = self.encoder.layers(images, self.blocks, mask)  # L x (B, 1+V, D)
        fused = outputs[-1] if self.fusion is None else self.fusion(outputs)
        return self.encoder.norm(fused)

    def decode(self, latent, visible_ids, masked_ids):
        """Visible tokens (B, 1+V, D) to decoder tokens of all patches in raster order (B, N, E)."""
        x = self.decoder_embed(latent)  # (B, 1+V, E)
        masked = self.mask_token.expand(*masked_ids.shape, -1)  # (B, M, E)
        places = torch.cat([visible_ids, masked_ids], dim=1).argsort(dim=1)  # (B, N)
        patches = common.pick(torch.cat([x[:, 1:], masked], dim=1), places)  # (B, N, E)
        x = torch.cat([x[:, :1], patches], dim=1) + self.decoder_pos_embed  # (B, 1+N, E)
        for block in self.decoder_blocks:
            x = block(x)
        return x[:, 1:]  # (B, N, E)

    def answer(self, tokens):
        """Decoder tokens (B, T, E) to the pixels that they predict, (B, T, P*P*C)."""
        return self.decoder_pred(self.decoder_norm(tokens))

    def targets(self, images, ids):
        """What the patches `ids` (B, M) should be, (B, M, P*P*C)."""
        images = low_pass(images) if self.target == "lowpass" else images
        return pixel_targets(images, ids, self.encoder.patch_size, self.norm_pix)

    def forward(self, images, mask):
        """Returns (loss, parts): parts are what the log shows beside it, the learnt fusion weights.

        images (B, 3, H, W), normalised; mask (B, N) bool, True = hidden, the same count per row.
        """
        visible_ids, masked_ids = (ids.to(images.device, non_blocking=True)
                                   for ids in common.split_ids(mask))  # (B, V), (B, M)
        if masked_ids.shape[1] == 0:
            raise ValueError("the mask hides no patch, so there is nothing to predict")
        tokens = self.decode(self.encode(images, mask), visible_ids, masked_ids)  # (B, N, E)
        answers = self.answer(common.pick(tokens, masked_ids))  # (B, M, P*P*C)
        loss = squared_error(answers, self.targets(images, masked_ids)).mean()
        learnt = isinstance(self.fusion, Fusion) and self.fusion.logits.requires_grad
        weights = self.fusion_weights.detach() if learnt else ()
        return loss, {f"weight_{index}": weight for index, weight in enumerate(weights)}


# What mmpretrain's names begin with or contain, and ours, replaced in this order.
OFFICIAL_NAMES = (
    ("backbone.proj_layers.", "fusion.projections."), ("backbone.proj_weights", "fusion.logits"),
    ("backbone.ln1.", "encoder.norm."), ("backbone.layers.", "encoder.blocks."),
    ("backbone.", "encoder."), ("neck.ln1.", "decoder_norm."), ("neck.", ""),
    ("patch_embed.projection.", "patch_embed.proj."), (".ln1.", ".norm1."), (".ln2.", ".norm2."),
    (".ffn.layers.0.0.", ".mlp.fc1."), (".ffn.layers.1.", ".mlp.fc2."),
)


def our_names(state_dict):
    """A state dict under our names, from those of facebookresearch/mae, mmpretrain, or our own."""
    state = {}
    for name, tensor in state_dict.items():
        for theirs, replacement in OFFICIAL_NAMES:
            name = name.replace(theirs, replacement)
        # facebookresearch/mae has the decoder's names from here, the encoder's without a prefix.
        name = re.sub(r"^(?=(cls_token|pos_embed|patch_embed|blocks|norm)(\.|$))", "encoder.", name)
        state[name] = tensor.flatten() if name == "fusion.logits" else tensor  # (L,)
    return state


def load_official(model, state_dict):
    """Loads pre-training weights of facebookresearch/mae or mmpretrain into an `MFMMAE`, strictly.

    Both position tables come from the file [D5]. Raises ValueError naming what is missing or too
    much; published files that hold the encoder alone have no decoder, which is said so.
    """
    state = our_names(state_dict)
    if not any(name.startswith("decoder") for name in state):
        raise ValueError("these weights hold no decoder, so pre-training cannot go on from them; "
                         "--init can start the encoder alone, eval/ can evaluate it")
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        message = f"not the weights of this model: {common.reason(error)}"
        raise ValueError(message) from error


# --------------------------------------------------------------------------------------------------
# Loss


def squared_error(answers, targets):
    """Mean squared error of each patch, both (B, M, P*P*C), as (B, M), in fp32 or better.

    The loss is its mean over all hidden patches of the batch; visible patches do not count [mae].
    """
    dtype = torch.promote_types(answers.dtype, torch.float32)
    return (answers.to(dtype) - targets.to(dtype)).square().mean(dim=-1)


# --------------------------------------------------------------------------------------------------
# Preview


@torch.no_grad()
def preview(path, config, model, batch, device):
    """Draws a batch of `Augment` as rows: image | visible patches | prediction of every patch |
    prediction of the hidden ones among the visible patches."""
    model.eval()
    images, mask = inputs(batch, device)
    patch_size, grid = model.encoder.patch_size, model.encoder.grid
    ids = [ids.to(device) for ids in common.split_ids(mask)]
    patches = model.answer(model.decode(model.encode(images, mask), *ids))  # (B, N, P*P*C)
    note = "Predictions of visible patches (3rd) count in no loss."
    if model.norm_pix:
        true = low_pass(images) if model.target == "lowpass" else images
        mean, std = patch_statistics(common.patchify(true, patch_size))  # (B, N, 1)
        patches = patches * std + mean
        note = "3rd, 4th: each patch has its mean and deviation from the true image: that leaks."
    predicted = unnormalise(common.unpatchify(patches, patch_size, grid))  # (B, 3, H, W)
    hidden = mask.to(device)[:, :, None].expand_as(patches)  # (B, N, P*P*C)
    hidden = common.unpatchify(hidden, patch_size, grid)  # (B, 3, H, W)
    images = unnormalise(images)
    panels = [images, torch.where(hidden, 0.5, images), predicted,
              torch.where(hidden, predicted, images)]
    common.save_panels(path, list(zip(*panels)),
                       ["image", "visible patches", "prediction", "prediction + visible"], note)


# --------------------------------------------------------------------------------------------------
# Train


def inputs(batch, device):
    """A batch of `Augment` to (images, mask), images normalised float32 on the device. The mask
    stays on the CPU, where `split_ids` reads it."""
    crop, mask = batch
    return common.normalise(crop.to(device, non_blocking=True)), mask


def build(config):
    """The model of a configuration, with weights drawn from its seed."""
    torch.manual_seed(config.seed)
    return MFMMAE(config.img_size, config.patch_size, config.embed_dim, config.depth,
                  config.num_heads, config.decoder_dim, config.decoder_depth, config.decoder_heads,
                  config.fused_blocks, config.fusion, config.projection, config.target,
                  config.norm_pix == "on")


def start_from(model, path):
    """--init FILE: our last.pt, a checkpoint of facebookresearch/mae or mmpretrain, or an encoder
    alone (our encoder.safetensors, MAE's published files), which leaves the rest at random."""
    if path.endswith(".safetensors"):
        state = common.read_safetensors(path)
    else:
        state = common.read_weights(path, "state_dict", "model")
    state = our_names(state)
    with common.init_errors(path):
        if any(name.startswith("decoder") for name in state):
            load_official(model, state)
        else:
            model.encoder.load_state_dict(
                {name.removeprefix("encoder."): tensor for name, tensor in state.items()})
            print(f"--init {path} holds an encoder alone: fusion and decoder start at random")


def prepare(config, processes, init):
    """The model on the device, from its seed or from the file `init`."""
    model = build(config)
    if init:
        start_from(model, init)
    return model.to(processes.device)


def decays(name, parameter):
    """Which parameters get weight decay [D7]: matrices, and the fusion's logits. Δ"""
    return name == "fusion.logits" or (common.decays(name, parameter) and "token" not in name)


def train(config, run, processes):
    """Pre-training from start to end: lr, forward, backward, step, log, save."""
    device = processes.device
    images = common.find_data(config.data, "pretrain", config.img_size)
    plan = common.make_plan(len(images), config.batch_size, config.micro_batch, config.epochs,
                            processes.world)
    model = prepare(config, processes, "" if run.state else config.init)
    samples = common.Samples(images, Augment(config), config.seed)  # [D6]
    if common.uses_compile(device, config.compile):
        for blocks in (model.encoder.blocks, model.decoder_blocks):
            common.compile_blocks(blocks)
    groups = common.parameter_groups(model, config.weight_decay, decays)
    optimizer = torch.optim.AdamW(groups, lr=config.peak_lr, betas=(0.9, 0.95), fused=True)
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
        lr = common.learning_rate(step, config.peak_lr, warmup_steps, plan.total_steps,
                                  start=1e-4 * config.peak_lr)  # [D8]
        for group in optimizer.param_groups:
            group["lr"] = lr

        for micro in range(plan.accumulation):
            crops, mask = inputs(run.next_batch(batches), device)
            more_to_come = processes.world > 1 and micro < plan.accumulation - 1
            with parallel.no_sync() if more_to_come else nullcontext():
                with common.autocast(device, config.precision):  # [D3]
                    loss, parts = parallel(crops, mask)
                (loss / plan.accumulation).backward()
            run.record(loss=loss, **parts)

        # For the log: nothing is clipped [mae] [code].
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        grad_norm = nn.utils.get_total_norm(gradients)
        run.update(optimizer, grad_norm)  # skips a step whose gradient is not finite [D11]

        run.log(step + 1, lr, grad_norm)
        stopping = run.stopping()
        if (step + 1) % save_every == 0 or step + 1 == run.stop or stopping:
            run.save(model, optimizer, step + 1)
            if processes.main:
                picture = run.folder / "preview.png"
                preview(picture, config, model, common.preview_batch(samples), device)
                model.train()
        if stopping:
            break
    run.close()


# --------------------------------------------------------------------------------------------------
# Main


def describe(config, model, plan, processes, data, folder):
    """Prints the resolved recipe, with its numbers as equations."""
    total, encoder = (sum(p.numel() for p in part.parameters()) for part in (model, model.encoder))
    blocks = ",".join(map(str, config.fused_blocks))
    fused = f"{config.fusion} of blocks {blocks}, projection {config.projection}"
    print(f"{'MFM' if blocks else 'MAE'}      {config.model}: {total:,} parameters, {encoder:,} of "
          f"them in the encoder\n"
          f"task     {config.num_masked} of {config.grid**2} patches hidden, target: "
          f"{config.target}{', normalised per patch' if config.norm_pix == 'on' else ''}\n"
          f"fusion   {fused if blocks else 'none'}\n"
          f"data     {data}, {config.augment}\n"
          f"lr       {config.peak_lr:.2e} = {config.lr:.2e} x {config.batch_size} / 256\n"
          f"{common.describe(config, plan, processes, folder)}", flush=True)


def dry_run(config, folder):
    """Prints recipe and cost without data, weights or a GPU: the model on torch's meta device."""
    N, M = config.grid**2, config.num_masked
    processes = common.Processes(0, int(os.environ.get("WORLD_SIZE", 1)), torch.device("cpu"))
    plan = common.make_plan(1_281_167, config.batch_size, config.micro_batch, config.epochs,
                            processes.world)
    with torch.device("meta"):
        model, image = build(config), torch.empty(1, 3, config.img_size, config.img_size)
    mask = common.random_masks(1, N, M)
    flops = common.count_flops(lambda: model(image, mask)[0].backward())
    # Saved activations under bf16: about 36 bytes per width, token and block (a rule of thumb).
    activations = 36 * (config.embed_dim * (1 + N - M) * config.depth
                        + config.decoder_dim * (1 + N) * config.decoder_depth)
    weights = sum(p.numel() for p in model.parameters())
    memory = (16 * weights + activations * plan.micro_batch) / 2**30
    describe(config, model, plan, processes, "1,281,167 images assumed (ImageNet-1K)", folder)
    print(f"cost     {flops / 1e9:.1f} GFLOP per image and step\n"
          f"memory   roughly {memory:.1f} GiB per process in bf16\n"
          f"recipe   {json.dumps(vars(config))}")


def main(argv=None):
    config = common.parse_config(Config, __doc__, SIZES, DEMO, argv)
    out = config.out or f"runs/mfm_mae_{'demo' if config.demo else config.model}"
    if config.dry_run:
        return dry_run(config, out)
    run = common.Run("mfm_mae", config, out)
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
        model = prepare(config, processes, "" if run.state else config.init)
        if run.state:
            model.load_state_dict(run.state["model"])
        samples = common.Samples(images, Augment(config), config.seed)
        batch = common.preview_batch(samples)
        preview(config.preview, config, model, batch, processes.device)
    weights = run.checkpoint if run.state else config.init or "untrained weights"
    print(f"drew {config.preview} from {weights}")


if __name__ == "__main__":
    common.run_main(main)
