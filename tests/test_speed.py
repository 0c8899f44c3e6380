"""eval/shrink.py; eval/speed.py: its statistics, all rows at the smallest sizes, a peer's loss, but no time."""

import itertools
import re
import sys

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import common
import mfm_mae
from eval import shrink, speed
from helpers import call, sentence, write_images


def test_shrink_makes_a_smaller_copy_and_goes_on(tmp_path, capsys):
    src, dst = tmp_path / "src", tmp_path / "dst" / "copy"
    flags = [src, dst, "--short_side", 32, "--workers", 1]
    files = {"a/00.JPEG": (80, 60), "b/00.png": (45, 90), "turned.jpg": (80, 60), "val/00.jpg": (40, 32), "val.txt": 0}
    for name in ("a/00.JPEG", "b/00.png", "val/00.jpg"):
        write_images((src / name).parent, 1, files[name], (src / name).suffix)
    (exif := Image.Exif())[0x0112] = 6  # a quarter turn
    Image.open(src / "a" / "00.JPEG").save(src / "turned.jpg", exif=exif)
    (src / "val.txt").write_text("00.jpg 3\n")
    assert call(*flags, main=shrink.main) == 0
    assert {str(path.relative_to(dst)) for path in dst.rglob("*") if path.is_file()} == files.keys()
    facts = [f"{Image.open(dst / name).format} {Image.open(dst / name).size}" for name in list(files)[:4]]
    assert facts == ["JPEG (43, 32)", "PNG (32, 64)", "JPEG (32, 43)", "JPEG (40, 32)"]
    same = [(dst / name).read_bytes() == (src / name).read_bytes() for name in files]
    assert same == [False] * 3 + [True] * 2  # small already, and no image
    for name in list(files)[:3]:  # the same picture, upright
        small, full = common.read_image(dst / name), common.read_image(src / name)[None].float()
        full = F.interpolate(full, small.shape[1:], mode="bilinear", antialias=True)[0]
        assert (small - full).abs().mean() < 12, name
    before, after = (sum((folder / name).stat().st_size for name in list(files)[:4]) / 1e6 for folder in (src, dst))
    assert f"4 images, {before:.1f} MB before, {after:.1f} MB now: their pixels have changed" in capsys.readouterr().out
    (src / "a" / "bad.jpg").write_bytes(b"junk"), (dst / "turned.jpg").write_bytes(b"mine")
    (dst / "val" / "00.jpg").unlink()
    assert call(*flags, main=shrink.main) == 1
    assert sentence(capsys.readouterr().err) == f"error: 1 of 5 images cannot be read and are not in {dst}"
    assert [(dst / name).exists() for name in ("a/bad.jpg", "val/00.jpg")] == [False, True]
    assert (dst / "turned.jpg").read_bytes() == b"mine"
    for words in ([src / "copy"], [src], [tmp_path / "new", "--src", tmp_path / "none"]):
        assert call("--src", src, "--dst", *words, main=shrink.main) == 1
        assert "a folder that is not inside it" in sentence(capsys.readouterr().err)


def test_statistics_by_hand(monkeypatch):
    assert speed.ratio([3, 2.2, 4], [2, 2, 2]) == "1.50 (1.10 to 2.00)"
    assert speed.ratio([2, 3], [2, 2.9]) == "1.02 (1.00 to 1.03), not established"
    assert speed.ratio([0.96, 1], [1, 1.05]) == "0.96 (0.95 to 0.96)"
    calls = []
    monkeypatch.setattr(speed.time, "perf_counter", itertools.count().__next__)
    runs = [lambda name=name: calls.append(name) for name in "ab"]
    assert speed.measure(runs, 3, torch.device("cpu")) == [[1, 1, 1]] * 2
    assert calls == list("baabbaab")  # the first two warm up


@pytest.mark.parametrize("fused", [False, True])
def test_the_peer_of_timms_blocks_has_our_loss(fused):
    pytest.importorskip("timm")
    size = 32, 8, 32, 2, 2, 16, 1, 2  # image, patch, width, depth, heads, of the decoder too
    ours, theirs = mfm_mae.MFMMAE(*size, fuse=()), speed.TimmMAE(*size, fused=fused)
    images, noise, _ = torch.randn(3, 3, 32, 32), torch.rand(3, 16), theirs.load_state_dict(ours.state_dict())
    torch.testing.assert_close(theirs(images, noise), ours(images, noise.argsort(1).argsort(1) >= 4)[0])


def test_every_row_at_the_smallest_sizes(tmp_path, data, monkeypatch, capsys):
    monkeypatch.setattr(speed, "child", lambda code: 100.0)
    monkeypatch.setitem(sys.modules, "vit_pytorch", None)  # as if it were not installed
    assert call("--tiny", "--rounds", 1, "--data", data, "--out", tmp_path / "speed.md", main=speed.main) == 0
    text = (tmp_path / "speed.md").read_text()
    assert text.startswith("# Speed\n") and text.endswith(capsys.readouterr().out) and "not measured" not in text
    names = re.findall(r"^\| ([^|]+) \|", text, re.M)
    assert {*speed.PEERS, *speed.METHODS, "our MAE", "decoding", "tuning", "import torch"} <= set(names)
    assert [names.count(f"{kind}_s") for kind in speed.METHODS] == [3] * 4  # fp32, bf16, cores
    assert text.count("| vit-pytorch | not installed |") == 2


def test_bad_input_is_a_sentence_and_gpu_parts_stop_in_time(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for words, match in (["--gpu"], "needs a CUDA GPU"), (["--only=steps,x"], "the parts are steps, mfu, memory"):
        assert call(*words, main=speed.main) == 1 and match in sentence(capsys.readouterr().err)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(speed.time, "perf_counter", itertools.count(step=100).__next__)
    monkeypatch.setattr(speed, "part", lambda name, config, device: ("head", [f"{name} on {device}"]))
    assert call("--gpu", main=speed.main) == 0
    assert re.search(r"\Ahead\nsteps on cuda\nmae_b on cuda\n[^`]*`--only .*,train_cae_v2`", capsys.readouterr().out)
