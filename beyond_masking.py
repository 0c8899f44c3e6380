"""Beyond Masking: Demystifying Token-Based Pre-Training for Vision Transformers.

Tian et al., arXiv 2203.14313 (2022). Official code: sunsmarterjie/beyond_masking.

The idea in one sentence: hiding patches is only one way to spoil an image that a ViT must restore;
of the others, those that move things help more than those that change their look, and the best
practice joins masking with a zoom.

Why (our reading): where every patch stays in its place and only its look is changed, each token
can be restored from itself alone: a local filter can sharpen or colour. Once things move, the
pixels asked for at a place are in other tokens: the encoder must know what is where and attend
there. Hidden patches are asked for though no token has them; zoomed in, so is what lies around the
view: `border` in the log, beside `centre`, the view itself.

  photo -- crop -- clean image -- degrade -- view (B, 3, S, S) -- visible patches -- ViT encoder
                       |                                                                 |
                       |                                     mask tokens -- decoder -- z (B, V, D)
                       |                                                       |
                       +-- resize, normalise each patch -- target --- squared error --- pred
                                                             both (B, N, 3*P*P)

  task      clean   the view is                       pred shows             loss over      top-1
  mask      S       the clean image, 75 % hidden      the same place         hidden         82.9
  zoom_in   S*9/7   its centre                        all of it, squeezed    centre, border 82.7
  zoom_out  S*5/7   the image amid mirror images      the image, enlarged    the view       82.5
  distort   S       the image through a fish-eye      the image, straight    all            82.1
  blur      S       a random convolution of it        the image, sharp       all            81.8
  decolor   S       one random mix of its colours     the image, in colour   all            81.4
  mask+zoom_in      zoom_in, 75 % of the view hidden                         hidden, border 83.2
(ViT-B, 300 epochs, fine-tuned on ImageNet-1K [readme].) mask+zoom_out and mask+distort work too.

  loss = mean |p - phi(r O)|^2 over patches,  phi(x) = (x - mean x) / std x per patch and colour
  zoom_in:  0.8 mean |c r'p - phi(c O)|^2 + 0.2 sum of four strips' mean |r'p - r' phi(r O)|^2
In the code: p `pred`, O `clean`, phi `normalise_patches`, c `center_crop`, r and r' `area_resize`
to the size S of pred, and back to R; the strips surround the centre.

Dimension key: B batch, N patches, V visible, M masked (V + M = N), D encoder width, E decoder
width, C channels, P patch side, S side of the view, R side of the clean image.

What differs from MAE (marked Δ): the degradations, and that view and prediction may show different
parts of the photo, so that no token can copy its own patch; pixels are normalised per patch and
colour; 1-D positions; a decoder of 4 narrow blocks; no class token.

Recipe (bare command, ViT-B): epochs 300, batch_size 2048, lr 1.5e-4, min_lr 1e-5,
warmup_epochs 20, weight_decay 0.05, mask_ratio 0.75, img_size 224, patch_size 16, crop_min 0.2

Sources: [code] the authors' code, [readme] their README, [issue] the author's replies in their
issue tracker. The text of the paper was not at hand. Our decisions, where these are silent (those
that all methods share: top of common.py):
  [D1] The released zooms cannot run unmasked, though the author says that no task but `mask...`
       hides patches [issue]. Unmasked, their patch term runs over all patches; 0.8 and 0.2 stay.
  [D2] The released blur cannot run; its mean weight 1/49 and padding 3 fit a 7 x 7 convolution of
       3 to 3 channels. Its bias is drawn per image as well; the authors draw it once per process.
  [D3] The released decolor cannot run: its loader makes colours paler, its engine expects one grey
       channel. Ours is the engine's mix, as in the authors' figure, with that folder's crop: 8 to
       100 % of the area, bilinear, no flip [code].
  [D4] decolor's encoder has one input channel. The exported encoder takes RGB: each colour gets a
       third of the weights, the mean of the random mixes. On grey images nothing changes.
  [D5] mask+distort is not released: distort's loss over all patches, for a patch that the view
       hides has no fixed place in the prediction.
  [D6] Decoders of ViT-Ti and S: half the encoder's width, 4 blocks, as for B. For L the released
       folders disagree: 24 blocks and a decoder of 512 x 8 x 8, as all but the zoom-in folder say.
  [D7] Batch 2048 and 20 epochs of warm-up, as the authors' two-node launcher has them.
  [D8] Offsets of zoom_out and weights of decolor are drawn per image; authors: per batch.

Commands (the same command again resumes; --out is runs/beyond_masking_MODEL_TASK):
  python beyond_masking.py --demo                                 built-in images, on a laptop
  python beyond_masking.py --model vit_s --data ~/photos --task zoom_in
  torchrun --nproc_per_node=8 beyond_masking.py --model vit_b     the best practice, ImageNet-1K
To use the method elsewhere copy this file and common.py (and demo/ for `scenes`).
"""

