"""Robustness: a fine-tuned classifier on ImageNet-A, -R, -Sketch and -C, without further training.

    python -m eval.robustness --checkpoint runs/finetune_cae_v2_vit_b --kind r --data ~/imagenet-r
    torchrun --nproc_per_node=8 -m eval.robustness --checkpoint RUN --kind c --data ~/imagenet-c

    kind     folder                             what is measured
    a, r     WNID/*.jpg, 200 classes            top-1 among the classes that are there [D2]
    sketch   WNID/*.JPEG, 1000 classes          top-1 among all classes
    c        CORRUPTION/SEVERITY/WNID/*.JPEG    mean error and mCE, two different numbers

The checkpoint is a run of eval.finetune, which keeps the class names: the class of an image is the name of
its folder (the WNID), never the place of the folder among the others, which is not the same in A and R.
The error of a corruption is the mean over its severities 1 to 5, the mean error that over the corruptions,
and the mCE that of the errors divided by AlexNet's, for all 15 corruptions and ImageNet's 1000 classes.

Sources: [I] the constants that ImageNet-C's authors published, [F] the test code of MFM's author.
  [D1] The view is that of all tests, short side to 256, then the centre of 224 pixels, also for C [F]: its
       images have 224 pixels already and lose their border. `--view whole` leaves such images as they are.
  [D2] In A and R the arg max runs over the classes in the folder, 200 of the 1000: an easier task.
Dimension key: B batch."""

import dataclasses
import os
import time
import typing
from pathlib import Path

import torch

if not __package__:  # started by its file name, Python does not find common.py
    raise SystemExit("error: start it in the folder of common.py as `python -m eval.robustness`")
import common
from common import flag
from eval.finetune import load_classifier, predictions
from eval.protocol import CentreViews, append_result, only_main_prints

# AlexNet's error on each corruption of ImageNet-C, the mean over its five severities [I].
ALEXNET = dict(
    gaussian_noise=.886428, shot_noise=.894468, impulse_noise=.922640, defocus_blur=.819880,
    glass_blur=.826268, motion_blur=.785948, zoom_blur=.798360, snow=.866816, frost=.826572, fog=.819324,
    brightness=.564592, contrast=.853204, elastic_transform=.646056, pixelate=.717840,
    jpeg_compression=.606500)
NAMES = dict(a="ImageNet-A", r="ImageNet-R", sketch="ImageNet-Sketch", c="ImageNet-C")


@dataclasses.dataclass(frozen=True)
class Config(common.MachineConfig):
    """The whole command line."""
    checkpoint: str = flag("", "the folder or the last.pt of a run of eval.finetune")
    kind: typing.Literal[("", *NAMES)] = flag("", "which set is in --data")
    data: str = flag("", "the folder of the set, as it is published")
    view: typing.Literal["crop", "whole"] = flag("crop", "whole: no crop where the size fits [D1]")
    batch_size: int = flag(256, "images computed at once; changes no number but in rounding", positive=True)

    def __post_init__(self):
        super().__post_init__()
        for name, what in (("checkpoint", "a run of eval.finetune"), ("kind", ", ".join(NAMES)),
                           ("data", f"the folder of {NAMES.get(self.kind)}")):
            if not getattr(self, name):
                raise ValueError(f"--{name} is missing: give {what}")


def by_name(folder, classes):
    """The images in CLASS/ folders, labelled with the place of CLASS in the classifier's `classes`."""
    if not os.path.isdir(folder):
        raise FileNotFoundError(f"there is no folder {folder}, which should hold one folder per class")
    files, label = common.list_images(folder), {name: index for index, name in enumerate(classes)}
    names = [os.path.relpath(file, folder).split(os.sep)[0] for file in files]
    unknown = sorted(set(names) - label.keys())
    if unknown:
        raise ValueError(f"{folder} has {unknown[0]}, which none of the classifier's {len(classes)} "
                         f"classes ({', '.join(classes[:3])} ...) is called: other data, or another layout")
    return common.Images(files, [label[name] for name in names], classes, str(folder))


