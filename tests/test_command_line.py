"""Flags, dry run, preview, --init and teachers; what goes wrong before training is one sentence, exit code 1."""

import importlib
import os
import re
import shutil
import socket
import time

import open_clip
import pytest
import torch

import beyond_masking
import cae_v2
import common
import mfm_mae
from helpers import QUICK, TINY, call, config_of, differences, finish, load, refused, sentence, start, teacher_file

FLAGS = dict(cae_v2=TINY, mfm_mae=[*QUICK, "--img_size=32", "--patch_size=8", "--lr=0.3"],
             beyond_masking=[*QUICK, "--img_size=28", "--patch_size=7"])


def test_defaults_then_what_depends_then_demo_then_what_was_typed():
    counts = [config_of(cae_v2, flags).num_masked for flags in ("", "--model=vit_ti", "--mask-ratio=0.2")]
    assert counts == [98, 30, 39]
    demo = config_of(cae_v2, "--demo")
    assert (demo.model, demo.img_size, demo.batch_size, demo.mask_ratio) == ("vit_demo", 32, 64, 0.2)
    given = config_of(cae_v2, "--demo --model=vit_ti --lr=0.0015")  # typed, although it is the default
    assert (given.lr, given.batch_size, given.mask_ratio) == (0.0015, 64, 30 / 196)
    assert [config_of(beyond_masking, flags).mask_ratio for flags in ("", "--task=blur")] == [0.75, 0]
    assert [config_of(beyond_masking, f"--task=decolor {more}").crop_min for more in ("", "--demo")] == [0.08, 1.0]
    assert config_of(mfm_mae, "--model vit_h").patch_size == 14 and config_of(mfm_mae, "--dry-run").dry_run


@pytest.fixture
def fails(tmp_path, data, capfd, monkeypatch):
    """Runs a script in this process and gives the one sentence with which it must end, without any new file."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    def run(*argv, script="cae_v2"):
        argv = [*FLAGS[script], "--data", data, "--out", tmp_path / "run", *argv]
        assert call(*argv, main=importlib.import_module(script).main) == 1
        text = capfd.readouterr().err
        assert text == sentence(text) + "\n" and "\x1b" not in text
        assert not (tmp_path / "run").is_dir() or os.listdir(tmp_path / "run") == ["last.pt"]
        return text
    return run


@pytest.mark.parametrize("script, rows", {
    "cae_v2": "--learning_rate 1; --batch 64; --dry; stray; --lr fast; --lr; --epochs 1.5; --demo=y; --embed_dim 9; "
              "--model vit_x; --lr 0; --lr nan; --epochs -5; --min_lr -1; --workers -2; --seed 99999999999999999999; "
              "--drop_path 1; --crop_min 2; --mask_ratio 0.99; --supervise masked --mask_ratio 0; --img_size 30; "
              "--warmup_epochs 4; --batch_size 25; --micro_batch 3; --device cuda",
    "mfm_mae": "fused --fuse 0,1; fused --fuse 0,4; --fuse all; --fuse 0,,2; --mask_ratio 1; --mask_ratio 0",
    "beyond_masking": "--task rotate; img_size --img_size 32 --patch_size 4; --mask_ratio 0.5 --task blur",
}.items())
def test_flags_that_cannot_be(fails, monkeypatch, script, rows):
    """The sentence names the first word of a row."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    for row in rows.split("; "):
        name, words = re.split("[= ]", row)[0], row.split()
        assert name in fails(*words[name in ("fused", "img_size"):], script=script), row


def test_the_cheap_checks_come_first_and_a_file_of_others_is_kept(fails, tmp_path):
    order = ["--lr=0", "--data=nowhere", "--teacher=ViT-B-16:none.pt", "--init=empty.pt", "--batch_size=25"]
    for place, words in enumerate(("--lr", "no data folder", "none.pt", "no checkpoint file", "24 images")):
        assert words in fails(*order[place:])
    (tmp_path / "run").mkdir()
    for state in ({"method": "mfm_mae", "step": 3}, [1], {"model": {}}):
        torch.save(state, tmp_path / "run" / "last.pt")
        assert "last.pt" in fails() and load(tmp_path / "run") == state


