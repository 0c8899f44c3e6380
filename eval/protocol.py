"""What the evaluations share: flags, the view of an image in tests, frozen features, the result line.

Under torchrun every process takes its share of the images: number rank, rank + world, rank + 2 world ...

Dimension key: B batch, N patches, D width, H x W size of the view, h x w size of the image as it is.
"""

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import sys
import time
import typing

import PIL
import torch
import torch.distributed
import torchvision
from torchvision.transforms.v2 import functional as TF
from tqdm import tqdm

import common
from common import flag
from eval.encoders import find_file, load_encoder


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """The flags of every evaluation that trains no encoder."""

    checkpoint: str = flag("", "a file (ours, timm, MAE, CAE v2 ...), or the folder of a run")
    data: str = flag("", "a folder with train/ and val/ (a folder per class), `cifar10` or `scenes` "
                         "(default: $IMAGENET, else data/imagenet)")
    img_size: int = flag(0, "pixels of the image's side (default: the encoder's own)")
    num_heads: int = flag(0, "heads of the encoder (default: what the file says, else the usual)")
    seed: int = flag(0, "of everything that is drawn")
    batch_size: int = flag(256, "images computed at once; changes no number but in rounding")
    workers: int = flag(-1, "loader processes (default: this process's share of cores, at most 16; none "
                            "for scenes)")
    precision: typing.Literal["auto", "bf16", "fp32"] = flag("auto", "auto: bf16 on GPU, else fp32")
    device: typing.Literal["auto", "cuda", "mps", "cpu"] = flag("auto", "where to compute")

    def __post_init__(self):
        if not self.checkpoint:
            raise ValueError("--checkpoint is missing: give the encoder's file, or the folder of a run")
        common.check_range(self, 0, "img_size", "num_heads", "seed")
        common.check_range(self, 1, "batch_size")
        if self.workers < 0:
            share = (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
            object.__setattr__(self, "workers", 0 if self.data == "scenes" else min(share, 16))


def open_checkpoint(config, **override):
    """(path, encoder) of the flags --checkpoint, --img_size, --num_heads; `override` as in `load_encoder`.

    Raises ValueError where the result line, which belongs beside the checkpoint, could not be written.
    """
    path = find_file(config.checkpoint)
    check_writable(path)
    given = {name: getattr(config, name) for name in ("img_size", "num_heads") if getattr(config, name)}
    silent = contextlib.redirect_stdout(None) if int(os.environ.get("RANK", 0)) else contextlib.nullcontext()
    with silent:
        return path, load_encoder(path, in_chans=3, **given, **override)


def check_writable(path):
    """Looks now whether the result line of the checkpoint `path` can be written, not after hours."""
    log = path.parent / "eval.jsonl"
    if not os.access(log if log.exists() else log.parent, os.W_OK):
        raise ValueError(f"the result belongs in {log}, which cannot be written: copy the checkpoint to a "
                         "folder of your own")


def random_encoder(vit, seed):
    """A ViT of the same shape with random weights: the floor that stands beside a result."""
    torch.manual_seed(seed)
    return common.ViT(**vit.config)


class CentreViews(torch.utils.data.Dataset):
    """The images of a `common.Images` as tests see them, with their labels: (uint8 (3, H, W), label)."""

    def __init__(self, images, size, whole=True):
        self.images, self.size, self.whole = images, size, whole

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        image, label = self.images[index]
        return centre_view(image, self.size, self.whole), label


def centre_view(image, size, whole=True):
    """The papers' view for tests, uint8 (3, h, w) to (3, H, W): short side to 256, bicubic, then the centre
    of 224 pixels, in proportion for other sizes. `whole`: an image of that size already stays as it is."""
    (height, width), (h, w) = size, image.shape[1:]
    if whole and (h, w) == (height, width):
        return image
    scale = max(height / h, width / w) * 256 / 224
    # The long side rounds down, as torchvision's Resize does.
    resized = [math.floor(side * scale + 1e-6) for side in (h, w)]
    image = TF.resize(image, resized, TF.InterpolationMode.BICUBIC, antialias=True)
    return TF.center_crop(image, [height, width])


@torch.no_grad()
def frozen_tokens(vit, images, batch_size, config, processes):
    """Yields (tokens after the final norm (B, [1+]N, D) float32 on the device, labels (B,)) of this process's
    share of `images`, in order, without augmentation, the encoder in eval mode.

    Raises ValueError for features that are not finite, and for fewer images than processes.
    """
    for batch, labels in centre_batches(vit, images, batch_size, config, processes):
        with common.autocast(processes.device, config.precision):
            tokens = vit(batch).float()  # (B, [1+]N, D)
        yield check_finite(tokens), labels


def centre_batches(vit, images, batch_size, config, processes):
    """Yields (normalised views (B, 3, H, W) on the device, labels (B,)) of this process's share."""
    if len(images) < processes.world:
        raise ValueError(f"{images.name} holds {len(images)} images, fewer than the {processes.world} "
                         "processes: start fewer")
    vit.eval().to(processes.device)
    share = range(processes.rank, len(images), processes.world)
    loader = torch.utils.data.DataLoader(
        CentreViews(images, vit.img_size), batch_size, sampler=share, num_workers=config.workers,
        worker_init_fn=common.own_group, pin_memory=processes.device.type == "cuda")
    for batch, labels in tqdm(loader, images.name, len(loader), leave=False,
                              disable=None if processes.main else True):
        yield common.normalise(batch.to(processes.device, non_blocking=True)), labels


def check_finite(features):
    if not features.isfinite().all():
        raise ValueError("the encoder gives features that are not finite: its training went wrong")
    return features


def pool_tokens(tokens, pool, num_patches):
    """(B, [1+]N, D) to (B, D): the class token ("cls"), or the mean of the N patch tokens ("mean"); any other
    word leaves the tokens as they are."""
    if pool == "mean":
        return tokens[:, -num_patches:].mean(dim=1)  # (B, D)
    return tokens[:, 0] if pool == "cls" else tokens


def check_pool(pool, vit, checkpoint):
    if pool == "cls" and vit.cls_token is None:
        raise ValueError(f"--pool cls: the encoder in {checkpoint} has no class token, use --pool mean")


def gather(rows, count, processes):
    """This process's share of rows (n_r, ...), as all (count, ...) rows in their order, in every process."""
    if processes.world == 1:
        return rows
    largest = -(-count // processes.world)
    padded = torch.zeros(largest, *rows.shape[1:], dtype=rows.dtype, device=processes.device)
    padded[: len(rows)] = rows
    parts = [torch.empty_like(padded) for _ in range(processes.world)]
    torch.distributed.all_gather(parts, padded)
    return torch.stack(parts, dim=1).flatten(0, 1)[:count].to(rows.device)


def check_classes(train, val):
    """The label of a class is its place in the list: two lists that differ would compare cats with dogs."""
    if train.classes != val.classes:
        only = sorted(set(train.classes) ^ set(val.classes))
        raise ValueError(f"the {len(train.classes)} classes of {train.name} and the {len(val.classes)} of "
                         f"{val.name} must be the same; in one of them only: {', '.join(only[:3])}"
                         f"{' ...' if len(only) > 3 else ''}")


def layer_groups(model, encoder, weight_decay, layer_decay):
    """AdamW's groups of a model's trainable parameters; `lr_scale` is their share of the learning rate:
    layer_decay^(depth + 1 - id), where id is 0 for what comes before the encoder's blocks, i + 1 for block i,
    depth + 1 for what comes after. Vectors, class token and positions have no weight decay."""
    depth, groups, ids = len(encoder.blocks), {}, {}
    for name, parameter in encoder.named_parameters():
        part, *rest = name.split(".")
        first = part in ("cls_token", "pos_embed", "patch_embed")
        ids[parameter] = int(rest[0]) + 1 if part == "blocks" else 0 if first else depth + 1
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            scale = layer_decay ** (depth + 1 - ids.get(parameter, depth + 1))
            decays = common.decays(name, parameter) and not name.endswith(("cls_token", "pos_embed"))
            group = dict(params=[], lr_scale=scale, weight_decay=weight_decay * decays)
            groups.setdefault((scale, decays), group)["params"].append(parameter)
    return list(groups.values())


def sha256(path):
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def append_result(kind, checkpoint, vit, config, started, **facts):
    """Appends the JSON line of a result to eval.jsonl beside the checkpoint, with all that is needed to
    repeat it: the file's hash, flags, seed, versions, command. `started` is `time.perf_counter()` at the
    start. Call it in the main process only."""
    record = dict(
        kind=kind, **facts, checkpoint=str(checkpoint), sha256=sha256(checkpoint), encoder=vit.config,
        view="torchvision uint8, bicubic antialias", seconds=round(time.perf_counter() - started, 1),
        torch=torch.__version__, torchvision=torchvision.__version__, pillow=PIL.__version__,
        processes=int(os.environ.get("WORLD_SIZE", 1)), flags=dataclasses.asdict(config),
        commit=common.commit(), command=" ".join(sys.argv))
    log = checkpoint.parent / "eval.jsonl"
    with open(log, "a") as file:
        file.write(json.dumps(record) + "\n")
    print(f"appended to {log}")
