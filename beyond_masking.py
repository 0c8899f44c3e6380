"""Beyond Masking: Demystifying Token-Based Pre-Training for Vision Transformers.

Tian et al., arXiv 2203.14313 (2022). Official code: sunsmarterjie/beyond_masking.

The idea in one sentence: hiding patches is only one way to spoil an image that a ViT must restore;
of the others, those that move things help more than those that change their look, and the best
practice joins masking with a zoom.

  photo -- crop -- clean image -- degrade -- view (B, 3, S, S) -- visible patches -- ViT encoder
                       |                                                                 |
                       |                                     mask tokens -- decoder -- z (B, V, D)
                       |                                                       |
                       +-- resize, normalise each patch -- target -- squared error (B, N, 3*P*P)

  task      clean   the view is                       the answer shows       loss over      top-1
  mask      S       the clean image, 75 % hidden      the same place         hidden         82.9
  zoom_in   S*9/7   its centre                        all of it, squeezed    centre, rim    82.7
  zoom_out  S*5/7   it amid its mirror images         it alone, enlarged     the view       82.5
  distort   S       it through a fish-eye             it, straight           all            82.1
  blur      S       it after a random convolution     it, sharp              all            81.8
  decolor   S       one random mix of its colours     it, in colour          all            81.4
  mask+zoom_in      zoom_in, 75 % of the view hidden                         hidden, rim    83.2
(ViT-B, 300 epochs, fine-tuned on ImageNet-1K [readme].) mask+zoom_out and mask+distort work too.

Dimension key: B batch, N patches, V visible, M masked (V + M = N), D encoder width, E decoder
width, P patch side, S side of the view, R side of the clean image, H heads.

What differs from MAE (marked Δ): the degradations, and that view and answer may lie in different
frames, so that no token can copy its own patch; pixels are normalised per patch and per colour;
1-D positions; a decoder of 4 narrow blocks; no class token.

Sources: [code] the authors' code, [readme] their README, [issue] the author's replies in their
issue tracker. The text of the paper was not at hand. Where they are silent, we decided:
  [D1] The released zooms cannot run unmasked, though the author says that no task but `mask...`
       hides patches [issue]. Unmasked, their patch term runs over all patches; 0.8 and 0.2 stay.
  [D2] The released blur cannot run; its mean weight 1/49 and padding 3 fit a 7 x 7 convolution of
       3 to 3 channels. Its bias is drawn per image as well; the authors draw it once per process.
  [D3] Offsets of zoom_out and weights of decolor are drawn per image; authors: per batch.
  [D4] decolor's encoder has one input channel. The exported encoder takes RGB: each colour gets a
       third of the weights, the mean of the random mixes. On grey images nothing changes.
  [D5] mask+distort is not released: distort's loss over all patches, for a patch that the view
       hides is no particular place of the answer.
  [D6] Decoders of ViT-Ti and S: half the encoder's width, 4 blocks, as for B. For L the released
       folders disagree: 24 blocks and a decoder of 512 x 8 x 8, as all but the zoom-in folder say.
  [D7] bf16 autocast without loss scaler instead of fp16 with one; augmentation on uint8 tensors.
  [D8] Every draw is a function of (seed, epoch, image); authors: seed 0 + rank.
  [D9] A step whose gradient is not finite is skipped and counted, as a loss scaler would.
  [D10] Batch 2048 and 20 epochs of warm-up, as the authors' two-node launcher has them.

Commands (the same command again resumes):
  python beyond_masking.py --demo                                 built-in images, on a laptop
  python beyond_masking.py --model vit_s --data ~/photos --task zoom_in
  torchrun --nproc_per_node=8 beyond_masking.py --model vit_b     the best practice, ImageNet-1K
To use the method elsewhere copy this file and common.py (and demo/ for `scenes`).
"""

import functools
import json
import math
import os
import typing
from contextlib import nullcontext
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

TASKS = ("mask", "zoom_in", "zoom_out", "distort", "blur", "decolor",
         "mask+zoom_in", "mask+zoom_out", "mask+distort")