import math
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

METHOD = "beyond_masking"  # in files and in the name of the run's folder
TASKS = ("mask", "zoom_in", "zoom_out", "distort", "blur", "decolor",
         "mask+zoom_in", "mask+zoom_out", "mask+distort")
COLUMNS = "embed_dim", "depth", "num_heads", "decoder_dim", "decoder_depth", "decoder_heads"
SIZES = {model: dict(zip(COLUMNS, row)) for model, row in {
    "vit_ti": (192, 12, 3, 96, 4, 3),  # [D6]
    "vit_s": (384, 12, 6, 192, 4, 3),  # [D6]
    "vit_b": (768, 12, 12, 384, 4, 6),  # [code]
    "vit_l": (1024, 24, 16, 512, 8, 8),  # [D6]
    "vit_demo": (128, 4, 4, 64, 1, 2),  # ours, for 28-pixel images with patches of 4
}.items()}


def is_masked(task):
    """Whether patches are hidden: in `mask` and the mixtures with it [issue]."""
    return task.startswith("mask")


DEPENDS = dict(mask_ratio=("task", {task: 0.75 for task in TASKS if is_masked(task)}),  # [code]
               crop_min=("task", {"decolor": 0.08}))  # [D3]

DEMO = dict(model="vit_demo", data="scenes", img_size=28, patch_size=4, epochs=4, batch_size=64,
            lr=2e-3, warmup_epochs=0.3, crop_min=1.0, workers=0, log_every=50)


@dataclass(frozen=True)
class Config(common.RunConfig):
    """The recipe; the flags that are no part of it come from common.RunConfig."""

    task: typing.Literal[TASKS] = flag("mask+zoom_in", "how the image is degraded [readme]")
    epochs: int = flag(300, "passes over the data [readme]", positive=True)
    batch_size: int = flag(2048, "images per step, all processes [code] [D7]", positive=True)
    lr: float = flag(1.5e-4, "base rate, per 256 images of the batch [code]", positive=True)
    min_lr: float = flag(1e-5, "learning rate at the end of the cosine [code]")
    warmup_epochs: float = flag(20, "epochs of linear warm-up from 0 [code] [D7]")
    weight_decay: float = flag(0.05, "AdamW, constant; betas are 0.9, 0.95 [code]")
    mask_ratio: float = flag(0.0, "share of hidden patches (default: 0.75 in `mask...`) [code]")
    img_size: int = flag(224, "pixels of the view's side [code]", positive=True)
    patch_size: int = flag(16, "pixels of a patch's side [code]", positive=True)
    crop_min: float = flag(0.2, "least area of a crop; decolor 0.08 [code] [D3]", positive=True)

    def __post_init__(self):
        super().__post_init__()
        check_size(self.task, self.img_size, self.patch_size)
        hidden, least = self.num_masked, int(is_masked(self.task))
        if not least <= hidden <= least * (self.num_patches - 1):
            raise ValueError(f"--mask_ratio {self.mask_ratio:g} hides {hidden} of "
                             f"{self.num_patches} patches: in tasks mask... some must be hidden "
                             "and some visible, in others none hidden")
        if self.crop_min > 1:
            raise ValueError("--crop_min is at most 1")

    @property
    def num_masked(self):
        # The number of visible patches is truncated [code].
        return self.num_patches - int(self.num_patches * (1 - self.mask_ratio))

    @property
    def run_name(self):  # the demo's has no task in it
        return super().run_name + f"_{self.task}" * (not self.demo)


