"""Fine-tuning: the encoder and a linear classifier on top, trained together by the recipe of each paper.

    python -m eval.finetune --checkpoint runs/cae_v2_vit_b --data ~/imagenet         one process
    torchrun --nproc_per_node=8 -m eval.finetune --checkpoint runs/cae_v2_vit_b      eight, the same recipe
    python -m eval.finetune --checkpoint mae_pretrain_vit_base.pth --recipe mae      any encoder's file
    python -m eval.finetune --checkpoint runs/cae_v2_vit_b --fraction 0.1            low-shot
    python -m eval.finetune --checkpoint runs/finetune_cae_v2_vit_b --eval_only      tests a run again

    image - crop, flip, RandAugment, erasing - mixup or cutmix - encoder - mean of patches, LayerNorm - linear

The recipe is a row of RECIPES, found by the method that the checkpoint names and the encoder's width. Each of
its values is also a flag, which wins. The same command again resumes, on a CPU bit for bit. Accuracy on the
validation images (centre view, fp32) stands after each epoch in log.jsonl, and at the end in eval.jsonl
beside the checkpoint. eval.robustness reads the run's last.pt.

Sources: [C] Atten4Vis/CAE, [M] mmpretrain's MFF, [F] MFM's author's fork, [E] facebookresearch/mae, [B]
Beyond Masking's released code. Where they are silent or cannot be followed:
  [D1] CAE v2 ViT-L has no script: CAE v1's for ViT-L, the rest as CAE v2 ViT-B.
  [D2] MFM ViT-L and ViT-H, and all of `mae`: MAE's, which for ViT-B is MFM's own.
  [D3] Beyond Masking: 100 epochs (its default of 30 is almost surely overridden), batch 1024 (64 per GPU on
       its launcher's 16), patches averaged (its encoders have no class token), positions trained (all that
       runs there).
  [D4] A width outside the table takes the row of the nearest width; the printed recipe says which.
  [D5] RandAugment is torchvision's on timm's scale (9 of 10), each of two operations applied with probability
       1/2, as in timm. Not as in timm: no noise on the strength (std 0.5 there), Identity instead of Invert
       and SolarizeAdd, a milder Posterize, bilinear moves.
  [D6] Mixup or cutmix is drawn once per micro batch (theirs: per GPU) from (seed, step, row), like drop path:
       so these two differ with the number of processes and --micro_batch, and nothing else does.
  [D7] No gradient clipping and no EMA, as in all sources; with --ema the average is what is tested.
  [D8] A fraction is drawn within each class, from the seed, at least one image.

Dimension key: B batch, N patches, T tokens (1+N, or N without class token), D width, K classes, H heads, d
width of a head, h x w grid.
"""

import contextlib
import dataclasses
import json
import os
import time
import typing
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from safetensors import safe_open
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torchvision.transforms import InterpolationMode, v2
from tqdm import tqdm

import common
from common import flag
from eval.protocol import (CentreViews, append_result, centre_view, check_classes, check_writable,
                           layer_groups, open_checkpoint, random_encoder, sha256)

# ------------------------------------------------------------------------------------------------------------
# Recipes: `lr` is absolute, `base_lr` is per 256 images

SHARED = dict(batch_size=1024, min_lr=1e-6, warmup_epochs=5, weight_decay=0.05, drop_path=0.1, mixup=0.8,
              cutmix=1.0, smoothing=0.1, randaugment=9, erasing=0.25, crop_min=0.08, pool="mean",
              fc_norm="fresh", rel_pos_bias="off", positions="learned")
