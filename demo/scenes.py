"""Toy World: small scenes with labels, label maps, boxes and captions, drawn by 100 lines of torch.

A scene is one object of ten classes, in three paints, before a sky and a ground. Nothing is stored
and nothing is downloaded: a scene is a function of (seed, index), so every method, evaluation and
test of this project runs anywhere. Two choices make the data worth learning from:

* The paints are independent of the class. Colour statistics give nothing away, an untrained encoder
  scores low, and what an encoder gains in training it gains by shape.
* The geometry lives in [-1, 1]^2, y down, apart from the pixels. A scene is the same at each size.

    python -m demo.scenes scenes.png        draws sixty scenes and their label maps
    python -m demo.scenes FOLDER            writes a small detection set in COCO's format
"""

import json
import sys
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

# Each class: at most six parts, painted one over the other, in a box [-1, 1]^2 of its own.
# A part: primitive, paint (0, 1, 2), centre x and y, half width, half height. A negative half
# height turns the triangle upside down, a negative half width turns the side triangle round.
PARTS = {
    "house": [("box", 0, 0, .4, .75, .6), ("tri", 1, 0, -.6, 1, .4),
              ("box", 2, -.25, .6, .2, .4)],
    "tree": [("box", 1, 0, .6, .15, .4), ("ell", 0, 0, -.3, .75, .7)],
    "pine": [("box", 1, 0, .8, .15, .2), ("tri", 0, 0, .25, .8, .4),
             ("tri", 0, 0, -.4, .55, .6)],
    # The hull reaches up under the sails (y .15 to .25): no gap, however soft the edges.
    "boat": [("box", 2, 0, -.1, .07, .9), ("tri", 1, .45, -.3, .4, .55),
             ("tri", 1, -.4, -.2, .35, .45), ("tri", 0, 0, .575, 1, -.425)],
    "car": [("box", 0, 0, .15, 1, .3), ("box", 1, -.1, -.3, .55, .25),
            ("ell", 2, -.5, .5, .25, .25), ("ell", 2, .5, .5, .25, .25)],
    "fish": [("side", 1, .7, 0, -.35, .5), ("ell", 0, -.2, 0, .75, .5),
             ("ell", 2, -.55, -.1, .13, .13)],
    "mushroom": [("box", 1, 0, .4, .25, .6), ("ell", 0, 0, -.3, .95, .5),
                 ("ell", 2, -.4, -.35, .17, .17), ("ell", 2, .35, -.3, .2, .2)],
    "snowman": [("ell", 0, 0, .5, .6, .5), ("ell", 0, 0, -.2, .4, .35),
                ("box", 1, 0, -.55, .45, .08), ("box", 1, 0, -.75, .28, .25)],
    "rocket": [("tri", 1, 0, .65, .8, .35), ("box", 0, 0, .15, .35, .65),
               ("tri", 1, 0, -.75, .35, .25), ("ell", 2, 0, -.05, .2, .2)],
    "flower": [("box", 1, 0, .5, .08, .5), ("ell", 0, -.4, -.3, .35, .3),
               ("ell", 0, .4, -.3, .35, .3), ("ell", 0, 0, -.7, .3, .3),
               ("ell", 0, 0, .1, .3, .3), ("ell", 2, 0, -.3, .22, .22)],
}
CLASSES = tuple(PARTS)
MAP_CLASSES = ("sky", "ground") + CLASSES

PAINTS = {
    "red": (.85, .15, .15), "orange": (.95, .55, .1), "yellow": (.95, .85, .2),
    "green": (.2, .65, .25), "blue": (.15, .3, .85), "purple": (.55, .2, .7),
    "pink": (.95, .55, .7), "white": (.95, .95, .95), "brown": (.45, .27, .12),
    "black": (.1, .1, .12),
}
SKIES = {"clear": (.5, .75, .95), "evening": (.95, .7, .5),
         "night": (.15, .15, .35), "cloudy": (.75, .78, .82)}
GROUNDS = {"grass": (.35, .6, .25), "sand": (.85, .75, .5),
           "snow": (.92, .94, .97), "water": (.2, .4, .65)}

# One seed per purpose, so that no scene serves two: pre-training, the teacher's own training,
# and the two sides of every evaluation.
SEEDS = {"pretrain": 0, "teacher": 1, "train": 2, "val": 3}