def degradation(task):
    """What happens to the image besides hiding patches: the word after `mask+`, or the task."""
    return task.removeprefix("mask+")


def check_size(task, img_size, patch_size):
    """Raises ValueError for an unknown task, or an image that does not fit it or the patches."""
    if task not in TASKS:
        raise ValueError(f"there is no task {task!r}: choose from {', '.join(TASKS)}")
    for side, patch in zip(common.pair(img_size), common.pair(patch_size)):
        unit = math.lcm(7, patch) if "zoom" in task else patch  # the zooms are 9:7 and 5:7
        if side % unit:
            raise ValueError(f"--task {task} needs an img_size that is a multiple of {unit}, not "
                             f"{side}: the next one is {(side // unit + 1) * unit}")


# --------------------------------------------------------------------------------------------------
# Corrupt: what is done to an image, and what is drawn for it
def clean_size(task, img_size):
    """(H, W) of the clean image for a view of `img_size`: 9/7 of it, 5/7 of it, or the same. Δ"""
    scale = dict(zoom_in=9, zoom_out=5).get(degradation(task), 7)  # of 224: 288, 160, 224 [code]
    return tuple(side * scale // 7 for side in common.pair(img_size))


def sample_params(task, batch, generator=None, img_size=224):
    """What `degrade` needs besides the image, for `batch` images: a dict of tensors, maybe empty.
    zoom_out: left, top (B,) int64, 0 .. 2/7 S - 1. distort: centre (B, 2) as x, y in [-1, 1],
    magnitude (B,). blur: weight (B, 3, 3, 7, 7), bias (3,). decolor: weights (B, 3)."""
    def uniform(low, high, *shape):
        return low + (high - low) * torch.rand(*shape, generator=generator)

    task, (rows, columns) = degradation(task), (2 * side // 7 for side in common.pair(img_size))
    if task == "zoom_out":
        return dict(left=torch.randint(columns, (batch,), generator=generator),  # [code] [D8]
                    top=torch.randint(rows, (batch,), generator=generator))
    if task == "distort":
        return dict(centre=uniform(-1, 1, batch, 2), magnitude=uniform(0.15, 0.25, batch))  # [code]
    if task == "blur":
        noise = torch.randn(batch, 3, 3, 7, 7, generator=generator)
        return dict(weight=1 / 49 + 0.02 * noise, bias=uniform(-1, 1, 3) / 147**0.5)  # [D2]
    if task == "decolor":
        return dict(weights=uniform(0, 0.667, batch, 3))  # [code] [D3] [D8]
    return {}


def degrade(task, clean, params):
    """Clean images (B, 3, *clean_size), normalised, to views: (B, 3, S, S), decolor (B, 1, S, S). Δ
    Pure: all that is random comes in `params`, as `sample_params` draws it. Patches are hidden
    later, in the encoder: zoom first, mask second [code]."""
    task = degradation(task)
    if task == "zoom_in":
        return center_crop(clean)  # (B, 3, S, S)
    if task == "zoom_out":
        return symmetric_pad(clean, params)  # (B, 3, S, S)
    if task == "distort":
        return fish_eye(clean, **params)
    if task == "blur":  # one convolution per image, which mixes the channels too
        kernels = rearrange(params["weight"], "b o i h w -> (b o) i h w")
        images = rearrange(clean, "b c h w -> 1 (b c) h w")
        images = F.conv2d(images, kernels, padding=3, groups=len(clean))
        bias = params["bias"][..., None, None]  # (3, 1, 1) or (B, 3, 1, 1)
        return rearrange(images, "1 (b c) h w -> b c h w", b=len(clean)) + bias
    if task == "decolor":  # of normalised values; the weights need not sum to 1 [code]
        return (clean * params["weights"][..., None, None]).sum(dim=1, keepdim=True)  # (B, 1, S, S)
    return clean


def center_crop(images):
    """The central 7/9 of images, in height and in width: (B, C, R, R) to (B, C, S, S)."""
    rows, columns = (side // 9 for side in images.shape[-2:])
    return images[..., rows:-rows, columns:-columns]


def symmetric_pad(images, params):
    """Images (B, C, R, R) at (top, left) of a canvas of 7/5 their size, amid their mirror images,
    the edge pixel repeated (numpy's "symmetric"): -1 shows 0, -2 shows 1 [code]."""
    for dim, offset in ((2, params["top"]), (3, params["left"])):
        size = images.shape[dim]
        place = torch.arange(size * 7 // 5, device=images.device)
        place = place - torch.as_tensor(offset, device=images.device).reshape(-1, 1)  # (B or 1, S)
        place = torch.where(place < 0, -1 - place, place)
        place = torch.where(place >= size, 2 * size - 1 - place, place)
        ids = place[:, None, :, None] if dim == 2 else place[:, None, None, :]
        images = images.gather(dim, ids.expand(*images.shape[:dim], -1, *images.shape[dim + 1:]))
    return images  # (B, C, S, S)


def fish_eye(images, centre, magnitude):
    """Images (B, C, S, S) in which q shows what was at q + m |c - q| (c - q): centre c (B, 2),
    magnitude m (B,), in coordinates x, y that are -1 and 1 at the corner pixels [code]."""
    y, x = (torch.linspace(-1, 1, side, device=images.device) for side in images.shape[-2:])
    q = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1).to(images)  # (S, S, 2)
    towards = centre[:, None, None] - q  # (B, S, S, 2)
    grid = q + magnitude[:, None, None, None] * towards.norm(dim=-1, keepdim=True) * towards
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=True)


class Augment:
    """Makes a training sample in a worker: clean image uint8 (3, R, R), what is drawn for its
    degradation, and where the task has one the mask (N,) bool. Random resized crop, bicubic, and
    flip, nothing else [code]; decolor: bilinear, no flip [D3]."""

    def __init__(self, config):
        self.config, self.size = config, clean_size(config.task, config.img_size)

    def __call__(self, image, label):  # labels have no use here
        config, grey, kind = self.config, self.config.task == "decolor", TF.InterpolationMode
        box = RandomResizedCrop.get_params(image, (config.crop_min, 1.0), ratio=(3 / 4, 4 / 3))
        image = TF.resized_crop(image, *box, self.size, kind.BILINEAR if grey else kind.BICUBIC)
        if not grey and torch.rand(()) < 0.5:
            image = TF.horizontal_flip(image)
        params = sample_params(config.task, 1, img_size=config.img_size)
        params = {name: value.squeeze(0) for name, value in params.items()}
        if not is_masked(config.task):
            return image, params
        return image, params, common.random_masks(1, config.num_patches, config.num_masked)[0]


def inputs(batch, device):
    """Turns a batch of `Augment` into what the model takes: clean images (B, 3, R, R), normalised,
    and params on the device, and the mask (B, N) or None, on the CPU."""
    clean, params, *mask = batch
    params = {name: value.to(device, non_blocking=True) for name, value in params.items()}
    return common.normalise(clean.to(device, non_blocking=True)), params, mask[0] if mask else None


# --------------------------------------------------------------------------------------------------
# Target: pixels of the clean image
@torch.compiler.assume_constant_result  # of the compiled loss it is a part
def area_matrix(old, new, device, dtype, made={}):
    """(new, old): row i averages the pixels floor(i old/new) .. ceil((i+1) old/new) - 1."""
    if (old, new, device, dtype) not in made:  # else each call would wait for the copy
        i, pixel = torch.arange(new, device="cpu")[:, None], torch.arange(old, device="cpu")
        first, end = i * old // new, -(-(i + 1) * old // new)
        inside = (first <= pixel) & (pixel < end)
        made[old, new, device, dtype] = (inside.double() / (end - first)).to(device, dtype)
    return made[old, new, device, dtype]


def area_resize(images, size):
    """Images (B, C, h, w) to (B, C, *size) by averaging, in both directions [code]: the adaptive
    average pooling of torch, as two small matrices, whose gradient is deterministic everywhere."""
    rows, columns = (area_matrix(old, new, images.device, images.dtype)
                     for old, new in zip(images.shape[-2:], size))
    return rows @ images @ columns.T


def patch_statistics(images, patch_size):
    """(pixels, mean, std) of the patches of normalised images (B, 3, S, S): pixels in 0 .. 1,
    (B, N, P*P, 3), mean and the unbiased std of each patch and colour (B, N, 1, 3) [code]."""
    patches = common.patchify(common.unnormalise(images), patch_size)  # (B, N, P*P*3)
    pixels = rearrange(patches, "b n (pq c) -> b n pq c", c=3)
    std, mean = torch.std_mean(pixels, dim=2, keepdim=True)
    return pixels, mean, std


def normalise_patches(images, patch_size):
    """Normalised images (B, 3, S, S) to patches (B, N, P*P*3), each of mean 0 and std 1 per colour
    [code]; MAE takes the three colours together. Δ"""
    pixels, mean, std = patch_statistics(images, patch_size)
    return ((pixels - mean) / (std + 1e-6)).flatten(2)  # (B, N, P*P*3)


def pixel_target(task, clean, patch_size, img_size):
    """What pred is compared with, a dict of patches (B, N, P*P*3) [code]: "whole" is all of the
    clean image, at the size of pred. Zoomed in, "centre" is the view, normalised on its own
    patches; at the seam it differs from the border around it, by the authors' design."""
    target = dict(whole=normalise_patches(area_resize(clean, img_size), patch_size))
    if degradation(task) == "zoom_in":
        target["centre"] = normalise_patches(center_crop(clean), patch_size)
    return target


# --------------------------------------------------------------------------------------------------
# Model
class Decoder(nn.Module):
    """Blocks, LayerNorm, linear head, on all patches: smaller than MAE's [code]. Δ"""

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
    """Encoder, bridge and decoder for one task. `.encoder` is a `common.ViT`. Sizes and patch may
    be (H, W) pairs. Raises ValueError for an unknown task and an img_size that does not fit it."""

    def __init__(self, task, img_size=224, patch_size=16, embed_dim=768, depth=12, num_heads=12,
                 decoder_dim=384, decoder_depth=4, decoder_heads=6, class_token=False):
        super().__init__()
        check_size(task, img_size, patch_size)
        self.task, self.loss = task, recovery_loss  # of this attribute `train` may make a program
        self.encoder = common.ViT(img_size, patch_size, in_chans=1 if task == "decolor" else 3,
                                  embed_dim=embed_dim, depth=depth, num_heads=num_heads,
                                  class_token=class_token)
        N = math.prod(self.encoder.grid)
        self.encoder.set_positions(common.sinusoid_1d(embed_dim, N))  # Δ not 2-D [code]
        self.encoder_to_decoder = nn.Linear(embed_dim, decoder_dim, bias=False)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_dim), is_masked(task))
        self.decoder = Decoder(self.encoder.grid, decoder_dim, decoder_depth, decoder_heads,
                               3 * math.prod(self.encoder.patch_size))
        # Linear layers of the blocks and the head: a normal of std 0.02 cut at one sigma, biases 0.
        # The patch convolution and the bridge keep torch's defaults, as the authors' routine never
        # reaches them [code].
        self.encoder.patch_embed.proj.reset_parameters()
        for part in (self.encoder.blocks, self.decoder):
            for layer in part.modules():
                if isinstance(layer, nn.Linear):
                    nn.init.trunc_normal_(layer.weight, std=0.02, a=-0.02, b=0.02)
                    nn.init.zeros_(layer.bias)
        for token in (self.mask_token, *([self.encoder.cls_token] if class_token else [])):
            nn.init.trunc_normal_(token, std=0.02, a=-0.02, b=0.02)
        for part in (self.encoder, self.decoder):
            common.freeze_key_bias(part)  # biases for q and v only [code]

    def predict(self, view, ids_keep=None, ids_masked=None):
        """Views (B, C, S, S) to the pred of all patches (B, N, P*P*3), in its own frame; which
        patches are visible is said by the ids (B, V), (B, M), or all are."""
        tokens = self.encoder(view, ids_keep=ids_keep)
        patches = tokens[:, 1:] if self.encoder.cls_token is not None else tokens  # (B, V, D)
        x = self.encoder_to_decoder(patches)  # (B, V, E)
        if ids_keep is not None:
            ids_restore = torch.cat([ids_keep, ids_masked], dim=1).argsort(dim=1)  # (B, N)
            masked = self.mask_token.expand(*ids_masked.shape, -1)  # (B, M, E)
            x = common.gather(torch.cat([x, masked], dim=1), ids_restore)  # (B, N, E)
        return self.decoder(x)

    def forward(self, clean, params, mask=None):
        """Clean images (B, 3, *clean_size(task, img_size)), normalised, params of `sample_params`,
        and for `mask...` tasks alone a mask (B, N) bool, True = hidden, to (loss, parts): parts of
        zoom_in are "centre" and "border", detached."""
        size, grid, patch = self.encoder.img_size, self.encoder.grid, self.encoder.patch_size
        wanted = (len(clean), 3, *clean_size(self.task, size))
        if clean.shape != wanted:
            raise ValueError(f"{self.task} expects clean images {wanted}, not {tuple(clean.shape)}")
        if (mask is not None) != is_masked(self.task):
            raise ValueError(f"the task {self.task} needs {'a' if mask is None else 'no'} mask")
        ids_keep = ids_masked = None
        if mask is not None:
            ids_keep, ids_masked = common.mask_to_ids(mask, clean.device)  # (B, V), (B, M)
            if ids_masked.shape[1] == 0:
                raise ValueError("the mask hides no patch, so there is nothing to restore")
        with in_fp32(clean.device):
            view = degrade(self.task, clean, params)  # (B, C, S, S)
            target = pixel_target(self.task, clean, patch, size)
        pred = self.predict(view, ids_keep, ids_masked)  # (B, N, P*P*3)
        with in_fp32(clean.device):
            pred = pred.to(clean.dtype)
            return self.loss(self.task, pred, target, params, ids_masked, patch, grid)


