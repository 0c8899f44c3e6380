"""MFM: masked autoencoder (MAE) with multi-level feature fusion, called MFF in the released code.

Liu et al., "Improving Pixel-based MIM by Reducing Wasted Modeling Capability", arXiv 2308.00261,
ICCV 2023. Released code: open-mmlab/mmpretrain. Base method: He et al., MAE, arXiv 2111.06377.

The idea in one sentence: the decoder of MAE gets the shallow blocks' features directly [abs], so
that the deep blocks need not carry the detail of pixels up to the last layer (our reading).

Why: MAE's decoder sees the last block alone and is asked for pixels. Edges, textures, colours are
known after the first blocks, but must survive all others to be of use: width and attention spent on
carrying them are what the paper calls wasted capability. Given the shallow features directly, the
deep blocks are free for what takes depth. Where to look: `weight_0`, `weight_1` ... in the log are
the shares of the fused blocks in their order, equal at the start (a hint only, since the maps can
rescale); eval/frequency shows how much high frequency the last block still carries.

  image -- visible patches -- ViT encoder: blocks 0 .. 11, each (B, 1+V, D)
                                  |   |   |      |
                                linear maps, weighted sum (the last block as it is)
                                           |
                                  the encoder's final norm      (B, 1+V, D)
                                           |
       mask token x M -------- decoder, all N places            (B, 1+N, E)
                                           |
              pixels of the M hidden patches: pred (B, M, P*P*C), target the same: squared error

  z    = LN( sum_k w_k (A_k o_k + b_k) ),  w = softmax(s),  for the last block A = 1, b = 0
  pred = decoder of z, with mask tokens in the hidden places
  loss = mean over hidden patches of |pred - t|^2 / PPC,  t = (x - mean x) / sqrt(var x + 1e-6)
In the code: o `outputs`, A, b `projections`, s `logits`, w `weights`, z what `encode` gives,
t `target`, x a true patch.

Dimension key: B batch, N patches, V visible, M masked (V + M = N), D encoder width, E decoder
width, P patch side, C channels, S crop side, H W image height and width, K gathered patches,
L fused blocks, h heads, d width of a head.

What differs from MAE (marked Δ): the decoder reads several blocks, each but the last through its
own linear map, averaged with learnable weights before the final norm; the logits of the weights
decay; the image is resized and cropped with a margin, not a random resized crop; optionally the
target is a low-pass image (PixMIM). `--fuse none --augment rrc` is MAE, except for D4 and D5. The
fusion is thrown away at the end: encoder.safetensors is a plain ViT, used by its last block alone.

Recipe (bare command, ViT-B): epochs 300, batch_size 4096, lr 1.5e-4, warmup_epochs 40,
weight_decay 0.05, mask_ratio 0.75, img_size 224, patch_size 16

Sources: [code] mmpretrain's release, [mae] facebookresearch/mae, [fork] the first author's forks,
[abs] the abstract. The body of the paper was not at hand. Our decisions, where these are silent or
differ (those that all methods share: top of common.py):
  [D1] Only depth 12 has a released set, 0,2,4,6,8,11. Other depths keep its spacing: five blocks a
       sixth of the depth apart, rounded down, and the last. 24: 0,4,8,12,16,23; 4: 0,1,2,3.
  [D2] Resizing is bilinear, as released; the author's fork has bicubic there.
  [D3] New models have MAE's position tables, column first; mmpretrain's are row first.
  [D4] Weight decay by the released rule, with or without fusion: the fusion's logits decay, the
       class and mask tokens do not (in facebookresearch/mae they do).
  [D5] Warm-up starts at 1e-4 of the peak, as in the released 300 epochs (800 epochs: 1e-9, MAE: 0).
  [D6] Biases of the encoder's MLPs start at 0, as in MAE; in mmpretrain from N(0, 1e-6). The maps
       of the attention fusion, whose start is not known, start as the other linear layers.
  [D7] The radius of the low-pass filter, 40 at 224 pixels [fork], grows with the image.

Commands (the same command again resumes; --out is runs/mfm_mae_MODEL):
  python mfm_mae.py --demo [--fuse none]                   built-in images, on a laptop [or MAE]
  python mfm_mae.py --model vit_s --data ~/photos          one GPU, any folder of images
  torchrun --nproc_per_node=8 mfm_mae.py --model vit_b     the released run: ImageNet, 300 epochs
To use the method elsewhere copy this file and common.py (and demo/ for `scenes`).
"""

import re
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

METHOD = "mfm_mae"  # in files and in the name of the run's folder