SIZES = {
    "vit_ti": dict(embed_dim=192, depth=12, num_heads=3, decoder_dim=96, decoder_depth=4,
                   decoder_heads=3),  # [D6]
    "vit_s": dict(embed_dim=384, depth=12, num_heads=6, decoder_dim=192, decoder_depth=4,
                  decoder_heads=3),  # [D6]
    "vit_b": dict(embed_dim=768, depth=12, num_heads=12, decoder_dim=384, decoder_depth=4,
                  decoder_heads=6),  # [code]
    "vit_l": dict(embed_dim=1024, depth=24, num_heads=16, decoder_dim=512, decoder_depth=8,
                  decoder_heads=8),  # [D6]
    # Not of the paper: for 28-pixel images with patches of 4.
    "vit_demo": dict(embed_dim=128, depth=4, num_heads=4, decoder_dim=64, decoder_depth=1,
                     decoder_heads=2),
}

DEMO = dict(model="vit_demo", data="scenes", img_size=28, patch_size=4, epochs=4, batch_size=64,
            lr=2e-3, warmup_epochs=0.3, crop_min=1.0, workers=0, log_every=50)


@dataclass(frozen=True)
class Config(common.RunConfig):
    """The whole command line; flags that change no number come from common.RunConfig."""

    task: typing.Literal[TASKS] = flag("mask+zoom_in", "how the image is degraded [readme]")
    epochs: int = flag(300, "passes over the data [readme]")
    batch_size: int = flag(2048, "images per step over all processes [code] [D10]")
    lr: float = flag(1.5e-4, "base learning rate; the peak is lr x batch_size / 256 [code]")
    min_lr: float = flag(1e-5, "learning rate at the end of the cosine [code]")
    warmup_epochs: float = flag(20, "epochs of linear warm-up from 0 [code] [D10]")
    weight_decay: float = flag(0.05, "AdamW, constant; betas are 0.9, 0.95 [code]")
    mask_ratio: float = flag(0.0, "share of hidden patches (default: 0.75 in `mask...`) [code]")
    img_size: int = flag(224, "pixels of the view's side [code]")
    patch_size: int = flag(16, "pixels of a patch's side [code]")
    crop_min: float = flag(0.2, "smallest area of a random crop, as a share of the image [code]")
    embed_dim: int = flag(0, "encoder width (default by size, like the following ones)")
    depth: int = flag(0, "encoder blocks")
    num_heads: int = flag(0, "encoder heads")
    decoder_dim: int = flag(0, "decoder width")
    decoder_depth: int = flag(0, "decoder blocks")
    decoder_heads: int = flag(0, "decoder heads")

    def __post_init__(self):
        super().__post_init__()
        common.check_range(self, 1, "epochs", "batch_size", "img_size", "patch_size", "embed_dim",
                           "depth", "num_heads", "decoder_dim", "decoder_depth", "decoder_heads")
        common.check_range(self, None, "lr", "crop_min")
        common.check_range(self, 0, "min_lr", "warmup_epochs", "weight_decay", "mask_ratio")
        check_size(self.task, self.img_size, self.patch_size)
        if not hides(self.task) and self.mask_ratio:
            raise ValueError(f"--task {self.task} hides no patches: --mask_ratio belongs to "
                             f"{', '.join(filter(hides, TASKS))}")
        if hides(self.task) and not self.mask_ratio:
            object.__setattr__(self, "mask_ratio", 0.75)
        if self.num_masked >= self.grid**2:
            raise ValueError(f"--mask_ratio {self.mask_ratio:g} leaves no patch visible: give less")
        if self.warmup_epochs >= self.epochs:
            raise ValueError(f"--warmup_epochs {self.warmup_epochs:g} must be shorter than the run "
                             f"of {self.epochs} epochs (fractions such as 0.5 are fine)")
        if self.crop_min > 1:
            raise ValueError("--crop_min is at most 1")

    @property
    def grid(self):
        return self.img_size // self.patch_size

    @property
    def num_masked(self):
        # The number of visible patches is truncated [code].
        return self.grid**2 - int(self.grid**2 * (1 - self.mask_ratio))

    @property
    def peak_lr(self):
        return self.lr * self.batch_size / 256


def hides(task):
    """Whether patches are hidden: in `mask` and the mixtures with it [issue]."""
    return task.startswith("mask")


def degradation(task):
    """What happens to the image besides hiding patches: the word after `mask+`, or the task."""
    return task.removeprefix("mask+")


