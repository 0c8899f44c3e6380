"""Robustness: a fine-tuned classifier on ImageNet-A, -R, -Sketch and -C, without further training.

    python -m eval.robustness --checkpoint runs/finetune_cae_v2_vit_b --kind r --data ~/imagenet-r
    torchrun --nproc_per_node=8 -m eval.robustness --checkpoint RUN --kind c --data ~/imagenet-c

    kind     folder                             what is measured
    a, r     WNID/*.jpg, 200 classes            top-1 among the classes that are there [D2]
    sketch   WNID/*.JPEG, 1000 classes          top-1 among all classes
    c        CORRUPTION/SEVERITY/WNID/*.JPEG    mean error and mCE, two different numbers

The checkpoint is a run of eval.finetune, which keeps the class names: an image's class is found by the name
of its folder (the WNID), never by the place of the folder among the others, which in A and R is another one.

The error of a corruption is the mean of its errors at severities 1 to 5. The mean error is the mean of these
over the corruptions. For the mCE each is divided first by AlexNet's error, so it exists for the 15
corruptions of ImageNet-C together, and for a classifier of ImageNet's 1000 classes, only.

Sources: [I] the constants that ImageNet-C's authors published, [F] the test code of MFM's author.
  [D1] The view is that of all tests, short side to 256, then the centre of 224 pixels, for C too [F], whose
       images have 224 pixels already: they are enlarged and lose their border. `--view whole` shows images
       that have the encoder's size as they are.
  [D2] In A and R the arg max runs over the classes that the folder holds: 200 of the 1000 in the published
       sets. The count is printed and stored, since fewer classes are an easier task.

Dimension key: B batch, K classes, H x W size of the view.
"""

import contextlib
import dataclasses
import os
import time
import typing
from pathlib import Path

import torch

import common
from common import flag
from eval.finetune import load_classifier, predictions
from eval.protocol import CentreViews, EvalConfig, append_result, check_writable

# AlexNet's error on each corruption of ImageNet-C, the mean over its five severities [I].
ALEXNET = dict(
    gaussian_noise=.886428, shot_noise=.894468, impulse_noise=.922640, defocus_blur=.819880,
    glass_blur=.826268, motion_blur=.785948, zoom_blur=.798360, snow=.866816, frost=.826572, fog=.819324,
    brightness=.564592, contrast=.853204, elastic_transform=.646056, pixelate=.717840,
    jpeg_compression=.606500)
SEVERITIES = ("1", "2", "3", "4", "5")
NAMES = dict(a="ImageNet-A", r="ImageNet-R", sketch="ImageNet-Sketch", c="ImageNet-C")


@dataclasses.dataclass(frozen=True)
class Config(EvalConfig):
    """The whole command line."""

    data: str = flag("", "the folder of the set, as it is published")
    kind: typing.Literal[("", *NAMES)] = flag("", "which set that is")
    view: typing.Literal["crop", "whole"] = flag("crop", "whole: no crop where the size fits [D1]")

    def __post_init__(self):
        super().__post_init__()
        if not self.kind:
            raise ValueError(f"--kind is missing: give {', '.join(NAMES)}, the set that lies in --data")
        if not self.data:
            raise ValueError(f"--data is missing: give the folder of {NAMES[self.kind]}")
        if self.img_size or self.num_heads:
            raise ValueError("--img_size and --num_heads belong to the classifier: fine-tune it with others")


def by_name(folder, classes):
    """The images in CLASS/ folders, labelled with the place of CLASS in `classes`, the classifier's own list.

    Raises FileNotFoundError or ValueError for a folder without images or with a class of another name.
    """
    if not os.path.isdir(folder):
        raise FileNotFoundError(f"there is no folder {folder}, which should hold one folder per class")
    files = common.list_images(folder)
    if not files:
        raise FileNotFoundError(f"{folder} holds no image ({', '.join(common.EXTENSIONS)})")
    place = {name: index for index, name in enumerate(classes)}
    names = [os.path.relpath(file, folder).split(os.sep)[0] for file in files]
    unknown = sorted(set(names) - place.keys())
    if unknown:
        more = " ..." if len(unknown) > 3 else ""
        raise ValueError(f"{folder} has {', '.join(unknown[:3])}{more}, which none of the classifier's "
                         f"{len(classes)} classes ({', '.join(classes[:3])} ...) is called: "
                         "the classifier was trained on other data, or the folder has another layout")
    return common.Images(files, [place[name] for name in names], classes, str(folder))


