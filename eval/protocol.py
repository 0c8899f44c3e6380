"""What the evaluations share: flags, the view in tests, frozen features, a training loop, the result line.

Dimension key: B batch, N patches, D width, H x W size of the view, h x w size of the image."""

import contextlib
import dataclasses
import hashlib
import io
import json
import math
import os
import sys
import time
import typing
from pathlib import Path

import numpy as np
import PIL.Image
import torch
import torchvision
from torch import nn
from torchvision.transforms.v2 import functional as TF
from tqdm import tqdm

import common
from common import flag
from eval.encoders import find_file, load_encoder

# Mean and std, in 0..1, that encoders were trained with; `half` is that of Google's ViT.
STATISTICS = dict(imagenet=(common.IMAGENET_MEAN, common.IMAGENET_STD), half=((0.5,) * 3, (0.5,) * 3),
                  clip=((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)))
MEAN_COLOUR = tuple(round(255 * value) for value in common.IMAGENET_MEAN)  # ImageNet's, in 0..255


@dataclasses.dataclass(frozen=True)
class EvalConfig(common.MachineConfig):
    """The flags of every evaluation. Raises ValueError without a checkpoint."""
    checkpoint: str = flag("", "a file (ours, timm, MAE, transformers ...), or the folder it is in")
    data: str = flag("", "a folder with train/ and val/ (a folder per class), `cifar10` or `scenes` "
                         "(default: $IMAGENET, otherwise data/imagenet)")
    img_size: int = flag(0, "pixels of the image's side (default: the encoder's own)")
    num_heads: int = flag(0, "heads of the encoder (default: what the file says, otherwise the usual)")
    key: str = flag("", "which weights of a file that holds several, such as teacher")
    mean_std: typing.Literal["auto", *STATISTICS] = flag(
        "auto", "how images are normalised; auto: what the file says, otherwise ImageNet's")
    batch_size: int = flag(256, "images computed at once; changes no number but in rounding", positive=True)

    def __post_init__(self):
        super().__post_init__()
        if not self.checkpoint:
            raise ValueError("--checkpoint is missing: give the encoder's file, or the folder of a run")


def open_checkpoint(config, own_norm=False):
    """(path, encoder) of --checkpoint, as by `find_file`, `check_writable` and `load_encoder`."""
    path = find_file(config.checkpoint)
    check_writable(path)
    given = {name: value for name in ("img_size", "num_heads", "key") if (value := getattr(config, name))}
    if config.mean_std != "auto":
        given |= dict(zip(("mean", "std"), STATISTICS[config.mean_std]))
    # The rank by hand: the processes may not be joined yet.
    with only_main_prints(common.Dist(int(os.environ.get("RANK", 0)), 1, None)):
        return path, load_encoder(path, own_norm=own_norm, in_chans=3, **given)


def open_run(path, kind):
    """(content of last.pt, its path) of a run's folder or file; `kind` as in `Run`, say "finetuning"."""
    path = Path(path).expanduser()
    path = path / "last.pt" if path.is_dir() else path
    state = common.read_checkpoint(path)
    if state.get("kind") != kind:
        raise ValueError(f"{path} is not from a {kind} run: give the folder or the last.pt of one")
    check_writable(path)
    return state, path


def check_writable(path):
    """Raises ValueError, before the work, where the result line of a checkpoint cannot be written."""
    log = path.parent / "eval.jsonl"
    if not os.access(log if log.exists() else log.parent, os.W_OK):
        raise ValueError(f"the result belongs in {log}, which cannot be written: copy the checkpoint")


def only_main_prints(dist):
    """A context in which only the main process prints."""
    return contextlib.nullcontext() if dist.is_main else contextlib.redirect_stdout(io.StringIO())


def random_encoder(vit, seed):
    """A ViT of the same shape with random weights: the baseline beside a result."""
    torch.manual_seed(seed)
    random = common.ViT(**vit.config)
    random.assumed = getattr(vit, "assumed", None)  # its heads may be
    return random


UNREADABLE = -2  # a label; -1 is an image without one


class CentreViews(torch.utils.data.Dataset):
    """The images of a `common.Images` as tests see them, and their labels: (uint8 (3, H, W), label).
    `skip_bad`: an image that cannot be read is told, and is black with the label UNREADABLE."""

    def __init__(self, images, size, whole=True, skip_bad=False):
        self.images, self.size, self.whole, self.skip_bad = images, size, whole, skip_bad

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        try:
            image, label = self.images[index]
        except ValueError as error:
            if not self.skip_bad:
                raise
            common.say(f"warning: {error}", sys.stderr)
            return torch.zeros(3, *self.size, dtype=torch.uint8), UNREADABLE
        return centre_view(image, self.size, self.whole), label


