"""--data as tar archives: WebDataset's shards, ImageNet's archive of class archives, damaged ones."""

import io
import shutil
import tarfile
from pathlib import Path

import pytest
import torch

import common
import mfm_mae
from eval.data import find_labelled
from helpers import QUICK, call, write_images


def pack(path, members):
    """An archive of {name: content}."""
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """{name: content} of 24 image files."""
    folder = write_images(tmp_path_factory.mktemp("images"))
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_images_labels_and_names(images, tmp_path):
    names = sorted(images)
    numbered = {name.replace("png", "cls"): str(9 + 2 * (index % 2)).encode() for index, name in enumerate(names)}
    other = {"readme.md": b"x", "._00.png": b"x", "00.json": b"{}"}
    (tmp_path / "shards").mkdir()
    for number, half in enumerate((names[:12], names[12:])):
        cls = {name: numbered[name] for name in numbered if name.replace("cls", "png") in half}
        pack(tmp_path / f"shards/imagenet-train-{number}.tar", {**{n: images[n] for n in half}, **cls, **other})
    pack(tmp_path / "shards/imagenet-val-0.tar", {name: images[name] for name in names[:3]} | numbered)
    train, val = (find_labelled(str(tmp_path / "shards"), split, 32) for split in ("train", "val"))
    assert (len(train), len(val), train.classes, val.classes) == (24, 3, ("11", "9"), ("11", "9"))
    assert train.labels.tolist() == [1, 0] * 12 and train.path(13) == f"{tmp_path}/shards/imagenet-train-1.tar/13.png"
    for index, name in enumerate(names):
        assert torch.equal(train[index][0], common.read_image(write(tmp_path / name, images[name])))
    folders = {f"./n0{index % 2}/{name}": images[name] for index, name in enumerate(names)}
    inner = [{name: images[name] for name in names[start::2]} for start in (0, 1)]
    nested = {f"n0{n}.tar": pack(tmp_path / f"n0{n}.tar", part).read_bytes() for n, part in enumerate(inner)}
    for members, order in ((folders, names), (nested, names[::2] + names[1::2])):
        (tmp_path / "data").mkdir()
        pack(tmp_path / "data/ILSVRC2012_img_train.tar", members)
        pack(tmp_path / "data/ILSVRC2012_img_val.tar", {name: images[name] for name in names[:2]})
        (tmp_path / "data/val.txt").write_text("01.png 0\n00.png 1\n")
        train = find_labelled(str(tmp_path / "data"), "train", 32)
        val = find_labelled(str(tmp_path / "data"), "val", 32, train.classes)
        assert [Path(train.path(index)).name for index in range(24)] == order
        assert train.classes == val.classes == ("n00", "n01") and val.labels.tolist() == [1, 0]
        assert [train[index][1] for index in (0, 23)] == [0, 1]
        assert len(common.find_data(str(tmp_path / "data/ILSVRC2012_img_val.tar"))) == 2
        shutil.rmtree(tmp_path / "data")
        common.open_shard.cache_clear()  # which would go on reading the one that is gone


def write(path, content):
    path.write_bytes(content)
    return path


def test_a_run_on_shards_is_the_run_on_files_and_its_index_is_kept(images, tmp_path, monkeypatch):
    flags, out = [*QUICK, "--img_size=32", "--patch_size=8", "--max_steps=4", "--workers=2"], tmp_path / "tar"
    (tmp_path / "files").mkdir()
    for name, content in images.items():
        write(tmp_path / "files" / name, content)
    shard = pack(tmp_path / "x.tar", images)
    assert call(*flags, "--data", shard, "--out", out, "--max_steps=2", main=mfm_mae.main) == 0
    walk, walks = common.walk_shard, []
    monkeypatch.setattr(common, "walk_shard", lambda *a: walks.append(a) or walk(*a))
    assert call(*flags, "--data", shard, "--out", out, main=mfm_mae.main) == 0 and not walks
    assert call(*flags, "--data", tmp_path / "files", "--out", tmp_path / "plain", main=mfm_mae.main) == 0
    left, right = (torch.load(path / "last.pt") for path in (out, tmp_path / "plain"))
    for name in left["model"]:
        assert torch.equal(left["model"][name], right["model"][name])
    fingerprint = common.find_data(str(shard)).fingerprint()
    assert fingerprint == common.find_data(str(shutil.copy(shard, tmp_path / "moved.tar"))).fingerprint()
    pack(shard, {name: images[name] for name in list(images)[::-1]})  # the index is of another file now
    assert common.find_data(str(shard), cache=out).path(0).endswith("23.png") and walks
    assert common.find_data(str(shard)).fingerprint() != fingerprint


def test_damaged_archives_are_named(images, tmp_path):
    whole = pack(tmp_path / "good.tar", {name: images[name] for name in list(images)[:6]}).read_bytes()
    size = len(images["00.png"])
    start = -(-size // 512) * 512 + 512  # of the second member's header
    for content in (b"", whole[:200], whole[: size // 2], whole[:start], whole[: start + 100], whole[: start + 1000],
                    whole[:start] + bytes([0, 7]) * 256 + whole[start + 512:], b"\x1f\x8b" + whole, b"<html>" * 200):
        shard = write(tmp_path / "bad.tar", content)
        with pytest.raises(ValueError, match=r"bad\.tar cannot be read as a tar archive .*: copy it anew"):
            common.find_data(str(shard))
    shard = write(tmp_path / "shrunk.tar", whole)
    data = common.find_data(str(shard))
    common.open_shard.cache_clear()
    write(shard, whole[: len(whole) // 2])  # after it was indexed
    with pytest.raises(ValueError, match=r"shrunk\.tar/05\.png cannot be read .*its archive is cut off"):
        data[5]
    with pytest.raises(FileNotFoundError, match=r"text\.tar holds no image"):
        common.find_data(str(pack(tmp_path / "text.tar", {"a.txt": b"x"})))
    (tmp_path / "mixed").mkdir()
    pack(tmp_path / "mixed/part-0.tar", images)
    with pytest.raises(FileNotFoundError, match="has no folder val/"):
        common.find_data(str(tmp_path / "mixed"), "val")
    with pytest.raises(ValueError, match="is outside the class folders"):
        find_labelled(str(pack(tmp_path / "train.tar", images)), "train", 32)
    for split in ("train", "val"):  # one archive would be both, silently
        with pytest.raises(FileNotFoundError, match="no .tar archive with such a name"):
            find_labelled(str(tmp_path / "mixed/part-0.tar"), split, 32)
