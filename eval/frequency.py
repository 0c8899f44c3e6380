"""Frequency content of features: how much fine detail each block keeps, beside the same encoder at random.

    python -m eval.frequency --checkpoint runs/mfm_mae_demo --data scenes

The claim examined is that of MFM (2308.00261): pixel targets make the last blocks carry high frequencies,
and the fusion of shallow blocks relieves them. Which transform the paper used is not known; this is that of
Park and Kim ("How do vision transformers work?", 2022) as their code has it. The tokens of a whole test
image after each block, without class token and final norm, are D maps of g x g patches:

    A(u) = mean over images and channels of log(|FFT2| + 1e-6), along the diagonal (u, u) of the spectrum
    relative log amplitude at u = A(u) - A(0), for u = 0 .. ceil(g/2) - 1

Lower at high u means smoother maps. The single number of a block is the last entry, at a frequency a little
below the highest that the grid can hold (6/7 pi for g = 14).

Result, beside the checkpoint: frequency.json (a curve for the patch embedding with positions and for each
block; also with random weights), frequency.png where matplotlib is installed, a JSON line in eval.jsonl.
Dimension key: B batch, N patches, D width, L blocks, g side of the grid, f = ceil(g/2) frequencies."""

import dataclasses
import json
import time

import torch
from einops import rearrange

if not __package__:  # started by its file name, Python does not find common.py
    raise SystemExit("error: start it in the folder of common.py as `python -m eval.frequency`")
import common
from common import flag
from eval import plot
from eval.protocol import EvalConfig, append_result, centre_batches, open_checkpoint, random_encoder


@dataclasses.dataclass(frozen=True)
class Config(EvalConfig):
    """The whole command line."""
    images: int = flag(1000, "how many test images, evenly picked from all", positive=True)


def relative_log_amplitude(features, grid):
    """Patch tokens (B, N, D) of a square grid to their curve (f,), a mean over images. It starts at 0."""
    h, w = common.pair(grid)
    if h != w or features.shape[1] != h * w:
        raise ValueError(f"a square grid is needed, not {features.shape[1]} patches on {h} x {w}")
    maps = rearrange(features, "b (h w) d -> b d h w", h=h)  # (B, D, g, g)
    amplitude = (torch.fft.fft2(maps).abs() + 1e-6).log().mean(dim=(0, 1))  # (g, g)
    diagonal = amplitude.diagonal()[: (h + 1) // 2]  # (f,)
    return diagonal - diagonal[0]


@torch.no_grad()
def curves(vit, images, config, dist):
    """The curve after the patch embedding and after each block, (1+L, f)."""
    total, N, blocks = 0, vit.grid[0] * vit.grid[1], range(len(vit.blocks))
    for batch, _ in centre_batches(vit, images, config.batch_size, config, dist):
        tokens = [vit.embed(batch), *vit.layers(batch, blocks)]  # (1+L) x (B, [1+]N, D)
        rows = [relative_log_amplitude(x[:, -N:].float(), vit.grid) for x in tokens]  # (1+L) x (f,)
        total = total + len(batch) * torch.stack(rows)  # (1+L, f)
    return dist.all_reduce(total) / len(images)


def pick_images(images, count):
    """`count` images, evenly spread: test folders are sorted by class."""
    chosen = torch.linspace(0, len(images) - 1, min(count, len(images))).round().long().tolist()
    picked = torch.utils.data.Subset(images, chosen)
    picked.name = images.name
    return picked


def main(argv=None):
    config, started = common.parse_config(Config, __doc__, argv=argv), time.perf_counter()
    checkpoint, vit = open_checkpoint(config)
    images = pick_images(common.find_data(config.data, "val", vit.img_size[0]), config.images)
    encoders = dict(random_init=random_encoder(vit, config.seed), encoder=vit)
    with common.distributed(config.device) as dist:
        if dist.is_main:
            common.say(f"data     {len(images):,} of the images in {images.name}")
        rows = {name: curves(encoder, images, config, dist).tolist() for name, encoder in encoders.items()}
        if not dist.is_main:
            return
        path, last = checkpoint.parent / "frequency.json", {name: row[-1][-1] for name, row in rows.items()}
        result = json.dumps(dict(rows, grid=list(vit.grid), images=len(images), data=config.data), indent=1)
        common.write_atomically(path, lambda file: file.write_text(result))
        append_result("frequency", checkpoint, vit, config, started, data=config.data, val=images.name,
                      val_images=len(images), device=str(dist.device), last_block=last["encoder"],
                      random_init=last["random_init"])
        print("highest against zero frequency after the last block: random init "
              f"{last['random_init']:.2f}, pre-trained {last['encoder']:.2f}")
        plot.draw([checkpoint.parent], path.with_suffix(".png"), panels=("frequency",))


if __name__ == "__main__":
    common.run_main(main)
