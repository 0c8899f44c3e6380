"""eval/encoders.py: every format against an independent forward, what is refused, and the converter."""

import argparse
import json
import os
import runpy
import sys

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from timm.models.vision_transformer import VisionTransformer

import common
from eval import encoders
from eval.encoders import assumed_heads, export, load_encoder
from helpers import ROOT, call, sentence


CAE, BEYOND, MFM = (torch.load(ROOT / f"tests/golden/{name}.pt") for name in ("cae_v2", "beyond_masking", "mfm_mae"))
CAE, BEYOND = CAE["cases"], BEYOND["variants"]
SMALL = dict(img_size=32, patch_size=8, embed_dim=64, depth=2, num_heads=4)
IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
OURS = common.ViT(**SMALL, init_values=0.1).state_dict()
SOURCES = {  # what a file of each format holds
    "timm": OURS, "mae": MFM["mae"]["state_dict"], "mmpretrain": {"state_dict": MFM["mfm"]["state_dict"]},
    "cae_v2": CAE["A_base_like"]["state_dict"], "beyond_masking": BEYOND["zoomed_in_masked"]["state_dict"],
    "run": dict(method="mfm_mae", model={f"encoder.{key}": value for key, value in OURS.items()})}


def randomise(module, seed=0):
    """No tensor stays at a value (0 or 1) that a wrong mapping would not disturb."""
    generator = torch.Generator().manual_seed(seed)
    for tensor in module.state_dict().values():
        tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.2 + 0.1)
    return module.eval()


def saved(path, content):
    torch.save(content, path)
    return path


def timm_file(tmp_path, wrap=dict, **changes):
    """A random timm model and the file that holds it."""
    model = randomise(VisionTransformer(**{**SMALL, "num_classes": 0, **changes}))
    return model, saved(tmp_path / "timm.pth", wrap(model.state_dict()))


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=0)


@pytest.mark.parametrize("config", [dict(SMALL, class_token=False, mlp_ratio=2.0), dict(SMALL, init_values=0.1),
    dict(SMALL, img_size=(16, 64), patch_size=(8, 16), in_chans=5),
    dict(SMALL, embed_dim=56, mlp_ratio=115.5 / 56)])  # 115 / 56 * 56 is 114.99999999999999 in floats
def test_our_encoder_file_gives_the_same_encoder(tmp_path, config):
    vit, before = randomise(common.ViT(**config)), os.umask(0o027)
    export(vit, tmp_path / "encoder.safetensors")
    os.umask(before)
    assert os.name == "nt" or (tmp_path / "encoder.safetensors").stat().st_mode & 0o777 == 0o640
    for path in (tmp_path / "encoder.safetensors", tmp_path, str(tmp_path)):
        before = torch.get_rng_state()
        read = load_encoder(path)
        assert torch.equal(before, torch.get_rng_state())
        assert all(torch.equal(read.state_dict()[key], value) for key, value in vit.state_dict().items())
        assert read.config | dict(mlp_ratio=0) == vit.config | dict(mlp_ratio=0)
    assert all(p.requires_grad == (name != "pos_embed") for name, p in read.named_parameters())


@pytest.mark.parametrize("about", [
    dict(config=dict(num_heads=12)), dict(encoder=dict(num_heads=12), config=dict(model="vit_ti"))])
def test_last_pt_reads_its_own_head_count_and_ignores_the_rest(tmp_path, capsys, about):
    vit = randomise(common.ViT(**{**SMALL, "embed_dim": 192, "num_heads": 12}))
    model = {f"encoder.{key}": value for key, value in vit.state_dict().items()}
    model |= {"norm.weight": torch.zeros(192), "regressor.0.norm.weight": torch.zeros(192)}
    saved(tmp_path / "last.pt", dict(kind="pretraining", model=model, **about))
    assert torch.equal(load_encoder(tmp_path)(IMAGES), vit(IMAGES))
    loaded, *others = capsys.readouterr().out.splitlines()
    assert "all 30 tensors" in loaded and "12 heads," in loaded and "assumed" not in loaded
    assert others == ["new      nothing", "ignored  norm (1), regressor (1)"]


