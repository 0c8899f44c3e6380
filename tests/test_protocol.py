"""eval/protocol.py: the view against torchvision, frozen features, shares of processes, the result line."""

import dataclasses
import hashlib
import json

import pytest
import torch
from torchvision.transforms import InterpolationMode, v2

import common
from eval import protocol
from eval.encoders import export
from eval.protocol import (EvalConfig, append_result, centre_view, check_classes, check_pool, frozen_tokens,
                           gather, open_checkpoint, pool_tokens, random_encoder)
from helpers import write_images

TINY = dict(img_size=32, patch_size=16, embed_dim=24, depth=2, num_heads=2)
ONE = common.Processes(0, 1, torch.device("cpu"))


def config(**changes):
    return EvalConfig(**{"checkpoint": "x", "workers": 0, **changes})


def tiny(**changes):
    torch.manual_seed(3)
    return common.ViT(**{**TINY, **changes})


def noise(count, size=32, classes=("a", "b")):
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (count, 3, size, size), generator=generator, dtype=torch.uint8)
    return common.Images(pixels, torch.arange(count) % len(classes), classes, "noise")


# -- the view


@pytest.mark.parametrize("size", [(300, 400), (400, 365), (365, 400), (256, 256), (30, 47), (80, 71)])
def test_view_is_resize_256_crop_224(size):
    image = torch.randint(0, 256, (3, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    papers = v2.Compose([v2.Resize(256, InterpolationMode.BICUBIC, antialias=True), v2.CenterCrop(224)])
    assert torch.equal(centre_view(image, (224, 224)), papers(image))


def test_view_keeps_what_has_the_size_and_fits_other_shapes():
    image = torch.randint(0, 256, (3, 32, 48), dtype=torch.uint8)
    assert centre_view(image, (32, 48)) is image
    assert centre_view(image, (16, 64)).shape == (3, 16, 64)


# -- frozen features


def test_tokens_are_those_of_the_encoder_in_eval_mode_and_no_byte_of_it_changes():
    vit, images = tiny(drop_path_rate=0.5).train(), noise(10)
    before = {key: value.clone() for key, value in vit.state_dict().items()}
    found = list(frozen_tokens(vit, images, 4, config(), ONE))
    tokens, labels = (torch.cat(parts) for parts in zip(*found))
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    with torch.no_grad():
        expected = vit.eval()((images.pixels / 255 - mean) / std)
    assert [len(part) for part, _ in found] == [4, 4, 2]
    assert tokens.dtype == torch.float32 and not tokens.requires_grad
    torch.testing.assert_close(tokens, expected, rtol=0, atol=1e-5)
    assert labels.tolist() == images.labels.tolist()
    assert all(torch.equal(before[key], value) for key, value in vit.state_dict().items())


def test_bf16_is_computed_and_float32_is_given():
    vit, images = tiny(), noise(4)
    (exact, _), = frozen_tokens(vit, images, 4, config(precision="fp32"), ONE)
    (rounded, _), = frozen_tokens(vit, images, 4, config(precision="bf16"), ONE)
    assert rounded.dtype == torch.float32 and not torch.equal(exact, rounded)
    torch.testing.assert_close(exact, rounded, rtol=0, atol=0.1)


@pytest.mark.parametrize("world", [2, 3])
def test_processes_share_the_images_and_gather_puts_them_in_order(world, monkeypatch):
    vit, images = tiny(), noise(8)
    (expected, _), = frozen_tokens(vit, images, 8, config(), ONE)
    each = [common.Processes(rank, world, torch.device("cpu")) for rank in range(world)]
    shares = [torch.cat([tokens for tokens, _ in frozen_tokens(vit, images, 2, config(), one)])
              for one in each]
    assert sum(map(len, shares)) == 8
    largest = max(map(len, shares))
    padded = [torch.cat([share, torch.zeros(largest - len(share), *share.shape[1:])]) for share in shares]

    def all_gather(parts, mine):
        assert mine.shape == parts[0].shape and any(torch.equal(mine, share) for share in padded)
        for part, share in zip(parts, padded, strict=True):
            part.copy_(share)

    monkeypatch.setattr(torch.distributed, "all_gather", all_gather)
    for share, one in zip(shares, each):
        torch.testing.assert_close(gather(share, 8, one), expected, rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match=f"2 images, fewer than the {world} processes") \
            if world > 2 else pytest.raises(StopIteration):
        last = frozen_tokens(vit, noise(2), 2, config(), each[-1])
        next(last), next(last)


def test_pooling():
    tokens = torch.randn(3, 5, 7)
    assert torch.equal(pool_tokens(tokens, "cls", 4), tokens[:, 0])
    torch.testing.assert_close(pool_tokens(tokens, "mean", 4), sum(tokens[:, i] for i in (1, 2, 3, 4)) / 4)
    torch.testing.assert_close(pool_tokens(tokens, "mean", 5), tokens.sum(1) / 5)  # without class token
    assert pool_tokens(tokens, "attention", 4) is tokens
    check_pool("cls", tiny(), "x")
    check_pool("mean", tiny(class_token=False), "x")
    with pytest.raises(ValueError, match="no class token, use --pool mean"):
        check_pool("cls", tiny(class_token=False), "x")


def test_features_that_are_not_finite_are_refused():
    vit = tiny()
    vit.norm.weight.data[0] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        next(frozen_tokens(vit, noise(2), 2, config(), ONE))


# -- checkpoint, classes, result


def test_another_image_size_resizes_the_position_table(tmp_path):
    vit = tiny(img_size=64)
    export(vit, tmp_path / "encoder.safetensors")
    path, same = open_checkpoint(config(checkpoint=str(tmp_path)))
    assert path == tmp_path / "encoder.safetensors" and torch.equal(same.pos_embed, vit.pos_embed)
    _, larger = open_checkpoint(config(checkpoint=str(tmp_path), img_size=96, num_heads=4))
    assert larger.img_size == (96, 96) and larger.config["num_heads"] == 4
    table = vit.pos_embed[0, 1:].T.reshape(1, 24, 4, 4)
    table = torch.nn.functional.interpolate(table, (6, 6), mode="bicubic", align_corners=False)
    torch.testing.assert_close(larger.pos_embed[0, 1:], table.flatten(2)[0].T)
    (tokens, _), = frozen_tokens(larger, noise(2, size=50), 2, config(), ONE)
    assert tokens.shape == (2, 37, 24)


def test_only_the_main_process_prints(tmp_path, capsys, monkeypatch):
    export(tiny(), tmp_path / "encoder.safetensors")
    monkeypatch.setenv("RANK", "1")
    open_checkpoint(config(checkpoint=str(tmp_path)))
    assert capsys.readouterr().out == ""


def test_the_random_encoder_is_of_the_seed_and_shape():
    vit = tiny(depth=1, class_token=False)
    one, same, other = (random_encoder(vit, seed).state_dict() for seed in (5, 5, 6))
    shapes = [{key: value.shape for key, value in state.items()} for state in (one, vit.state_dict())]
    assert shapes[0] == shapes[1]
    key = "blocks.0.attn.qkv.weight"
    assert torch.equal(one[key], same[key]) and not torch.equal(one[key], other[key])


def test_class_lists_must_be_equal():
    check_classes(noise(2), noise(4))
    with pytest.raises(ValueError, match="2 classes of noise and the 3 of noise .* one of them only: c$"):
        check_classes(noise(2), noise(3, classes=("a", "b", "c")))


def test_a_result_can_be_repeated(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    export(tiny(), tmp_path / "encoder.safetensors")
    for number in (1, 2):
        append_result("test", tmp_path / "encoder.safetensors", tiny(), config(seed=4), 0.0, number=number)
    first, second = map(json.loads, (tmp_path / "eval.jsonl").read_text().splitlines())
    assert (first["kind"], first["number"], second["number"]) == ("test", 1, 2)
    assert first["sha256"] == hashlib.sha256((tmp_path / "encoder.safetensors").read_bytes()).hexdigest()
    assert first["flags"] == dataclasses.asdict(config(seed=4)) and first["encoder"] == tiny().config
    assert first["torch"] == torch.__version__ and first["torchvision"] and first["pillow"]
    assert first["commit"] == common.commit() and first["command"] and first["processes"] == 3


def test_workers_are_a_share_of_the_cores(monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 24)
    assert EvalConfig(checkpoint="x").workers == 16 and EvalConfig(checkpoint="x", data="scenes").workers == 0
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert EvalConfig(checkpoint="x").workers == 3


def test_bad_flags(tmp_path):
    for changes, match in ((dict(checkpoint=""), "--checkpoint is missing"), (dict(seed=-1), "seed"),
                           (dict(batch_size=0), "at least 1"), (dict(img_size=-1), "img_size")):
        with pytest.raises(ValueError, match=match):
            config(**changes)
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        open_checkpoint(config(checkpoint=str(tmp_path / "x.pth")))
    with pytest.raises(FileNotFoundError, match="neither encoder.safetensors nor last.pt"):
        open_checkpoint(config(checkpoint=str(tmp_path)))
    image = write_images(tmp_path / "images", 1) / "00.png"
    with pytest.raises(ValueError, match="cannot be read as a checkpoint"):
        open_checkpoint(config(checkpoint=str(image)))


def test_a_result_that_cannot_be_written_is_told_before_the_work(tmp_path, monkeypatch):
    (tmp_path / "last.pt").touch()
    protocol.check_writable(tmp_path / "last.pt")
    monkeypatch.setattr(protocol.os, "access", lambda path, mode: False)
    with pytest.raises(ValueError, match="eval.jsonl, which cannot be written: copy the checkpoint"):
        protocol.check_writable(tmp_path / "last.pt")