def errors(model, images, allowed, config, dist):
    """(wrong, all) images, over all processes; the arg max runs over the classes `allowed` (indices)."""
    counts = torch.zeros(2, dtype=torch.long, device=dist.device)
    allowed = torch.tensor(allowed, device=dist.device)
    views = CentreViews(images, model.encoder.img_size, whole=config.view == "whole")  # [D1]
    for logits, labels in predictions(model, views, config.batch_size, config, dist):
        pred = allowed[logits[:, allowed].argmax(dim=1)]  # (B,)
        counts += torch.stack([(pred != labels).sum(), torch.ones_like(labels).sum()])
    return dist.all_reduce(counts).tolist()


def corruption_errors(model, classes, config, dist):
    """({corruption: per cent wrong, the mean over severities 1 to 5}, number of images) of the folder."""
    root, found, count = Path(config.data).expanduser(), {}, 0
    names = [name for name in ALEXNET if (root / name).is_dir()]
    if not names:
        raise FileNotFoundError(f"{root} has no folder {next(iter(ALEXNET))}, or of another corruption")
    # All folders are read before the first image is computed.
    sets = {name: [by_name(root / name / severity, classes) for severity in "12345"] for name in names}
    for name, severities in sets.items():
        wrong = [errors(model, images, range(len(classes)), config, dist) for images in severities]
        found[name] = sum(100 * part / whole for part, whole in wrong) / len(wrong)
        count += sum(whole for _, whole in wrong)
        print(f"{name:18} error {found[name]:5.1f} %", flush=True)
    return found, count


def mean_corruption_error(found):
    """The mCE in per cent of {corruption: error in per cent}, which must hold all 15."""
    return sum(found[name] / ALEXNET[name] for name in ALEXNET) / len(ALEXNET)


def measure(model, classes, config, dist):
    """The facts of the result line, after they were printed."""
    if config.kind != "c":
        images = by_name(Path(config.data).expanduser(), classes)
        present = sorted(set(images.labels.tolist()))
        allowed = present if config.kind in ("a", "r") else range(len(classes))  # [D2]
        wrong, count = errors(model, images, allowed, config, dist)
        accuracy = 100 * (count - wrong) / count
        print(f"{NAMES[config.kind]}: top-1 {accuracy:.1f} % of {count:,} images of {len(present)} "
              f"classes, arg max over {len(allowed)}")
        return dict(accuracy=accuracy, images=count, classes_present=len(present), argmax_over=len(allowed))
    found, count = corruption_errors(model, classes, config, dist)
    mean, missing = sum(found.values()) / len(found), [name for name in ALEXNET if name not in found]
    mce = None if missing or len(classes) != 1000 else mean_corruption_error(found)
    why = f"missing: {', '.join(missing)}" if missing else f"it is for 1000 classes, not {len(classes)}"
    note = f"no mCE, {why}" if mce is None else f"mCE (divided by AlexNet's errors) {mce:.1f} %"
    print(f"ImageNet-C: mean error (plain, {len(found)} corruptions) {mean:.1f} % of {count:,}; {note}")
    return dict(mean_error=mean, mce=mce, errors=found, missing=missing, images=count)


def main(argv=None):
    config, started = common.parse_config(Config, __doc__, argv=argv), time.perf_counter()
    with common.distributed(config.device) as dist, only_main_prints(dist):
        model, classes, state, path = load_classifier(config.checkpoint)
        facts = measure(model.to(dist.device), classes, config, dist)
        if dist.is_main:
            append_result("robustness", path, model.encoder, config, started, dataset=NAMES[config.kind],
                          **facts, classes=len(classes), trained_as=state["config"], step=state["step"],
                          device=str(dist.device))


if __name__ == "__main__":
    common.run_main(main)