def centre_view(image, size, whole=True):
    """The papers' view in tests, uint8 (3, h, w) to (3, H, W): short side to 256, bicubic, then the centre
    of 224 pixels, in proportion for other sizes. `whole`: an image of that size stays as it is."""
    (height, width), (h, w) = size, image.shape[1:]
    if whole and (h, w) == (height, width):
        return image
    scale = max(height / h, width / w) * 256 / 224
    # The long side rounds down, as torchvision's Resize does.
    resized = [math.floor(side * scale + 1e-6) for side in (h, w)]
    return TF.center_crop(TF.resize(image, resized, TF.InterpolationMode.BICUBIC), [height, width])


def read_annotated(path, size, annotation):
    """An image file as (3, h, w) uint8 for an annotation of that `size`: turned upright by its EXIF tag, or
    as stored, if it fits so alone. Raises ValueError, which calls the annotation so, for any other size."""
    image, turned = common.read_image(path, size), ""
    if image.shape[1:] != size:
        with contextlib.suppress(Exception), PIL.Image.open(path) as file:  # a damaged tag turns nothing
            turned = ", turned by its EXIF tag," * (file.getexif().get(0x0112) in range(2, 9))
        (h, w), (height, width) = image.shape[1:], size
        raise ValueError(f"{path}{turned} has {h} x {w} pixels, {annotation} {height} x {width}: they must "
                         "be equal")
    return image


def share_loader(dataset, batch_size, config, dist, collate=None):
    """A loader of this process's share: samples rank, rank + world, ... `batch_size` None: single ones."""
    share = range(dist.rank, len(dataset), dist.world)
    return torch.utils.data.DataLoader(
        dataset, batch_size, sampler=share, num_workers=common.num_workers(config), collate_fn=collate,
        worker_init_fn=common.leave_group, pin_memory=dist.device.type == "cuda")


@torch.no_grad()
def frozen_tokens(vit, images, batch_size, config, dist, pool=None):
    """Yields (tokens after the final norm (B, [1+]N, D), or (B, D) by `pool`, float32 on the device, labels
    (B,)) of this process's share of `images`. Raises ValueError as `centre_batches`, `check_finite` do."""
    for batch, labels in centre_batches(vit, images, batch_size, config, dist):
        with common.autocast(dist.device, config.precision):
            tokens = vit(batch).float()  # (B, [1+]N, D)
        yield pool_tokens(check_finite(tokens), pool, math.prod(vit.grid)), labels


def centre_batches(vit, images, batch_size, config, dist, skip_bad=False):
    """Yields (normalised views (B, 3, H, W) on the device, labels (B,)) of this process's share, in order;
    moves the encoder there, too. `skip_bad` as in `CentreViews`. Raises ValueError for too few images."""
    if len(images) < dist.world:
        raise ValueError(f"{images.name} holds {len(images)} images, fewer than the {dist.world} processes")
    vit.eval().to(dist.device)
    loader = share_loader(CentreViews(images, vit.img_size, skip_bad=skip_bad), batch_size, config, dist)
    for batch, labels in tqdm(loader, images.name, leave=False, disable=None if dist.is_main else True):
        yield normalise(batch, vit, dist.device), labels


def normalise(images, vit, device):
    """uint8 images (B, 3, H, W), on the device and with the mean and std that `vit` was trained with."""
    return common.normalise(images.to(device, non_blocking=True), vit.config["mean"], vit.config["std"])


def look_through(dataset, name, config, dist, keep=len):
    """The list of `keep(item)` of this process's items of `dataset`, each read once in a loader's worker:
    what cannot be read is found before hours of training, not after. Raises the item's error."""
    loader = share_loader(dataset, None, config, dist, keep)
    return list(tqdm(loader, name, leave=False, disable=None if dist.is_main else True))


def check_finite(values, what="the encoder gives features"):
    """The same tensor. Raises ValueError for a NaN or an infinity in it."""
    if not values.isfinite().all():
        raise ValueError(f"{what} that are not finite: its training went wrong")
    return values


def pool_tokens(tokens, pool, num_patches):
    """(B, [1+]N, D) to (B, D): the class token ("cls") or the mean of N patches ("mean"); or unchanged."""
    if pool == "mean":
        return tokens[:, -num_patches:].mean(dim=1)  # (B, D)
    return tokens[:, 0] if pool == "cls" else tokens


def check_pool(pool, vit, checkpoint):
    """Raises ValueError for --pool cls without a class token."""
    if pool == "cls" and vit.cls_token is None:
        raise ValueError(f"--pool cls: the encoder in {checkpoint} has no class token, use --pool mean")


