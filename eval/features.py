"""Features of a folder of images, written to a file: what one does first with an encoder.

    python -m eval.features --checkpoint runs/cae_v2_vit_b --data photos --out photos.safetensors
    python -m eval.features --checkpoint mae.pth --data ~/x --out x.safetensors --tokens all --layers=5,-1

`--data` is any folder of images; of one with a train/ in it, only that is read. Images are resized and
cropped as in tests (`protocol.centre_view`). The file holds float32 tensors: `features` after the encoder's
final norm, by `--tokens` the mean of the patch tokens or the class token (n, D), patches in raster order
(n, N, D), or all (n, [1+]N, D). With --layers it holds `layer_5` and so on instead, the outputs of these
blocks before any norm, numbered from 0; -1 is the last. Images in class folders bring `labels` (n,). The
metadata has a JSON text, "about": file names in the order of the rows, classes, the checkpoint's hash. A
file that cannot be read is told and listed there, and its rows are NaN:

    with safetensors.safe_open("photos.safetensors", "pt") as file:
        features, about = file.get_tensor("features"), json.loads(file.metadata()["about"])
Dimension key: B batch, n images, N patches, D width."""

import dataclasses
import json
import math
import os
import time
import typing
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

if not __package__:  # started by its file name, Python does not find common.py
    raise SystemExit("error: start it in the folder of common.py as `python -m eval.features`")
import common
from common import flag
from eval.protocol import (UNREADABLE, EvalConfig, all_gather, append_result, centre_batches, check_finite,
                           check_pool, only_main_prints, open_checkpoint, pool_tokens, sha256)

LIMIT, NAMES_LIMIT = 16 * 2**30, 90e6  # bytes; the header of a .safetensors file may have 100 MB


@dataclasses.dataclass(frozen=True)
class Config(EvalConfig):
    """The whole command line."""
    out: str = flag("", "the file to write, .safetensors")
    tokens: typing.Literal["mean", "cls", "patches", "all"] = flag("mean", "which tokens")
    layers: str = flag("", "blocks, as in 5,-1 (default: the encoder's output, after its final norm)")


def layer_indices(layers, depth):
    """{name in the file: block index} of --layers. Raises ValueError for what is no block."""
    words, known = layers.split(","), {str(index): index % depth for index in range(-depth, depth)}
    if not all(word.strip() in known for word in words):
        raise ValueError(f"--layers {layers}: the encoder has blocks 0 to {depth - 1}, given as in 0,-1")
    return {f"layer_{known[word.strip()]}": known[word.strip()] for word in words}


def feature_shape(config, vit):
    """The shape of one image's features."""
    N = math.prod(vit.grid)
    tokens = dict(patches=(N,), all=(N + (vit.cls_token is not None),)).get(config.tokens, ())
    return *tokens, vit.config["embed_dim"]


@torch.no_grad()
def extract(vit, images, layers, config, dist):
    """{name: features (n, *feature_shape) float32, on the CPU} of all images, in the main process; NaN is
    the row of an image that cannot be read."""
    share, first, N = len(range(dist.rank, len(images), dist.world)), 0, math.prod(vit.grid)
    features = {name: torch.empty(share, *feature_shape(config, vit)) for name in layers}
    for batch, labels in centre_batches(vit, images, config.batch_size, config, dist, skip_bad=True):
        with common.autocast(dist.device, config.precision):
            outputs = vit.layers(batch, list(layers.values())) if config.layers else [vit(batch)]
        for name, tokens in zip(layers, outputs):  # (B, [1+]N, D)
            tokens = tokens[:, -N:] if config.tokens == "patches" else tokens
            chosen = check_finite(pool_tokens(tokens.float(), config.tokens, N))
            chosen[labels == UNREADABLE] = math.nan
            features[name][first: first + len(batch)] = chosen.cpu()
        first += len(batch)
    # One layer after the other: the other processes hold no more than one.
    gathered = ((name, all_gather(part, len(images), dist)) for name, part in features.items())
    return {name: rows for name, rows in gathered if dist.is_main}


def names_and_classes(images, root):
    """(file names relative to the folder, labels or None, classes): by the folder that each image is in."""
    if images.pixels is not None:
        return [str(index) for index in range(len(images))], images.labels, images.classes
    names = [Path(images.path(index)).relative_to(root).as_posix() for index in range(len(images))]
    if not all("/" in name for name in names):
        return names, None, ()
    classes, labels = np.unique([name.split("/")[0] for name in names], return_inverse=True)
    return names, torch.from_numpy(labels), classes.tolist()


def main(argv=None):
    config, started = common.parse_config(Config, __doc__, argv=argv), time.perf_counter()
    if not config.out.endswith(".safetensors"):
        raise ValueError(f"--out must name the file to write, ending in .safetensors, not '{config.out}'")
    checkpoint, vit = open_checkpoint(config)
    check_pool(config.tokens, vit, checkpoint)
    layers = layer_indices(config.layers, len(vit.blocks)) if config.layers else {"features": None}
    images = common.find_data(config.data, "pretrain", vit.img_size[0])
    shape = len(images), *feature_shape(config, vit)
    size = 4 * math.prod(shape) * len(layers)
    cost = f"{' x '.join(map(str, shape))} float32 for {', '.join(layers)}: {size / 2**30:.2f} GiB in all"
    names, labels, classes = names_and_classes(images, images.name)
    header = len(json.dumps(json.dumps(names)))
    if size > LIMIT or header > NAMES_LIMIT:
        raise ValueError(f"{cost}, {header / 1e6:.0f} MB of names: too much, take fewer layers or images")
    out = Path(config.out).absolute()
    if out.exists() and common.read_about(out).get("kind") != "features":
        raise ValueError(f"--out {config.out} exists and holds no features: give another name")
    out.parent.mkdir(parents=True, exist_ok=True)
    if not os.access(out.parent, os.W_OK):
        raise ValueError(f"--out {config.out} cannot be written there: give a folder of your own")
    with common.distributed(config.device) as dist, only_main_prints(dist):
        common.say(f"data     {len(images):,} images in {images.name}\n{cost}")
        tensors = extract(vit, images, layers, config, dist)
        if dist.is_main:
            bad = tensors[next(iter(layers))].flatten(1).isnan().any(dim=1).nonzero()[:, 0].tolist()
            tensors |= dict(labels=labels) if labels is not None else {}
            facts = dict(data=config.data, images=len(images), tokens=config.tokens, layers=list(layers),
                         out=str(out), device=str(dist.device), unreadable=[names[row] for row in bad])
            about = json.dumps(dict(
                facts, kind="features", names=names, classes=list(classes), folder=images.name,
                checkpoint=str(checkpoint), sha256=sha256(checkpoint), encoder=vit.config))
            common.write_atomically(out, lambda path: save_file(tensors, path, dict(about=about)))
            append_result("features", checkpoint, vit, config, started, **facts)
            print(f"wrote {config.out}: {out.stat().st_size / 2**20:.1f} MiB"
                  + f", {len(bad)} rows are NaN: their images cannot be read" * bool(bad))


if __name__ == "__main__":
    common.run_main(main)