CAE = dict(SHARED, fc_norm="encoder", rel_pos_bias="on", positions="fixed")  # [C]
RECIPES = {
    "cae_v2": {
        "vit_ti": dict(CAE, lr=4e-3, epochs=100, layer_decay=0.85, drop_path=0.0, mixup=0.2, cutmix=0.0,
                       smoothing=0.0),  # [C]
        "vit_s": dict(CAE, lr=4e-4, epochs=200, warmup_epochs=20, layer_decay=0.75),  # [C]
        "vit_b": dict(CAE, lr=2e-4, epochs=100, layer_decay=0.75),  # [C]
        "vit_l": dict(CAE, lr=2e-3, epochs=50, batch_size=4096, layer_decay=0.75, drop_path=0.2),  # [D1]
    },
    "mfm_mae": {
        "vit_s": dict(SHARED, base_lr=5e-4, epochs=100, layer_decay=0.65),  # [F]
        "vit_b": dict(SHARED, base_lr=5e-4, epochs=100, layer_decay=0.65),  # [M] [E]
        "vit_l": dict(SHARED, base_lr=1e-3, epochs=50, layer_decay=0.75, drop_path=0.2),  # [E] [D2]
        "vit_h": dict(SHARED, base_lr=1e-3, epochs=50, layer_decay=0.75, drop_path=0.3),  # [E] [D2]
    },
    "beyond_masking": {
        "vit_b": dict(SHARED, base_lr=1e-3, epochs=100, layer_decay=0.75),  # [B] [D3]
    },
}
RECIPES["mae"] = RECIPES["mfm_mae"]  # [D2]
WIDTHS = dict(vit_ti=192, vit_s=384, vit_b=768, vit_l=1024, vit_h=1280)