def all_gather(rows, count, dist):
    """This process's share of rows (n_r, ...) to all (count, ...) rows, in order, in every process."""
    if dist.world == 1:
        return rows
    missing = math.ceil(count / dist.world) - len(rows)  # 0 or 1: all processes must give equal shapes
    padded = torch.cat([rows, rows.new_zeros(missing, *rows.shape[1:])]).to(dist.device)
    parts = [torch.empty_like(padded) for _ in range(dist.world)]
    torch.distributed.all_gather(parts, padded)
    return torch.stack(parts, dim=1).flatten(0, 1)[:count].to(rows.device)


def check_classes(train, val):
    """Raises ValueError for two lists of classes that differ: a label is a place in the list."""
    if train.classes != val.classes:
        only = ", ".join(sorted(set(train.classes) ^ set(val.classes))[:3])
        raise ValueError(f"the {len(train.classes)} classes of {train.name} and the {len(val.classes)} of "
                         f"{val.name} must be the same; in one of them only: {only}")


def set_drop_path(blocks, rate):
    """Stochastic depth of a ViT's blocks, rising linearly from 0 to `rate` in the last one."""
    for block, value in zip(blocks, torch.linspace(0, rate, len(blocks), device="cpu").tolist()):
        block.drop_path.rate = value


def layer_groups(model, encoder, weight_decay, layer_decay):
    """AdamW's groups of a model's trainable parameters; `lr_scale` is their share of the learning rate:
    layer_decay^(depth + 1 - id), where id is 0 for what comes before the encoder's blocks, i + 1 for
    block i, depth + 1 for what comes after. Vectors, class token and positions have no weight decay."""
    depth, groups, ids = len(encoder.blocks), {}, dict.fromkeys(encoder.parameters(), 0)
    for index, block in enumerate([*encoder.blocks, encoder.norm]):
        ids |= dict.fromkeys(block.parameters(), index + 1)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            scale = layer_decay ** (depth + 1 - ids.get(parameter, depth + 1))
            decays = common.decays(name, parameter) and not name.endswith(("cls_token", "pos_embed"))
            group = dict(params=[], lr_scale=scale, weight_decay=weight_decay * decays)
            groups.setdefault((scale, decays), group)["params"].append(parameter)
    return list(groups.values())


def fit(config, run, dist, plan, model, optimizer, compute_loss, learning_rate, clip_grad=math.inf):
    """Fine-tuning, after `run.begin`: after each step it yields (steps done, learning rate, gradient norm),
    and the caller logs and saves. `compute_loss(model, batch)` gives (loss, {name: scalar for the log}) of
    a micro batch on the CPU. A group's rate is its `lr_scale` (see `layer_groups`) times the step's."""
    parallel = model if dist.world == 1 else nn.parallel.DistributedDataParallel(
        model, gradient_as_bucket_view=True)
    for step in run.steps():
        model.train()  # the caller may have tested it
        lr = learning_rate(step)
        for group in optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        for micro, batch in enumerate(run.micro_batches()):
            # Drop path, mixup and anchors are drawn in here: seeded, they need no saved generator.
            torch.manual_seed(common.seed_for(config.seed, "step", step, plan.first_row(micro, dist)))
            parallel.require_backward_grad_sync = micro == plan.accumulation - 1
            loss, parts = compute_loss(parallel, batch)
            (loss / plan.accumulation).backward()
            run.record(loss=loss, **parts)
        grad_norm = nn.utils.clip_grad_norm_(model.parameters(), clip_grad)
        if run.may_step(optimizer, grad_norm):
            optimizer.step()
        optimizer.zero_grad()
        yield step + 1, lr, grad_norm


def sha256(path):
    """The SHA-256 of a file, which is mapped, not read into memory."""
    return hashlib.sha256(np.memmap(path, mode="r")).hexdigest()


def append_result(kind, checkpoint, vit, config, started, **facts):
    """Appends the JSON line of a result to eval.jsonl beside the checkpoint, with all that is needed to
    repeat it; `started`: `time.perf_counter()` at the start. For the main process only."""
    record = dict(
        kind=kind, **facts, checkpoint=str(checkpoint), sha256=sha256(checkpoint), exif=common.EXIF,
        view="torchvision uint8, bicubic antialias", seconds=round(time.perf_counter() - started, 1),
        encoder=vit.config, assumed=getattr(vit, "assumed", None), torch=torch.__version__,
        torchvision=torchvision.__version__, pillow=PIL.__version__, command=" ".join(sys.argv),
        processes=int(os.environ.get("WORLD_SIZE", 1)), flags=vars(config), seed=config.seed,
        commit=common.commit())
    log = checkpoint.parent / "eval.jsonl"
    cut = log.exists() and not log.read_bytes().endswith(b"\n")  # a line of a process that was killed
    with open(log, "a") as file:
        file.write("\n" * cut + json.dumps(record) + "\n")
    print(f"appended to {log}")