def build(config):
    """The model of a configuration, with weights drawn from its seed."""
    torch.manual_seed(config.seed)
    return BeyondMasking(config.task, config.img_size, config.patch_size, **SIZES[config.model])


def decays(name, parameter):
    """Which parameters get weight decay: all but the mask token and what is usual [code]."""
    return common.decays(name, parameter) and name != "mask_token"


def rgb_encoder(encoder):
    """The encoder for RGB images: decolor's, of one channel, gets a third of it per colour [D4]."""
    if encoder.config["in_chans"] == 3:
        return encoder
    rgb, state = common.ViT(**{**encoder.config, "in_chans": 3}), encoder.state_dict()
    weight = encoder.patch_embed.proj.weight.detach()  # (D, 1, P, P)
    rgb.load_state_dict({**state, "patch_embed.proj.weight": weight.expand(-1, 3, -1, -1) / 3})
    return rgb


def example(config):
    """(model, inputs of one image) on torch's meta device, for --dry_run."""
    with torch.device("meta"):
        model, params = build(config), sample_params(config.task, 1, img_size=config.img_size)
        clean = torch.empty(1, 3, *clean_size(config.task, config.img_size))
    mask = common.random_masks(1, config.num_patches, config.num_masked)
    return model, (clean, params, mask if is_masked(config.task) else None)


