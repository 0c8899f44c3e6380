"""Draws docs/banner.png, the README's picture: a row per method, from the preview that its demo leaves.

    python cae_v2.py --demo;  python beyond_masking.py --demo;  python mfm_mae.py --demo
    python -m docs.banner        (from the top of the repository)
"""

from PIL import Image, ImageDraw

import common

SIDE, STEP = 168, 174  # of a panel in a preview, and from one panel to the next
# Per method: its preview, which row of it, and the panels for what is seen, asked and predicted.
ROWS = {
    "MFM: hidden pixels": ("mfm_mae_demo", 1, (0, 1, None, 3)),
    "Beyond Masking: all of the image, from a hidden zoom": ("beyond_masking_demo", 1, (0, 1, 2, 3)),
    "CAE v2: CLIP's features": ("cae_v2_demo", 1, (0, 1, None, 2)),
}
COLUMNS = "image", "what the encoder sees", "what is asked", "what it predicts"


def main(size=88, width=620):
    sheet = Image.new("RGB", (width, 20 + len(ROWS) * (size + 6)), "white")
    draw = ImageDraw.Draw(sheet)
    for column, caption in enumerate(COLUMNS):
        draw.text((6 + column * (size + 62), 4), caption, fill="black")
    for line, (label, (run, row, panels)) in enumerate(ROWS.items()):
        preview, top = Image.open(f"runs/{run}/preview.png"), 20 + line * (size + 6)
        for column, panel in enumerate(panels):
            left = 6 + column * (size + 62)
            if panel is None:
                draw.multiline_text((left, top + 30), label.replace(": ", ":\n"), fill="black")
                continue
            box = (6 + panel * STEP, 22 + row * STEP, 6 + panel * STEP + SIDE, 22 + row * STEP + SIDE)
            sheet.paste(preview.crop(box).resize((size, size), Image.NEAREST), (left, top))
    common.write_atomically("docs/banner.png", lambda path: sheet.save(path, format="PNG"))


if __name__ == "__main__":
    common.run_main(main)
