"""A smaller copy of a folder of photographs, for cores that decode the full ones too slowly.

    python -m eval.shrink ~/imagenet ~/imagenet320 --short_side 320

An image with a longer short side is turned upright, resized (Lanczos) and written under the same name in
its own format, JPEG with quality 90; smaller ones, and other files such as lists of labels, are copied.
The same command goes on after an interruption: an image that is there is not made again.
The pixels change: results on the copy are not results on the original images, and should say so.
"""
import concurrent.futures
import dataclasses
import shutil
import sys
from pathlib import Path

from PIL import Image
from torchvision.transforms.v2 import functional as TF
from tqdm import tqdm

import common
from common import flag
from eval.protocol import only_main_prints


@dataclasses.dataclass(frozen=True)
class Config:
    """The whole command line."""
    src: str = flag("", "folder of images")
    dst: str = flag("", "folder of the copy")
    short_side: int = flag(320, "pixels of the short side, at most", positive=True)
    workers: int = flag(0, "processes (default: one per core)")
    __post_init__ = common.MachineConfig.__post_init__


def shrink(path, copy, side):
    """Writes an image's copy with a short side of at most `side`; says so if the image cannot be read."""
    try:
        image = TF.to_pil_image(common.read_image(path))
    except ValueError as error:
        return common.say(f"warning: {error}")
    if min(image.size) <= side:
        return common.write_atomically(copy, lambda new: shutil.copyfile(path, new))
    kind = Image.open(path).format.replace("MPO", "JPEG")  # a phone's JPEG with a second image behind
    size = [round(length * side / min(image.size)) for length in image.size]
    small = image.resize(size, Image.Resampling.LANCZOS)
    common.write_atomically(copy, lambda new: small.save(new, format=kind, quality=90))


def main(argv=None):
    words = list(sys.argv[1:] if argv is None else argv)
    if len(words) > 1 and not any(word.startswith("-") for word in words[:2]):
        words[:2] = ["--src", words[0], "--dst", words[1]]
    config = common.parse_config(Config, __doc__, argv=words)
    src, dst = (Path(folder).expanduser().resolve() for folder in (config.src, config.dst))
    if not (config.src and config.dst and src.is_dir()) or dst.is_relative_to(src):
        raise ValueError("give SRC, a folder of images, and DST, a folder that is not inside it")
    with only_main_prints(common.Dist(1, 2, None)):  # what list_images calls left out is copied below
        copies = {Path(file): dst / Path(file).relative_to(src) for file in common.list_images(src)}
    for path in {path for path in src.rglob("*") if path.is_file()} - copies.keys():
        common.write_atomically(dst / path.relative_to(src), lambda new: shutil.copyfile(path, new))
    todo = [path for path in copies if not copies[path].exists()]
    with concurrent.futures.ProcessPoolExecutor(config.workers or None) as pool:
        work = todo, [copies[path] for path in todo], [config.short_side] * len(todo)
        list(tqdm(pool.map(shrink, *work, chunksize=16), "images", len(todo)))
    sizes = [(path.stat().st_size, copy.stat().st_size) for path, copy in copies.items() if copy.exists()]
    before, after = (sum(column) / 1e6 for column in zip(*sizes, (0, 0)))
    print(f"{len(sizes):,} images, {before:.1f} MB before, {after:.1f} MB now: their pixels have changed")
    if bad := len(copies) - len(sizes):
        raise ValueError(f"{bad} of {len(copies)} images cannot be read and are not in {dst}")


if __name__ == "__main__":
    common.run_main(main)