@pytest.mark.parametrize("changes", [
    {}, dict(init_values=0.1), dict(class_token=False, global_pool="avg", fc_norm=False),
    dict(num_classes=10), dict(no_embed_class=True), dict(mlp_ratio=3.0, in_chans=3, depth=1)])
def test_timm_forward(tmp_path, changes):
    model, path = timm_file(tmp_path, **changes)
    vit = load_encoder(path, num_heads=4)
    assert vit.state_dict().keys() == {key for key in model.state_dict() if not key.startswith("head.")}
    close(vit(IMAGES), model.forward_features(IMAGES))


@pytest.mark.parametrize("wrap", [
    lambda state: {"model": state, "args": argparse.Namespace(blr=None), "epoch": 3, "optimizer": {}},
    lambda state: {"state_dict": {f"module.{key}": value for key, value in state.items()}},
    lambda state: {f"_orig_mod.module.{key}": value for key, value in state.items()},
    lambda state: {key.replace("s.0.", "s.0._orig_mod."): value.half() for key, value in state.items()}])
def test_wrappers(tmp_path, wrap):
    model, path = timm_file(tmp_path, wrap)
    vit = load_encoder(path, num_heads=4)
    assert all(value.dtype == torch.float32 for value in vit.state_dict().values())
    for key, value in model.state_dict().items():
        assert torch.allclose(vit.state_dict()[key], value, atol=1e-3)


@pytest.mark.parametrize("case", CAE)
@pytest.mark.parametrize("prefix", ["", "encoder."])
def test_official_cae_v2_and_its_encoder_alone(tmp_path, case, prefix):
    state = {key.removeprefix(prefix): value for key, value in CAE[case]["state_dict"].items()
             if not prefix or key.startswith(prefix)}
    path = saved(tmp_path / "cae.pth", {"model": state})
    close(load_encoder(path, num_heads=4)(CAE[case]["images"]), CAE[case]["transfer"]["encoder_unmasked"])


@pytest.mark.parametrize("name, ignored", [("mae", "decoder_blocks (24)"), ("mfm", "proj_layers (10)")])
def test_mae_and_mmpretrain(tmp_path, capsys, name, ignored):
    """The downstream features of the released code: of the last block, nothing of the fusion."""
    case = MFM[name]
    path = saved(tmp_path / "x.pth", {"state_dict": case["state_dict"], "meta": dict(epoch=3)})
    vit = load_encoder(path, num_heads=4)
    close(vit(case["images"])[:, 0], case["vit_cls_feature"])
    close(vit.layers(case["images"], [-1])[0][:, 1:].mean(dim=1), case["vit_patch_mean"])
    out = capsys.readouterr().out
    assert ignored in out and ("mmpretrain names" in out) == (name == "mfm")


@pytest.mark.parametrize("name", ["distorted", "blurred", "decolorized"])
def test_official_beyond_masking(tmp_path, name):
    """No position table, so 14 x 14 patches; no key bias; in some files an unused class token."""
    case, unused = BEYOND[name], {"encoder.cls_token": torch.ones(1, 1, 48)} if name == "blurred" else {}
    path = saved(tmp_path / "checkpoint-299.pth", {"model": case["state_dict"] | unused, "epoch": 299})
    vit = load_encoder(path, num_heads=4)
    assert vit.img_size == (56, 56) and vit.cls_token is None
    close(vit(case["degraded"]), case["outputs"]["encoder_tokens"])
    if name == "decolorized":  # grey images as RGB
        vit, images = load_encoder(path, num_heads=4, in_chans=3), case["degraded"].expand(-1, 3, -1, -1)
        close(vit(images), case["outputs"]["encoder_tokens"])
        refused(path, "patch_embed.proj.weight", num_heads=4, in_chans=5)