@dataclasses.dataclass(frozen=True)
class Config:
    """The whole command line; -1 and `recipe` stand for the recipe's value."""

    checkpoint: str = flag("", "a file (ours, timm, MAE, CAE v2 ...), or the folder of a run")
    data: str = flag("", "a folder with train/ and val/ (a folder per class), `cifar10` or `scenes` "
                         "(default: $IMAGENET, else data/imagenet)")
    recipe: typing.Literal[("auto", *RECIPES)] = flag("auto", "whose recipe; auto: what the checkpoint names")
    fraction: float = flag(1.0, "share of the training images of each class [D8]")
    list: str = flag("", "text file that names the training images, one a line (CLASS/FILE or FILE)")
    random_init: bool = flag(False, "random weights in an encoder of that shape: the floor")
    out: str = flag("", "folder of the run (default: runs/finetune_NAME)")
    img_size: int = flag(0, "pixels of the image's side (default: the encoder's own)")
    num_heads: int = flag(0, "heads of the encoder (default: what the file says, else the usual)")
    seed: int = flag(0, "of head, order of images, crops, mixing and drop path")
    epochs: int = flag(-1, "passes over the data (default: by recipe, like the following ones)")
    batch_size: int = flag(-1, "images per step over all processes")
    lr: float = flag(-1, "peak learning rate, absolute")
    min_lr: float = flag(-1, "learning rate at the end of the cosine")
    warmup_epochs: float = flag(-1, "epochs of linear warm-up from 0")
    layer_decay: float = flag(-1, "the rate of each layer, as a share of that of the next")
    weight_decay: float = flag(-1, "AdamW; none on vectors, class token and positions")
    drop_path: float = flag(-1, "stochastic depth of the last block, rising linearly to it")
    mixup: float = flag(-1, "alpha of mixup; 0: none")
    cutmix: float = flag(-1, "alpha of cutmix; 0: none; with both, each has probability 1/2")
    smoothing: float = flag(-1, "label smoothing")
    randaugment: int = flag(-1, "strength of RandAugment, 1 to 10; 0: none [D5]")
    erasing: float = flag(-1, "probability that a rectangle is replaced by noise")
    crop_min: float = flag(-1, "smallest area of a random crop, as a share of the image")
    pool: typing.Literal["recipe", "mean", "cls"] = flag("recipe", "patches, or class token")
    fc_norm: typing.Literal["recipe", "encoder", "fresh"] = flag("recipe", "where it starts")
    rel_pos_bias: typing.Literal["recipe", "on", "off"] = flag("recipe", "a learnt bias per block and offset")
    positions: typing.Literal["recipe", "fixed", "learned"] = flag("recipe", "whether the table is trained")
    ema: float = flag(0.0, "decay of an average of the weights, such as 0.9999; 0: none [D7]")
    micro_batch: int = flag(0, "images computed at once (default: a process's share, at most 256)")
    workers: int = flag(-1, "loader processes (default: this process's share of cores, at most 16)")
    precision: typing.Literal["auto", "bf16", "fp32"] = flag("auto", "auto: bf16 on GPU, else fp32")
    compile: typing.Literal["auto", "on", "off"] = flag("auto", "torch.compile; auto: on a GPU")
    device: typing.Literal["auto", "cuda", "mps", "cpu"] = flag("auto", "where to compute")
    save_every: int = flag(0, "steps between checkpoints (default: an epoch)")
    max_steps: int = flag(0, "stop at this step, counted from 0; the schedule stays as it is")
    log_every: int = flag(20, "steps between log lines")
    fresh: bool = flag(False, "start a new numbered folder instead of going on with the run")
    eval_only: bool = flag(False, "only test the fine-tuned run that --checkpoint names")

    def __post_init__(self):
        if not self.checkpoint:
            raise ValueError("--checkpoint is missing: give the encoder's file, or the folder of a run")
        typed = {name for name, value in vars(self).items() if value != -1}
        common.check_range(self, 0, "img_size", "num_heads", "seed", "micro_batch", "save_every", "max_steps",
                           "ema", *typed & {"min_lr", "warmup_epochs", "weight_decay", "drop_path", "mixup",
                                            "cutmix", "smoothing", "randaugment", "erasing"})
        common.check_range(self, 1, "log_every", *typed & {"epochs", "batch_size"})
        common.check_range(self, None, "fraction", *typed & {"lr", "layer_decay", "crop_min"})
        for name in ("fraction", "layer_decay", "crop_min", "erasing", "smoothing"):
            if getattr(self, name) > 1:
                raise ValueError(f"--{name} {getattr(self, name):g} must be at most 1")
        if self.drop_path >= 1 or self.ema >= 1 or self.randaugment > 10:
            raise ValueError("--drop_path and --ema must be below 1, --randaugment at most 10")
        if self.list and self.fraction < 1:
            raise ValueError("--list and --fraction both choose the training images: give one of them")
        if self.workers < 0:
            share = (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
            object.__setattr__(self, "workers", 0 if self.data == "scenes" else min(share, 16))


def with_recipe(config, path, vit):
    """(config with the recipe's values where none were typed, name of the recipe, origin of the lr).

    Raises ValueError where no recipe can be told, or the values contradict each other.
    """
    method = method_of(path) if config.recipe == "auto" else config.recipe
    if method not in RECIPES:
        raise ValueError(f"{path} does not say which method trained it: give --recipe {', '.join(RECIPES)}")
    size = min(RECIPES[method], key=lambda size: abs(WIDTHS[size] - vit.config["embed_dim"]))  # [D4]
    recipe, origin = dict(RECIPES[method][size]), "absolute"
    typed = {name: getattr(config, name) for name in {*recipe, "lr"} - {"base_lr"}
             if getattr(config, name) not in (-1, "recipe")}
    base_lr, values = recipe.pop("base_lr", None), {**recipe, **typed}
    if "lr" not in values:
        values["lr"] = base_lr * values["batch_size"] / 256
        origin = f"{base_lr:g} x batch {values['batch_size']} / 256"
    config = dataclasses.replace(config, recipe=method, num_heads=vit.config["num_heads"], **values)
    if config.warmup_epochs >= config.epochs:
        raise ValueError(f"--warmup_epochs {config.warmup_epochs:g} must be shorter than the run of "
                         f"{config.epochs} epochs (fractions such as 0.5 are fine)")
    if config.pool == "cls" and vit.cls_token is None:
        raise ValueError(f"--pool cls: the encoder in {path} has no class token, use --pool mean")
    return config, f"{method}, {size}", origin


def method_of(path):
    """The method that a checkpoint of ours names, "" for others."""
    if path.suffix == ".safetensors":
        with safe_open(path, "pt") as file:
            return json.loads((file.metadata() or {}).get("about", "{}")).get("method", "")
    return common.read_checkpoint(path).get("method", "")


# ------------------------------------------------------------------------------------------------------------
# Model


class Classifier(nn.Module):
    """An encoder with a linear classifier: images (B, C, H, W) to logits (B, K).

    `pool="mean"`: mean of the last block's patch tokens, then `fc_norm`, which starts as a copy of the
    encoder's final norm (`fc_norm="encoder"`) or new; the final norm itself is out of use. `pool="cls"`: the
    class token after the final norm. The head starts at N(0, 2e-5), which is the sources' truncated normal
    of 0.02 times 0.001 (CAE v2, Beyond Masking) or of 2e-5 (MFM, MAE): they cut too far out to matter.
    """

    def __init__(self, vit, num_classes, pool="mean", fc_norm="fresh", rel_pos_bias=False):
        super().__init__()
        self.encoder, self.pool = vit, pool
        dim = vit.config["embed_dim"]
        if rel_pos_bias:
            for block in vit.blocks:
                block.attn = BiasedAttention(block.attn, vit.grid, vit.cls_token is not None)
        if pool == "mean":
            self.fc_norm = nn.LayerNorm(dim, eps=1e-6)
            if fc_norm == "encoder":
                self.fc_norm.load_state_dict(vit.norm.state_dict())
            vit.norm.requires_grad_(False)
        self.head = nn.Linear(dim, num_classes)
        nn.init.normal_(self.head.weight, std=2e-5)
        nn.init.zeros_(self.head.bias)

    def features(self, images):
        """Images to the (B, D) vectors that the head reads."""
        if self.pool == "cls":
            return self.encoder(images)[:, 0]  # (B, D)
        N = self.encoder.grid[0] * self.encoder.grid[1]
        tokens, = self.encoder.layers(images, [-1])  # (B, T, D)
        return self.fc_norm(tokens[:, -N:].mean(dim=1))  # (B, D)

    def forward(self, images):
        return self.head(self.features(images))  # (B, K)


class BiasedAttention(nn.Module):
    """An encoder's attention with a relative position bias: softmax(q k^T / sqrt(d) + bias) v [C].

    The bias is a learnt number per head and offset between two tokens, zero at the start. The weights keep
    their names, and the table lies beside them: `load_encoder` refuses an encoder that needs such a table,
    instead of computing without it.
    """

    def __init__(self, attention, grid, class_token):
        super().__init__()
        self.num_heads, self.qkv, self.proj = attention.num_heads, attention.qkv, attention.proj
        index = relative_positions(grid, class_token)  # (T, T)
        self.register_buffer("index", index, persistent=False)
        self.relative_position_bias_table = nn.Parameter(torch.zeros(int(index.max()) + 1, self.num_heads))

    def forward(self, x):
        q, k, v = rearrange(self.qkv(x), "b n (qkv h d) -> qkv b h n d", qkv=3, h=self.num_heads)
        bias = rearrange(self.relative_position_bias_table[self.index], "q k h -> h q k")  # (H, T, T)
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype))  # (B, H, T, d)
        return self.proj(rearrange(x, "b h n d -> b n (h d)"))