# What a scene draws, all uniform in [0, 1), and how many numbers each needs.
DRAWS = {"label": 1, "scale": 1, "tilt": 1, "shift": 2, "flip": 1, "paints": len(PAINTS),
         "jitter": 15, "sky": 1, "ground": 1, "slope": 2, "horizon": 4, "words": 2}

# The colours of MAP_CLASSES in a drawn label map. (12, 3)
PALETTE = torch.tensor([
    (200, 224, 240), (150, 160, 120), (214, 39, 40), (44, 160, 44), (0, 90, 60), (31, 119, 180),
    (90, 90, 90), (255, 127, 14), (227, 119, 194), (255, 255, 255), (148, 103, 189),
    (240, 220, 40)], dtype=torch.uint8)


class Scenes(NamedTuple):
    """n scenes of side S pixels.

    images (n, 3, S, S) uint8; labels (n,) int64, a place in CLASSES; maps (n, S, S) uint8, a place
    in MAP_CLASSES per pixel; boxes (n, 4) float32, x0 y0 x1 y1 in pixels, tight around the object's
    pixels in the map, right and bottom edge exclusive; captions: n strings.
    """
    images: Tensor
    labels: Tensor
    maps: Tensor
    boxes: Tensor
    captions: list[str]


def make_scenes(count: int, size: int = 32, seed: int = 0) -> Scenes:
    """Scenes 0 to count - 1 of `seed`, `size` pixels high and wide.

    Scene i is the same for each count and, but for its resolution, for each size.
    Raises ValueError where count < 1 or size < 16.
    """
    if count < 1:
        raise ValueError(f"count must be at least 1 scene, not {count}")
    if size < 16:
        raise ValueError(f"size must be at least 16 pixels, or parts of an object vanish: {size}")
    # One call for all numbers of all scenes: uniform draws on the CPU come one after the other,
    # row by row, so the first rows do not depend on how many follow.
    draws = torch.rand((count, sum(DRAWS.values())), generator=torch.Generator().manual_seed(seed))
    # A chunk holds about a million pixels: fast (it stays near the cache) and small at any size.
    chunks = draws.split(max(1, 2**20 // size**2))
    images, maps = map(torch.cat, zip(*(render(named(chunk), size) for chunk in chunks)))
    d = named(draws)
    return Scenes(images, pick(d["label"], CLASSES), maps, boxes_of(maps), captions_of(d))


def named(draws: Tensor) -> dict[str, Tensor]:
    """Columns by name: (n, K) -> {name: (n, DRAWS[name])}."""
    return dict(zip(DRAWS, draws.split(list(DRAWS.values()), dim=1)))


def pick(draw: Tensor, options) -> Tensor:
    """A place in `options` per scene: (n, 1) in [0, 1) -> (n,) int64."""
    return (draw[:, 0] * len(options)).long()  # (n,)


def pick_paints(d: dict[str, Tensor]) -> Tensor:
    """Three different places in PAINTS per scene, (n, 3) int64: the first three of a shuffle."""
    return d["paints"].argsort(dim=1, stable=True)[:, :3]  # (n, 3)


def pick_colours(d: dict[str, Tensor]) -> Tensor:
    """Sky, ground and the object's three paints, each U(-.08, .08) off its table: (n, 5, 3)."""
    sky, ground, paints = (torch.tensor(list(table.values())) for table in (SKIES, GROUNDS, PAINTS))
    chosen = [sky[pick(d["sky"], SKIES)][:, None], ground[pick(d["ground"], GROUNDS)][:, None],
              paints[pick_paints(d)]]
    return torch.cat(chosen, dim=1) + .16 * (d["jitter"].unflatten(1, (5, 3)) - .5)  # (n, 5, 3)


def render(d: dict[str, Tensor], size: int) -> tuple[Tensor, Tensor]:
    """Draw n scenes: images (n, 3, S, S) uint8 and label maps (n, S, S) uint8."""
    labels = pick(d["label"], CLASSES)
    colours = pick_colours(d)
    canvas, maps = draw_background(d, colours, size)
    u, v, scale = object_coordinates(d, size)
    for index, parts in enumerate(PARTS.values()):
        rows = (labels == index).nonzero()[:, 0]  # (m,)
        a, b, pixels = u[rows], v[rows], scale[rows] * size / 2  # (m, S, S) twice, (m, 1, 1)
        picture, through = canvas[rows], torch.ones_like(a)  # (m, 3, S, S), (m, S, S)
        for kind, paint, x, y, width, height in parts:
            # In pixels, the distance to an edge is also the share of the pixel beyond that edge.
            cover = (.5 - pixels * distance_to(kind, a - x, b - y, width, height)).clamp(0, 1)
            colour = colours[rows, 2 + paint, :, None, None]  # (m, 3, 1, 1)
            picture = picture + cover[:, None] * (colour - picture)
            through = through * (1 - cover)
        canvas[rows] = picture
        # The pixel is the object's where less than half of the background shines through.
        maps[rows] = torch.where(through < .5, 2 + index, maps[rows])
    return (canvas.clamp(0, 1) * 255).round().byte(), maps


def draw_background(d: dict[str, Tensor], colours: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Sky over ground with a waving horizon: canvas (n, 3, S, S) float32, maps (n, S, S) uint8."""
    axis = pixel_centres(size)
    height, wave, pace, phase = d["horizon"].double().split(1, dim=1)  # (n, 1) each
    # In double: the last bits of a sine differ between CPUs, and rounding to single drops them.
    horizon = -.1 + .6 * height + .15 * wave * torch.sin((1 + 3 * pace) * axis + 6.3 * phase)
    below = ((axis[:, None] - horizon.float()[:, None]) * size / 2 + .5).clamp(0, 1)  # (n, S, S)
    slope = .3 * (d["slope"] - .5)  # (n, 2)
    # A vertical gradient of U(-.15, .15) y in each of the two.
    shade = (colours[:, :2, :, None] + slope[:, :, None, None] * axis)[..., None]  # (n, 2, 3, S, 1)
    canvas = shade[:, 0] + below[:, None] * (shade[:, 1] - shade[:, 0])  # (n, 3, S, S)
    return canvas, (below > .5).byte()


def object_coordinates(d: dict[str, Tensor], size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Each pixel's place in the object's own box: u, v (n, S, S), and its scale (n, 1, 1)."""
    axis = pixel_centres(size)
    # Smaller or more tilted objects are too hard for a minute of training, larger ones too easy:
    # there, raw pixels alone give the class.
    scale = (.6 + .35 * d["scale"])[:, :, None]  # (n, 1, 1)
    tilt = (.4 * (d["tilt"].double() - .5))[:, :, None]  # (n, 1, 1)
    cos, sin = tilt.cos().float(), tilt.sin().float()
    shift = (2 * d["shift"] - 1)[:, :, None, None] * (1 - scale)[:, None]  # (n, 2, 1, 1)
    x = (axis - shift[:, 0]) / scale  # (n, 1, S)
    y = (axis[:, None] - shift[:, 1]) / scale  # (n, S, 1)
    flip = 2 * (d["flip"] < .5).float()[:, :, None] - 1  # (n, 1, 1)
    return flip * (cos * x + sin * y), cos * y - sin * x, scale


def pixel_centres(size: int) -> Tensor:
    """Where the S pixels of a side lie in [-1, 1]: (S,) float32."""
    return (torch.arange(size) + .5) * (2 / size) - 1  # (S,)


def distance_to(kind: str, x: Tensor, y: Tensor, width: float, height: float) -> Tensor:
    """How far (x, y) is from the edge of a primitive about the origin; negative inside."""
    p, q, w, h = x / width, y / height, abs(width), abs(height)
    if kind == "box":
        return torch.maximum((p.abs() - 1) * w, (q.abs() - 1) * h)
    if kind == "ell":  # exact for a circle, near the edge good enough for an ellipse
        return ((p * p + q * q).sqrt() - 1) * min(w, h)
    if kind == "side":
        p, q, w, h = q, p, h, w
    # A triangle: its base, and its two slanted edges, each measured at a right angle.
    slant = w / (1 + (w / h / 2) ** 2) ** .5
    return torch.maximum((q - 1) * h, (p.abs() - (q + 1) / 2) * slant)


def boxes_of(maps: Tensor) -> Tensor:
    """Tight box of the object in each label map: (n, S, S) uint8 -> (n, 4) float32."""
    is_object, size = maps >= 2, maps.shape[-1]
    columns, rows = is_object.any(dim=1).int(), is_object.any(dim=2).int()  # (n, S) each
    # argmax finds the first of equal values; from the far end for the far edge.
    edges = [columns.argmax(1), rows.argmax(1),
             size - columns.flip(1).argmax(1), size - rows.flip(1).argmax(1)]
    return torch.stack(edges, dim=1).float()  # (n, 4)


def captions_of(d: dict[str, Tensor]) -> list[str]:
    """What one might say of each scene: its class, for half its colour, for a third its place.

    A caption that named everything would let the teacher tell its images apart by colour and sky,
    which are easy, and leave the class, which is the point, for last.
    """
    names = [list(table) for table in (CLASSES, PAINTS, SKIES, GROUNDS)]
    places = (pick(d["label"], CLASSES), pick_paints(d)[:, 0], pick(d["sky"], SKIES),
              pick(d["ground"], GROUNDS))
    captions = []
    for (coloured, placed), *scene in zip(d["words"].tolist(), *(p.tolist() for p in places)):
        what, colour, sky, ground = (words[place] for words, place in zip(names, scene))
        thing = f"{colour} {what}" if coloured < .5 else what
        article = "an" if thing.startswith("orange") else "a"
        where = f" on {ground} under {'an' if sky == 'evening' else 'a'} {sky} sky"
        captions.append(f"{article} {thing}" + where * (placed < 1 / 3))
    return captions


def write_coco(folder, train: int = 400, val: int = 100, size: int = 64) -> None:
    """Write a detection set in COCO's format: {train,val}/*.png, annotations/instances_*.json.

    An image of `size` pixels shows four scenes, two by two: with a single one there would be little
    to find. Masks are COCO's run lengths. Raises ValueError for an odd size or one below 32.
    """
    from torchvision.utils import save_image
    if size % 2:
        raise ValueError(f"size must be even, as two scenes share a side: {size}")
    folder, half = Path(folder), size // 2
    for split, count in (("train", train), ("val", val)):
        scenes = make_scenes(4 * count, half, SEEDS[split])
        images, annotations = [], []
        for directory in (folder / split, folder / "annotations"):
            directory.mkdir(parents=True, exist_ok=True)
        for place, image_id in enumerate(range(1, count + 1)):
            image = {"id": image_id, "file_name": f"{image_id:06}.png", "height": size,
                     "width": size}
            canvas = torch.zeros(3, size, size, dtype=torch.uint8)
            for quarter in range(4):
                scene, y, x = 4 * place + quarter, quarter // 2 * half, quarter % 2 * half
                canvas[:, y: y + half, x: x + half] = scenes.images[scene]
                mask = torch.zeros(size, size, dtype=torch.bool)
                mask[y: y + half, x: x + half] = scenes.maps[scene] >= 2
                x0, y0, x1, y1 = scenes.boxes[scene].tolist()
                annotations.append({
                    "id": len(annotations) + 1, "image_id": image_id, "iscrowd": 0,
                    "category_id": int(scenes.labels[scene]) + 1, "area": int(mask.sum()),
                    "bbox": [x + x0, y + y0, x1 - x0, y1 - y0],
                    "segmentation": {"size": [size, size], "counts": run_lengths(mask)}})
            save_image(canvas / 255, folder / split / image["file_name"])
            images.append(image)
        categories = [{"id": 1 + index, "name": name} for index, name in enumerate(CLASSES)]
        content = {"images": images, "annotations": annotations, "categories": categories}
        (folder / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))


def run_lengths(mask: Tensor) -> list[int]:
    """COCO's code of a mask: lengths of runs of 0 and 1 in turn, 0 first, column by column."""
    column = mask.T.flatten().int()  # (H*W,)
    edges = torch.nn.functional.pad(column, (1, 0)).diff().nonzero()[:, 0]  # a run begins there
    ends = torch.cat([edges.new_zeros(1), edges, edges.new_tensor([len(column)])])
    return ends.diff().tolist()


def main() -> None:
    """Write images and their label maps, side by side, to the file named on the command line, or,
    where a folder is named, a detection set into it."""
    from torchvision.utils import save_image
    if len(sys.argv) != 2:
        sys.exit("usage: python -m demo.scenes OUT.png, or python -m demo.scenes FOLDER")
    if not sys.argv[1].endswith(".png"):
        return write_coco(sys.argv[1])
    scenes = make_scenes(60, size=64)
    maps = PALETTE[scenes.maps.long()].movedim(-1, 1)  # (n, 3, S, S)
    pairs = torch.stack([scenes.images, maps], dim=1).flatten(0, 1)  # (2n, 3, S, S)
    save_image(pairs / 255, sys.argv[1], nrow=12, padding=2)


if __name__ == "__main__":
    main()