COLUMNS = "embed_dim", "depth", "num_heads", "decoder_dim", "decoder_depth", "decoder_heads"
SIZES = {model: dict(zip(COLUMNS, row)) for model, row in {
    "vit_ti": (192, 12, 3, 192, 8, 12),  # [fork]
    "vit_s": (384, 12, 6, 384, 8, 12),  # [fork]
    "vit_b": (768, 12, 12, 512, 8, 16),  # [code]
    "vit_l": (1024, 24, 16, 512, 8, 16),  # [mae]
    "vit_h": (1280, 32, 16, 512, 8, 16),  # [mae]
    "vit_demo": (128, 4, 4, 64, 1, 4),  # ours, for 32-pixel images with patches of 4
}.items()}
DEPENDS = dict(patch_size=("model", {"vit_h": 14}))  # defaults that follow another flag [mae]

DEMO = dict(model="vit_demo", data="scenes", img_size=32, patch_size=4, epochs=2, batch_size=32,
            lr=1.6e-2, warmup_epochs=0.2, norm_pix="off", workers=0, log_every=50)


@dataclass(frozen=True)
class Config(common.RunConfig):
    """The recipe; the flags that are no part of it come from common.RunConfig."""

    epochs: int = flag(300, "passes over the data; 800 was released too [code]", positive=True)
    batch_size: int = flag(4096, "images per step, all processes: 8 x 512 [code]", positive=True)
    lr: float = flag(1.5e-4, "base rate, per 256 images of the batch [code]", positive=True)
    warmup_epochs: float = flag(40, "epochs of linear warm-up [code] [D5]")
    weight_decay: float = flag(0.05, "AdamW, constant; betas are 0.9, 0.95 [code] [D4]")
    mask_ratio: float = flag(0.75, "share of hidden patches; visible ones are rounded down [code]")
    augment: typing.Literal["resize_crop", "rrc"] = flag("resize_crop", "crop [code], or MAE's")
    fuse: str = flag("", "blocks to fuse, from 0, such as 0,2,4,6,8,11 [code], or `none`: plain MAE"
                         " (default: by depth [D1])")
    fusion: typing.Literal["average", "uniform", "attention"] = flag("average", "how [code] [fork]")
    projection: typing.Literal["linear", "none"] = flag("linear", "of shallow blocks [code] [fork]")
    target: typing.Literal["pixels", "lowpass"] = flag("pixels", "PixMIM: lowpass [code] [fork]")
    norm_pix: typing.Literal["on", "off"] = flag("on", "normalise the target per patch [code]")
    img_size: int = flag(224, "pixels of the crop's side [code]", positive=True)
    patch_size: int = flag(16, "pixels of a patch's side; vit_h: 14 [code] [mae]", positive=True)

    def __post_init__(self):
        super().__post_init__()
        if not 0 < self.num_masked < self.num_patches:
            raise ValueError(f"--mask_ratio {self.mask_ratio:g} hides {self.num_masked} of "
                             f"{self.num_patches} patches: some must be hidden, some visible")
        if self.img_size < 5:
            raise ValueError("--img_size is at least 5: 4 pixels are reflected around the image")
        if not re.fullmatch(r"|none|\d+(,\d+)*", self.fuse):
            raise ValueError(f"--fuse {self.fuse} should read like 0,2,4,6,8,11, or none")

    @property
    def num_masked(self):
        # The number of visible patches is truncated [mae] [code].
        return self.num_patches - int(self.num_patches * (1 - self.mask_ratio))

    @property
    def out_indices(self):
        """The blocks to fuse; none is MAE."""
        if self.fuse:
            return () if self.fuse == "none" else tuple(map(int, self.fuse.split(",")))
        depth = SIZES[self.model]["depth"]
        return tuple(sorted({*(k * depth // 6 for k in range(5)), depth - 1}))  # [D1]


# --------------------------------------------------------------------------------------------------
# Corrupt: the crop, and which patches are hidden
class Augment:
    """Makes a training sample in a worker: image uint8 (3, S, S), mask (N,) bool.
    `resize_crop`: short side to S, 4 pixels of reflection around, a crop of S anywhere [code]. Δ
    `rrc`: a random part, 20 to 100 % of the area, resized to S [mae]. Both flip half of them."""

    def __init__(self, config):
        self.config = config

    def __call__(self, image, label):  # labels have no use here
        S = self.config.img_size
        if self.config.augment == "rrc":
            box = RandomResizedCrop.get_params(image, (0.2, 1.0), ratio=(3 / 4, 4 / 3))
            crop = TF.resized_crop(image, *box, [S, S], TF.InterpolationMode.BICUBIC)
        else:
            image = TF.resize(image, [S], TF.InterpolationMode.BILINEAR)  # [D2]
            rows, columns = (reflect(torch.arange(S) + torch.randint(-4, side + 5 - S, ()), side)
                             for side in image.shape[1:])
            crop = image.index_select(1, rows).index_select(2, columns)
        if torch.rand(()) < 0.5:
            crop = TF.horizontal_flip(crop)
        return crop, common.random_masks(1, self.config.num_patches, self.config.num_masked)[0]


def reflect(places, size):
    """Places beside a row of `size` pixels, mirrored at its outermost ones, to places in it."""
    return size - 1 - (size - 1 - places.abs()).abs()


def inputs(batch, device):
    """Turns a batch of `Augment` into what the model takes: images (B, C, H, W), normalised, on the
    device; and the mask (B, N), which stays on the CPU, where counting it costs no waiting."""
    crop, mask = batch
    return common.normalise(crop.to(device, non_blocking=True)), mask


# --------------------------------------------------------------------------------------------------
# Target: the pixels of the hidden patches
def pixel_target(images, ids, patch_size, norm_pix=True, kind="pixels"):
    """(target, mean, std) of the patches `ids` (B, K) of normalised images (B, C, H, W): vectors
    (B, K, P*P*C) in the order (row, column, channel), if `norm_pix` normalised each by its own mean
    and std, both (B, K, 1): unbiased, with 1e-6 in the root [mae]."""
    images = low_pass(images) if kind == "lowpass" else images
    patches = common.gather(common.patchify(images, patch_size), ids)  # (B, K, P*P*C)
    mean = patches.mean(dim=-1, keepdim=True)  # (B, K, 1)
    std = (patches.var(dim=-1, keepdim=True) + 1e-6).sqrt()  # (B, K, 1)
    if not norm_pix:
        mean, std = torch.zeros_like(mean), torch.ones_like(std)
    return (patches - mean) / std, mean, std


def low_pass(images):
    """The low frequencies of normalised images (B, 3, H, W), PixMIM's target [fork]: a disc of the
    shifted spectrum, centred half a pixel beside the zero frequency, so that the result is complex;
    its modulus is the image (which shifting the spectrum back would not change) [fork]. Δ"""
    H, W = images.shape[-2:]
    pixels = common.unnormalise(images)
    spectrum = torch.fft.fftshift(torch.fft.fft2(pixels), dim=(-2, -1))
    rows, columns = (torch.arange(size, device=images.device) - (size - 1) / 2 for size in (H, W))
    disc = rows[:, None].square() + columns.square() <= (40 * min(H, W) / 224) ** 2  # [D7]
    change = torch.fft.ifft2(spectrum * disc).abs() - pixels
    return images + change / common.channels(common.IMAGENET_STD, images.device, images.dtype)


# --------------------------------------------------------------------------------------------------
# Model
def projections(dim, num_blocks, kind):
    """One map per fused block: its own linear layer [code]; the last block stays as it is. Δ"""
    maps = [nn.Linear(dim, dim) if kind == "linear" else nn.Identity()
            for _ in range(num_blocks - 1)]
    return nn.ModuleList([*maps, nn.Identity()])


class Fusion(nn.Module):
    """A weighted average of block outputs, class token included, for the decoder to read. Δ
    The weights, one number for a whole block, are the softmax of learnable logits that start equal
    [code], so their sum is 1. With frozen logits this is the plain mean (`uniform` [fork])."""

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
    Each block adds its own learnable vector; there is no key bias and no residual path."""

    def __init__(self, dim, num_blocks, projection, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.projections = projections(dim, num_blocks, projection)
        self.block_embed = nn.Parameter(torch.zeros(num_blocks, 1, 1, dim))
        self.q = nn.Linear(dim, dim)
        self.v = nn.Linear(dim, dim)
        self.proj = nn.Linear(dim, dim)
        self.k = nn.Linear(dim, dim, bias=False)
        nn.init.normal_(self.block_embed, std=0.02)

    def forward(self, outputs):
        """A list of L block outputs (B, 1+V, D) to one of the same shape."""
        projected = [project(h) + e
                     for project, h, e in zip(self.projections, outputs, self.block_embed)]
        tokens = torch.cat(projected, dim=1)  # (B, L*(1+V), D)
        q, k, v = (rearrange(x, "b t (h d) -> b h t d", h=self.num_heads)
                   for x in (self.q(projected[-1]), self.k(tokens), self.v(tokens)))
        x = common.attention(q, k, v)  # (B, h, 1+V, d)
        return self.proj(rearrange(x, "b h t d -> b t (h d)"))  # (B, 1+V, D)


class MFMMAE(nn.Module):
    """Encoder, fusion, decoder. `fuse`: blocks counted from 0, ending with the last; () is MAE.
    `.encoder` is a plain ViT: the fusion lies outside and never feeds back into its blocks.
    Raises ValueError for a missing block and for an unknown option."""

    def __init__(self, img_size=224, patch_size=16, embed_dim=768, depth=12, num_heads=12,
                 decoder_dim=512, decoder_depth=8, decoder_heads=16, fuse=(0, 2, 4, 6, 8, 11),
                 fusion="average", projection="linear", target="pixels", norm_pix=True,
                 mlp_ratio=4.0, decoder_mlp_ratio=4.0):
        super().__init__()
        last = depth - 1  # must be fused: no loss would reach blocks deeper than the deepest one
        if fuse and not (sorted({*fuse}) == list(fuse) and fuse[0] >= 0 and fuse[-1] == last):
            raise ValueError(f"fused blocks {fuse} must rise from at least 0 to {last}, the last")
        for value, allowed in ((fusion, ("average", "uniform", "attention")),
                               (projection, ("linear", "none")), (target, ("pixels", "lowpass"))):
            if value not in allowed:
                raise ValueError(f"{value!r} is none of {', '.join(allowed)}")
        self.target, self.norm_pix = target, norm_pix
        self.out_indices = tuple(fuse) or (last,)
        self.encoder = common.ViT(img_size, patch_size, embed_dim=embed_dim, depth=depth,
                                  num_heads=num_heads, mlp_ratio=mlp_ratio)  # [D3]
        if len(self.out_indices) == 1:  # the last block alone: MAE
            self.fusion = None
        elif fusion == "attention":
            self.fusion = AttentionFusion(embed_dim, len(fuse), projection, num_heads)
        else:
            self.fusion = Fusion(embed_dim, len(fuse), projection, learnable=fusion == "average")
        P, Q = self.encoder.patch_size
        self.decoder_embed = nn.Linear(embed_dim, decoder_dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_dim))
        # A row of zeros for the class token; `to` leads to the meta device of --dry_run, too.
        table = F.pad(common.sincos_2d(decoder_dim, self.encoder.grid), (0, 0, 1, 0))  # (1+N, E)
        self.decoder_pos_embed = nn.Parameter(table[None].to(self.mask_token), requires_grad=False)
        self.decoder_blocks = nn.ModuleList(
            common.Block(decoder_dim, decoder_heads, decoder_mlp_ratio)
            for _ in range(decoder_depth))
        self.decoder_norm = nn.LayerNorm(decoder_dim, eps=1e-6)
        self.decoder_pred = nn.Linear(decoder_dim, P * Q * 3)
        # Linear layers start Xavier-uniform with zero bias, the fusion's maps too [code] [D6].
        common.xavier_init(self)
        nn.init.normal_(self.mask_token, std=0.02)

    @property
    def fusion_weights(self):
        """The share of each fused block, (L,), summing to 1; None for attention, which has none."""
        return torch.ones(1) if self.fusion is None else getattr(self.fusion, "weights", None)

    def encode(self, images, ids_keep):
        """What the decoder reads: visible tokens (B, 1+V, D), fused, then normed once [code]. Δ"""
        outputs = self.encoder.layers(images, self.out_indices, ids_keep=ids_keep)
        return self.encoder.norm(outputs[-1] if self.fusion is None else self.fusion(outputs))

    def decode(self, latent, ids_keep, ids_masked, ids):
        """Visible tokens (B, 1+V, D) to decoder tokens of the patches `ids`: (B, K, E)."""
        x = self.decoder_embed(latent)  # (B, 1+V, E)
        masked = self.mask_token.expand(*ids_masked.shape, -1)  # (B, M, E)
        ids_restore = torch.cat([ids_keep, ids_masked], dim=1).argsort(dim=1)  # (B, N)
        patches = common.gather(torch.cat([x[:, 1:], masked], dim=1), ids_restore)  # (B, N, E)
        x = torch.cat([x[:, :1], patches], dim=1) + self.decoder_pos_embed  # (B, 1+N, E)
        for block in self.decoder_blocks[:-1]:
            x = block(x)
        return self.decoder_blocks[-1](x, ids + 1)  # (B, K, E), in x after the class token

    def predict(self, images, ids_keep, ids_masked, ids):
        """The pred of the patches `ids` (B, K), in training the hidden ones: (B, K, P*P*C). Only
        these pass the last MLP, norm and layer; MAE computes all, and takes the loss of the hidden.
        """
        tokens = self.decode(self.encode(images, ids_keep), ids_keep, ids_masked, ids)  # (B, K, E)
        return self.decoder_pred(self.decoder_norm(tokens))

    def forward(self, images, mask):
        """Normalised images (B, C, H, W) and mask (B, N) bool, True = hidden, to (loss, parts):
        parts are what the log shows beside the loss, the learnt fusion weights."""
        ids_keep, ids_masked = common.mask_to_ids(mask, images.device)  # (B, V), (B, M)
        if ids_masked.shape[1] == 0:
            raise ValueError("the mask hides no patch, so there is nothing to predict")
        target, _, _ = pixel_target(images, ids_masked, self.encoder.patch_size, self.norm_pix,
                                    self.target)  # (B, M, P*P*C), (B, M, 1), (B, M, 1)
        pred = self.predict(images, ids_keep, ids_masked, ids_masked)  # (B, M, P*P*C)
        learnt = isinstance(self.fusion, Fusion) and self.fusion.logits.requires_grad
        weights = self.fusion_weights.detach() if learnt else ()
        parts = {f"weight_{index}": weight for index, weight in enumerate(weights)}
        return squared_error(pred, target).mean(), parts


def build(config):
    """The model of a configuration, with weights drawn from its seed."""
    torch.manual_seed(config.seed)
    return MFMMAE(config.img_size, config.patch_size, **SIZES[config.model],
                  fuse=config.out_indices, fusion=config.fusion, projection=config.projection,
                  target=config.target, norm_pix=config.norm_pix == "on")


def decays(name, parameter):
    """Which parameters get weight decay [D4]: matrices, and the fusion's logits. Δ"""
    return name == "fusion.logits" or (common.decays(name, parameter) and "token" not in name)


def example(config):
    """(model, inputs of one image) on torch's meta device, for --dry_run."""
    with torch.device("meta"):
        model, images = build(config), torch.empty(1, 3, config.img_size, config.img_size)
    return model, (images, common.random_masks(1, config.num_patches, config.num_masked))


# --------------------------------------------------------------------------------------------------
# Loss
def squared_error(pred, target):
    """Mean squared error of each patch, both (B, M, P*P*C), as (B, M), in fp32 (float64 stays). The
    loss is its mean over all hidden patches of the batch; visible patches do not count [mae]."""
    dtype = torch.promote_types(pred.dtype, torch.float32)
    return (pred.to(dtype) - target.to(dtype)).square().mean(dim=-1)


# --------------------------------------------------------------------------------------------------
# Preview
@torch.no_grad()
def preview(path, config, model, batch, device):
    """Draws a batch of `Augment` as rows: image | visible patches | prediction of every patch |
    prediction of the hidden ones among the visible patches."""
    model.eval()
    (images, mask), vit = inputs(batch, device), model.encoder
    grid, (P, Q) = vit.grid, vit.patch_size
    ids = torch.arange(mask.shape[1], device=device).expand(len(mask), -1)  # (B, N)
    pred = model.predict(images, *common.mask_to_ids(mask, device), ids)  # (B, N, P*P*C)
    # A normalised prediction gets the mean and std of its true patch back.
    _, mean, std = pixel_target(images, ids, (P, Q), model.norm_pix, model.target)
    pred = common.unnormalise(common.unpatchify(pred * std + mean, (P, Q), grid))  # (B, C, H, W)
    hidden = mask.to(device)[:, :, None].expand(-1, -1, P * Q * 3)  # (B, N, P*P*C)
    hidden, images = common.unpatchify(hidden, (P, Q), grid), common.unnormalise(images)
    note = "3rd, 4th: each patch has its mean and std from the true image: that leaks." \
        if model.norm_pix else "Predictions of visible patches (3rd) count in no loss."
    panels = [images, images.where(~hidden, 0.5), pred, images.where(~hidden, pred)]
    common.save_panels(path, list(zip(*panels)),
                       ["image", "visible patches", "prediction", "prediction + visible"], note)


# --------------------------------------------------------------------------------------------------
# Train
def train(config, run, dist):
    """Pre-training from start to end: lr, forward, backward, step, log, save."""
    device = dist.device
    images = common.find_data(config.data, "pretrain", config.img_size, cache=run.folder)
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
                                  start=1e-4 * config.peak_lr)  # [D5]
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
            run.save(model, optimizer, step + 1, model.encoder)
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