@pytest.mark.parametrize("error, words", [
    (ValueError("the flag is wrong"), "error: the flag is wrong"), (MemoryError(), "--micro_batch"),
    (OSError(28, "No space left on device", "runs/last.pt"), "No space left on device: runs/last.pt"),
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"), "--micro_batch"), (KeyError("x"), None),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "--micro_batch"),
    (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "), "fewer --workers goes on"),
    (KeyboardInterrupt(), "interrupted")])
def test_what_a_user_can_mend_is_one_sentence(capsys, monkeypatch, error, words):
    """A mistake of ours keeps its traceback. Of several processes, one that fails ends at once."""
    with pytest.raises(SystemExit if words else KeyError) as stop:
        common.run_main(main := lambda: (_ for _ in ()).throw(error))
    if words:
        assert words in sentence(capsys.readouterr().err) and stop.value.code == 1
        monkeypatch.setattr(os, "_exit", (ended := []).append)
        monkeypatch.setattr(time, "sleep", ended.append)
        monkeypatch.setattr(os, "environ", dict(RANK="2", WORLD_SIZE="4"))
        common.run_main(main)
        assert ended == [3, 1] and sentence(capsys.readouterr().err).endswith(" [process 2]")


@pytest.mark.slow
@pytest.mark.parametrize("more", ["--data=nowhere", "--teacher=ViT-B-32:README.md"])
def test_torchrun_says_it_once(data, tmp_path, more):
    """Before the processes meet, and when the others already wait for the first one."""
    code, _, err = finish(start(*TINY, "--data", data, "--out", tmp_path / "run", more, processes=2))
    assert code != 0 and 'cae_v2.py", line' not in err and ("\n" + err).count("\nerror: ") == 1, err


@pytest.mark.parametrize("module, model, millions, steps", [
    (cae_v2, "vit_ti", 5.7, 187_500), (cae_v2, "vit_s", 23.7, 187_500), (cae_v2, "vit_b", 114.4, 187_500),
    (mfm_mae, "vit_b", 114.86, 93_600), (beyond_masking, "vit_b", 93.34, 187_500)])
def test_the_dry_run_needs_nothing_and_counts_right(tmp_path, monkeypatch, capsys, module, model, millions, steps):
    """Parameters are the authors'. ViT-B/16 takes 17.6 G multiply-adds by common account; the teacher runs forward
    on all tokens, the student three times as much on those that it sees."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(socket.socket, "connect", None)
    monkeypatch.setenv("WORLD_SIZE", "4")
    module.main(["--model", model, "--dry_run", "--data=nowhere"])
    text = capsys.readouterr().out
    assert os.listdir(tmp_path) == [] and f"{steps:,} = 300 epochs x {steps // 300}" in text
    parameters = int(re.search(r"([\d,]+) parameters", text)[1].replace(",", ""))
    assert parameters / 1e6 == pytest.approx(millions, abs=0.4)
    assert 16 * parameters / 2**30 < float(re.search(r"roughly ([\d.]+) GiB", text)[1]) < 80
    total = float(re.search(r"([\d.]+) GFLOP", text)[1])
    if module is cae_v2:
        teacher = float(re.search(r"([\d.]+) of them in the teacher", text)[1])
        assert teacher == pytest.approx(2 * 17.6, rel=0.05)
        assert model != "vit_b" or 3 * 17.6 < total - teacher < 2 * 3 * 17.6
    assert float(re.search(r"([\d.]+) EFLOP", text)[1]) == pytest.approx(
        total * steps * (4096 if module is mfm_mae else 2048) / 1e9, abs=0.06)
    # All weights in fp32, and two moments of those that are trained: all but a few tables of positions.
    assert 11.8 * parameters < 2**30 * (float(re.search(r"previous.pt ([\d.]+) GiB", text)[1]) + 0.005)
    assert 2**30 * (float(re.search(r"previous.pt ([\d.]+) GiB", text)[1]) - 0.005) < 12 * parameters
    seconds = total * 1e9 * steps * (4096 if module is mfm_mae else 2048) / 4 / 0.4  # at 1 FLOP a second
    hours = {card: float(number) for card, number in re.findall(r"([AH]\d00) ([\d.]+)", text)}
    assert hours == {card: pytest.approx(seconds / peak / 3600, rel=0.02)
                     for card, peak in dict(A100=312e12, H100=989e12, H200=989e12).items()}


def test_previews_and_what_init_takes(tmp_path, data, capsys, monkeypatch):
    """Pictures of trained, given and untrained weights; our own files, a folder, `~`, and nothing else."""
    trained, path, no = tmp_path / "run", tmp_path / "p.png", tmp_path / "no"
    assert call(*FLAGS["mfm_mae"], "--data", data, "--out", trained, main=mfm_mae.main) == 0
    pictures = [(trained / "preview.png").read_bytes()]
    for source, *more in (("last.pt", trained), (str(trained), no, "--init", trained), ("untrained", no)):
        argv = [*FLAGS["mfm_mae"], "--data", data, "--preview", path, "--out", *more]
        assert call(*argv, main=mfm_mae.main) == 0 and source in capsys.readouterr().out.splitlines()[-1]
        pictures.append(path.read_bytes())
    assert pictures[0] == pictures[1] == pictures[2] != pictures[3] and not no.exists()
    def start_from(path, size=32):
        config = config_of(mfm_mae, f"{' '.join(FLAGS['mfm_mae'])} --img_size={size}")
        model, fresh = mfm_mae.build(config), mfm_mae.build(config).state_dict()
        common.load_init(model, path)
        return [(name, tensor, fresh[name]) for name, tensor in model.state_dict().items()]
    weights = load(trained)["model"]
    rest, tables = [name for name in weights if name[:8] != "encoder."], ["encoder.pos_embed", "decoder_pos_embed"]
    monkeypatch.setenv("HOME", str(trained.parent))
    for path, size, kept in ((trained / "last.pt", 32, []), ("~/run", 32, []), (trained, 48, tables),
                             (trained / "encoder.safetensors", 32, rest)):
        for name, ours, fresh in start_from(path, size):
            assert torch.equal(ours, fresh if name in kept else weights[name]), name
    torch.save({"model": {"layer.weight": torch.ones(2)}}, tmp_path / "foreign.pth")
    common.save_encoder(common.ViT(32, 8, embed_dim=96, depth=4), tmp_path / "narrow.safetensors")
    for name, words in (("foreign.pth", "python -m eval.encoders .*foreign.pth"),
                        ("narrow.safetensors", r"cls_token is \(1, 1, 96\) there and \(1, 1, 128\) here")):
        refused(words, start_from, tmp_path / name)


@pytest.mark.parametrize("teacher, words", [
    ("openai", "NAME:TAG"), ("ViT-B-16:", "NAME:TAG"), ("ViT-X-99:openai", "ViT-X-99"), ("hf-hub:timm/x", "hf-hub"),
    ("ViT-B-16:no_tag", "no_tag"), ("ViT-B-16:openai", "openai need another activation"),
    ("RN50:openai", "of RN50 is not"), ("ViT-B-16-SigLIP:webli", "SigLIP is not"), ("coca_ViT-B-32:x", "32 is not"),
    ("ViT-H-14-CLIPA:datacomp1b", "CLIPA is not"), ("ViT-B-16-quickgelu:absent.pt", "absent.pt"),
    ("command_narrow:@/junk.pt", "junk.pt cannot be read as a checkpoint"), ("command_narrow:@/web.pt", "a web page"),
    ("command_narrow:@/command_wide.pt", "size mismatch"), ("command_narrow:@/timm.pt", "is one of timm's")])
def test_teachers_that_cannot_be(fails, tmp_path, teacher, words):
    if "@" in teacher:
        teacher_file(tmp_path, "command_narrow"), teacher_file(tmp_path, "command_wide", width=48)
        (tmp_path / "junk.pt").write_bytes(b"junk\0"), (tmp_path / "web.pt").write_bytes(b"<html>")
        torch.save({"visual.trunk.cls_token": torch.zeros(1, 1, 8)}, tmp_path / "timm.pt")
    assert words in fails("--teacher", teacher.replace("@", str(tmp_path)))


@pytest.mark.parametrize("name, size, patch", [("demo", 32, 4), ("demo", 48, 4), ("command_patch14", 196, 14)])
@torch.no_grad()
def test_targets_are_open_clips_own_numbers(tmp_path, name, size, patch):
    """Its normed and projected patches, and in front what it calls the embedding of the image."""
    spec = name if name == "demo" else teacher_file(tmp_path, name, image_size=size, patch_size=patch)
    visual = cae_v2.load_teacher(spec, size)
    assert not any(p.requires_grad for p in visual.parameters()) and not visual.training
    assert cae_v2.teacher_size(spec, 14) == 14 * patch
    model = spec.split(":") if name != "demo" else ("tiny_clip", "demo/tiny_clip.safetensors")
    model, images = open_clip.create_model(*model, force_image_size=size).eval(), torch.randn(2, 3, size, size)
    tokens = model.visual.forward_intermediates(images, 1, normalize_intermediates=True, output_fmt="NLC")
    patches = tokens["image_intermediates"][-1] @ model.visual.proj
    expected = torch.cat([model.encode_image(images)[:, None], patches], dim=1)
    torch.testing.assert_close(cae_v2.clip_targets(visual, images), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("cached", [True, False])
def test_published_weights_from_the_cache_or_from_the_network(tmp_path, monkeypatch, capsys, cached):
    """In the cache: no request is made. Otherwise a line says first what is fetched, and what to do without."""
    spec, said, hub = teacher_file(tmp_path, "command_published"), [], tmp_path / "models--org--tiny"
    published = dict(hf_hub="org/tiny/", mean=(0.1, 0.2, 0.3), std=(1.0, 1.0, 1.0))
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "command_published", {"tag": published})
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    for folder in ("refs", "snapshots/abc123", ".no_exist/abc123"):
        (hub / folder).mkdir(parents=True)
    if cached:  # and noted that the hub has no safetensors of it
        (hub / "refs/main").write_text("abc123")
        (hub / ".no_exist/abc123/open_clip_model.safetensors").touch()
        shutil.copy(spec.partition(":")[2], hub / "snapshots/abc123/open_clip_pytorch_model.bin")
    def request(*arguments, **more):
        said.append(capsys.readouterr().out)
        raise OSError("no network")
    monkeypatch.setattr(socket.socket, "connect", request)
    monkeypatch.setattr("open_clip.pretrained.hf_hub_download", request)
    if cached:
        visual = cae_v2.load_teacher("command_published:tag", 32)
        assert differences(dict(visual.state_dict()), dict(cae_v2.load_teacher(spec, 32).state_dict())) == []
        assert said == [] and visual.preprocess_cfg["mean"] == (0.1, 0.2, 0.3)
    else:
        refused("command_published:tag.*no network", cae_v2.load_teacher, "command_published:tag", 32)
        assert re.search("huggingface.co/org/tiny.*without a network.*--teacher command_published:FILE", said[0])