# --------------------------------------------------------------------------------------------------
# Loss
def recovery_loss(task, pred, target, params, ids_masked, patch_size, grid):
    """(loss, parts) of pred (B, N, P*P*3), in fp32; ids_masked (B, M) or None. Where the view shows
    another part of the clean image than pred, both pred and target are brought to the clean image's
    own size first, and the hidden patches are those of the view [code]. Δ"""
    whole = target["whole"]  # (B, N, P*P*3)
    if "zoom" in task:
        size = clean_size(task, [side * patch for side, patch in zip(grid, patch_size)])
        pred, whole = (area_resize(common.unpatchify(tokens, patch_size, grid), size)
                       for tokens in (pred, whole))  # (B, 3, R, R), (B, 3, R, R)
    if degradation(task) == "zoom_in":
        view = common.patchify(center_crop(pred), patch_size)  # (B, N, P*P*3)
        centre = patch_error(view, target["centre"], ids_masked)
        # The border's four strips are means, summed [code].
        error, (h, w) = (pred - whole).square(), (side // 9 for side in size)
        border = error[..., :h, :].mean() + error[..., -h:, :].mean() + \
            error[..., h:-h, :w].mean() + error[..., h:-h, -w:].mean()
        return 0.8 * centre + 0.2 * border, dict(centre=centre.detach(), border=border.detach())
    if degradation(task) == "zoom_out":
        pred, whole = (common.patchify(symmetric_pad(images, params), patch_size)
                       for images in (pred, whole))  # (B, N, P*P*3), (B, N, P*P*3)
    # The frame of mask+distort's pred is not that of its view: all patches count [D5].
    return patch_error(pred, whole, None if task == "mask+distort" else ids_masked), {}


def patch_error(pred, target, ids_masked):
    """Mean squared error of patches (B, N, P*P*3), over the hidden ones or, with None, all [D1]."""
    if ids_masked is not None:
        pred, target = common.gather(pred, ids_masked), common.gather(target, ids_masked)
    return F.mse_loss(pred, target)


# --------------------------------------------------------------------------------------------------
# Preview
@torch.no_grad()
def preview(path, config, model, batch, device):
    """Draws a batch of `Augment` as rows: clean | view, hidden patches grey | target | pred."""
    model.eval()
    (clean, params, mask), vit = inputs(batch, device), model.encoder
    seen = view = degrade(model.task, clean, params)  # (B, C, S, S)
    seen = common.unnormalise(seen.expand(-1, 3, -1, -1))  # (B, 3, S, S)
    ids = common.mask_to_ids(mask, device) if mask is not None else ()
    if mask is not None:
        hidden = rearrange(mask.to(device).float(), "b (h w) -> b 1 h w", h=vit.grid[0])
        seen = seen.where(F.interpolate(hidden, size=seen.shape[-2:]) == 0, 0.5)
    # pred is of patches with mean 0 and std 1: it is given those of the true patch.
    pixels, mean, std = patch_statistics(area_resize(clean, vit.img_size), vit.patch_size)
    pred = rearrange(model.predict(view, *ids), "b n (pq c) -> b n pq c", c=3) * std + mean
    target, pred = (common.unpatchify(x.flatten(2), vit.patch_size, vit.grid)
                    for x in (pixels, pred))  # (B, 3, S, S), (B, 3, S, S)
    common.save_panels(path, list(zip(common.unnormalise(clean), seen, target, pred)),
                       ["clean", f"seen: {config.task}", "target", "prediction"],
                       "4th: each patch has its mean and std from the true image: that leaks.")


# --------------------------------------------------------------------------------------------------
# Train
def train(config, run, dist):
    """Pre-training from start to end: lr, forward, backward, step, log, save."""
    device = dist.device
    size = max(config.img_size, *clean_size(config.task, config.img_size))  # of built-in images
    images = common.find_data(config.data, "pretrain", size, cache=run.folder)
    samples = common.Samples(images, Augment(config), config.seed)
    model = run.load(build(config)).to(device)
    if config.preview:
        return preview(config.preview, config, model, common.preview_batch(samples), device)
    common.compile_blocks(config, device, model)
    groups = common.parameter_groups(model, config.weight_decay, decays)
    optimizer = torch.optim.AdamW(groups, lr=config.peak_lr, betas=(0.9, 0.95), fused=True)
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
            # Several processes average their gradients once a step, in its last backward pass.
            parallel.require_backward_grad_sync = micro == plan.accumulation - 1
            with common.autocast(device, config.precision):
                loss, parts = parallel(*inputs(batch, device))  # target, pred, loss: see `forward`
            (loss / plan.accumulation).backward()
            run.record(loss=loss, **parts)

        grads = [p.grad for p in model.parameters() if p.grad is not None]
        grad_norm = nn.utils.get_total_norm(grads)  # for the log: nothing is clipped [code]
        if run.may_step(optimizer, grad_norm):  # a gradient that is not finite changes nothing
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        if run.log(step + 1, lr, grad_norm) and dist.is_main:  # True: it is time to save
            run.save(model, optimizer, step + 1, rgb_encoder(model.encoder))
            run.draw(lambda path: preview(
                path, config, model, common.preview_batch(samples), device))
            model.train()


# --------------------------------------------------------------------------------------------------
# Main
def main(argv=None):
    config = common.parse_config(Config, __doc__, SIZES, DEMO, argv, DEPENDS)
    common.main(METHOD, config, example, train)


if __name__ == "__main__":
    common.run_main(main)
