"""Features of a folder of images, written to a file: what one does first with an encoder.

    python -m eval.features --checkpoint runs/cae_v2_vit_b --data photos --out photos.safetensors
    python -m eval.features --checkpoint mae_pretrain_vit_base.pth --data photos --out layers.safetensors \\
        --tokens patches --layers 5,-1

`--data` is any folder of images, flat or nested; of a folder with a train/ in it, only that is read. Each
image is seen once, resized and cropped as in tests (`protocol.centre_view`). `--tokens`: mean of the patch
tokens, the class token, all patches in raster order, or all tokens, the class token first.

The file holds float32 tensors: `features`, the output of the encoder after its final norm, (n, D), or
(n, N, D) for patches and (n, [1+]N, D) for all. With `--layers` it holds `layer_5` and so on instead, the
outputs of these blocks before any norm, numbered from 0; -1 is the last. If the images are in class folders,
`labels` (n,) are there too. The metadata holds a JSON text, "about": the file names relative to the folder,
in the order of the rows, the classes, and what was computed by which checkpoint:

    with safetensors.safe_open("photos.safetensors", "pt") as file:
        features, about = file.get_tensor("features"), json.loads(file.metadata()["about"])
    about["names"][0], features[0]

All features are held in memory until they are written at the end; their size is printed before the start, and
more than 16 GiB are refused.

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

if not __package__:  # started by its file name, Python does not find common.py
    raise SystemExit("error: start it as `python -m eval.features`")
import common
from common import flag
from eval.protocol import (EvalConfig, all_gather, append_result, centre_batches, check_finite, check_pool,
                           open_checkpoint, pool_tokens, sha256)

LIMIT = 16 * 2**30  # bytes


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