def errors(model, images, config, processes, only=None):
    """(wrong, all) images, over all processes; the arg max runs over the classes `only` (indices)."""
    counts = torch.zeros(2, dtype=torch.long, device=processes.device)
    views = CentreViews(images, model.encoder.img_size, whole=config.view == "whole")  # [D1]
    for logits, labels in predictions(model, views, config.batch_size, config.workers, processes):
        if only is not None:
            kept = torch.tensor(only, device=logits.device)
            answers = kept[logits[:, kept].argmax(dim=1)]  # (B,)
        else:
            answers = logits.argmax(dim=1)  # (B,)
        counts += torch.stack([(answers != labels).sum(), torch.ones_like(labels).sum()])
    return processes.sum(counts).tolist()


def corruption_errors(model, classes, config, processes):
    """{corruption: per cent wrong, the mean over severities 1 to 5} for the corruptions in the folder, and
    the number of images. Raises where there is none, or a severity is missing."""
    root, found, images = Path(config.data).expanduser(), {}, 0
    names = [name for name in ALEXNET if (root / name).is_dir()]
    if not names:
        raise FileNotFoundError(f"{root} has no folder {next(iter(ALEXNET))} or of another corruption: give "
                                "the folder that holds CORRUPTION/SEVERITY/WNID/*.JPEG")
    # All folders are looked at before the first image is computed.
    sets = {name: [by_name(root / name / severity, classes) for severity in SEVERITIES] for name in names}
    for name, severities in sets.items():
        wrong = [errors(model, each, config, processes) for each in severities]
        found[name] = sum(100 * part / whole for part, whole in wrong) / len(wrong)
        images += sum(whole for _, whole in wrong)
        print(f"{name:18} error {found[name]:5.1f} %", flush=True)
    return found, images


def mean_corruption_error(found):
    """The mCE in per cent of {corruption: error in per cent}, which must hold all 15."""
    return sum(found[name] / ALEXNET[name] for name in ALEXNET) / len(ALEXNET)


def measure(model, classes, config, processes):
    """The facts of the result line, after they were printed."""
    if config.kind != "c":
        images = by_name(Path(config.data).expanduser(), classes)
        present = sorted(set(images.labels.tolist()))
        only = present if config.kind in ("a", "r") else None
        wrong, count = errors(model, images, config, processes, only)
        accuracy = 100 * (count - wrong) / count
        print(f"{NAMES[config.kind]}: top-1 {accuracy:.1f} % of {count:,} images of {len(present)} classes, "
              f"arg max over {len(present) if only else len(classes)}")
        return dict(accuracy=accuracy, images=count, classes_present=len(present),
                    argmax_over=len(only or classes))
    found, count = corruption_errors(model, classes, config, processes)
    mean, missing = sum(found.values()) / len(found), [name for name in ALEXNET if name not in found]
    mce = mean_corruption_error(found) if not missing and len(classes) == 1000 else None
    print(f"ImageNet-C: mean error (plain, {len(found)} corruptions) {mean:.1f} %, of {count:,} images")
    if mce is not None:
        print(f"ImageNet-C: mCE (divided by AlexNet's errors) {mce:.1f} %")
    else:
        why = (f"missing: {', '.join(missing)}" if missing
               else f"AlexNet's errors are those of 1000 classes, not {len(classes)}")
        print(f"ImageNet-C: no mCE, {why}")
    return dict(mean_error=mean, mce=mce, errors=found, missing=missing, images=count)


def main(argv=None):
    config, started = common.parse_config(Config, __doc__, argv=argv), time.perf_counter()
    with common.processes(config.device) as processes:
        # Only the main process prints.
        with contextlib.nullcontext() if processes.main else contextlib.redirect_stdout(None):
            model, classes, state, path = load_classifier(config.checkpoint)
            check_writable(path)
            facts = measure(model.to(processes.device), classes, config, processes)
            if processes.main:
                append_result("robustness", path, model.encoder, config, started, dataset=NAMES[config.kind],
                              **facts, classes=len(classes), trained_as=state["config"], step=state["step"],
                              seed=config.seed, device=str(processes.device))


if __name__ == "__main__":
    common.run_main(main)
