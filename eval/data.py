"""Images with labels, for the evaluations that train or test a classifier."""

import os
import re
from pathlib import Path

import common

LISTS = ("LOC_val_solution.csv", "val.txt")  # as ImageNet's labels of the validation images are published


def find_labelled(spec, split, img_size):
    """The images that `--data SPEC` names, as a `common.Images` with labels; split is "train" or "val".
    SPEC is `scenes`, `cifar10`, or a folder of ImageNet's layout: train/, and val/, validation/ or test/,
    with a folder per class; the validation images may also be in one folder, see `listed_classes`. A label
    is the place of the class among the sorted names. Raises FileNotFoundError or ValueError."""
    images = common.find_data(spec, split, img_size)
    if images.labels is not None:
        return images
    folder, files = images.name, [images.path(index) for index in range(len(images))]
    parts = [os.path.relpath(file, folder).split(os.sep) for file in files]
    loose = [file for file, part in zip(files, parts) if len(part) == 1]
    if loose == files and split == "val":
        names = listed_classes(files, Path(folder))
    elif loose:
        raise ValueError(f"{loose[0]} is outside the class folders of {folder}: give it a class folder")
    else:
        names = [part[0] for part in parts]
    labels = {name: label for label, name in enumerate(sorted(set(names)))}
    return common.Images(files, [labels[name] for name in names], labels, folder)


def listed_classes(files, folder):
    """The class names of validation images in one folder, from a list: LOC_val_solution.csv or val.txt, in
    the folder or beside it, otherwise the only .txt or .csv file in it. A line begins with a file name (its
    ending may be missing) and a class: its name (WNID), or its index among the sorted folders of train/,
    from 0. Raises FileNotFoundError or ValueError unless images and lines match one to one."""
    known = [path / name for path in (folder, folder.parent) for name in LISTS if (path / name).is_file()]
    texts = [path for path in folder.iterdir() if path.suffix in (".txt", ".csv")]
    if not known and len(texts) != 1:
        raise FileNotFoundError(f"{folder} has images without class folders, and no list of their classes: "
                                f"put {' or '.join(LISTS)} (lines of file name and class) into it")
    path = (known or texts)[0]
    lines = [re.split(r"[,\s]+", line.strip()) for line in path.read_text().splitlines()]
    listed = {Path(words[0]).stem: words[1] for words in lines if len(words) > 1 and words[1]}
    listed.pop("ImageId", None)  # the head of LOC_val_solution.csv
    stems = [Path(file).stem for file in files]
    odd = sorted(set(stems) ^ listed.keys())
    if odd:
        raise ValueError(f"the list {path} names {len(listed)} images and {folder} holds {len(stems)}; "
                         f"{odd[0]} is in the {'list' if odd[0] in listed else 'folder'} only")
    classes = sorted(entry.name for entry in (folder.parent / "train").iterdir() if entry.is_dir())
    # A class folder may be called "2" as well: names come first.
    if set(listed.values()) <= set(classes) or not all(map(str.isdigit, listed.values())):
        return [listed[stem] for stem in stems]
    wrong = [index for index in listed.values() if int(index) >= len(classes)]
    if wrong:
        raise ValueError(f"the list {path} holds the class index {wrong[0]}, and the {len(classes)} "
                         f"folders of {folder.parent}/train are counted from 0: use a list that fits them")
    return [classes[int(listed[stem])] for stem in stems]
