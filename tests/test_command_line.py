"""What goes wrong before training: one sentence that says what to do, exit code 1, no traceback."""

import dataclasses
import os
import re
import shutil
import subprocess
import sys
import time

import open_clip
import pytest
import torch
from torch import nn

import cae_v2
import common
from helpers import ROOT, TINY, call, environment, finish, start, teacher_file, write_images

NETWORK = ["--teacher=ViT-B-32-quickgelu:openai"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("data") / "images")


@pytest.fixture
def fails(tmp_path, data, capfd):
    """Runs the script in this process and gives the one sentence with which it must end."""

    def run(*argv):
        assert call(*TINY, "--data", data, "--out", tmp_path / "run", *argv) == 1
        return sentence(capfd.readouterr().err)

    return run


def sentence(text):
    """The text, if it is one line that begins with error: and has no escape codes in it."""
    assert text.startswith("error: ") and text.count("\n") == 1 and text.endswith("\n"), text
    assert "\x1b" not in text and "Traceback" not in text
    return text


# -- flags


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--learning_rate 1", "unknown argument --learning_rate"),
        ("--mask-ration 0.5", "did you mean --mask_ratio"),
        ("--batch 64", "--batch"),
        ("--sup both", "--sup"),
        ("stray", "stray"),
        ("--lr fast", "--lr.*fast"),
        ("--epochs 1.5", "--epochs.*1.5"),
        ("--workers two", "--workers.*two"),
        ("--lr", "--lr"),
        ("--model vit_x", "vit_x.*vit_ti"),
        ("--mask blocks", "blocks.*block.*random"),
        ("--supervise cls", "cls.*both"),
        ("--precision fp16", "fp16.*bf16"),
        ("--device tpu", "tpu.*cuda"),
        ("--compile yes", "yes.*on.*off"),
        ("--lr 0", "--lr 0"),
        ("--lr -1", "--lr -1"),
        ("--lr nan", "--lr nan"),
        ("--epochs 0", "--epochs 0"),
        ("--epochs -5", "--epochs -5"),
        ("--batch_size 0", "--batch_size 0"),
        ("--clip_grad 0", "--clip_grad 0"),
        ("--img_size 0", "--img_size 0"),
        ("--patch_size 0", "--patch_size 0"),
        ("--depth 0", "--depth 0"),
        ("--regressor_depth 0", "--regressor_depth 0"),
        ("--num_heads -1", "--num_heads -1"),
        ("--min_lr -1", "--min_lr -1"),
        ("--weight_decay -0.1", "--weight_decay -0.1"),
        ("--init_values -1", "--init_values -1"),
        ("--log_every 0", "--log_every 0"),
        ("--save_every -1", "--save_every -1"),
        ("--max_steps -1", "--max_steps -1"),
        ("--micro_batch -1", "--micro_batch -1"),
        ("--drop_path 1", "--drop_path"),
        ("--drop_path -0.1", "--drop_path"),
        ("--crop_min 0", "--crop_min"),
        ("--crop_min 2", "--crop_min"),
        ("--color_jitter -1", "--color_jitter"),
        ("--seed -1", "--seed"),
        ("--seed 99999999999999999999", "--seed"),
        ("--mask_ratio 1", "--mask_ratio"),
        ("--mask_ratio 0.99", "--mask_ratio"),
        ("--mask_ratio -0.1", "--mask_ratio"),
        ("--mask_ratio 0 --supervise masked", "--supervise masked"),
        ("--img_size 30", "--img_size 30.*--patch_size 8"),
        ("--img_size 8 --patch_size 16", "--img_size 8.*--patch_size 16"),
        ("--warmup_epochs 4", "--warmup_epochs 4.*4 epochs"),
        ("--warmup_epochs -1", "--warmup_epochs -1"),
        ("--embed_dim 30", "30"),
        ("--num_heads 3", "3 heads"),
        ("--regressor_heads 5", "5 heads"),
    ],
)
def test_flags_that_cannot_be(fails, flags, words):
    assert re.search(words, fails(*flags.split()))


