"""Draws the README's two pictures: docs/banner.png, a row per method, from the previews of the runs in
results/reference; and docs/tasks.png, what each task of Beyond Masking does to an image.

    python -m docs.figures        (from the top of the repository)
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image, ImageDraw
from torchvision.transforms.v2 import functional as TF

import beyond_masking
import common
from demo.scenes import make_scenes

SIDE, STEP, TOP = 168, 174, 22  # of a panel in a preview, from one to the next, of the first row
SIZE, LEFT, GAP = 92, 112, 24  # of a panel in the banner, of the first one, between them
ROW = 3  # of the previews
COLUMNS = "image", "the encoder sees", "asked for", "it predicts"


def panels(method, row):
    """A row of a reference run's preview."""
    sheet, top = Image.open(f"results/reference/{method}/preview.png").convert("RGB"), TOP + row * STEP
    return [sheet.crop((left, top, left + SIDE, top + SIDE)) for left in range(6, sheet.width - SIDE, STEP)]


def hidden_cells(seen, cells=8):
    """Places (x, y) of the patches that a preview shows in grey."""
    side = SIDE // cells
    return [(x, y) for y in range(cells) for x in range(cells)
            if seen.crop((x * side + 2, y * side + 2, (x + 1) * side - 2, (y + 1) * side - 2)).getextrema()
            in [((value, value),) * 3 for value in (127, 128)]]


def outlined(picture, cells, count=8):
    """The picture with a white line around the cells."""
    picture, side = picture.copy(), SIDE // count
    for x, y in cells:
        box = x * side, y * side, (x + 1) * side - 1, (y + 1) * side - 1
        ImageDraw.Draw(picture).rectangle(box, outline="white", width=2)
    return picture


def banner(path="docs/banner.png"):
    image, seen, _, filled = panels("mfm_mae", ROW)
    asked = Image.new("RGB", image.size, "lightgrey")  # the hidden patches, nothing else
    for x, y in hidden_cells(seen):
        box = x * 21, y * 21, (x + 1) * 21, (y + 1) * 21
        asked.paste(image.crop(box), box)
    clip, visible, cosines = panels("cae_v2", ROW)
    rows = {"MFM\n\nthe hidden\npatches": [image, seen, asked, filled],
            "Beyond Masking\n\nthe hidden patches\nand what is around": panels("beyond_masking", ROW),
            "CAE v2\n\nCLIP's feature\nof each patch": [clip, visible, None, outlined(cosines, hidden_cells(visible))]}
    sheet = Image.new("RGB", (LEFT + 4 * (SIZE + GAP) + 40, 18 + 3 * (SIZE + 6)), "white")
    draw = ImageDraw.Draw(sheet)
    for column, caption in enumerate(COLUMNS):
        draw.text((LEFT + column * (SIZE + GAP), 3), caption, fill="black")
    for line, (label, pictures) in enumerate(rows.items()):
        top = 18 + line * (SIZE + 6)
        draw.multiline_text((6, top + 12), label, fill="black")
        for column, picture in enumerate(pictures):
            left = LEFT + column * (SIZE + GAP)
            if picture:
                sheet.paste(picture.resize((SIZE, SIZE), Image.LANCZOS), (left, top))
            else:
                words = "a vector of 64\nnumbers for each\npatch of the\nwhole image"
                draw.multiline_text((left, top + 18), words, fill="black")
    scale = TF.to_pil_image(common.colour_map(torch.linspace(1, 0, SIZE)[:, None])).resize((8, SIZE))
    sheet.paste(scale, (left + SIZE + 4, top))
    for text, y in (("right (1)", top - 2), ("cosine", top + 40), ("0", top + SIZE - 10)):
        draw.text((left + SIZE + 14, y), text, fill="black")
    common.write_atomically(path, lambda file: sheet.save(file, format="PNG", optimize=True))


def tasks(path="docs/tasks.png", size=112, seed=12):
    """Nine columns in the order of the card's table: the photo, what the encoder sees, what is asked for."""
    order = [*beyond_masking.TASKS]
    generator, columns = torch.Generator().manual_seed(seed), []
    for task in order:
        rows, cols = beyond_masking.clean_size(task, size)
        photo = common.normalise(make_scenes(1, size=9 * size // 7, seed=seed).images)
        clean = F.interpolate(photo, (rows, cols), mode="bilinear", antialias=True)
        view = beyond_masking.degrade(task, clean, beyond_masking.sample_params(task, 1, generator, size))
        view = common.unnormalise(view) if view.shape[1] == 3 else view.expand(-1, 3, -1, -1)
        if task in ("blur", "decolor"):  # their random weights leave 0 .. 1: the range is drawn
            view = (view - view.min()) / (view.max() - view.min())
        if beyond_masking.is_masked(task):
            mask = common.random_masks(1, 49, 37, torch.Generator().manual_seed(seed))
            mask = F.interpolate(rearrange(mask.float(), "b (h w) -> b 1 h w", h=7), (size, size))
            view = view.where(mask == 0, 0.5)
        image = F.interpolate(photo, (size, size), mode="bilinear", antialias=True)
        asked = beyond_masking.area_resize(clean, (size, size))
        columns.append([common.unnormalise(image), view, common.unnormalise(asked)])
    pictures = [[TF.to_pil_image(image[0].clamp(0, 1)) for image in column] for column in columns]
    sheet = Image.new("RGB", (40 + 9 * (size + 6), 16 + 3 * (size + 6)), "white")
    draw = ImageDraw.Draw(sheet)
    for row, label in enumerate(("image", "seen", "asked")):
        draw.text((2, 16 + row * (size + 6) + size // 2), label, fill="black")
    for column, (task, parts) in enumerate(zip(order, pictures)):
        draw.text((40 + column * (size + 6), 2), task, fill="black")
        for row, picture in enumerate(parts):
            sheet.paste(picture, (40 + column * (size + 6), 16 + row * (size + 6)))
    common.write_atomically(path, lambda file: sheet.save(file, format="PNG", optimize=True))


if __name__ == "__main__":
    banner()
    tasks()