def relative_positions(grid, class_token):
    """(T, T) row of the bias table for each (query, key) pair: the (2h-1)(2w-1) offsets of two patches in
    raster order, then, with a class token: from it to a patch, from a patch to it, from it to itself."""
    h, w = grid
    ids = torch.arange(h * w)
    down, right = (x[:, None] - x for x in (ids // w, ids % w))  # (N, N)
    index = (down + h - 1) * (2 * w - 1) + right + w - 1
    if class_token:
        offsets = (2 * h - 1) * (2 * w - 1)
        index = F.pad(index, (1, 0, 1, 0), value=offsets)  # (1+N, 1+N)
        index[1:, 0], index[0, 0] = offsets + 1, offsets + 2
    return index


def build(config, vit, num_classes):
    """The `Classifier` of a resolved configuration, its head drawn from the seed."""
    torch.manual_seed(config.seed)
    model = Classifier(vit, num_classes, config.pool, config.fc_norm, config.rel_pos_bias == "on")
    vit.pos_embed.requires_grad_(config.positions == "learned")
    rates = torch.linspace(0, config.drop_path, len(vit.blocks)).tolist()
    for block, rate in zip(vit.blocks, rates):
        block.drop_path.rate = rate
    return model


def load_classifier(path):
    """(model in eval mode, class names, content of last.pt, its path) of a fine-tuned run's folder or file.

    Of a run with --ema the model is the average. Raises FileNotFoundError or ValueError.
    """
    path = Path(path).expanduser()
    path = path / "last.pt" if path.is_dir() else path
    state = common.read_checkpoint(path)
    if state.get("kind") != "finetuning":
        raise ValueError(f"{path} is no fine-tuned classifier: give the folder of a run of eval.finetune")
    config = state["config"]
    model = Classifier(common.ViT(**state["encoder"]), len(state["classes"]), config["pool"],
                       rel_pos_bias=config["rel_pos_bias"] == "on")
    average = {name.removeprefix("module."): tensor for name, tensor in state.get("ema", {}).items()
               if name != "n_averaged"}
    model.load_state_dict(average or state["model"])
    return model.eval(), state["classes"], state, path


# ------------------------------------------------------------------------------------------------------------
# Data


class Augment:
    """A training sample: a uint8 image to a normalised float32 one of the encoder's size, and its label.

    Erasing writes N(0, 1) per pixel and channel (timm's `pixel`), so images are normalised here already.
    """

    def __init__(self, config, size):
        bicubic, bilinear = InterpolationMode.BICUBIC, InterpolationMode.BILINEAR
        mean = [round(255 * value) for value in common.IMAGENET_MEAN]
        steps = [v2.RandomResizedCrop(size, (config.crop_min, 1.0), interpolation=bicubic, antialias=True),
                 v2.RandomHorizontalFlip()]
        if config.randaugment:  # 11 steps from none to the largest strength: timm's scale [D5]
            operation = v2.RandAugment(1, config.randaugment, 11, interpolation=bilinear, fill=mean)
            steps += [v2.RandomApply([operation], p=0.5)] * 2
        steps += [v2.ToDtype(torch.float32, scale=True),
                  v2.Normalize(common.IMAGENET_MEAN, common.IMAGENET_STD),
                  v2.RandomErasing(config.erasing, (0.02, 1 / 3), (0.3, 1 / 0.3), value="random")]
        self.steps = v2.Compose(steps)

    def __call__(self, image, label):
        return self.steps(image), label


def make_mix(config, num_classes):
    """A function of images (B, 3, H, W) and labels (B,) to mixed images and targets: soft (B, K), or the
    labels as they are without mixing. Smoothing is left to the loss."""
    kinds = [kind(alpha=alpha, num_classes=num_classes)
             for kind, alpha in ((v2.MixUp, config.mixup), (v2.CutMix, config.cutmix)) if alpha]
    return v2.RandomChoice(kinds) if kinds else lambda images, labels: (images, labels)


def low_shot(images, config):
    """The training images that --fraction or --list choose, as an `Images`."""
    if config.fraction == 1 and not config.list:
        return images
    ids = listed(images, config.list) if config.list else []
    for label, name in enumerate(() if config.list else images.classes):
        members = (images.labels == label).nonzero()[:, 0]
        generator = torch.Generator().manual_seed(common.seed_for(config.seed, "fraction", name))
        order = torch.randperm(len(members), generator=generator)
        ids += members[order[: max(1, round(config.fraction * len(members)))]].tolist()
    ids = sorted(ids)
    source = images.pixels[ids] if images.pixels is not None else [images.path(index) for index in ids]
    return common.Images(source, images.labels[ids], images.classes, images.name)


def listed(images, path):
    """Indices of the images that a text file names; ValueError for a name that is not exactly one image's."""
    if images.pixels is not None:
        raise ValueError(f"--list names files, and {images.name} has none: give --data FOLDER, or --fraction")
    if not os.path.isfile(path):
        raise FileNotFoundError(f"--list {path}: there is no such file")
    found = {}
    for index in range(len(images)):
        name = os.path.relpath(images.path(index), images.name).replace(os.sep, "/")
        for key in {name, os.path.basename(name)}:
            found.setdefault(key, []).append(index)
    ids = set()
    for name in filter(None, map(str.strip, Path(path).read_text().splitlines())):
        if len(found.get(name, ())) != 1:
            raise ValueError(f"--list {path}: {len(found.get(name, ()))} images of {images.name} are called "
                             f"{name}, one was expected")
        ids.add(found[name][0])
    if not ids:
        raise ValueError(f"--list {path} names no image: write one file name a line")
    return list(ids)


# ------------------------------------------------------------------------------------------------------------
# Test


@torch.no_grad()
def predictions(model, views, batch_size, workers, processes):
    """Yields (logits (B, K), labels (B,)) on the device for this process's share of uint8 `views`: every
    world-th one, none twice, so that sums over the processes count each image once."""
    share = torch.utils.data.Subset(views, range(processes.rank, len(views), processes.world))
    loader = torch.utils.data.DataLoader(share, batch_size, num_workers=workers, pin_memory=(
        processes.device.type == "cuda"), worker_init_fn=common.own_group)
    model.eval()
    for images, labels in loader:
        logits = model(common.normalise(images.to(processes.device, non_blocking=True)))  # (B, K)
        if not logits.isfinite().all():
            raise ValueError("the classifier gives numbers that are not finite: its training went wrong")
        yield logits, labels.to(processes.device)


def evaluate(model, images, batch_size, workers, processes):
    """Per cent of `images` with the right class first, and among the first five, over all processes."""
    counts = torch.zeros(3, dtype=torch.long, device=processes.device)
    views = CentreViews(images, model.encoder.img_size)
    for logits, labels in predictions(model, views, batch_size, workers, processes):
        hits = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]  # (B, 5)
        counts += torch.stack([hits[:, 0].sum(), hits.sum(), torch.ones_like(labels).sum()])
    first, five, total = processes.sum(counts).tolist()
    return dict(accuracy=100 * first / total, top5=100 * five / total)


def measured(folder):
    """{step: line} of the tests in a run's log.jsonl."""
    log = folder / "log.jsonl"
    lines = log.read_text().splitlines() if log.exists() else []
    lines = [json.loads(line) for line in lines if line.endswith("}")]
    return {line["step"]: line for line in lines if "accuracy" in line}


# ------------------------------------------------------------------------------------------------------------
# Train


def preview(path, samples, mix, size):
    """Draws a few training images as rows: centre view | augmented | augmented and mixed."""
    plain = common.Samples(samples.images, lambda image, label: (centre_view(image, size), label), seed=0)
    views, (images, labels) = common.preview_batch(plain)[0] / 255, common.preview_batch(samples)
    torch.manual_seed(0)
    mean, std = (torch.tensor(value)[:, None, None] for value in (common.IMAGENET_MEAN, common.IMAGENET_STD))
    rows = zip(views, *(batch * std + mean for batch in (images, mix(images, labels)[0])))
    common.save_panels(path, list(rows), ["centre view", "augmented", "and mixed"],
                       "1st: as in tests.  3rd: as in training.")


def train(config, run, processes, vit, digest):
    """Fine-tuning from start to end: lr, forward, backward, step, log, save, test.

    Gives the facts of the result line, or None where the run stops before its end.
    """
    device = processes.device
    images, val = (common.find_data(config.data, split, vit.img_size[0]) for split in ("train", "val"))
    check_classes(images, val)
    images = low_shot(images, config)
    plan = common.make_plan(len(images), config.batch_size, config.micro_batch, config.epochs,
                            processes.world)
    samples = common.Samples(images, Augment(config, vit.img_size), config.seed)
    mix, criterion = make_mix(config, len(val.classes)), nn.CrossEntropyLoss(label_smoothing=config.smoothing)
    model = build(config, vit, len(val.classes)).to(device)
    ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(config.ema)) if config.ema else None
    if ema and run.state:
        ema.load_state_dict(run.state["ema"])
    if common.uses_compile(device, config.compile):
        common.compile_blocks(vit.blocks)
    groups = layer_groups(model, model.encoder, config.weight_decay, config.layer_decay)
    optimizer = torch.optim.AdamW(groups, lr=config.lr, fused=True)
    if processes.main:
        describe(config, model, plan, processes, images, val, run.folder)
    start = run.begin(processes, plan, model, optimizer, len(images))
    if processes.main:
        preview(run.folder / "preview.png", samples, mix, vit.img_size)
    parallel = model if processes.world == 1 else nn.parallel.DistributedDataParallel(
        model, gradient_as_bucket_view=True, broadcast_buffers=False)
    warmup_steps = round(config.warmup_epochs * plan.steps_per_epoch)
    save_every = config.save_every or plan.steps_per_epoch
    more = dict(classes=list(val.classes), encoder=vit.config, encoder_sha256=digest)
    tests = measured(run.folder)
    if start and start % plan.steps_per_epoch == 0 and start not in tests:  # killed between save and test
        tests[start] = test(ema.module if ema else model, val, start, plan, config, run, processes)
    batches = iter(common.training_loader(samples, plan, processes, config, start, run.stop))

    for step in range(start, run.stop):
        model.train()
        lr = common.learning_rate(step, config.lr, warmup_steps, plan.total_steps, config.min_lr)
        for group in optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]

        for micro in range(plan.accumulation):
            views, labels = (part.to(device, non_blocking=True) for part in run.next_batch(batches))
            # Mixing and drop path draw here; seeded so, they need no saved generator [D6].
            torch.manual_seed(common.seed_for(config.seed, "step", step, plan.first_row(micro, processes)))
            views, targets = mix(views, labels)
            more_to_come = processes.world > 1 and micro < plan.accumulation - 1
            with parallel.no_sync() if more_to_come else contextlib.nullcontext():
                with common.autocast(device, config.precision):
                    logits = parallel(views)  # (B, K)
                loss = criterion(logits.float(), targets)
                (loss / plan.accumulation).backward()
            run.record(loss=loss)

        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        grad_norm = nn.utils.get_total_norm(gradients)
        run.update(optimizer, grad_norm)  # skips a step whose gradient is not finite
        if ema:
            ema.update_parameters(model)

        run.log(step + 1, lr, grad_norm)
        stopping = run.stopping()
        if (step + 1) % save_every == 0 or step + 1 == run.stop or stopping:
            run.save(model, optimizer, step + 1, **more, **(dict(ema=ema.state_dict()) if ema else {}))
        if stopping:
            break
        if (step + 1) % plan.steps_per_epoch == 0:
            tests[step + 1] = test(ema.module if ema else model, val, step + 1, plan, config, run, processes)
    run.close()
    if plan.total_steps not in tests:
        return None
    result = {name: tests[plan.total_steps][name] for name in ("accuracy", "top5")}
    return dict(**result, train=images.name, val=val.name, train_images=len(images), val_images=len(val),
                classes=len(val.classes), steps=plan.total_steps, world=processes.world,
                micro_batch=plan.micro_batch, encoder_sha256=digest)


