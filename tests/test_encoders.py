"""eval/encoders.py: every format against an independent forward, and what must be refused."""

import argparse
import json
import math
import os
import pathlib
import pickle

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from timm.models.vision_transformer import VisionTransformer

import beyond_masking
import common
from eval.encoders import assumed_heads, export, load_encoder

GOLDEN = torch.load(pathlib.Path(__file__).parent / "golden" / "cae_v2.pt", weights_only=True)["cases"]
SMALL = dict(img_size=32, patch_size=8, embed_dim=64, depth=2, num_heads=4)


def randomise(module, seed=0):
    """No tensor stays at a value (0 or 1) that a wrong mapping would not disturb."""
    generator = torch.Generator().manual_seed(seed)
    for tensor in module.state_dict().values():
        tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.2 + 0.1)
    return module.eval()


def features(vit, images):
    with torch.no_grad():
        return vit.eval()(images)


def timm_file(tmp_path, wrap=lambda state: state, **changes):
    """A random timm model and the file that holds it."""
    model = randomise(VisionTransformer(**{**SMALL, "num_classes": 0, **changes}))
    torch.save(wrap(model.state_dict()), tmp_path / "timm.pth")
    return model, tmp_path / "timm.pth"


def close(ours, theirs):
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() < 1e-5


IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


# -- formats


@pytest.mark.parametrize("config", [
    dict(SMALL), dict(SMALL, class_token=False, mlp_ratio=2.0), dict(SMALL, init_values=0.1),
    dict(SMALL, img_size=(16, 64), patch_size=(8, 16), in_chans=5),
    dict(SMALL, embed_dim=56, mlp_ratio=115.5 / 56),  # 115 / 56 * 56 is 114.99999999999999 in floats
], ids=["plain", "no_class_token", "layer_scale", "pairs", "odd_ratio"])
def test_our_encoder_file_gives_the_same_encoder(tmp_path, config):
    vit = randomise(common.ViT(**config))
    export(vit, tmp_path / "encoder.safetensors")
    for path in (tmp_path / "encoder.safetensors", tmp_path, str(tmp_path)):
        read = load_encoder(path)
        assert all(torch.equal(read.state_dict()[key], value) for key, value in vit.state_dict().items())
        assert read.config | dict(mlp_ratio=0) == vit.config | dict(mlp_ratio=0)
    assert load_file(tmp_path / "encoder.safetensors").keys() == vit.state_dict().keys()
    assert not any(p.requires_grad for name, p in read.named_parameters() if name == "pos_embed")
    assert all(p.requires_grad for name, p in read.named_parameters() if name != "pos_embed")


def test_last_pt_reads_its_own_head_count_and_ignores_the_rest(tmp_path, capsys):
    vit = randomise(common.ViT(**{**SMALL, "embed_dim": 192, "num_heads": 12}))
    model = {f"encoder.{key}": value for key, value in vit.state_dict().items()}
    model |= {"norm.weight": torch.zeros(192), "regressor.0.norm.weight": torch.zeros(192)}
    state = dict(kind="pretraining", method="cae_v2", config=dict(num_heads=12, img_size=32), model=model)
    torch.save(state, tmp_path / "last.pt")
    torch.load(tmp_path / "last.pt")  # torch's default loader
    assert torch.equal(features(load_encoder(tmp_path), IMAGES), features(vit, IMAGES))
    loaded, new, ignored = capsys.readouterr().out.splitlines()
    assert "all 30 tensors" in loaded and "12 heads," in loaded and "assumed" not in loaded
    assert new.split() == ["new", "nothing"]
    assert ignored.split(maxsplit=1) == ["ignored", "norm (1), regressor (1)"]


@pytest.mark.parametrize("changes", [
    {}, dict(init_values=0.1), dict(class_token=False, global_pool="avg", fc_norm=False),
    dict(num_classes=10), dict(no_embed_class=True), dict(mlp_ratio=3.0, in_chans=3, depth=1),
], ids=["plain", "layer_scale", "no_class_token", "with_head", "no_embed_class", "sizes"])
def test_timm_forward(tmp_path, changes):
    model, path = timm_file(tmp_path, **changes)
    with torch.no_grad():
        close(features(load_encoder(path, num_heads=4), IMAGES), model.forward_features(IMAGES))


