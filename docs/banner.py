"""Draws docs/banner.png, the README's picture: a row per method, from the previews that the demos leave.

    python mfm_mae.py --demo;  python beyond_masking.py --demo;  python cae_v2.py --demo
    python -m docs.banner        (from the top of the repository)
"""

from PIL import Image, ImageChops, ImageDraw

import common

SIDE, STEP, TOP = 168, 174, 22  # of a panel in a preview, from one to the next, of the first row
SIZE, LEFT, GAP = 90, 120, 40  # of a panel here, of the first one, between them
COLUMNS = "image", "the encoder sees", "asked for", "it predicts"


def panel(run, column, row=1):
    """A panel of a run's preview.png."""
    left, top = 6 + column * STEP, TOP + row * STEP
    return Image.open(f"runs/{run}/preview.png").crop((left, top, left + SIDE, top + SIDE))


def main():
    image, visible = panel("mfm_mae_demo", 0), panel("mfm_mae_demo", 1)
    hidden = ImageChops.difference(image, visible).convert("L").point(lambda value: 255 * (value > 0))
    rows = {
        "MFM": [image, visible, Image.composite(image, Image.new("RGB", image.size, "lightgrey"), hidden),
                panel("mfm_mae_demo", 3)],
        "Beyond Masking\n(mask + zoom in)": [panel("beyond_masking_demo", column) for column in range(4)],
        "CAE v2": [panel("cae_v2_demo", 0), panel("cae_v2_demo", 1), None, panel("cae_v2_demo", 2)]}
    sheet = Image.new("RGB", (LEFT + 4 * (SIZE + GAP), 18 + 3 * (SIZE + 6)), "white")
    draw = ImageDraw.Draw(sheet)
    for column, caption in enumerate(COLUMNS):
        draw.text((LEFT + column * (SIZE + GAP), 3), caption, fill="black")
    for line, (label, panels) in enumerate(rows.items()):
        top = 18 + line * (SIZE + 6)
        draw.multiline_text((6, top + 36), label, fill="black")
        for column, picture in enumerate(panels):
            place = LEFT + column * (SIZE + GAP), top
            if picture:
                sheet.paste(picture.resize((SIZE, SIZE), Image.NEAREST), place)
            else:
                draw.multiline_text((place[0], top + 30), "the feature that\nCLIP gives for\neach patch", fill="black")
    draw.multiline_text((LEFT + 4 * (SIZE + GAP) - 36, top + 24), "yellow:\nright\nblue:\nwrong", fill="black")
    common.write_atomically("docs/banner.png", lambda path: sheet.save(path, format="PNG"))


if __name__ == "__main__":
    common.run_main(main)