@pytest.mark.parametrize("class_token", [False, True])
def test_the_1d_sinusoid_is_recomputed_for_another_size(tmp_path, class_token):
    """In the authors' file, which has none, and in ours, where the row of a class token stays zero."""
    path = saved(tmp_path / "official.pth", SOURCES["beyond_masking"])
    vit = load_encoder(path, num_heads=4, img_size=(28, 40))
    close(vit.pos_embed.data[0], common.sinusoid_1d(48, 70))
    ours = common.ViT(28, 4, embed_dim=32, depth=1, num_heads=2, class_token=class_token)
    ours.set_positions(common.sinusoid_1d(32, 49))
    export(ours, tmp_path / "ours.safetensors")
    table = load_encoder(tmp_path / "ours.safetensors", img_size=36).pos_embed.data[0]
    close(table[-81:], common.sinusoid_1d(32, 81))
    assert len(table) == 81 + class_token and (table[:-81] == 0).all()


def test_position_resize(tmp_path, capsys):
    vit = randomise(common.ViT(**SMALL))
    export(vit, tmp_path / "e.safetensors")
    for size in (48, (16, 64)):
        capsys.readouterr()
        read = load_encoder(tmp_path / "e.safetensors", img_size=size)
        grid = [side // 8 for side in common.pair(size)]
        picture = vit.pos_embed[0, 1:].T.reshape(1, 64, 4, 4)  # a raster of 4 x 4 pixels with 64 channels
        expected = F.interpolate(picture, size=grid, mode="bicubic", align_corners=False)[0].flatten(1).T
        assert torch.equal(read.pos_embed[0], torch.cat([vit.pos_embed[0, :1], expected]))
        assert f"from 4 x 4 to {grid[0]} x {grid[1]}" in capsys.readouterr().out.splitlines()[1]


@pytest.mark.parametrize("size", [(16, 24), (16, 32)])  # 2 x 4 patches and a class token: 9 rows, not 3 x 3
def test_oblong_table_of_a_foreign_file_needs_the_image_size(tmp_path, size):
    model, path = timm_file(tmp_path, img_size=size)
    read = load_encoder(path, num_heads=4, img_size=size)
    images = IMAGES[:, :, :size[0], :size[1]]
    close(read(images), model.forward_features(images))
    if size == (16, 24):
        refused(path, "img_size=.height, width.", num_heads=4)


def test_heads(tmp_path, capsys):
    state = common.ViT(16, 8, embed_dim=192, depth=1, num_heads=3).state_dict()
    timms = saved(tmp_path / "timm.pth", state)
    state = {f"encoder.{key}": value for key, value in state.items() if "qkv.bias" not in key}
    state |= {f"encoder.blocks.0.attn.{part}_bias": torch.zeros(192) for part in "qv"}
    official = saved(tmp_path / "cae.pth", {"model": state})
    for path, given, heads in ((timms, {}, 3), (official, {}, 12), (official, dict(num_heads=6), 6)):
        assert load_encoder(path, **given).config["num_heads"] == heads
        assert ("heads (assumed)" in capsys.readouterr().out) == (not given)
    assert [assumed_heads("timm", dim) for dim in (192, 384, 768, 1024, 1280)] == [3, 6, 12, 16, 16]
    assert {assumed_heads("timm", dim) for dim in (1152, 1408, 1536, 1664)} == {16}
    for dim in (48, 1792, 2048, 1088):
        with pytest.raises(ValueError, match=f"{dim}: give num_heads="):
            assumed_heads("timm", dim)
    assert [assumed_heads("CAE v2", dim) for dim in (192, 384, 768, 1024)] == [12, 12, 12, 16]


def refused(path, match, error=ValueError, **override):
    with pytest.raises(error, match=match) as caught:
        load_encoder(path, **override)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_other_models(tmp_path):
    refused(tmp_path, "no checkpoint at .*neither encoder.safetensors nor last.pt", FileNotFoundError)
    refused(saved(tmp_path / "bands.pth", common.ViT(**SMALL, in_chans=10).state_dict()), "10 channels.* 3 ",
            in_chans=3)
    for content in (timm.create_model("resnet10t").state_dict(), {}, {"model": {}}, {"model": "x", 3: 4}):
        refused(saved(tmp_path / "x.pth", content), "no vision transformer in a known format")
    path = saved(tmp_path / "x.pth", {"model": at("backbone.") | {"extra_embed": torch.zeros(64)}})
    refused(path, "model.extra_embed is not known .*--key model.backbone")
    assert load_encoder(path, key="model.backbone").config["embed_dim"] == 64


@pytest.mark.parametrize("form, remove, match", [
    ("timm", "norm.weight", "lack norm.weight$"), ("timm", "cls_token", "17 rows"),
    ("timm", "patch_embed.proj.bias", "lack patch_embed.proj.bias$"),
    ("timm", "blocks.1.ls", "lack blocks.1.ls1.gamma, blocks.1.ls2.gamma$"),
    ("timm", "blocks.0", "no blocks.0.mlp.fc1.weight"), ("timm", "pos_embed", "no pos_embed"),
    ("cae_v2", "encoder.blocks.1.attn.v_bias", "lack blocks.1.attn.qkv.bias$"),
    ("beyond_masking", "encoder.blocks.1.attn.q_bias", "lack blocks.1.attn.qkv.bias$")])
def test_a_part_is_missing(tmp_path, form, remove, match):
    rest = {key: value for key, value in SOURCES[form].items() if not key.startswith(remove)}
    refused(saved(tmp_path / "x.pth", rest), match, num_heads=4)


@pytest.mark.parametrize("form, extra, what", [
    ("timm", "reg_token", "register tokens"), ("timm", "register_tokens", "register tokens"),
    ("timm", "dist_token", "distillation token"), ("timm", "norm_pre.bias", "norm before the blocks"),
    ("timm", "blocks.0.attn.q_norm.weight", "norms of queries and keys"),
    ("timm", "blocks.0.attn.k_norm.bias", "norms of queries and keys"), ("timm", "channel_embed", ""),
    ("timm", "storage_tokens", ""), ("timm", "x_tokens", ""), ("mae", "pos_embed_spatial", ""),
    ("mae", "extra.weight", ""), ("mae", "rel_pos_bias.table", ""), ("run", "encoder.rope.freqs", ""),
    ("mmpretrain", "backbone.ln_pre.bias", ""), ("mmpretrain", "backbone.pre_norm.bias", ""),
    ("mmpretrain", "backbone.layers.0.gamma_1", ""), ("cae_v2", "encoder.blocks.0.attn.rel_pos_bias", "")])
def test_a_part_that_vit_lacks(tmp_path, form, extra, what):
    """Also where the table has a row for a second special token: no question about the image's size."""
    state = SOURCES[form]
    state = state.get("model", state.get("state_dict", state)) | {extra: torch.zeros(48)}
    name = extra if form == "timm" else f".*{extra.split('.')[-1]}"
    for rows in (17, 18)[:1 + ("token" in what)]:
        state = state | {"pos_embed": torch.zeros(1, rows, 64)} if form == "timm" else state
        refused(saved(tmp_path / "x.pth", state), f"does not compute, {name}{what and f' .*{what}'}", num_heads=4)


def test_overrides_that_do_not_fit(tmp_path):
    path = tmp_path / "e.safetensors"
    export(common.ViT(**SMALL), path)
    for override, match in (
            (dict(num_heads=5), "5 heads"), (dict(num_heads=-4), "-4 heads"), (dict(img_size=0), "size 0"),
            (dict(img_size=30), "multiple"), (dict(depth=3), "lack blocks"), (dict(embed_dim=8), "shape")):
        refused(path, match, **override)
    assert load_encoder(path, depth=2, drop_path_rate=0.1).config["depth"] == 2
    refused(saved(tmp_path / "x.pth", SOURCES["mae"]), "width of 48: give num_heads=")


def test_a_fine_tuned_file_without_final_norm(tmp_path, capsys):
    """timm's, and mmpretrain's, of which only the blocks can be used: `own_norm` takes it with a new norm."""
    model, path = timm_file(tmp_path, class_token=False, global_pool="avg", fc_norm=True, num_classes=5)
    refused(path, "fine-tuned classifier: its norm .fc_norm. .*eval.segment", num_heads=4)
    capsys.readouterr()
    vit = load_encoder(path, own_norm=True, num_heads=4)
    assert "new      final norm" in capsys.readouterr().out and vit.assumed[-1] == "norm"
    [theirs] = model.forward_intermediates(IMAGES, indices=1, output_fmt="NLC", intermediates_only=True)
    torch.testing.assert_close(vit.layers(IMAGES, [-1])[0], theirs)
    assert torch.equal(vit.norm.weight, torch.ones(64)) and not vit.norm.bias.any()
    state = {key.replace(".ln1.", ".ln2.") if key.startswith("backbone.ln1") else key: value
             for key, value in SOURCES["mmpretrain"]["state_dict"].items()}
    refused(saved(tmp_path / "mm.pth", state), "fine-tuned classifier", num_heads=4)
    assert load_encoder(tmp_path / "mm.pth", own_norm=True, num_heads=4).norm.weight.eq(1).all()


def at(prefix, add=0.0):
    return {f"{prefix}{key}": value + add for key, value in OURS.items()}


@pytest.mark.parametrize("content, key, add", [
    ({"student": at("module.backbone.", 1), "teacher": at("backbone.", 2), "epoch": 1}, "teacher", 2),
    ({"student": at("module.backbone.", 1), "teacher": at("backbone.", 2)}, "student.backbone", 1),
    ({"encoder": at("module.", 1), "target_encoder": at("module.", 2), "opt": {"state": {}}}, "target_encoder", 2),
    ({"teacher": at("backbone.", 3)}, "", 3), ({"model_ema": at("", 3)}, "", 3), (at("net.", 3), "", 3),
    ({"a": {"b": {"state_dict": at("model.backbone.", 3)}}}, "", 3), (at("student.") | at("teacher.", 2), "student", 0),
    ({"state_dict": at("", 1), "state_dict_ema": at("", 2)}, "", 1),
    ({"model": at("", 1), "model_ema": at("", 2)}, "model_ema", 2)])
def test_weights_that_lie_deeper(tmp_path, capsys, content, key, add):
    path = saved(tmp_path / "x.pth", content)
    vit = load_encoder(path, key=key)
    assert all(torch.equal(vit.state_dict()[name], value + add) for name, value in OURS.items())
    averaged = "; --key state_dict_ema takes averaged weights" in capsys.readouterr().out
    assert averaged == ("state_dict_ema" in content)
    if key and "ema" not in key:
        refused(path, f"{key}.*give one of them, as --key NAME")
        refused(path, f"{key}.*not 'other'", key="other")


@pytest.mark.parametrize("name", ["ViTModel", "ViTForImageClassification", "ViTMAEForPreTraining"])
def test_transformers_folders(tmp_path, name):
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTMAEConfig if "MAE" in name else transformers.ViTConfig
    model = getattr(transformers, name)(config(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96, image_size=32, patch_size=8,
        decoder_hidden_size=32, decoder_num_hidden_layers=1, decoder_num_attention_heads=2, mask_ratio=0.0)).eval()
    model.save_pretrained(tmp_path)
    processor = dict(image_mean=[0.1, 0.2, 0.3], image_std=[0.5, 0.5, 0.4])
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor))
    noise = dict(noise=torch.arange(16.0).expand(2, 16)) if "MAE" in name else {}
    for path in (tmp_path, tmp_path / "model.safetensors"):
        vit = load_encoder(path)
        body = getattr(model, "vit", model)
        close(vit(IMAGES), body(IMAGES, **noise).last_hidden_state)
        assert (vit.config["mean"], vit.config["std"]) == tuple(processor.values()) and vit.assumed == []
    export(vit, tmp_path / "hf", "hf")
    again = load_encoder(tmp_path / "hf")
    assert again.config == vit.config and again.assumed == [] and torch.equal(again(IMAGES), vit(IMAGES))
    changed = json.loads((tmp_path / "config.json").read_text()) | dict(hidden_act="gelu_new")
    (tmp_path / "config.json").write_text(json.dumps(changed))
    refused(tmp_path / "model.safetensors", "hidden_act gelu_new")
    (tmp_path / "config.json").write_text("<html>")
    with pytest.raises(ValueError, match="config.json is not JSON"):
        load_encoder(tmp_path)