def test_our_file_loads_strictly_in_timm(tmp_path):
    vit = randomise(common.ViT(**SMALL, init_values=0.1))
    export(vit, tmp_path / "encoder.safetensors")
    model = VisionTransformer(**SMALL, num_classes=0, init_values=0.1)
    model.load_state_dict(load_file(tmp_path / "encoder.safetensors"))
    with torch.no_grad():
        close(model.eval().forward_features(IMAGES), features(vit, IMAGES))


@pytest.mark.parametrize("wrap", [
    lambda state: state,
    lambda state: {"model": state, "args": argparse.Namespace(lr=1.0, blr=None), "epoch": 3, "optimizer": {}},
    lambda state: {"state_dict": {f"module.{key}": value for key, value in state.items()}},
    lambda state: {f"_orig_mod.module.{key}": value for key, value in state.items()},
    lambda state: {key.replace("s.0.", "s.0._orig_mod."): value.half() for key, value in state.items()},
], ids=["bare", "model_args", "ddp", "compiled", "compiled_blocks_half"])
def test_wrappers(tmp_path, wrap):
    model, path = timm_file(tmp_path, wrap)
    vit = load_encoder(path, num_heads=4)
    assert all(value.dtype == torch.float32 for value in vit.state_dict().values())
    for key, value in model.state_dict().items():
        assert torch.allclose(vit.state_dict()[key], value, atol=1e-3)


def test_mae_file_keeps_its_position_table_and_drops_the_decoder(tmp_path, capsys):
    model, path = timm_file(tmp_path)
    others = ("mask_token", "decoder_pos_embed", "decoder_blocks.0.norm1.weight", "decoder_pred.bias")
    torch.save({"model": model.state_dict() | {key: torch.zeros(8) for key in others}}, path)
    vit = load_encoder(path, num_heads=4)
    assert torch.equal(vit.pos_embed, model.pos_embed)
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == "ignored  mask_token (1), decoder_pos_embed (1), decoder_blocks (1), decoder_pred (1)"


@pytest.mark.parametrize("case", GOLDEN)
@pytest.mark.parametrize("prefix", ["encoder.", ""], ids=["pretraining", "bare_encoder"])
def test_official_cae_v2(tmp_path, case, prefix):
    state, golden = GOLDEN[case]["state_dict"], GOLDEN[case]["transfer"]
    if not prefix:
        state = {key[len("encoder."):]: value for key, value in state.items() if key.startswith("encoder.")}
    torch.save({"model": state, "args": argparse.Namespace(model="x")}, tmp_path / "cae.pth")
    tokens = features(load_encoder(tmp_path / "cae.pth", num_heads=4), GOLDEN[case]["images"])
    close(tokens, golden["encoder_unmasked"])
    close(tokens[:, 0], golden["linear_probe_cls"])


@pytest.mark.parametrize("name", ["mae", "mfm"])
def test_mae_and_mmpretrain(tmp_path, capsys, name):
    """The downstream features of the released code: of the last block, nothing of the fusion."""
    golden = torch.load(pathlib.Path(__file__).parent / "golden" / "mfm_mae.pt", weights_only=True)[name]
    key = dict(mae="model", mfm="state_dict")[name]
    torch.save({key: golden["state_dict"], "meta": dict(epoch=3)}, tmp_path / "x.pth")
    vit = load_encoder(tmp_path / "x.pth", num_heads=golden["config"]["num_heads"])
    close(features(vit, golden["images"])[:, 0], golden["vit_cls_feature"])
    close(vit.layers(golden["images"], [-1])[0][:, 1:].mean(dim=1), golden["vit_patch_mean"])
    loaded, _, ignored = capsys.readouterr().out.splitlines()
    if name == "mfm":
        assert "mmpretrain names" in loaded and "proj_weights (1), proj_layers (10)" in ignored
        assert torch.equal(vit.pos_embed, golden["state_dict"]["backbone.pos_embed"])


@pytest.mark.parametrize("extra", ["backbone.pre_norm.weight", "backbone.layers.0.gamma_1",
                                   "backbone.layers.0.attn.rel_pos_bias"])