def test_no_mask_ratio_hangs_a_small_grid():
    """Blocks have no room to grow on small grids: an answer or a sentence, but never a silent loop."""
    code = """if True:
        import random, cae_v2
        for grid in (2, 3, 4, 5):
            for count in range(grid**2):
                try:
                    mask = cae_v2.block_mask(grid, count, random.Random(count))
                except ValueError:
                    continue
                assert sum(map(sum, mask)) == count"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment(), timeout=60, check=True)


def test_batches_that_the_data_or_the_flags_cannot_fill(fails):
    assert re.search("24 images.*--batch_size 24", fails("--batch_size=25"))
    assert re.search("--micro_batch 3.*nearest", fails("--micro_batch=3"))
    assert re.search("--micro_batch 16", fails("--micro_batch=16"))


def test_a_batch_that_the_processes_cannot_share(fails, monkeypatch):
    """As rank 0 of three; nothing is joined before the numbers are known to fit."""
    monkeypatch.setattr(common, "processes", lambda device: Alone())
    assert re.search("--batch_size 8.*3 processes", fails())


class Alone:
    """Process 0 of three, without the others."""

    def __enter__(self):
        return common.Processes(0, 3, torch.device("cpu"))

    def __exit__(self, *error):
        return False


def test_nothing_is_written_before_all_is_known_to_fit(fails, tmp_path):
    fails("--batch_size=25")
    fails("--teacher=ViT-B-16:nowhere.pt")
    fails("--init=nowhere.pt")
    assert not (tmp_path / "run").exists()


# -- data


def test_data_that_are_not_there(fails, tmp_path, monkeypatch):
    missing = fails("--data", tmp_path / "nowhere")
    assert re.search("nowhere.*--data.*IMAGENET.*--demo", missing)
    monkeypatch.setenv("IMAGENET", str(tmp_path / "variable"))
    assert "variable" in fails("--data=")
    (tmp_path / "empty").mkdir()
    assert re.search("empty holds no image", fails("--data", tmp_path / "empty"))
    (tmp_path / "file").write_text("no folder")
    assert "file" in fails("--data", tmp_path / "file")
    monkeypatch.setenv("CIFAR10", str(tmp_path))
    assert "download=True" in fails("--data=cifar10")


def test_an_unreadable_first_image(fails, tmp_path):
    write_images(tmp_path / "images")
    (tmp_path / "images" / "00.png").write_bytes(b"junk")
    assert "00.png" in fails("--data", tmp_path / "images")


def test_data_come_before_the_teacher_and_the_teacher_before_the_network(fails, tmp_path):
    """The cheap checks stand first: an engineer hears of the first thing to mend in seconds."""
    assert "nowhere" in fails("--data", tmp_path / "nowhere", "--teacher=ViT-B-16:absent.pt")
    assert "--lr" in fails("--lr=0", "--data", tmp_path / "nowhere")


# -- checkpoints

JUNK = {"empty": b"", "text": b"no checkpoint", "pickle": b"\x80\x04junk", "zip": b"PK\x03\x04" + bytes(100)}


@pytest.mark.parametrize("content", JUNK.values(), ids=JUNK)
def test_a_junk_checkpoint_in_the_folder_is_named_and_kept(fails, tmp_path, content):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "last.pt").write_bytes(content)
    assert "last.pt cannot be read" in fails()
    assert (tmp_path / "run" / "last.pt").read_bytes() == content


def test_a_checkpoint_of_another_program_in_the_folder(fails, tmp_path):
    (tmp_path / "run").mkdir()
    for state in ({"method": "mfm_mae", "step": 3}, {"model": {}}, {}):
        torch.save(state, tmp_path / "run" / "last.pt")
        assert "last.pt" in fails() and "--out" in fails()


def test_a_file_where_the_folder_should_be(fails, tmp_path):
    (tmp_path / "run").write_text("a file")
    assert "run" in fails()


@pytest.mark.parametrize("name", ["init.pt", "init.safetensors"])
@pytest.mark.parametrize("content", JUNK.values(), ids=JUNK)
def test_a_junk_init(fails, tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    assert name in fails("--init", tmp_path / name)


FOREIGN = {
    "other names": {"model": {"layer.weight": torch.ones(2)}},
    "bare": {"layer.weight": torch.ones(2)},
    "no tensors": {"a": 1},
    "numbered": {1: torch.ones(2)},
    "no dictionary inside": {"model": 3},
    "a list": [torch.ones(2)],
    "empty": {},
    "other method": {"method": "mfm_mae", "model": {"encoder.cls_token": torch.ones(1, 1, 32)}},
}


@pytest.mark.parametrize("state", FOREIGN.values(), ids=FOREIGN)
def test_a_foreign_init(fails, tmp_path, state):
    torch.save(state, tmp_path / "foreign.pth")
    assert "foreign.pth" in fails("--init", tmp_path / "foreign.pth")


def test_an_init_that_is_not_there(fails, tmp_path):
    for name in ("absent.pt", "absent.safetensors", "absent"):
        assert name in fails("--init", tmp_path / name)
    assert str(tmp_path) in fails("--init", tmp_path)


# -- teachers


@pytest.mark.parametrize(
    "teacher, words",
    [
        ("ViT-B-16-quickgelu", "NAME:TAG"),
        ("openai", "NAME:TAG"),
        ("ViT-B-16:", "NAME:TAG"),
        ("ViT-X-99:openai", "ViT-X-99"),
        (":openai", "open_clip knows no model"),
        ("ViT-B-16:no_such_tag", "no_such_tag.*laion"),
        ("RN50:openai", "ViT"),
        ("ViT-B-16:openai", "ViT-B-16-quickgelu:openai"),
        ("ViT-B-16-quickgelu:laion2b_s34b_b88k", "laion2b_s34b_b88k.*dfn2b"),
        ("ViT-B-16-quickgelu:nowhere/file.pt", "nowhere.file.pt"),
        ("ViT-B-16-quickgelu:absent.safetensors", "absent.safetensors"),
        ("hf-hub:timm/x", "hf-hub"),
    ],
)
def test_teachers_that_cannot_be(fails, monkeypatch, teacher, words):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert re.search(words, fails("--teacher", teacher))


@pytest.mark.parametrize("name", ["clip.pt", "clip.safetensors", "clip.bin"])
@pytest.mark.parametrize("content", JUNK.values(), ids=JUNK)
def test_a_junk_teacher(fails, tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    assert name in fails("--teacher", f"ViT-B-32:{tmp_path / name}")


@pytest.mark.parametrize("state", FOREIGN.values(), ids=FOREIGN)
def test_a_teacher_file_without_an_image_tower(fails, tmp_path, state):
    torch.save(state, tmp_path / "clip.pt")
    assert "clip.pt" in fails("--teacher", f"ViT-B-32:{tmp_path / 'clip.pt'}")


def test_weights_of_another_teacher_and_of_one_that_lacks_a_layer(fails, tmp_path):
    teacher_file(tmp_path, "command_wide", width=48)
    spec = teacher_file(tmp_path, "command_narrow")
    err = fails("--teacher", f"command_narrow:{tmp_path / 'command_wide.pt'}")
    assert "command_wide.pt" in err and "command_narrow" in err and "size mismatch" in err
    state = torch.load(tmp_path / "command_narrow.pt")
    del state["visual.ln_post.bias"]
    torch.save(state, tmp_path / "command_narrow.pt")
    assert "ln_post.bias" in fails("--teacher", spec)


def test_a_teachers_folder(fails, tmp_path):
    spec = teacher_file(tmp_path / "made", "command_folder")
    (tmp_path / "folder").mkdir()
    assert "open_clip_model.safetensors" in fails("--teacher", f"command_folder:{tmp_path / 'folder'}")
    shutil.copy(spec.partition(":")[2], tmp_path / "folder" / "open_clip_pytorch_model.bin")
    visual = cae_v2.load_teacher(f"command_folder:{tmp_path / 'folder'}", 32)
    assert all(
        torch.equal(*both)
        for both in zip(visual.parameters(), cae_v2.load_teacher(spec, 32).parameters(), strict=True)
    )


def test_weights_that_open_clip_saved_while_training(tmp_path):
    """open_clip's own checkpoints nest the weights and prefix them with module."""
    teacher_file(tmp_path, "command_nested")
    state = torch.load(tmp_path / "command_nested.pt")
    torch.save(
        {"epoch": 3, "state_dict": {f"module.{name}": tensor for name, tensor in state.items()}},
        tmp_path / "nested.pt",
    )
    ours, theirs = (
        cae_v2.load_teacher(f"command_nested:{tmp_path / name}.pt", 32)
        for name in ("nested", "command_nested")
    )
    assert all(torch.equal(*both) for both in zip(ours.parameters(), theirs.parameters(), strict=True))