def test_timms_download_and_our_file_say_mean_and_std(tmp_path, capsys):
    folder, config = tmp_path / "timm", dict(architecture="vit", num_features=64, pretrained_cfg=dict(
        mean=[0.5] * 3, std=[0.25] * 3))
    folder.mkdir()
    save_file(OURS, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    vit = load_encoder(folder, num_heads=4)
    assert (vit.config["mean"], vit.config["std"], vit.assumed) == ([0.5] * 3, [0.25] * 3, [])
    export(vit, tmp_path / "own" / "encoder.safetensors")
    assert load_encoder(tmp_path / "own").config == vit.config
    config["num_features"] = 32  # of another model
    (folder / "config.json").write_text(json.dumps(config))
    capsys.readouterr()
    vit = load_encoder(folder)
    assert vit.config["mean"] == list(common.IMAGENET_MEAN) and vit.assumed == ["num_heads", "mean"]
    assert "1 heads (assumed)" in (out := capsys.readouterr().out) and "0.225] (assumed)" in out
    assert load_encoder(folder, mean=[0.0] * 3, std=[1.0] * 3, num_heads=4).assumed == []


@pytest.mark.parametrize("changes", [
    dict(init_values=0.1), dict(img_size=(16, 64), patch_size=(8, 16)), dict(mlp_ratio=2.0)])
def test_hugging_face(tmp_path, monkeypatch, changes):
    transformers = pytest.importorskip("transformers")
    path, out = tmp_path / "x.safetensors", tmp_path / "hf"
    vit = randomise(common.ViT(**{**SMALL, **changes}))
    export(vit, path)
    monkeypatch.setattr(sys, "argv", ["encoders", "--form=hf", str(path), str(out)])
    runpy.run_module("eval.encoders", run_name="__main__")
    model, info = transformers.ViTModel.from_pretrained(out, add_pooling_layer=False, output_loading_info=True)
    assert not any(info.values())
    images = torch.randn(2, 3, *vit.img_size)
    close(model.eval()(images).last_hidden_state, vit(images))


@pytest.mark.parametrize("form", SOURCES)
def test_conversion(tmp_path, form):
    """The file has ViT's keys alone and all that builds the encoder; converted again, it stays the same."""
    path, out, again = (tmp_path / name for name in ("x.pt", "e.safetensors", "again.safetensors"))
    torch.save(SOURCES[form], path)
    assert call(path, out, "--num_heads=4", "--img-size=48", main=encoders.main) == 0
    with safe_open(out, "pt") as file:
        about = json.loads(file.metadata()["about"])
    vit, read = load_encoder(path, num_heads=4, img_size=48), common.ViT(**about["config"])
    assert about["config"] == vit.config and about["kind"] == "encoder" and "version" in about
    assert about.get("method") == SOURCES[form].get("method")
    read.load_state_dict(load_file(out))
    assert all(torch.equal(tensor, read.state_dict()[name]) for name, tensor in vit.state_dict().items())
    assert call(out, again, main=encoders.main) == 0 and again.read_bytes() == out.read_bytes()


def test_conversion_refuses(tmp_path, capsys):
    path, new = tmp_path / "x.safetensors", tmp_path / "new"
    export(common.ViT(**SMALL, class_token=False), path)
    for argv, match in (((path, path), "exists"), ((path, tmp_path), "exists"), ((path, new), "should end"),
                        ((new, "y.safetensors"), "no check"), ((path, new, "--form=hf"), "class token")):
        assert call(*argv, main=encoders.main) == 1 and match in sentence(capsys.readouterr().err)
    with pytest.raises(ValueError, match="'onnx'"):
        export(common.ViT(**SMALL), new, form="onnx")
    assert list(tmp_path.iterdir()) == [path] and load_encoder(path)