def test_mmpretrain_with_a_part_that_vit_lacks(tmp_path, extra):
    golden = torch.load(pathlib.Path(__file__).parent / "golden" / "mfm_mae.pt", weights_only=True)["mfm"]
    torch.save({"state_dict": golden["state_dict"] | {extra: torch.zeros(48)}}, tmp_path / "x.pth")
    refused(tmp_path / "x.pth", "does not compute", num_heads=4)
    cut = {key: value for key, value in golden["state_dict"].items() if not key.startswith("backbone.ln1")}
    torch.save({"state_dict": cut}, tmp_path / "x.pth")
    refused(tmp_path / "x.pth", "lacks norm.weight, norm.bias", num_heads=4)


@pytest.mark.parametrize("config", [
    dict(SMALL, init_values=0.1), dict(SMALL, img_size=(16, 64), patch_size=(8, 16)),
    dict(SMALL, mlp_ratio=2.0),
], ids=["layer_scale", "pairs", "ratio"])
def test_hugging_face(tmp_path, config):
    transformers = pytest.importorskip("transformers")
    vit = randomise(common.ViT(**config))
    export(vit, tmp_path / "hf", form="hf")
    model, info = transformers.ViTModel.from_pretrained(tmp_path / "hf", add_pooling_layer=False,
                                                        output_loading_info=True)
    assert not any(info.values())
    images = torch.randn(2, 3, *vit.img_size)
    with torch.no_grad():
        close(model.eval()(images).last_hidden_state, features(vit, images))


def test_export_refuses():
    with pytest.raises(ValueError, match="class token"):
        export(common.ViT(**SMALL, class_token=False), "nowhere", form="hf")
    with pytest.raises(ValueError, match="'onnx'"):
        export(common.ViT(**SMALL), "nowhere", form="onnx")


# -- sizes


