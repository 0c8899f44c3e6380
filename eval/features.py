"""Features of a folder of images, written to a file: what one does first with an encoder.

    python -m eval.features --checkpoint runs/cae_v2_vit_b --data photos --out photos.safetensors
    python -m eval.features --checkpoint mae_pretrain_vit_base.pth --data photos --out layers.safetensors \\
        --tokens patches --layers 5,-1

`--data` is any folder of images, flat or nested (of a folder with a train/ in it, only that: give its val/ by
name). Each image is seen once, resized and cropped as in tests (`protocol.centre_view`). `--tokens`: mean of
the patch tokens, the class token, all patches in raster order, or all tokens, the class token first.

The file holds float32 tensors: `features`, the output of the encoder after its final norm, (n, D), or
(n, N, D) for patches and (n, 1+N, D) for all; with `--layers` instead `layer_5` and so on, the output of
these blocks before any norm, numbered from 0, -1 is the last. And `labels` (n,), where the images lie in
class folders. Under "about" its metadata holds a JSON text: the file names relative to the folder, row by
row, the classes, and what was computed by which checkpoint:

    with safetensors.safe_open("photos.safetensors", "pt") as file:
        features, about = file.get_tensor("features"), json.loads(file.metadata()["about"])
    about["names"][0], features[0]

The size is printed before the start. All is held in memory until it is written, once, at the end; what would
exceed 16 GiB is refused: take fewer layers, another `--tokens`, or a subfolder at a time. Under torchrun the
other processes hold a layer of it for a moment.

Dimension key: B batch, n images, N patches, D width.
"""

import dataclasses
import json
import math
import os
import time
import typing
from pathlib import Path

import torch
from safetensors.torch import save_file

import common
from common import flag
from eval.protocol import (EvalConfig, append_result, centre_batches, check_finite, check_pool, gather,
                           open_checkpoint, pool_tokens, sha256)

LIMIT = 16 * 2**30  # bytes
NAMES_LIMIT = 90e6  # bytes; the header of a .safetensors file may have 100 MB


@dataclasses.dataclass(frozen=True)
class Config(EvalConfig):
    """The whole command line."""

    out: str = flag("", "the file to write, .safetensors")
    tokens: typing.Literal["mean", "cls", "patches", "all"] = flag("mean", "which tokens")
    layers: str = flag("", "blocks, as in 5,-1 (default: the encoder's output, after its final norm)")

    def __post_init__(self):
        super().__post_init__()
        if not self.out.endswith(".safetensors"):
            raise ValueError(f"--out must name the file to write, ending in .safetensors, not '{self.out}'")
        try:
            [int(word) for word in self.layers.split(",") if self.layers]
        except ValueError as error:
            raise ValueError(f"--layers {self.layers} must be whole numbers, as in 5,-1") from error


def layer_names(config, vit):
    """{name in the file: block index, None for the encoder's output}."""
    depth = len(vit.blocks)
    indices = [int(word) for word in config.layers.split(",") if config.layers]
    if not all(-depth <= index < depth for index in indices):
        raise ValueError(f"--layers {config.layers}: the encoder has {depth} blocks, 0 to {depth - 1}")
    return {f"layer_{index % depth}": index % depth for index in indices} or {"features": None}


def feature_shape(config, vit):
    """The shape of one image's features."""
    N = math.prod(vit.grid)
    tokens = {"patches": (N,), "all": (N + (vit.cls_token is not None),)}.get(config.tokens, ())
    return *tokens, vit.config["embed_dim"]


@torch.no_grad()
def extract(vit, images, names, config, processes):
    """{name: features (n, *feature_shape) float32 on the CPU} of all images; {} but in the main process."""
    share = len(range(processes.rank, len(images), processes.world))
    features = {name: torch.empty(share, *feature_shape(config, vit)) for name in names}
    first, N = 0, math.prod(vit.grid)
    for batch, _ in centre_batches(vit, images, config.batch_size, config, processes):
        with common.autocast(processes.device, config.precision):
            outputs = [vit(batch)] if None in names.values() else vit.layers(batch, list(names.values()))
        for name, tokens in zip(names, outputs):  # (B, [1+]N, D)
            tokens = tokens[:, -N:] if config.tokens == "patches" else tokens
            chosen = check_finite(pool_tokens(tokens.float(), config.tokens, N))
            features[name][first: first + len(batch)] = chosen.cpu()
        first += len(batch)
    whole = {}
    for name, part in features.items():
        rows = gather(part, len(images), processes)
        if processes.main:
            whole[name] = rows
    return whole


def names_and_classes(images, root):
    """(file names relative to the folder, labels or None, classes): by the folder that each image lies in."""
    if images.pixels is not None:
        return [str(index) for index in range(len(images))], images.labels, images.classes
    names = [Path(images.path(index)).relative_to(root).as_posix() for index in range(len(images))]
    tops = [name.split("/")[0] for name in names]
    if not all("/" in name for name in names):
        return names, None, ()
    classes = sorted(set(tops))
    ids = {name: index for index, name in enumerate(classes)}
    return names, torch.tensor([ids[top] for top in tops]), classes


def main(argv=None):
    config, started = common.parse_config(Config, __doc__, argv=argv), time.perf_counter()
    checkpoint, vit = open_checkpoint(config)
    check_pool(config.tokens, vit, checkpoint)
    layers = layer_names(config, vit)
    images = common.find_data(config.data, "pretrain", vit.img_size[0])
    shape = (len(images), *feature_shape(config, vit))
    size = 4 * math.prod(shape) * len(layers)
    cost = (f"{' x '.join(map(str, shape))} float32 for each of {', '.join(layers)}: "
            f"{size / 2**30:.2f} GiB in all")
    if size > LIMIT:
        raise ValueError(f"{cost}, more than the {LIMIT / 2**30:.0f} GiB that are held in memory: take fewer "
                         "layers, other --tokens, or a subfolder at a time")
    names, labels, classes = names_and_classes(images, images.name)
    if len(json.dumps(json.dumps(names))) > NAMES_LIMIT:
        raise ValueError(f"the names of {len(images):,} files take more than the {NAMES_LIMIT / 1e6:.0f} MB "
                         "that a .safetensors file can hold: take a subfolder at a time")
    Path(config.out).absolute().parent.mkdir(parents=True, exist_ok=True)
    if not os.access(Path(config.out).absolute().parent, os.W_OK):
        raise ValueError(f"--out {config.out} cannot be written there: give a folder of your own")
    with common.processes(config.device) as processes:
        if processes.main:
            print(cost, flush=True)
        tensors = extract(vit, images, layers, config, processes)
        if processes.main:
            if labels is not None:
                tensors["labels"] = labels
            facts = dict(data=config.data, images=len(images), tokens=config.tokens, layers=list(layers),
                         out=str(Path(config.out).absolute()), device=str(processes.device))
            about = dict(kind="features", names=names, classes=list(classes), folder=images.name, **facts,
                         checkpoint=str(checkpoint), sha256=sha256(checkpoint), encoder=vit.config)
            common.write_atomically(
                config.out, lambda path: save_file(tensors, path, dict(about=json.dumps(about))))
            append_result("features", checkpoint, vit, config, started, **facts)
            print(f"wrote {config.out}: {os.path.getsize(config.out) / 2**20:.1f} MiB")


if __name__ == "__main__":
    common.run_main(main)