@pytest.mark.filterwarnings("ignore")  # torch's remarks on TorchScript
def test_openais_archive_loads_by_its_quickgelu_name_alone(fails, tmp_path):
    """OpenAI publishes TorchScript in half precision; its file does not say which activation it needs."""
    spec = teacher_file(tmp_path, "command-quickgelu", quick_gelu=True)
    teacher_file(tmp_path, "command", quick_gelu=False)

    class Archive(nn.Module):
        def __init__(self):
            super().__init__()
            self.visual = open_clip.create_model("command-quickgelu").visual.half()

        def forward(self, x):
            return x

    torch.jit.trace(Archive(), torch.ones(1)).save(tmp_path / "ViT-B-16.pt")
    visual = cae_v2.load_teacher(f"command-quickgelu:{tmp_path / 'ViT-B-16.pt'}", 32)
    state = torch.jit.load(tmp_path / "ViT-B-16.pt").state_dict()
    for name, parameter in visual.named_parameters():
        assert parameter.dtype == torch.float32 and torch.equal(
            parameter, state[f"visual.{name}"].float()
        ), name
    assert any(type(module).__name__ == "QuickGELU" for module in visual.modules())
    assert "add -quickgelu" in fails("--teacher", f"command:{tmp_path / 'ViT-B-16.pt'}")
    assert cae_v2.load_teacher(spec, 32)