def test_position_resize(tmp_path, capsys):
    vit = randomise(common.ViT(**SMALL))
    export(vit, tmp_path / "e.safetensors")
    assert torch.equal(load_encoder(tmp_path / "e.safetensors", img_size=32).pos_embed, vit.pos_embed)
    for size in (48, (16, 64)):
        capsys.readouterr()
        read = load_encoder(tmp_path / "e.safetensors", img_size=size)
        grid = [side // 8 for side in common.pair(size)]
        picture = vit.pos_embed[0, 1:].T.reshape(1, 64, 4, 4)  # a raster of 4 x 4 pixels with 64 channels
        expected = F.interpolate(picture, size=grid, mode="bicubic", align_corners=False)[0].flatten(1).T
        assert torch.equal(read.pos_embed[0, 1:], expected)
        assert torch.equal(read.pos_embed[0, :1], vit.pos_embed[0, :1])
        assert read(torch.zeros(1, 3, *common.pair(size))).shape == (1, 1 + math.prod(grid), 64)
        assert f"from 4 x 4 to {grid[0]} x {grid[1]}" in capsys.readouterr().out.splitlines()[1]


@pytest.mark.parametrize("size", [(16, 24), (16, 32)])  # 2 x 4 patches and a class token might be 3 x 3
def test_oblong_table_of_a_foreign_file_needs_the_image_size(tmp_path, size):
    model, path = timm_file(tmp_path, img_size=size)
    read = load_encoder(path, num_heads=4, img_size=size)
    images = IMAGES[:, :, :size[0], :size[1]]
    with torch.no_grad():
        close(features(read, images), model.forward_features(images))
    if size == (16, 24):
        refused(path, "img_size=.height, width.", num_heads=4)


def test_heads(tmp_path, capsys):
    sizes = dict(img_size=16, patch_size=8, depth=1)
    vit = randomise(common.ViT(**sizes, embed_dim=192, num_heads=3))
    torch.save(vit.state_dict(), tmp_path / "timm.pth")
    official = {f"encoder.{key}": value for key, value in vit.state_dict().items() if "qkv.bias" not in key}
    q, _, v = vit.blocks[0].attn.qkv.bias.detach().chunk(3)
    official |= {"encoder.blocks.0.attn.q_bias": q.clone(), "encoder.blocks.0.attn.v_bias": v.clone()}
    torch.save({"model": official}, tmp_path / "cae.pth")
    assert load_encoder(tmp_path / "timm.pth").config["num_heads"] == 3
    assert load_encoder(tmp_path / "cae.pth").config["num_heads"] == 12
    assert capsys.readouterr().out.count("(assumed)") == 2
    assert load_encoder(tmp_path / "cae.pth", num_heads=6).config["num_heads"] == 6
    assert "(assumed)" not in capsys.readouterr().out
    export(common.ViT(**sizes, embed_dim=192, num_heads=12), tmp_path / "e.safetensors")
    assert load_encoder(tmp_path / "e.safetensors").config["num_heads"] == 12
    assert [assumed_heads("timm", dim) for dim in (192, 384, 768, 1024, 1280)] == [3, 6, 12, 16, 16]
    assert [assumed_heads("CAE v2", dim) for dim in (192, 384, 768, 1024)] == [12, 12, 12, 16]


def test_loading_draws_no_random_numbers(tmp_path):
    export(common.ViT(**SMALL), tmp_path / "e.safetensors")
    before = torch.get_rng_state()
    load_encoder(tmp_path / "e.safetensors")
    assert torch.equal(before, torch.get_rng_state())


# -- what must be refused, in one sentence that names the file and the fault


def refused(path, match, error=ValueError, **override):
    with pytest.raises(error, match=match) as caught:
        load_encoder(path, **override)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_bad_paths(tmp_path):
    refused(tmp_path / "none.pth", "there is no checkpoint", FileNotFoundError)
    refused(tmp_path, "neither encoder.safetensors nor last.pt", FileNotFoundError)


@pytest.mark.parametrize("name", ["x.pth", "x.pt", "x.safetensors"])
@pytest.mark.parametrize("junk", [b"", b"\x80", b"no checkpoint", bytes(range(256)), b"PK\3\4" + bytes(99)])
def test_junk(tmp_path, name, junk):
    (tmp_path / name).write_bytes(junk)
    refused(tmp_path / name, "cannot be read as a")


def test_cut_off(tmp_path):
    export(common.ViT(**SMALL), tmp_path / "e.safetensors")
    torch.save(common.ViT(**SMALL).state_dict(), tmp_path / "e.pth")
    for path in (tmp_path / "e.safetensors", tmp_path / "e.pth"):
        path.write_bytes(path.read_bytes()[:-1000])
        refused(path, "cannot be read as a")


def test_other_models(tmp_path):
    path = tmp_path / "x.pth"
    for content in (timm.create_model("resnet10t").state_dict(), {}, {"model": {}}, {"model": "vit_b", 3: 4},
                    VisionTransformer(**SMALL, pos_embed="none").state_dict()):
        torch.save(content, path)
        refused(path, "no vision transformer in a known format")
    for content in ([1, 2], torch.zeros(3), "text"):
        torch.save(content, path)
        refused(path, "not a dictionary")


@pytest.mark.parametrize("remove, match", [
    ("norm.weight", "lacks norm.weight$"), ("cls_token", "17 rows"),
    ("patch_embed.proj.bias", "lacks patch_embed.proj.bias$"),
    ("blocks.1.attn.qkv", "lacks blocks.1.attn.qkv.weight, blocks.1.attn.qkv.bias$"),
    ("blocks.1.ls", "lacks blocks.1.ls1.gamma, blocks.1.ls2.gamma$"),
    ("blocks.0", "no blocks.0.mlp.fc1.weight"), ("pos_embed", "no pos_embed"),
])
def test_a_backbone_with_a_part_missing(tmp_path, remove, match):
    state = common.ViT(**SMALL, init_values=0.1).state_dict()
    torch.save({key: value for key, value in state.items() if not key.startswith(remove)}, tmp_path / "x.pth")
    refused(tmp_path / "x.pth", match, num_heads=4)


@pytest.mark.parametrize("changes, named", [
    (dict(qk_norm=True), "q_norm"), (dict(reg_tokens=2, no_embed_class=True), "reg_token"),
    (dict(pre_norm=True), "norm_pre|patch_embed"),
])
def test_a_backbone_that_computes_something_else(tmp_path, changes, named):
    _, path = timm_file(tmp_path, **changes)
    refused(path, named, num_heads=4)


def test_overrides_that_do_not_fit(tmp_path):
    export(common.ViT(**SMALL), tmp_path / "e.safetensors")
    for override, match in (
            (dict(num_heads=5), "5 heads"), (dict(num_heads=0), "0 heads"), (dict(img_size=30), "multiple"),
            (dict(img_size=0), "smaller"), (dict(depth=3), "lacks blocks.2"), (dict(embed_dim=32), "shape"),
            (dict(class_token=False), "shape"), (dict(width=3), "width is no argument")):
        refused(tmp_path / "e.safetensors", match, **override)
    assert load_encoder(tmp_path / "e.safetensors", depth=2, drop_path_rate=0.1).blocks[1].drop_path.rate > 0
    torch.save(common.ViT(**{**SMALL, "embed_dim": 56}).state_dict(), tmp_path / "x.pth")
    refused(tmp_path / "x.pth", "num_heads=")


class Harmful:
    def __reduce__(self):
        return os.mkdir, ("harm",)


@pytest.mark.parametrize("content, named", [
    (pathlib.PurePosixPath("a"), "pathlib.PurePosixPath"), (Harmful(), "posix.mkdir|nt.mkdir"),
    (json.JSONDecoder, "json.decoder.JSONDecoder"),
])
def test_other_objects_are_refused_by_name(tmp_path, monkeypatch, content, named):
    monkeypatch.chdir(tmp_path)
    torch.save({"model": common.ViT(**SMALL).state_dict(), "args": content}, tmp_path / "x.pth")
    refused(tmp_path / "x.pth", f"type ({named})")
    (tmp_path / "y.pth").write_bytes(pickle.dumps({"model": {}, "args": content}, protocol=2))
    refused(tmp_path / "y.pth", f"{named}|cannot be read")
    assert not (tmp_path / "harm").exists()


# -- Beyond Masking


BEYOND = torch.load(pathlib.Path(__file__).parent / "golden" / "beyond_masking.pt", weights_only=True)["variants"]
OF_TASK = dict(distorted="distort", blurred="blur", decolorized="decolor")


@pytest.mark.parametrize("name", OF_TASK)
def test_official_beyond_masking_gives_the_authors_tokens(tmp_path, name):
    """No position table, 14 x 14 patches by default, q and v biases alone."""
    torch.save({"model": BEYOND[name]["state_dict"], "epoch": 299}, tmp_path / "checkpoint-299.pth")
    vit = load_encoder(tmp_path / "checkpoint-299.pth", num_heads=4).eval()
    assert vit.img_size == (56, 56) and vit.cls_token is None
    tokens = vit(BEYOND[name]["degraded"])
    torch.testing.assert_close(tokens, BEYOND[name]["outputs"]["encoder_tokens"], atol=2e-5, rtol=0)


def test_the_unused_class_token_of_the_zoomed_in_folder_is_dropped(tmp_path, capsys):
    case = BEYOND["zoomed_in_masked"]
    assert "encoder.cls_token" in case["state_dict"]
    torch.save({"model": case["state_dict"]}, tmp_path / "z.pth")
    vit = load_encoder(tmp_path / "z.pth", num_heads=4)
    assert vit.cls_token is None and vit(torch.randn(1, 3, 56, 56)).shape == (1, 196, 48)
    assert "Beyond Masking names" in capsys.readouterr().out


def test_a_one_channel_encoder_takes_rgb_when_asked(tmp_path):
    case = BEYOND["decolorized"]
    torch.save({"model": case["state_dict"]}, tmp_path / "grey.pth")
    vit = load_encoder(tmp_path / "grey.pth", num_heads=4, in_chans=3).eval()
    tokens = vit(case["degraded"].expand(-1, 3, -1, -1))
    torch.testing.assert_close(tokens, case["outputs"]["encoder_tokens"], atol=2e-5, rtol=0)
    with pytest.raises(ValueError, match="patch_embed.proj.weight"):
        load_encoder(tmp_path / "grey.pth", num_heads=4, in_chans=5)


def test_the_1d_sinusoid_is_recomputed_for_another_size(tmp_path):
    """In the authors' file, which has none, and in ours, which has one; with a class token its row stays zero."""
    torch.save({"model": BEYOND["distorted"]["state_dict"]}, tmp_path / "official.pth")
    vit = load_encoder(tmp_path / "official.pth", num_heads=4, img_size=(28, 40))
    assert vit.grid == (7, 10)
    torch.testing.assert_close(vit.pos_embed.data[0], common.sinusoid_1d(48, 70))
    for class_token in (False, True):
        ours = beyond_masking.BeyondMasking("mask", 28, 4, 32, 1, 2, 16, 1, 2, class_token=class_token)
        common.save_encoder(ours.encoder, tmp_path / "ours.safetensors")
        table = load_encoder(tmp_path / "ours.safetensors", img_size=36).pos_embed.data[0]
        torch.testing.assert_close(table[-81:], common.sinusoid_1d(32, 81))
        assert len(table) == 81 + class_token and (table[:-81] == 0).all()