def test(model, val, step, plan, config, run, processes):
    """Tests after `step`; the main process writes a line to the log. Gives that line."""
    line = dict(step=step, epoch=step / plan.steps_per_epoch,
                **evaluate(model, val, plan.micro_batch, config.workers, processes))
    if processes.main:
        with open(run.folder / "log.jsonl", "a") as file:
            file.write(json.dumps(line) + "\n")
        tqdm.write(f"epoch {line['epoch']:g}: top 1 {line['accuracy']:.2f} %, top 5 {line['top5']:.2f} % of "
                   f"{len(val):,} validation images")
    return line


# ------------------------------------------------------------------------------------------------------------
# Main


def describe(config, model, plan, processes, images, val, folder):
    """Prints the resolved recipe."""
    total = sum(p.numel() for p in model.parameters())
    values = "  ".join(f"{name} {getattr(config, name)}" for name in RECIPES["cae_v2"]["vit_b"]
                       if name not in ("epochs", "batch_size", "lr", "warmup_epochs"))
    print(f"model    {total:,} parameters, {len(val.classes)} classes\n"
          f"recipe   {values}\n"
          f"data     {len(images):,} images in {images.name}, {len(val):,} in {val.name}\n"
          f"{common.describe(config, plan, processes, folder)}", flush=True)


