"""Trains a small CLIP on CIFAR-10's class names: a teacher for trying CAE v2 on real images.

    python results/cifar_teacher.py CIFAR10_FOLDER OUT.safetensors      (from the top of the repository)

The folder holds train/CLASS/*.jpg and test/CLASS/*.jpg. The model is demo/tiny_clip.json, the loop that of
demo/teacher.py, in bf16; captions read "a CLASS": this teacher has seen the labels of the training images,
so that only runs with the same teacher compare. The file is open_clip's: `--teacher tiny_clip:OUT.safetensors`.
"""

import json
import sys
import time
from pathlib import Path

import open_clip
import torch
from safetensors.torch import save_file
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from demo.teacher import CLIP, CONTEXT, HERE, WORDS, clip_loss, normalise, train, write  # noqa: E402
from eval.data import find_labelled  # noqa: E402
from mfm_mae import reflect  # noqa: E402

RECIPE = {**CLIP, "steps": 7000, "batch": 128, "lr": 1.5e-3}


def pixels(images):
    """All images as one tensor (n, 3, 32, 32) uint8, and their labels (n,)."""
    return torch.stack([image for image, _ in images]), images.labels


def captions(labels):
    """Word ids of "a CLASS" with one id per class: (n,) to (n, CONTEXT)."""
    start, a, first, end = 1, 2, 3, len(WORDS) - 1
    rows = torch.zeros(len(labels), CONTEXT, dtype=torch.long)
    rows[:, 0], rows[:, 1], rows[:, 2], rows[:, 3] = start, a, first + labels, end
    return rows


def main(data, out):
    torch.manual_seed(0)
    open_clip.add_model_config(HERE / "tiny_clip.json")
    model, log, start = open_clip.create_model("tiny_clip"), [], time.time()
    (images, labels), (test, test_labels) = (pixels(find_labelled(data, split, 32)) for split in ("train", "val"))
    tokens = captions(labels)

    def loss_of(ids):
        flip = (torch.rand(len(ids)) < 0.5)[:, None, None, None]
        batch = torch.where(flip, images[ids].flip(-1), images[ids])
        top, left = torch.randint(-4, 5, (2, len(ids), 1))  # a shift of up to 4 pixels, mirrored at the edges
        rows, columns = (reflect(torch.arange(32) + shift, 32) for shift in (top, left))  # (B, 32)
        batch = batch[torch.arange(len(ids))[:, None, None], :, rows[:, :, None], columns[:, None]]
        with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):  # the fused one is slower here
            return clip_loss(model, normalise(batch.movedim(-1, 1), model.visual), tokens[ids])

    train("clip", model, loss_of, log, **RECIPE)
    model = model.half().float().eval()
    with torch.no_grad():
        texts = model.encode_text(captions(torch.arange(10)), normalize=True)
        guess = torch.cat([model.encode_image(normalise(part, model.visual)) @ texts.T for part in test.split(500)])
    accuracy = (guess.argmax(1) == test_labels).float().mean().item()
    log.append(dict(stage="end", zero_shot=round(accuracy, 4), seconds=round(time.time() - start), seed=0,
                    threads=torch.get_num_threads(), torch=torch.__version__))
    write(Path(out), lambda path: save_file({name: value.half() for name, value in model.state_dict().items()}, path))
    lines = "".join(json.dumps(line) + "\n" for line in log)
    write(Path(out).with_suffix(".log.jsonl"), lambda path: path.write_text(lines))
    print(log[-1])


if __name__ == "__main__":
    main(*sys.argv[1:])
