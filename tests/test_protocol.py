"""eval/protocol.py: view against torchvision, frozen features, shares, training loop by hand, results."""

import copy
import dataclasses
import hashlib
import json
import math
import shutil

import pytest
import torch
from torch import nn
from torchvision.transforms import InterpolationMode, v2

import common
from eval import protocol
from eval.encoders import export
from eval.protocol import (EvalConfig, all_gather, append_result, centre_view, check_classes, fit, frozen_tokens,
                           open_checkpoint, open_run, random_encoder)
from helpers import read_log, sentence
from test_linear_probe import ONE, tiny
from test_runs import places, script  # noqa: F401


@dataclasses.dataclass(frozen=True)
class Config(EvalConfig, common.TrainConfig):
    pass


def config(**changes):
    return Config(**{"checkpoint": "x", "workers": 0, **changes})


def noise(count, size=32, classes=("a", "b")):
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (count, 3, size, size), generator=generator, dtype=torch.uint8)
    return common.Images(pixels, torch.arange(count) % len(classes), classes, "noise")


@pytest.mark.parametrize("size", [(300, 400), (400, 365), (365, 400), (256, 256), (30, 47), (80, 71), (224, 224)])
def test_view_is_resize_256_crop_224(size):
    image = torch.randint(0, 256, (3, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    papers = v2.Compose([v2.Resize(256, InterpolationMode.BICUBIC, antialias=True), v2.CenterCrop(224)])
    assert torch.equal(centre_view(image, (224, 224), whole=False), papers(image))
    assert centre_view(image, (16, 64)).shape == (3, 16, 64)
    assert centre_view(image, size) is image


def test_tokens_are_those_of_the_encoder_in_eval_mode_and_no_byte_of_it_changes():
    vit, images = tiny(depth=2, drop_path_rate=0.5).train(), noise(10)
    before = {key: value.clone() for key, value in vit.state_dict().items()}
    found = list(frozen_tokens(vit, images, 4, config(), ONE))
    tokens, labels = (torch.cat(parts) for parts in zip(*found))
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    with torch.no_grad():
        expected = vit.eval()(v2.functional.normalize(images.pixels / 255, mean, std))
    torch.testing.assert_close(tokens, expected, rtol=0, atol=1e-5)
    assert labels.tolist() == images.labels.tolist() and not tokens.requires_grad
    torch.testing.assert_close(vit.state_dict(), before, rtol=0, atol=0)
    rounded = next(frozen_tokens(vit, images, 4, config(precision="bf16"), ONE))[0]
    assert rounded.dtype == torch.float32 and not torch.equal(rounded, tokens[:4])
    torch.testing.assert_close(rounded, tokens[:4], rtol=0, atol=0.1)
    vit.norm.weight.data[0] = float("nan")
    with pytest.raises(ValueError, match="features that are not finite"):
        next(frozen_tokens(vit, images, 4, config(), ONE))


@pytest.mark.parametrize("world", [2, 3])
def test_processes_share_the_images_and_all_gather_puts_them_in_order(world, monkeypatch):
    vit, images = tiny(), noise(8)
    [(expected, _)] = frozen_tokens(vit, images, 8, config(), ONE)
    each = [common.Dist(rank, world, ONE.device) for rank in range(world)]
    shares = [torch.cat([rows for rows, _ in frozen_tokens(vit, images, 2, config(), one)]) for one in each]
    padded = nn.utils.rnn.pad_sequence(shares, batch_first=True)

    def stand_in(parts, mine):
        assert any(torch.equal(mine, share) for share in padded)
        for part, share in zip(parts, padded, strict=True):
            part.copy_(share)

    monkeypatch.setattr(torch.distributed, "all_gather", stand_in)
    for share, one in zip(shares, each):
        torch.testing.assert_close(all_gather(share, 8, one), expected, rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match=f"1 images, fewer than the {world} processes"):
        next(frozen_tokens(vit, noise(1), 2, config(), each[-1]))


def test_a_checkpoint_and_a_random_encoder_of_its_shape(tmp_path, capsys, monkeypatch):
    vit = tiny(img_size=64)
    export(vit, tmp_path / "encoder.safetensors")
    path, same = open_checkpoint(config(checkpoint=str(tmp_path)))
    assert path == tmp_path / "encoder.safetensors" and torch.equal(same.pos_embed, vit.pos_embed)
    assert "loaded" in capsys.readouterr().out
    monkeypatch.setenv("RANK", "1")  # only the main process prints
    _, larger = open_checkpoint(config(checkpoint=str(tmp_path), img_size=96, num_heads=4))
    assert larger.img_size == (96, 96) and larger.config["num_heads"] == 4
    assert capsys.readouterr().out == ""
    for name, (mean, std) in protocol.STATISTICS.items():
        _, other = open_checkpoint(config(checkpoint=str(tmp_path), mean_std=name))
        images = torch.full((1, 3, 2, 2), 255, dtype=torch.uint8)
        expected = (1 - torch.tensor(mean)) / torch.tensor(std)
        assert torch.allclose(protocol.normalise(images, other, "cpu")[0, :, 0, 0], expected) and other.assumed == []
        assert random_encoder(other, 0).config["mean"] == list(mean)
    first, again, other = (random_encoder(vit, seed).cls_token for seed in (5, 5, 6))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_what_is_refused(tmp_path, monkeypatch):
    check_classes(noise(2), noise(4))
    with pytest.raises(ValueError, match="2 classes of noise and the 3 of noise .* one of them only: c$"):
        check_classes(noise(2), noise(3, classes=("a", "b", "c")))
    with pytest.raises(ValueError, match="--checkpoint is missing"):
        config(checkpoint="")
    torch.save(dict(kind="finetuning"), tmp_path / "last.pt")
    assert open_run(tmp_path, "finetuning") == open_run(tmp_path / "last.pt", "finetuning")
    with pytest.raises(ValueError, match="last.pt is not from a detection run"):
        open_run(tmp_path, "detection")
    monkeypatch.setattr(protocol.os, "access", lambda path, mode: False)
    with pytest.raises(ValueError, match="eval.jsonl, which cannot be written"):  # before the work
        open_run(tmp_path, "finetuning")


@pytest.mark.parametrize("script", ["eval.finetune", "eval.linear_probe", "eval.detect"], indirect=True)
def test_a_bad_test_image_is_told_before_a_run_trains(script, places, tmp_path, capsys):  # noqa: F811
    """One that goes on does not look again."""
    out, more, folder = tmp_path / "run", ["--data", tmp_path], "coco" if script.name == "eval.detect" else "classes"
    shutil.copytree(places / folder, tmp_path, dirs_exist_ok=True)
    picture = sorted((tmp_path / "val").rglob("*.*"))[-1]
    whole = picture.read_bytes()
    picture.write_bytes(whole[:60])
    assert script(out, *more) == 1 and not out.exists()
    assert f"{picture} cannot be read as an image" in sentence(capsys.readouterr().err)
    picture.write_bytes(whole)
    assert script(out, *more, "--max_steps=2") == 0
    picture.write_bytes(whole[:60])
    assert script(out, *more, "--max_steps=4") == 1 and len(read_log(out)) > 2


@pytest.mark.parametrize("clip_grad", [0.2, math.inf])
def test_the_loop_is_that_of_torchs_optimiser(tmp_path, clip_grad):
    """Three steps of two micro batches, beside a loop written out here."""
    model = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(48, 2))
    same = copy.deepcopy(model)
    optimizer, reference = (torch.optim.AdamW([
        dict(params=[net[2].weight], lr_scale=0.5), dict(params=[net[2].bias], lr_scale=1.0)]) for net in (model, same))
    samples, plan = common.Samples(noise(6, size=4), lambda *it: it, 0), common.make_plan(6, 6, 3, 3, 1)
    flags, seen, rates = config(seed=7, log_every=1, save_every=1), [], [0.3, 0.2, 0.1].__getitem__
    run = common.Run("test", flags, tmp_path)
    run.begin(ONE, plan, samples, model, optimizer)

    def loss(net, batch):
        return nn.functional.cross_entropy(net(common.normalise(batch[0])), batch[1])

    def compute_loss(net, batch):
        assert net.training
        seen.append((torch.initial_seed(), batch))
        value = loss(net, batch)
        return value, dict(twice=2 * value)

    for step, lr, norm in fit(flags, run, ONE, plan, model, optimizer, compute_loss, rates, clip_grad):
        total = 0
        for seed, batch in seen[-2:]:
            torch.manual_seed(seed)
            total += loss(same, batch) / 2
        total.backward()
        length = torch.cat([p.grad.flatten() for p in same.parameters()]).norm()
        for group in reference.param_groups:
            group["lr"] = rates(step - 1) * group["lr_scale"]
            for p in group["params"]:
                p.grad *= min(1, clip_grad / length.item())
        reference.step()
        reference.zero_grad()
        torch.testing.assert_close((model.state_dict(), norm), (same.state_dict(), length))
        assert lr == rates(step - 1) and run.log(step, lr, norm)
        line = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[-1])
        assert (line["loss"], line["twice"]) == pytest.approx((total.item(), 2 * total.item()))
        model.eval()  # as a test does
    expected = [common.seed_for(7, "step", step, row) for step in range(3) for row in (0, 3)]
    assert [seed for seed, _ in seen] == expected


def test_a_result_can_be_repeated(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    (tmp_path / "last.pt").write_bytes(b"weights")
    for number in (1, 2):
        append_result("test", tmp_path / "last.pt", tiny(), config(seed=4), 0.0, number=number)
    first, second = map(json.loads, (tmp_path / "eval.jsonl").read_text().splitlines())
    assert first["sha256"] == hashlib.sha256(b"weights").hexdigest() and second["number"] == 2
    assert first["flags"] == dataclasses.asdict(config(seed=4)) and first["encoder"] == tiny().config
    versions = dict(commit=common.commit(), torch=torch.__version__, processes=3)
    assert versions.items() <= first.items() and first["command"] and first["torchvision"]