def eval_only(config, processes, started):
    """--eval_only: the accuracy of a finished run, as a line of eval.jsonl beside its last.pt."""
    model, classes, state, path = load_classifier(config.checkpoint)
    check_writable(path)
    val = common.find_data(config.data, "val", model.encoder.img_size[0])
    check_classes(common.Images([], classes=classes, name=f"the classifier {path}"), val)
    result = evaluate(model.to(processes.device), val, config.micro_batch or 256, config.workers, processes)
    if processes.main:
        append_result("finetune", path, model.encoder, config, started, **result, step=state["step"],
                      trained_as=state["config"], val=val.name, val_images=len(val), seed=config.seed,
                      device=str(processes.device))
        print(f"fine-tuned classifier: {result['accuracy']:.2f} %, top 5 {result['top5']:.2f} %")


def run_or_resume(config, processes, started):
    path, vit = open_checkpoint(config)
    config, row, origin = with_recipe(config, path, vit)
    name = path.parent.name if path.name in ("encoder.safetensors", "last.pt") else path.stem
    if config.random_init:
        vit, name = random_encoder(vit, config.seed), name + "_random"
    run = common.Run("finetune", config, config.out or f"runs/finetune_{name}", kind="finetuning")
    digest = sha256(path)
    if run.state and run.state["encoder_sha256"] != digest:
        raise ValueError(f"{path} is not the file any more that the run in {run.folder} started from: "
                         "restore it, or give --fresh or another --out for a new run")
    if run.finished and (run.start < run.state["total_steps"] or run.start in measured(run.folder)):
        return print(f"the run in {run.folder}/ is finished, step {run.start}; --fresh starts anew, "
                     f"--eval_only --checkpoint {run.folder} tests it again")
    print(f"recipe   {row}: lr {config.lr:.2e} ({origin}), times {config.layer_decay:g} per layer down")
    processes.wait()
    facts = train(config, run, processes, vit, digest)
    if processes.main and facts:
        append_result("finetune", path, vit, config, started, **facts, recipe=row, run=str(run.folder),
                      random_init=config.random_init, seed=config.seed, device=str(processes.device))
        print(f"{'trained from random weights' if config.random_init else 'fine-tuned'} on "
              f"{facts['train_images']:,} images: {facts['accuracy']:.2f} %, top 5 "
              f"{facts['top5']:.2f} %")


def main(argv=None):
    config, started = common.parse_config(Config, __doc__, argv=argv), time.perf_counter()
    with common.processes(config.device) as processes:
        # Only the main process prints.
        with contextlib.nullcontext() if processes.main else contextlib.redirect_stdout(None):
            (eval_only if config.eval_only else run_or_resume)(config, processes, started)


if __name__ == "__main__":
    common.run_main(main)
