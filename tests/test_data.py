"""eval/data.py: labelled images of ImageNet's layout, validation folders with a list, built-in data."""

import shutil

import pytest

import common
from eval.data import find_labelled, find_train_and_val
from helpers import refused, write_images


def test_class_folders(tmp_path):
    for split, count in (("train", 3), ("validation", 2)):
        write_images(tmp_path / split / "n02" / "deep", count, kind=".JPEG")
        write_images(tmp_path / split / "n01", 1, kind=".JPEG")
    train, val = (find_labelled(str(tmp_path), split, 32) for split in ("train", "val"))
    assert train.classes == val.classes == ("n01", "n02")
    assert [train[index][1] for index in range(4)] == [0, 1, 1, 1] and val.labels.tolist() == [0, 1, 1]
    assert "n01" in train.path(0) and "n02" in train.path(3)
    assert (train.name, val.name) == (str(tmp_path / "train"), str(tmp_path / "validation"))


@pytest.mark.parametrize("split, folders", [("train", "."), ("train", ".a"), ("val", ".a")])
def test_images_outside_class_folders_are_refused_even_with_a_list(tmp_path, split, folders):
    for folder in folders:
        write_images(tmp_path / split / folder, 2)
    (tmp_path / split / "val.txt").write_text("00 a\n01 b\n")
    refused(r"00\.png is outside the class folders", find_labelled, str(tmp_path), split, 32)


def test_built_in_images_bring_their_labels(monkeypatch):
    train, val = (find_labelled("scenes", split, 16) for split in ("train", "val"))
    assert train.classes == val.classes and len(train.classes) == 10
    assert train[0][0].shape == (3, 16, 16) and set(val.labels.tolist()) == set(range(10))
    images = common.Images(train.pixels[:2], [4, 2], ("e", "c"), "cifar10")
    monkeypatch.setattr(common, "find_data", lambda spec, split, img_size: images)
    assert find_labelled("cifar10", "val", 32) is images


def flat(root, lines, name="LOC_val_solution.csv", classes=("n01", "n02", "n03")):
    """train/ of three classes, and val/ with three images and a list."""
    for label in classes:
        write_images(root / "train" / label, 1)
    write_images(root / "val", 3, kind=".JPEG")
    (root / "val" / name).write_text("\n".join(lines) + "\n")
    return str(root)


KAGGLE = ["ImageId,PredictionString", "01,n03 1 2 3 4 ", "00,n02 5 6 7 8 n02 1 2 3 4", "02,n01 1 2 3 4"]
LISTS = [("LOC_val_solution.csv", KAGGLE), ("val.txt", ["00.JPEG 1", "01.JPEG 2", "02.JPEG 0"]),
         ("a.csv", ["filename,label,split", "00.JPEG,n02,val", "01.JPEG,n03,val", "02.JPEG,n01,val"]),
         ("a.csv", ["file;class", '"00.JPEG";"n02"', '"01.JPEG";"n03"', '"02.JPEG";"n01"']),
         ("a.txt", [r"val\00.JPEG n02", r"val\01.JPEG n03", r"val\02.JPEG n01"]),
         ("labels.txt", ["val/00.JPEG\tn02", "val/01.JPEG\tn03", "", "val/02.JPEG\tn01"])]


@pytest.mark.parametrize("name, lines", LISTS)
def test_the_list_gives_names_or_indices_of_classes(tmp_path, name, lines):
    root = flat(tmp_path, lines, name)
    train, val = (find_labelled(root, split, 32) for split in ("train", "val"))
    assert val.classes == train.classes == ("n01", "n02", "n03")
    assert [val[index][1] for index in range(3)] == [1, 2, 0]


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
@pytest.mark.parametrize("head", ["name,label\r\n", ""])
def test_a_list_saved_by_a_spreadsheet(tmp_path, encoding, head):
    flat(tmp_path, ["00 n02"])
    text = f"{head}00.JPEG,n02\r\n01.JPEG,n03\r\n02.JPEG,n01\r\n"
    (tmp_path / "val" / "LOC_val_solution.csv").write_bytes(text.encode(encoding))
    assert find_labelled(str(tmp_path), "val", 32).labels.tolist() == [1, 2, 0]
    (tmp_path / "val" / "LOC_val_solution.csv").write_bytes("00 n02\n01 n03\n02 é\n".encode("latin-1"))
    refused("solution.csv, line 3, is not in UTF-8", find_labelled, str(tmp_path), "val", 32)