def check_size(task, img_size, patch_size):
    """Raises ValueError for an unknown task, or an image that does not fit it or the patches."""
    if task not in TASKS:
        raise ValueError(f"there is no task {task!r}: choose from {', '.join(TASKS)}")
    for side, patch in zip(common.pair(img_size), common.pair(patch_size)):
        unit = math.lcm(7, patch) if "zoom" in task else patch
        if side % unit:
            near = sorted({max(side // unit, 1) * unit, (side // unit + 1) * unit})
            why = " and of 7, as the zooms are 9:7 and 5:7" if "zoom" in task else ""
            raise ValueError(f"img_size {side} is not a multiple of patch_size {patch}{why}: the "
                             f"nearest that works is {' or '.join(map(str, near))}")


# --------------------------------------------------------------------------------------------------
# Corrupt: what is done to an image, and what is drawn for it


def clean_size(task, img_size):
    """(H, W) of the clean image for a view of `img_size`: 9/7 of it, 5/7 of it, or the same. Δ

    For 224: 288, 160 or 224 [code].
    """
    scale = dict(zoom_in=9, zoom_out=5).get(degradation(task), 7)
    return tuple(side * scale // 7 for side in common.pair(img_size))


def sample_params(task, batch, generator=None, img_size=224):
    """What `degrade` needs besides the image, for `batch` images: a dict of tensors, maybe empty.

    zoom_out: left, top (B,) int64, 0 .. 2/7 S - 1. distort: centre (B, 2) as x, y in [-1, 1],
    magnitude (B,). blur: weight (B, 3, 3, 7, 7), bias (3,). decolor: weights (B, 3).
    """
    def uniform(low, high, *shape):
        return low + (high - low) * torch.rand(*shape, generator=generator)

    task = degradation(task)
    if task == "zoom_out":
        rows, columns = (2 * side // 7 for side in common.pair(img_size))
        return dict(left=torch.randint(columns, (batch,), generator=generator),  # [code] [D3]
                    top=torch.randint(rows, (batch,), generator=generator))
    if task == "distort":
        return dict(centre=uniform(-1, 1, batch, 2), magnitude=uniform(0.15, 0.25, batch))  # [code]
    if task == "blur":
        noise = torch.randn(batch, 3, 3, 7, 7, generator=generator)
        return dict(weight=1 / 49 + 0.02 * noise, bias=uniform(-1, 1, 3) / 147**0.5)  # [D2]
    if task == "decolor":
        return dict(weights=uniform(0, 0.667, batch, 3))  # [code] [D3]
    return {}


def degrade(task, clean, params):
    """Clean images (B, 3, *clean_size), normalised, to views: (B, 3, S, S), decolor (B, 1, S, S). Δ

    Pure: all that is random comes in `params`, as `sample_params` draws it. Patches are hidden
    later, in the encoder: zoom first, mask second [code].
    """
    task = degradation(task)
    if task == "zoom_in":
        return centre_of(clean)  # (B, 3, S, S)
    if task == "zoom_out":
        return amid_mirrors(clean, params)  # (B, 3, S, S)
    if task == "distort":
        return fish_eye(clean, **params)
    if task == "blur":  # one convolution per image, which mixes the channels too
        kernels = rearrange(params["weight"], "b o i h w -> (b o) i h w")
        blurred = F.conv2d(rearrange(clean, "b c h w -> 1 (b c) h w"), kernels, padding=3,
                           groups=len(clean))
        bias = params["bias"][..., None, None]  # (3, 1, 1) or (B, 3, 1, 1)
        return rearrange(blurred, "1 (b c) h w -> b c h w", b=len(clean)) + bias
    if task == "decolor":  # of normalised values; the weights need not sum to 1 [code]
        return (clean * params["weights"][..., None, None]).sum(dim=1, keepdim=True)  # (B, 1, S, S)
    return clean


def centre_of(images):
    """The central 7/9 of images, in height and in width: (B, C, R, R) to (B, C, S, S)."""
    rows, columns = (side // 9 for side in images.shape[-2:])
    return images[..., rows:-rows, columns:-columns]


def amid_mirrors(images, params):
    """Images (B, C, R, R) at (top, left) of a canvas of 7/5 their size, amid their mirror images.

    The edge pixel is repeated (numpy's "symmetric"): -1 shows 0, -2 shows 1 [code].
    """
    for dim, offset in ((2, params["top"]), (3, params["left"])):
        size = images.shape[dim]
        place = torch.arange(size * 7 // 5, device=images.device)
        place = place - torch.as_tensor(offset, device=images.device).reshape(-1, 1)  # (B or 1, S)
        place = torch.where(place < 0, -1 - place, place)
        place = torch.where(place >= size, 2 * size - 1 - place, place)
        ids = place[:, None, :, None] if dim == 2 else place[:, None, None, :]
        images = torch.take_along_dim(images, ids, dim=dim)
    return images  # (B, C, S, S)


def fish_eye(images, centre, magnitude):
    """What lies at q comes from q + m |c - q| (c - q), in coordinates of -1 .. 1 as x, y [code].

    images (B, C, S, S), centre c (B, 2), magnitude m (B,). Corner pixels lie at -1 and 1.
    """
    y, x = (torch.linspace(-1, 1, side, device=images.device) for side in images.shape[-2:])
    q = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1).to(images)  # (S, S, 2)
    towards = centre[:, None, None] - q  # (B, S, S, 2)
    grid = q + magnitude[:, None, None, None] * towards.norm(dim=-1, keepdim=True) * towards
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=True)


class Augment:
    """Makes a training sample in a worker: clean image, what is drawn for its degradation, mask.

    Random resized crop and flip, nothing else [code]. The image is uint8 (3, R, R) [D7], the mask,
    where the task has one, (N,) bool.
    """

    def __init__(self, config):
        self.config, self.size = config, clean_size(config.task, config.img_size)

    def __call__(self, image, label):  # labels have no use here
        config = self.config
        box = RandomResizedCrop.get_params(image, (config.crop_min, 1.0), ratio=(3 / 4, 4 / 3))
        image = TF.resized_crop(image, *box, self.size, TF.InterpolationMode.BICUBIC)
        if torch.rand(()) < 0.5:
            image = TF.horizontal_flip(image)
        params = sample_params(config.task, 1, img_size=config.img_size)  # [D8]
        params = {name: value.squeeze(0) for name, value in params.items()}
        if not hides(config.task):
            return image, params
        return image, params, common.random_masks(1, config.grid**2, config.num_masked)[0]


# --------------------------------------------------------------------------------------------------
# Target: pixels of the clean image


@functools.cache
def area_matrix(old, new, device, dtype):
    """(new, old): row i averages the pixels floor(i old/new) .. ceil((i+1) old/new) - 1."""
    i = torch.arange(new, device="cpu")[:, None]
    first, end = i * old // new, -(-(i + 1) * old // new)
    pixel = torch.arange(old, device="cpu")
    inside = (first <= pixel) & (pixel < end)
    return (inside.double() / (end - first)).to(device, dtype)


def area_resize(images, size):
    """Images (B, C, h, w) to (B, C, *size) by averaging, in both directions [code]: the adaptive
    average pooling of torch, as two small matrices, whose gradient is deterministic everywhere."""
    rows, columns = (area_matrix(old, new, images.device, images.dtype)
                     for old, new in zip(images.shape[-2:], size))
    return rows @ images @ columns.T


def normalise_patches(images, patch_size):
    """Normalised images (B, 3, S, S) to patches (B, N, P*P*3), each of mean 0 and deviation 1. Δ

    Per patch and per colour, with the unbiased deviation, of pixels in 0 .. 1 [code]; MAE
    normalises the three colours of a patch together.
    """
    mean, std = (images.new_tensor(value)[:, None, None]
                 for value in (common.IMAGENET_MEAN, common.IMAGENET_STD))
    patches = common.patchify(images * std + mean, patch_size)  # (B, N, P*P*3)
    pixels = rearrange(patches, "b n (pq c) -> b n pq c", c=3)
    std, mean = torch.std_mean(pixels, dim=2, keepdim=True)
    return rearrange((pixels - mean) / (std + 1e-6), "b n pq c -> b n (pq c)")


def answer_target(clean, patch_size, img_size):
    """What the answer's patches should be: all of the clean image, at the answer's size [code]."""
    return normalise_patches(area_resize(clean, img_size), patch_size)  # (B, N, P*P*3)


# --------------------------------------------------------------------------------------------------
# Model


class Decoder(nn.Module):
    """Blocks, LayerNorm, linear head, on all patches [code]."""

    def __init__(self, grid, dim, depth, num_heads, outputs):
        super().__init__()
        table = common.sinusoid_1d(dim, math.prod(grid))[None]  # (1, N, E)
        self.positions = nn.Parameter(table.to(torch.empty(0).device), requires_grad=False)
        self.blocks = nn.ModuleList(common.Block(dim, num_heads) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.head = nn.Linear(dim, outputs)

    def forward(self, x):
        x = x + self.positions  # (B, N, E)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))  # (B, N, P*P*3)


def in_fp32(device):
    """Autocast off: it would round the products that resize and blur pixels to bf16."""
    available = torch.amp.is_autocast_available(device.type)  # not on the meta device
    return torch.autocast(device.type, enabled=False) if available else nullcontext()


class BeyondMasking(nn.Module):
    """Encoder, bridge and decoder for one task. `.encoder` is a `common.ViT`.

    Sizes and patch may be (H, W) pairs; clean images have 3 channels.
    Raises ValueError for an unknown task and for an img_size that does not fit it.
    """

    def __init__(self, task, img_size=224, patch_size=16, embed_dim=768, depth=12, num_heads=12,
                 decoder_dim=384, decoder_depth=4, decoder_heads=6, class_token=False):
        super().__init__()
        check_size(task, img_size, patch_size)
        self.task = task
        self.encoder = common.ViT(img_size, patch_size, in_chans=1 if task == "decolor" else 3,
                                  embed_dim=embed_dim, depth=depth, num_heads=num_heads,
                                  class_token=class_token)
        N = math.prod(self.encoder.grid)
        self.encoder.set_positions(common.sinusoid_1d(embed_dim, N))  # Δ not 2-D [code]
        self.encoder_to_decoder = nn.Linear(embed_dim, decoder_dim, bias=False)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_dim), requires_grad=hides(task))
        self.decoder = Decoder(self.encoder.grid, decoder_dim, decoder_depth, decoder_heads,
                               3 * math.prod(self.encoder.patch_size))
        self._initialise()

    def _initialise(self):
        # Linear layers of the blocks and the head: a normal of std 0.02 cut at one sigma, biases 0.
        # The patch convolution and the bridge keep torch's defaults, as the authors' routine never
        # reaches them [code].
        self.encoder.patch_embed.proj.reset_parameters()
        for part in (self.encoder.blocks, self.decoder):
            for layer in part.modules():
                if isinstance(layer, nn.Linear):
                    nn.init.trunc_normal_(layer.weight, std=0.02, a=-0.02, b=0.02)
                    nn.init.zeros_(layer.bias)
        for token in (self.mask_token, self.encoder.cls_token):
            if token is not None:
                nn.init.trunc_normal_(token, std=0.02, a=-0.02, b=0.02)
        for part in (self.encoder, self.decoder):
            common.freeze_key_bias(part)  # biases for q and v only [code]

    def answer(self, view, mask=None):
        """Views (B, C, S, S) to the answer's patches (B, N, P*P*3), in its own frame."""
        N = math.prod(self.encoder.grid)
        x = self.encoder_to_decoder(self.encoder(view, mask)[:, -N:])  # (B, V, E), no class token
        if mask is not None:
            order = torch.cat(common.split_ids(mask), dim=1)  # (B, N)
            order = order.argsort(dim=1).to(view.device, non_blocking=True)  # back to raster order
            hidden = self.mask_token.expand(len(x), N - x.shape[1], -1)  # (B, M, E)
            x = common.pick(torch.cat([x, hidden], dim=1), order)  # (B, N, E)
        return self.decoder(x)

    def forward(self, clean, params, mask=None):
        """Returns (loss, parts): for the zoom-in, parts are the detached "centre" and "border".

        clean (B, 3, *clean_size(task, img_size)), normalised; params as `sample_params` gives them;
        mask (B, N) bool, True = hidden, the same count per row, for `mask...` tasks and no others.
        """
        size = clean_size(self.task, self.encoder.img_size)
        if clean.ndim != 4 or tuple(clean.shape[1:]) != (3, *size):
            raise ValueError(f"clean images of shape {tuple(clean.shape)} were given, the task "
                             f"{self.task} expects (B, 3, {size[0]}, {size[1]})")
        if (mask is not None) != hides(self.task):
            raise ValueError(f"the task {self.task} needs {'a' if mask is None else 'no'} mask")
        if mask is not None and not bool(mask.any()):
            raise ValueError("the mask hides no patch, so there is nothing to restore")
        with in_fp32(clean.device):
            view = degrade(self.task, clean, params)
        answer = self.answer(view, mask)  # (B, N, P*P*3)
        with in_fp32(clean.device):
            answer = answer.to(clean.dtype)
            masked_ids = None
            if mask is not None:
                masked_ids = common.split_ids(mask)[1].to(clean.device, non_blocking=True)  # (B, M)
            return recovery_loss(self.task, answer, clean, params, masked_ids,
                                 self.encoder.patch_size, self.encoder.img_size)


def load_official(model, state_dict):
    """Loads the authors' weights, under their key names, into a `BeyondMasking`, strictly.

    Their files hold no position tables; `encoder.cls_token`, which they save and never use, is
    dropped unless the model has one. Raises ValueError naming what is missing or too much.
    """
    own, state = model.state_dict(), dict(state_dict)
    state.update({name: own[name] for name in ("encoder.pos_embed", "decoder.positions")})
    for name in own:
        q_name, v_name = (name.replace("qkv.bias", key) for key in ("q_bias", "v_bias"))
        if name.endswith("attn.qkv.bias") and {q_name, v_name} <= set(state):
            q, v = state.pop(q_name), state.pop(v_name)
            state[name] = torch.cat([q, torch.zeros_like(q), v])
    if "encoder.cls_token" not in own:
        state.pop("encoder.cls_token", None)
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        message = f"not the weights of this Beyond Masking model: {common.reason(error)}"
        raise ValueError(message) from error


def rgb_encoder(encoder):
    """The encoder for RGB images: decolor's, of one channel, gets a third of it per colour [D4]."""
    if encoder.config["in_chans"] == 3:
        return encoder
    rgb = common.ViT(**{**encoder.config, "in_chans": 3})
    weight = encoder.patch_embed.proj.weight.detach().cpu()  # (D, 1, P, P)
    state = {name: tensor.cpu() for name, tensor in encoder.state_dict().items()}
    rgb.load_state_dict({**state, "patch_embed.proj.weight": weight.expand(-1, 3, -1, -1) / 3})
    return rgb


# --------------------------------------------------------------------------------------------------
# Loss


def recovery_loss(task, answer, clean, params, masked_ids, patch_size, img_size):
    """(loss, parts) of the answer's patches (B, N, P*P*3), in fp32; masked_ids (B, M) or None. Δ

    Where the view shows another part of the clean image than the answer, the answer is brought
    into the view's frame first, and the hidden patches are those of the view [code].
    """
    grid = tuple(side // patch for side, patch in zip(img_size, common.pair(patch_size)))
    if degradation(task) == "zoom_in":
        return zoom_in_loss(answer, clean, masked_ids, patch_size, grid)
    target = answer_target(clean, patch_size, img_size)  # (B, N, P*P*3)
    if degradation(task) == "zoom_out":
        def to_view(tokens):
            images = common.unpatchify(tokens, patch_size, grid)  # (B, 3, S, S)
            images = amid_mirrors(area_resize(images, clean.shape[-2:]), params)  # (B, 3, S, S)
            return common.patchify(images, patch_size)  # (B, N, P*P*3)

        answer, target = to_view(answer), to_view(target)
    # The frame of mask+distort's answer is not that of its view: all patches count [D5].
    ids = None if task == "mask+distort" else masked_ids
    return patch_error(answer, target, ids), {}


def patch_error(answer, target, masked_ids):
    """Mean squared error of patches (B, N, C), over the hidden ones or, with None, all [D1]."""
    if masked_ids is not None:
        answer, target = common.pick(answer, masked_ids), common.pick(target, masked_ids)
    return F.mse_loss(answer, target)


def zoom_in_loss(answer, clean, masked_ids, patch_size, grid):
    """0.8 of the error on the view's patches, 0.2 of that on the rim around it [code].

    The view is normalised on its own patches, the rim on those of the squeezed image: at the seam
    the two do not agree, by the authors' design. The rim's four strips are means, summed.
    """
    view, size = centre_of(clean), clean.shape[-2:]
    image = area_resize(common.unpatchify(answer, patch_size, grid), size)  # (B, 3, R, R)
    centre = patch_error(common.patchify(centre_of(image), patch_size),
                         normalise_patches(view, patch_size), masked_ids)
    target = answer_target(clean, patch_size, view.shape[-2:])  # (B, N, P*P*3)
    target = area_resize(common.unpatchify(target, patch_size, grid), size)  # (B, 3, R, R)
    error, (h, w) = (image - target).square(), (side // 9 for side in size)
    border = error[..., :h, :].mean() + error[..., -h:, :].mean() + \
        error[..., h:-h, :w].mean() + error[..., h:-h, -w:].mean()
    return 0.8 * centre + 0.2 * border, dict(centre=centre.detach(), border=border.detach())


# --------------------------------------------------------------------------------------------------
# Preview


@torch.no_grad()
def preview_rows(config, model, batch, device):
    """Rows of (3, S, S) images in 0 .. 1: clean | view, hidden patches grey | target | answer."""
    model.eval()
    clean, params, mask = inputs(batch, device)
    view = degrade(config.task, clean, params)
    target = answer_target(clean, config.patch_size, model.encoder.img_size)
    grid, (mean, std) = model.encoder.grid, (clean.new_tensor(value)[:, None, None] for value in (
        common.IMAGENET_MEAN, common.IMAGENET_STD))
    seen = view * std + mean if view.shape[1] == 3 else view * std.mean() + mean.mean()
    seen = seen.expand(-1, 3, -1, -1)  # (B, 3, S, S)
    if mask is not None:
        hidden = rearrange(mask.to(device).float(), "b (h w) -> b 1 h w", h=grid[0])
        seen = torch.where(F.interpolate(hidden, size=seen.shape[-2:]) > 0, 0.5, seen)
    # Both in units of a patch's own deviation, as the loss compares them: nothing leaks.
    target, answer = (0.5 + common.unpatchify(tokens, config.patch_size, grid) / 5
                      for tokens in (target, model.answer(view, mask)))
    return list(map(list, zip(clean * std + mean, seen, target, answer)))


def preview(path, config, model, batch, device):
    """Draws a batch of `Augment`, a row per image (see `preview_rows`)."""
    common.save_panels(path, preview_rows(config, model, batch, device),
                       ["clean", f"seen: {config.task}", "target", "answer"],
                       "Target and answer: pixels in units of their patch's deviation, as compared "
                       "in the loss.")


# --------------------------------------------------------------------------------------------------
# Train


def inputs(batch, device):
    """A batch of `Augment` to (clean images, params, mask or None), images float32 on the device,
    normalised. The mask stays on the CPU, where `split_ids` reads it."""
    clean, params, *mask = batch
    params = {name: value.to(device, non_blocking=True) for name, value in params.items()}
    return common.normalise(clean.to(device, non_blocking=True)), params, mask[0] if mask else None


def build(config):
    """The model of a configuration, with weights drawn from its seed."""
    torch.manual_seed(config.seed)
    return BeyondMasking(config.task, config.img_size, config.patch_size, config.embed_dim,
                         config.depth, config.num_heads, config.decoder_dim, config.decoder_depth,
                         config.decoder_heads)


def start_from(model, path):
    """--init FILE: our last.pt or encoder.safetensors, or the authors' pre-training checkpoint."""
    if path.endswith(".safetensors"):
        target, state = model.encoder, common.read_safetensors(path)
    else:
        target, state = model, common.read_weights(path, "model")
    with common.init_errors(path):
        if target is model and "decoder.positions" not in state:  # the authors save no tables
            load_official(model, state)
        else:
            target.load_state_dict(state)


def prepare(config, processes, init):
    """The model on the device."""
    model = build(config)
    if init:
        start_from(model, init)
    return model.to(processes.device)


def decays(name, parameter):
    return common.decays(name, parameter) and name != "mask_token"  # [code]


def find_images(config, **count):
    """The images of --data; built-in ones are as large as the larger of view and clean image."""
    size = max(config.img_size, *clean_size(config.task, config.img_size))
    return common.find_data(config.data, "pretrain", size, **count)


def train(config, run, processes):
    """Pre-training from start to end: lr, forward, backward, step, log, save."""
    device = processes.device
    images = find_images(config)
    plan = common.make_plan(len(images), config.batch_size, config.micro_batch, config.epochs,
                            processes.world)
    model = prepare(config, processes, "" if run.state else config.init)
    samples = common.Samples(images, Augment(config), config.seed)
    if common.uses_compile(device, config.compile):
        for part in (model.encoder, model.decoder):
            common.compile_blocks(part.blocks)
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
                                  config.min_lr)
        for group in optimizer.param_groups:
            group["lr"] = lr

        for micro in range(plan.accumulation):
            clean, params, mask = inputs(run.next_batch(batches), device)
            more_to_come = processes.world > 1 and micro < plan.accumulation - 1
            with parallel.no_sync() if more_to_come else nullcontext():
                with common.autocast(device, config.precision):
                    loss, parts = parallel(clean, params, mask)
                (loss / plan.accumulation).backward()
            run.record(loss=loss, **parts)

        # Logged, not clipped [code].
        grad_norm = nn.utils.get_total_norm(
            [p.grad for p in model.parameters() if p.grad is not None])
        run.update(optimizer, grad_norm)  # skips a step whose gradient is not finite [D9]

        run.log(step + 1, lr, grad_norm)
        stopping = run.stopping()
        if (step + 1) % save_every == 0 or step + 1 == run.stop or stopping:
            run.save(model, optimizer, step + 1, rgb_encoder(model.encoder))
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
    hidden = f"{config.num_masked} of {config.grid**2} patches hidden"
    clean, _ = clean_size(config.task, config.img_size)
    print(f"model    Beyond Masking, {config.model}: {total:,} parameters, {encoder:,} of them in "
          f"the encoder\n"
          f"task     {config.task}: clean image {clean}, view {config.img_size}, "
          f"{hidden if hides(config.task) else 'all patches visible'}\n"
          f"data     {data}\n"
          f"lr       {config.peak_lr:.2e} = {config.lr:.2e} x {config.batch_size} / 256\n"
          f"{common.describe(config, plan, processes, folder)}", flush=True)


def dry_run(config, folder):
    """Prints recipe and cost without data, weights or a GPU: the model on torch's meta device."""
    N, M = config.grid**2, config.num_masked
    processes = common.Processes(0, int(os.environ.get("WORLD_SIZE", 1)), torch.device("cpu"))
    plan = common.make_plan(1_281_167, config.batch_size, config.micro_batch, config.epochs,
                            processes.world)
    params = sample_params(config.task, 1, img_size=config.img_size)
    params = {name: value.to("meta") for name, value in params.items()}
    with torch.device("meta"):
        model = build(config)
        clean = torch.empty(1, 3, *clean_size(config.task, config.img_size))
    mask = common.random_masks(1, N, M) if hides(config.task) else None
    flops = common.count_flops(lambda: model(clean, params, mask)[0].backward())
    # Saved activations under bf16: about 36 bytes per width, token and block (a rule of thumb).
    activations = 36 * (config.embed_dim * (N - M) * config.depth
                        + config.decoder_dim * N * config.decoder_depth)
    weights = sum(p.numel() for p in model.parameters())
    memory = (16 * weights + activations * plan.micro_batch) / 2**30
    describe(config, model, plan, processes, "1,281,167 images assumed (ImageNet-1K)", folder)
    print(f"cost     {flops / 1e9:.1f} GFLOP per image and step\n"
          f"memory   roughly {memory:.1f} GiB per process in bf16\n"
          f"recipe   {json.dumps(vars(config))}")


def main(argv=None):
    config = common.parse_config(Config, __doc__, SIZES, DEMO, argv)
    name = f"{'demo' if config.demo else config.model}_{config.task}"
    if config.demo:
        name = name.removesuffix(f"_{Config.task}")  # the best practice's is runs/..._demo
    out = config.out or f"runs/beyond_masking_{name}"
    if config.dry_run:
        return dry_run(config, out)
    run = common.Run("beyond_masking", config, out)
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
    images = find_images(config, num_scenes=100)
    with common.processes(config.device) as processes:
        model = prepare(config, processes, "" if run.state else config.init)
        if run.state:
            model.load_state_dict(run.state["model"])
        batch = common.preview_batch(common.Samples(images, Augment(config), config.seed))
        preview(config.preview, config, model, batch, processes.device)
    weights = run.checkpoint if run.state else config.init or "untrained weights"
    print(f"drew {config.preview} from {weights}")


if __name__ == "__main__":
    common.run_main(main)