def independent_targets(model, images, ln_post=True):
    """Tokens of an open_clip model by its own layers: a class token and patches, normed and projected."""
    visual = model.visual
    x = visual.conv1(images).flatten(2).transpose(1, 2)
    x = torch.cat([visual.class_embedding.expand(len(x), 1, -1), x], dim=1) + visual.positional_embedding
    x = visual.transformer(visual.ln_pre(x))
    return (visual.ln_post(x) if ln_post else x) @ visual.proj


@torch.no_grad()
def test_a_patch_14_teacher_sees_196_pixels_for_a_14_x_14_grid(tmp_path):
    spec = teacher_file(tmp_path, "command_patch14", image_size=196, patch_size=14)
    assert (
        cae_v2.teacher_size(spec, 14) == 196 and cae_v2.teacher_size("ViT-B-16-quickgelu:openai", 14) == 224
    )
    assert cae_v2.teacher_size("ViT-L-14-quickgelu:openai", 14) == 196
    visual = cae_v2.load_teacher(spec, 196)
    images = torch.randn(2, 3, 196, 196)
    targets = cae_v2.clip_targets(visual, images)
    assert targets.shape == (2, 197, 24) and targets.dtype == torch.float32
    model = open_clip.create_model("command_patch14", pretrained=str(tmp_path / "command_patch14.pt")).eval()
    torch.testing.assert_close(targets, independent_targets(model, images), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(targets[:, 0], model.encode_image(images), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_teacher_whose_norm_comes_after_pooling_still_norms_every_token(tmp_path):
    """open_clip's CLIPA models leave patch tokens without their norm: it is added, or they are refused."""
    spec = teacher_file(tmp_path, "command_after_pool", pool_type="avg", final_ln_after_pool=True)
    try:
        visual = cae_v2.load_teacher(spec, 32)
    except ValueError:
        return
    images = torch.randn(2, 3, 32, 32)
    model = open_clip.create_model(
        "command_after_pool", pretrained=str(tmp_path / "command_after_pool.pt")
    ).eval()
    expected = independent_targets(model, images)[:, 1:]
    torch.testing.assert_close(cae_v2.clip_targets(visual, images)[:, 1:], expected, atol=1e-5, rtol=1e-5)


def test_a_teacher_that_pools_by_attention_is_refused(tmp_path):
    """CoCa's tokens are those of its pooler: they belong to no patch."""
    spec = teacher_file(
        tmp_path, "command_coca", attentional_pool=True, attn_pooler_queries=8, attn_pooler_heads=2
    )
    with pytest.raises(ValueError, match="command_coca"):
        cae_v2.load_teacher(spec, 32)


@torch.no_grad()
def test_positions_are_resized_for_another_grid(fails, tmp_path):
    spec = teacher_file(tmp_path, "command_resized")  # 4 x 4 patches of 8
    native, visual = cae_v2.load_teacher(spec, 32), cae_v2.load_teacher(spec, 48)
    table, resized = native.positional_embedding, visual.positional_embedding
    assert resized.shape == (37, 32) and torch.equal(resized[0], table[0])
    cells = nn.functional.interpolate(
        table[1:].T.reshape(1, 32, 4, 4), (6, 6), mode="bilinear", align_corners=False
    )
    torch.testing.assert_close(resized[1:], cells.reshape(32, 36).T)
    model = open_clip.create_model("command_resized", pretrained=str(tmp_path / "command_resized.pt")).eval()
    model.visual.positional_embedding = nn.Parameter(resized)
    images = torch.randn(2, 3, 48, 48)
    torch.testing.assert_close(
        cae_v2.clip_targets(visual, images), independent_targets(model, images), atol=1e-5, rtol=1e-5
    )
    with pytest.raises(ValueError, match="do not tile"):
        cae_v2.load_teacher(spec, 36)


def test_a_teacher_with_another_grid_than_the_student_trains(tmp_path, data):
    spec = teacher_file(tmp_path, "command_trains", image_size=28, patch_size=14)  # 2 x 2 of 14
    assert call(*TINY, "--data", data, "--out", tmp_path / "run", "--teacher", spec, "--max_steps=2") == 0
    assert torch.load(tmp_path / "run" / "last.pt")["model"]["head.weight"].shape == (24, 32)


def test_the_teacher_gets_its_own_mean_and_std(tmp_path):
    visual = cae_v2.load_teacher(teacher_file(tmp_path, "command_mean"), 32)
    crops = torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8)
    mask = torch.zeros(2, 16, dtype=torch.bool)
    student, teacher_images, same = cae_v2.inputs((crops, mask), visual, torch.device("cpu"))
    assert torch.equal(same, mask)
    for images, mean, std in (
        (student, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        (teacher_images, (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    ):
        back = images * torch.tensor(std)[:, None, None] + torch.tensor(mean)[:, None, None]
        torch.testing.assert_close(back * 255, crops.float(), atol=1e-3, rtol=0)


# -- no network


def test_no_network_allowed_and_no_cache(tmp_path, data, capsys):
    begin = time.perf_counter()
    process = start(
        *TINY,
        *NETWORK,
        "--data",
        data,
        "--out",
        tmp_path / "run",
        HF_HUB_OFFLINE="1",
        HF_HOME=str(tmp_path / "hf"),
    )
    code, _, err = finish(process)
    with capsys.disabled():
        print(f"\nno network allowed: answered after {time.perf_counter() - begin:.1f} s")
    assert code == 1
    assert re.search("cache.*https.*--teacher ViT-B-32-quickgelu:/", sentence(err))


def test_no_network_there_and_no_cache_answers_in_seconds(tmp_path, data, capsys):
    """Ten seconds are the promise; the bound is generous for a busy machine."""
    begin = time.perf_counter()
    process = start(
        *TINY,
        *NETWORK,
        "--data",
        data,
        "--out",
        tmp_path / "run",
        HF_ENDPOINT="http://127.0.0.1:9",
        HF_HOME=str(tmp_path / "hf"),
        HF_HUB_OFFLINE="0",
        NO_PROXY="127.0.0.1",
        no_proxy="127.0.0.1",
    )
    code, _, err = finish(process)
    seconds = time.perf_counter() - begin
    with capsys.disabled():
        print(f"\nno network there: answered after {seconds:.1f} s")
    assert code == 1 and seconds < 30
    assert re.search("127.0.0.1:9.*--teacher ViT-B-32-quickgelu:/", sentence(err))


def test_a_server_that_never_answers_is_given_up_after_three_seconds():
    import socket

    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        begin = time.perf_counter()
        assert not cae_v2.reachable(f"http://127.0.0.1:{server.getsockname()[1]}")
        assert 2 < time.perf_counter() - begin < 8


def test_a_slow_name_look_up_does_not_hang_the_start(monkeypatch):
    monkeypatch.setattr("socket.getaddrinfo", lambda *arguments, **more: time.sleep(20) or [])
    begin = time.perf_counter()
    assert not cae_v2.reachable("http://example.org", seconds=1.0)
    assert time.perf_counter() - begin < 8


def test_published_weights_come_from_the_cache_without_a_question(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "huggingface_hub.hf_hub_download",
        lambda repository, file, local_files_only=False: f"{repository}/{file}",
    )
    monkeypatch.setattr(cae_v2, "reachable", lambda *_: pytest.fail("the network was asked"))
    config = open_clip.get_model_config("ViT-B-16-quickgelu")
    path, mean_std = cae_v2.published_weights("ViT-B-16-quickgelu", "openai", config)
    assert path.endswith("open_clip_model.safetensors") and mean_std["mean"][0] == pytest.approx(0.48145466)


# -- help, dry run, torchrun


def test_help_names_every_flag_in_both_spellings(capsys):
    assert call("--help") == 0
    text = capsys.readouterr().out
    for field in dataclasses.fields(cae_v2.Config):
        for name in (field.name, field.name.replace("_", "-")):
            assert re.search(rf"--{name}\b", text), name
    assert "torchrun" in text and "2211.09799" in text


@pytest.mark.parametrize("model, millions", [("vit_ti", 5.7), ("vit_s", 23.7), ("vit_b", 114.4)])
def test_dry_run_needs_neither_data_nor_weights(tmp_path, monkeypatch, capsys, model, millions):
    """The parameter counts are those of the authors' models."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(cae_v2, "published_weights", lambda *_: pytest.fail("weights were looked for"))
    monkeypatch.chdir(tmp_path)
    assert call("--model", model, "--dry_run", "--data=nowhere") == 0
    text = capsys.readouterr().out
    assert os.listdir(tmp_path) == []
    found = [int(number.replace(",", "")) / 1e6 for number in re.findall(r"([\d,]{7,}) parameters", text)]
    assert any(number == pytest.approx(millions, abs=0.4) for number in found), text
    assert "GFLOP" in text and "GiB" in text and "187500 = 300 epochs x 625" in text


def test_dry_run_counts_what_a_plain_forward_and_backward_cost(capsys):
    """ViT-B/16: 17.6 G multiply-adds an image by common account; the teacher runs forward on all tokens."""
    assert call("--dry_run") == 0
    text = capsys.readouterr().out
    teacher = float(re.search(r"([\d.]+) of them in the teacher", text)[1])
    total = float(re.search(r"([\d.]+) GFLOP", text)[1])
    assert teacher == pytest.approx(2 * 17.6, rel=0.05)
    # 99 of 197 tokens in the encoder, forward and twice that backward, and the regressor's four blocks.
    assert 3 * 2 * 17.6 / 2 < total - teacher < 3 * 2 * 17.6


def test_torchrun_says_it_once(tmp_path):
    process = start("--data", tmp_path / "nowhere", "--device=cpu", processes=2)
    code, _, err = finish(process)
    assert code != 0
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "nowhere" in lines[0], err
    assert 'cae_v2.py", line' not in err  # no traceback into our files


@pytest.mark.slow
def test_torchrun_with_a_bad_teacher_says_it_once(tmp_path, data):
    """Here the other process already waits for the first one, which dies."""
    (tmp_path / "clip.pt").write_bytes(b"junk")
    process = start(
        *TINY,
        "--data",
        data,
        "--out",
        tmp_path / "run",
        "--teacher",
        f"ViT-B-32:{tmp_path / 'clip.pt'}",
        processes=2,
    )
    code, _, err = finish(process)
    assert code != 0
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "clip.pt" in lines[0], err
    assert 'cae_v2.py", line' not in err, err
