"""Images with labels, for the evaluations that train or test a classifier."""

import codecs
import csv
import os
import re
from pathlib import Path

import common
from eval.protocol import check_classes

LISTS = ("LOC_val_solution.csv", "val.txt")  # as ImageNet's labels of the validation images are published


def find_train_and_val(spec, img_size):
    """(training, validation images) of `find_labelled`, of the same classes, and a line that tells them."""
    train, val = (find_labelled(spec, split, img_size) for split in ("train", "val"))
    check_classes(train, val)
    return train, val, (f"{len(train):,} images of {len(train.classes)} classes in {train.name}, "
                        f"{len(val):,} to test in {val.name}")


def find_labelled(spec, split, img_size, classes=()):
    """The images that `--data SPEC` names, as a `common.Images` with labels; split is "train" or "val".
    SPEC is `scenes`, `cifar10`, or a folder of ImageNet's layout: train/, and val/, valid/, validation/ or
    test/, with a folder per class; validation images may also be in one folder (`listed_classes`, which
    `classes` is for). A label is the place of the class among the sorted names. May raise ValueError."""
    images = common.find_data(spec, split, img_size)
    if images.labels is not None:
        return images
    folder, files = images.name, [images.path(index) for index in range(len(images))]
    parts = [os.path.relpath(file, folder).split(".tar/")[-1].split(os.sep) for file in files]
    loose = [file for file, part in zip(files, parts) if len(part) == 1]
    if loose == files and split == "val":
        names = listed_classes(files, Path(folder), classes)
    elif loose:
        raise ValueError(f"{loose[0]} is outside the class folders of {folder}: give it a class folder")
    else:
        names = [part[0] for part in parts]
    labels = {name: label for label, name in enumerate(sorted(set(names)))}
    if len(labels) == 1:
        deeper = sorted({part[1] for part in parts if len(part) > 2})[:3]
        why = f": are {', '.join(deeper)} in it the classes? Move them one level up" if deeper else ""
        raise ValueError(f"{folder} holds one class, {names[0]}, and needs two or more{why}")
    return common.Images(images.files, [labels[name] for name in names], labels, folder)


def listed_classes(files, folder, classes=()):
    """The class names of validation images in one folder, from a list: LOC_val_solution.csv or val.txt, in
    the folder or beside it, otherwise the only .txt or .csv file in it. A line begins with a file name (its
    ending may be missing) and a class: its name (WNID), or its index, from 0, in `classes` or among the
    sorted folders of train/. Raises FileNotFoundError or ValueError unless images and lines match."""
    known = [path / name for path in (folder, folder.parent) for name in LISTS if (path / name).is_file()]
    texts = [path for path in folder.glob("*") if path.suffix in (".txt", ".csv")]
    if not known and len(texts) != 1:
        raise FileNotFoundError(f"{folder} has images without class folders, and no list of their classes: "
                                f"put {' or '.join(LISTS)} (lines of file name and class) into it")
    path, stems = (known or texts)[0], [Path(file).stem for file in files]
    listed = read_list(path, set(stems))
    odd = sorted(set(stems) ^ listed.keys())
    if odd:
        raise ValueError(f"the list {path} names {len(listed)} images and {folder} holds {len(stems)}; "
                         f"{odd[0]} is in the {'list' if odd[0] in listed else 'folder'} only")
    train = [entry for entry in folder.parent.iterdir() if entry.name.lower() in ("train", "training")]
    folders = [entry.name for entry in train[0].iterdir() if entry.is_dir()] if train else []
    classes = classes or sorted(name for name in folders if not name.startswith("."))
    # A class folder may be called "2" as well: names come first.
    if set(listed.values()) <= set(classes) or not all(map(str.isdigit, listed.values())):
        return [listed[stem] for stem in stems]
    wrong = [index for index in listed.values() if int(index) >= len(classes)]
    if wrong:
        raise ValueError(f"the list {path} holds the class index {wrong[0]}, and the {len(classes)} "
                         f"folders of {folder.parent}/train are counted from 0: use a list that fits them")
    return [classes[int(listed[stem])] for stem in stems]


def read_list(path, stems):
    """{file name without its ending: class} of a list's lines, which may be separated by tabs, semicolons,
    commas or spaces, and quoted; a name among `stems` may hold the separator. A first line of headings is
    left out. Raises ValueError with the number of a line that is not of this form."""
    listed, first = {}, None
    for number, line in enumerate(read_text(path).splitlines(), 1):
        separator = next((sign for sign in "\t;," if sign in line), " ")
        words = [word for row in csv.reader([line.strip()], delimiter=separator) for word in row]
        files = [Path(separator.join(words[:end]).strip().replace("\\", "/"))
                 for end in range(1, len(words))]
        count = next((count for count, file in enumerate(files, 1) if {file.name, file.stem} & stems), 1)
        if not any(words):
            continue
        file, label = files[count - 1] if files else Path(), words[count] if files else ""
        label = re.sub(r"( \d+){4}.*", "", label).strip()  # LOC_val_solution.csv has boxes behind it
        stem = file.name if file.name in stems else file.stem
        if not label or listed.get(stem, label) != label:
            raise ValueError(f"the list {path}, line {number}, is no file name and class, or gives a file "
                             f"another class: {line.strip()[:80]!r}")
        first = first or (stem, label, file.suffix)
        listed[stem] = label
    if first and first[0] not in stems and list(listed.values()).count(first[1]) == 1 \
            and first[2].lower() not in common.EXTENSIONS:  # headings
        del listed[first[0]]
    return listed


def read_text(path):
    """The text of a file in UTF-8 or, with a byte order mark, UTF-16. Raises ValueError with the line."""
    raw = Path(path).read_bytes()
    wide = raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        return raw.decode("utf-16" if wide else "utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise ValueError(f"{path}, line {line}, is not in UTF-8: save the file in that encoding") from error