@pytest.mark.parametrize("line", ["my cat, old.JPEG n01", "my cat, old.JPEG,n01", "my cat, old;n01",
                                  "val/my cat, old n01", '"my cat, old.JPEG","n01"', "my cat, old.JPEG\tn01"])
def test_names_that_hold_the_separator(tmp_path, line):
    flat(tmp_path, ["00 n02", "01 n03", line.replace(", ", " ") if line.endswith(" n01") else line], "val.txt")
    name = "my cat old" if line.endswith(" n01") else "my cat, old"
    (tmp_path / "val" / "02.JPEG").rename(tmp_path / "val" / f"{name}.JPEG")
    val = find_labelled(str(tmp_path), "val", 32)
    assert {val.path(index)[-8:-5]: val.classes[label] for index, label in enumerate(val.labels)} == {
        "/00": "n02", "/01": "n03", "old": "n01"}


def test_names_of_classes_need_no_training_folder_and_indices_those_of_a_classifier(tmp_path):
    root = flat(tmp_path, ["00 n02", "01 n03", "02 n01"], "val.txt")
    shutil.rmtree(tmp_path / "train")
    assert find_labelled(root, "val", 32).classes == ("n01", "n02", "n03")
    (tmp_path / "val" / "val.txt").write_text("00 1\n01 2\n02 0\n")
    assert find_labelled(root, "val", 32, ("x", "y", "z")).classes == ("x", "y", "z")
    refused("holds the class index 1, and the 0 folders", find_labelled, root, "val", 32)


def test_a_single_class_is_none(tmp_path):
    for split in ("train", "val"):
        for label in "abc":
            write_images(tmp_path / split / "images" / label, 1)
            write_images(tmp_path / split / "images" / ".hidden", 1)
        words = f"{split} holds one class, images, .* are a, b, c in it the classes"
        refused(words, find_labelled, str(tmp_path), split, 32)
        shutil.move(tmp_path / split / "images" / "a", tmp_path / split / "a")
    train, val, line = find_train_and_val(str(tmp_path), 32)
    assert line == f"3 images of 2 classes in {tmp_path}/train, 3 to test in {tmp_path}/val"
    (tmp_path / "val" / "images").rename(tmp_path / "val" / "b")
    refused("in one of them only: b, images", find_train_and_val, str(tmp_path), 32)


def test_a_list_beside_the_folder(tmp_path):
    """Its indices count the sorted folders of train, also one without images, but no loose files."""
    root = flat(tmp_path, ["00 3", "01 1", "02 2"], "val.txt")
    (tmp_path / "val" / "val.txt").rename(tmp_path / "val.txt")
    (tmp_path / "val" / "readme.txt").write_text("not the list")
    (tmp_path / "train" / "n00").mkdir(), (tmp_path / "train" / "a.txt").touch()
    val = find_labelled(root, "val", 32)
    assert [val.classes[label] for label in val.labels] == ["n03", "n01", "n02"]
    val = find_labelled(flat(tmp_path / "new", ["00 2", "01 10", "02 2"], "val.txt", ("2", "10")), "val", 32)
    assert val.classes == ("10", "2") and val.labels.tolist() == [1, 0, 1]  # folders named by numbers: names


@pytest.mark.parametrize("lines, match", [
    (["00 n01", "01 n02"], r"names 2 images and .*val holds 3; 02 is in the folder only"),
    (["00 n01", "01 n02", "02 n03", "03 n01"], r"names 4 images .* 03 is in the list only"),
    (["00 n01", "", "01", "02 n02"], r"line 3, is no file name and class.*'01'"),
    (["00 n01", "00 n02", "01 n01", "02 n02"], r"line 2, .* gives a file another class: '00 n02'"),
    (["99.JPEG n04", "00 n01", "01 n02", "02 n03"], "99 is in the list only"),
    (["00 1", "01 2", "02 3"], r"class index 3, and the 3 folders of .*train are counted from 0")])
def test_a_list_that_does_not_fit_is_refused(tmp_path, lines, match):
    refused(match, find_labelled, flat(tmp_path, lines), "val", 32)


def test_without_a_list_or_with_two_of_unknown_names(tmp_path):
    root, put = flat(tmp_path, ["00 n01", "01 n02", "02 n03"], "a.txt"), "no list of their classes: put LOC_val_sol"
    (tmp_path / "val" / "b.txt").touch()
    refused(put, find_labelled, root, "val", 32, error=FileNotFoundError)
    (tmp_path / "val" / "a.txt").unlink(), (tmp_path / "val" / "b.txt").unlink()
    refused(put, find_labelled, root, "val", 32, error=FileNotFoundError)
