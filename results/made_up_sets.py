"""Folders laid out like ImageNet-A, -R, -Sketch and -C, made of the test images of any labelled set.

    python -m results.made_up_sets CIFAR/test OUT [images of each class]      (from the top of the repository)

Only the layout is that of the published sets: A and R hold every fifth class (200 of 1000), Sketch all of
them as edges, C the 15 corruptions at 5 severities, each a crude stand-in for the published one.
"""

import sys
from pathlib import Path

import torch
from torchvision.io import write_jpeg
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as TF

import common
from eval.robustness import ALEXNET


def noise(strength):
    return lambda x: (x + strength * 255 * torch.randn(x.shape)).clamp(0, 255)


def blend(colour, strength):
    return lambda x: (1 - strength) * x + strength * colour


def edges(x):
    grey = x.mean(dim=0, keepdim=True)  # (1, h, w)
    return 255 - 4 * (grey - TF.gaussian_blur(grey, 5)).abs().clamp(max=63).expand(3, -1, -1)


def pixelate(share):
    def apply(x):
        small = TF.resize(x, [max(2, round(side * share)) for side in x.shape[1:]])
        return TF.resize(small, list(x.shape[1:]), TF.InterpolationMode.NEAREST)
    return apply


def corruption(name, severity):
    """A function of float32 images (3, h, w) in 0..255 that stands in for a corruption, stronger by severity."""
    s = severity / 10  # 0.1 to 0.5
    if name.endswith("noise"):
        return noise(s)
    if name.endswith("blur"):
        return lambda x: TF.gaussian_blur(x, 2 * severity + 1, 8 * s)
    return dict(snow=blend(255, s), frost=blend(200, s), fog=blend(128, s), brightness=lambda x: x + 255 * s,
                contrast=lambda x: x.mean() + (1 - 1.8 * s) * (x - x.mean()), pixelate=pixelate(1 - 1.8 * s),
                elastic_transform=v2.ElasticTransform(60 * s, 3.0),
                jpeg_compression=lambda x: TF.jpeg(x.byte(), round(40 * (1 - 1.9 * s))).float())[name]


def main(source, out, per_class=10):
    torch.manual_seed(0)
    folders = sorted(path for path in Path(source).iterdir() if path.is_dir())
    for index, folder in enumerate(folders):
        for number, path in enumerate(sorted(folder.iterdir())[:int(per_class)]):
            image, views = common.read_image(path).float(), {"sketch": edges}
            if index % 5 == 0:
                views |= dict(a=lambda x: x.flip(1), r=lambda x: x.flip(0))
            views |= {f"c/{name}/{severity}": corruption(name, severity)
                      for name in ALEXNET for severity in range(1, 6)}
            for place, change in views.items():
                target = Path(out, place, folder.name, f"{number}.jpg")
                target.parent.mkdir(parents=True, exist_ok=True)
                write_jpeg(change(image).clamp(0, 255).byte(), str(target), quality=95)


if __name__ == "__main__":
    if len(sys.argv) not in (3, 4):
        sys.exit(__doc__)
    main(*sys.argv[1:])
