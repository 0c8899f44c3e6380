"""common.py against timm, numpy, torch's own optimiser and the file formats of other people."""

import argparse
import dataclasses
import json
import math
import os
import pickle
import shutil
import stat
import subprocess
import sys
import typing

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from timm.models.vision_transformer import VisionTransformer
from torch import nn

import cae_v2
import common
from helpers import write_images

ONE = common.Processes(0, 1, torch.device("cpu"))
SMALL = dict(img_size=32, patch_size=8, embed_dim=48, depth=3, num_heads=4)


def randomise(module, seed=0):
    """Random values in every tensor, the position table included: a zero or a one would hide mistakes."""
    generator = torch.Generator().manual_seed(seed)
    for tensor in module.state_dict().values():
        tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.2 + 0.1)
    return module.eval()


def twins(**changes):
    """Our ViT and timm's with the same weights, under the same names."""
    config = {**SMALL, **changes}
    ours = randomise(common.ViT(**config))
    theirs = VisionTransformer(**config, num_classes=0, global_pool="").eval()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    return ours, theirs


def images_for(vit, batch=2):
    return torch.randn(
        batch, vit.config["in_chans"], *vit.img_size, generator=torch.Generator().manual_seed(1)
    )


def close(ours, theirs, atol=2e-5):
    assert ours.shape == theirs.shape
    torch.testing.assert_close(ours, theirs, atol=atol, rtol=1e-5)


# -- 1  ViT

SHAPES = {
    "square": {},
    "wide image": dict(img_size=(16, 40)),
    "wide patch": dict(patch_size=(4, 16)),
    "both": dict(img_size=(24, 32), patch_size=(8, 16)),
    "one channel": dict(in_chans=1),
    "five channels": dict(in_chans=5, patch_size=(8, 4)),
    "no class token": dict(class_token=False),
    "layer scale": dict(init_values=0.1),
    "one head": dict(num_heads=1),
    "MLP ratio": dict(mlp_ratio=2.5),
}


@pytest.mark.parametrize("changes", SHAPES.values(), ids=SHAPES)
@torch.no_grad()
def test_vit_equals_timm(changes):
    ours, theirs = twins(**changes)
    images = images_for(ours)
    close(ours(images), theirs(images))


@torch.no_grad()
def test_the_epsilon_of_every_norm_is_timms():
    """On tokens so small that it outweighs their variance."""
    ours, theirs = twins()
    x = torch.randn(2, 5, 48, generator=torch.Generator().manual_seed(3)) * 1e-3
    close(ours.blocks[0](x), theirs.blocks[0](x))
    close(ours.norm(x), theirs.norm(x))
    block = ours.blocks[0]
    assert {norm.eps for norm in (block.norm1, block.norm2, ours.norm)} == {1e-6}


@torch.no_grad()
def test_layers_equal_timm_block_outputs():
    ours, theirs = twins(depth=4)
    images, indices = images_for(ours), [0, 2, -1]
    for norm in (False, True):
        expected = theirs.forward_intermediates(
            images,
            indices=[0, 2, 3],
            return_prefix_tokens=True,
            norm=norm,
            output_fmt="NLC",
            intermediates_only=True,
        )
        outputs = ours.layers(images, indices, norm=norm)
        assert len(outputs) == 3
        for output, (patches, prefix) in zip(outputs, expected):
            close(output, torch.cat([prefix, patches], dim=1))
    close(ours.layers(images, [3], norm=True)[0], ours(images))


@torch.no_grad()
def test_layers_keep_the_order_that_was_asked_for_and_refuse_others():
    ours, _ = twins()
    images = images_for(ours)
    first, last = ours.layers(images, [0, 2])
    assert all(torch.equal(*both) for both in zip(ours.layers(images, [2, 0]), (last, first)))
    mask = common.random_masks(2, 16, 5)
    assert torch.equal(ours.layers(images, [-1], mask, norm=True)[0], ours(images, mask))
    for wrong in ([3], [-4], [0, 99]):
        with pytest.raises(ValueError, match="outside a depth of 3"):
            ours.layers(images, wrong)


@pytest.mark.parametrize(
    "changes", [{}, dict(class_token=False), dict(img_size=(16, 40), in_chans=1), dict(init_values=0.5)]
)
@torch.no_grad()
def test_masked_forward_equals_timm_modules_on_the_kept_tokens(changes):
    ours, theirs = twins(**changes)
    images = images_for(ours, batch=3)
    prefix, N = int(ours.config["class_token"]), math.prod(ours.grid)
    mask = common.random_masks(3, N, N // 2, torch.Generator().manual_seed(2))
    # Each row by itself, with boolean indexing: no ids, no gather.
    for row in range(3):
        tokens = theirs.patch_embed(images[row : row + 1]) + theirs.pos_embed[:, prefix:]
        tokens = tokens[:, ~mask[row]]
        if prefix:
            tokens = torch.cat([theirs.cls_token + theirs.pos_embed[:, :1], tokens], dim=1)
        for block in theirs.blocks:
            tokens = block(tokens)
        close(ours(images, mask)[row : row + 1], theirs.norm(tokens))


@torch.no_grad()
def test_hidden_pixels_reach_nothing():
    ours, _ = twins()
    images, mask = images_for(ours), common.random_masks(2, 16, 7)
    hidden = mask.view(2, 1, 4, 4).repeat_interleave(8, 2).repeat_interleave(8, 3)
    assert torch.equal(ours(images, mask), ours(torch.where(hidden, torch.nan, images), mask))


def test_vit_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="not a multiple of the patch size"):
        common.ViT(**{**SMALL, "img_size": (32, 30)})
    with pytest.raises(ValueError, match="heads"):
        common.ViT(**{**SMALL, "num_heads": 5})
    vit = common.ViT(**SMALL)
    for shape in ((2, 3, 32, 40), (2, 1, 32, 32), (3, 32, 32)):
        with pytest.raises(ValueError, match="this ViT expects"):
            vit(torch.zeros(shape))


def test_a_new_vit_has_fixed_positions_and_maes_initialisation():
    torch.manual_seed(0)
    vit = common.ViT(img_size=32, patch_size=4, embed_dim=256, depth=1, num_heads=4)
    assert not vit.pos_embed.requires_grad
    assert vit.pos_embed[0, 0].abs().max() == 0
    assert torch.equal(vit.pos_embed[0, 1:], common.sincos_2d(256, (8, 8), "column"))
    for layer in (vit.blocks[0].attn.qkv, vit.blocks[0].mlp.fc1, vit.patch_embed.proj):
        bound = math.sqrt(6 / (layer.weight.flatten(1).shape[0] + layer.weight.flatten(1).shape[1]))
        assert bound * 0.99 < layer.weight.abs().max() <= bound
    for name, parameter in vit.named_parameters():
        if name.endswith("bias") and name != "patch_embed.proj.bias":
            assert parameter.abs().max() == 0, name
    assert vit.cls_token.std().item() == pytest.approx(0.02, rel=0.15)


def test_set_positions_replaces_the_whole_table():
    vit, table = common.ViT(**SMALL), torch.randn(16, 48)
    nn.init.ones_(vit.pos_embed)
    vit.set_positions(table)
    assert torch.equal(vit.pos_embed[0, 1:], table) and vit.pos_embed[0, 0].abs().max() == 0


def test_frozen_key_bias_stays_exactly_zero_while_queries_and_values_learn():
    torch.manual_seed(0)
    vit = common.ViT(**SMALL)
    common.freeze_key_bias(vit)
    optimizer = torch.optim.AdamW(common.parameter_groups(vit, 0.05), lr=1e-2)
    for step in range(5):
        vit(images_for(vit)).pow(3).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    for block in vit.blocks:
        q, k, v = block.attn.qkv.bias.detach().chunk(3)
        assert k.abs().max() == 0
        assert (q != 0).all() and (v != 0).all()


def test_drop_path_drops_whole_samples_at_its_rate_and_keeps_the_mean():
    torch.manual_seed(0)
    drop = common.DropPath(0.3).train()
    x = torch.rand(20_000, 2, 3) + 0.5
    ratio = drop(x) / x
    dropped = ratio[:, 0, 0] == 0
    # A sample is dropped or kept as a whole, and what is kept grows by 1 / 0.7.
    torch.testing.assert_close(ratio, torch.where(dropped, 0, 1 / 0.7)[:, None, None].expand_as(ratio))
    assert dropped.float().mean().item() == pytest.approx(0.3, abs=4 * math.sqrt(0.3 * 0.7 / 20_000))
    assert drop.eval()(x) is x
    assert common.DropPath(0.0).train()(x) is x


def test_drop_path_rates_rise_linearly_and_draws_differ_in_the_two_branches():
    vit = common.ViT(**{**SMALL, "depth": 5}, drop_path_rate=0.2)
    assert [block.drop_path.rate for block in vit.blocks] == pytest.approx([0, 0.05, 0.1, 0.15, 0.2])
    torch.manual_seed(0)
    block = common.Block(8, 2, drop_path=0.5).train()
    x = torch.randn(400, 3, 8)
    with torch.no_grad():
        unchanged = (block(x) == x).flatten(1).all(1).float().mean().item()
    assert unchanged == pytest.approx(0.25, abs=0.09)  # both dropped; one draw for both would give 0.5


def test_compiling_blocks_leaves_the_names_of_the_weights():
    vit = common.ViT(**SMALL)
    names = list(vit.state_dict())
    common.compile_blocks(vit.blocks)
    assert list(vit.state_dict()) == names


# -- 2  patches, masks


@pytest.mark.parametrize("patch", [2, (3, 2), (1, 6)])
def test_patchify_order_by_loops(patch):
    P, Q = common.pair(patch)
    images = np.random.default_rng(0).normal(size=(2, 3, 6, 12)).astype(np.float32)
    tokens = common.patchify(torch.from_numpy(images), patch).numpy()
    h, w = 6 // P, 12 // Q
    assert tokens.shape == (2, h * w, P * Q * 3)
    for row in range(h):
        for column in range(w):
            values = [
                images[1, channel, row * P + p, column * Q + q]
                for p in range(P)
                for q in range(Q)
                for channel in range(3)
            ]
            assert np.array_equal(tokens[1, row * w + column], values)
    assert torch.equal(common.unpatchify(torch.from_numpy(tokens), patch, (h, w)), torch.from_numpy(images))


@pytest.mark.parametrize("grid", [(5, 5), (3, 7), (1, 4)])
@pytest.mark.parametrize("first", ["column", "row"])
def test_sincos_by_an_independent_formula(grid, first):
    dim = 24
    expected = np.zeros((grid[0] * grid[1], dim))
    for row in range(grid[0]):
        for column in range(grid[1]):
            one, two = (column, row) if first == "column" else (row, column)
            for k in range(dim // 4):
                period = 10000 ** (k / (dim / 4))
                expected[row * grid[1] + column, k :: dim // 4] = (
                    math.sin(one / period),
                    math.cos(one / period),
                    math.sin(two / period),
                    math.cos(two / period),
                )
    table = common.sincos_2d(dim, grid, first)
    assert table.dtype == torch.float32
    np.testing.assert_allclose(table.numpy(), expected, atol=1e-6)


def test_the_1d_sinusoid_by_numpy():
    table = common.sinusoid_1d(10, 7).numpy()
    for n in range(7):
        for j in range(10):
            angle = n / 10000 ** (2 * (j // 2) / 10)
            assert table[n, j] == pytest.approx(np.cos(angle) if j % 2 else np.sin(angle), abs=1e-6)


def test_sincos_refuses_odd_widths_and_orders():
    with pytest.raises(ValueError, match="multiple of 4, not 30"):
        common.sincos_2d(30, 4)
    with pytest.raises(ValueError, match="'column' or 'row'"):
        common.sincos_2d(32, 4, "rows")


def test_random_masks_hide_the_same_number_everywhere_alike():
    masks = common.random_masks(20_000, 12, 3, torch.Generator().manual_seed(0))
    assert masks.dtype == torch.bool and masks.shape == (20_000, 12)
    assert (masks.sum(1) == 3).all()
    assert (masks.float().mean(0) - 0.25).abs().max() < 4.5 * math.sqrt(0.25 * 0.75 / 20_000)
    both = (masks.float().T @ masks.float() / 20_000)[~torch.eye(12, dtype=torch.bool)]  # pairs of patches
    assert (both - 3 / 12 * 2 / 11).abs().max() < 5 * math.sqrt(0.045 / 20_000)
    assert torch.equal(masks, common.random_masks(20_000, 12, 3, torch.Generator().manual_seed(0)))
    assert not torch.equal(masks, common.random_masks(20_000, 12, 3, torch.Generator().manual_seed(1)))


def test_random_masks_take_counts_from_none_to_all_but_one():
    for count in (0, 11):
        assert (common.random_masks(3, 12, count).sum(1) == count).all()
    for count in (-1, 12, 13):
        with pytest.raises(ValueError, match="0 to 11"):
            common.random_masks(3, 12, count)


def test_split_ids_ascend_and_refuse_unequal_rows():
    mask = common.random_masks(5, 30, 11)
    visible, masked = common.split_ids(mask)
    for row in range(5):
        assert visible[row].tolist() == [n for n in range(30) if not mask[row, n]]
        assert masked[row].tolist() == [n for n in range(30) if mask[row, n]]
    mask[2, masked[2, 0]] = False
    with pytest.raises(ValueError, match="same number"):
        common.split_ids(mask)


def test_pick_takes_tokens_by_row():
    tokens = torch.randn(2, 5, 3)
    ids = torch.tensor([[4, 0], [1, 1]])
    assert torch.equal(common.pick(tokens, ids), torch.stack([tokens[0, [4, 0]], tokens[1, [1, 1]]]))


# -- 3  randomness


def test_seeds_are_the_same_everywhere_and_tell_keys_apart():
    """The number is written down: another one would break the resumption of every run on disk."""
    assert common.seed_for(0, "sample", 3, 7) == 8602463054367235400
    keys = [
        (seed, kind, epoch, index)
        for seed in range(3)
        for kind in ("sample", "order")
        for epoch in range(5)
        for index in range(50)
    ]
    seeds = {common.seed_for(*key) for key in keys}
    assert len(seeds) == len(keys) and all(0 <= seed < 2**63 for seed in seeds)
    assert common.seed_for(1, 23) != common.seed_for(12, 3)


# -- 4  data


def test_images_hold_file_names_of_any_length_and_script(tmp_path):
    names = ["a.png", "längerer Name.png", "日本.png", "b" * 60 + ".png"]
    for index, name in enumerate(names):
        Image.new("RGB", (4, 3), (index, 0, 0)).save(tmp_path / name)
    images = common.Images([tmp_path / name for name in names], labels=[5, 6, 7, 8])
    assert len(images) == 4
    for index, name in enumerate(names):
        pixels, label = images[index]
        assert images.path(index) == str(tmp_path / name)
        assert (pixels.shape, pixels.dtype, pixels[0, 0, 0].item(), label) == (
            (3, 3, 4),
            torch.uint8,
            index,
            5 + index,
        )
    copy = pickle.loads(pickle.dumps(images))  # as a worker gets it where processes are spawned
    assert copy.path(2) == images.path(2)
    assert common.Images([tmp_path / "a.png"])[0][1] == -1


def test_images_of_a_tensor():
    pixels = torch.randint(256, (5, 3, 4, 4), dtype=torch.uint8)
    images = common.Images(pixels, [0, 1, 0, 1, 1], ("cat", "dog"), "pets")
    assert len(images) == 5 and images.classes == ("cat", "dog") and images.name == "pets"
    assert torch.equal(images[3][0], pixels[3]) and images[3][1] == 1


def colours(path):
    return common.read_image(path).flatten(1).float().mean(1).tolist()


def test_every_kind_of_picture_becomes_rgb(tmp_path):
    red = Image.new("RGB", (8, 6), (200, 40, 30))
    red.convert("P", palette=Image.Palette.ADAPTIVE).save(tmp_path / "palette.png")
    red.convert("CMYK").save(tmp_path / "cmyk.jpg", quality=95)
    red.convert("RGBA").save(tmp_path / "alpha.png")
    red.save(tmp_path / "web.webp", lossless=True)
    Image.new("L", (8, 6), 77).save(tmp_path / "grey.jpg", quality=95)
    Image.new("1", (8, 6), 1).save(tmp_path / "binary.tiff")
    for name in ("palette.png", "cmyk.jpg", "alpha.png", "web.webp"):
        assert common.read_image(tmp_path / name).shape == (3, 6, 8)
        assert colours(tmp_path / name) == pytest.approx([200, 40, 30], abs=6), name
    assert colours(tmp_path / "grey.jpg") == pytest.approx([77] * 3, abs=2)
    assert colours(tmp_path / "binary.tiff") == [255] * 3


@pytest.mark.filterwarnings("ignore")  # Pillow's own remarks on damaged files
@pytest.mark.parametrize("kind", [".png", ".jpg", ".webp", ".tif", ".bmp"])
def test_no_broken_file_escapes_the_sentence(tmp_path, kind):
    """Cut, overwritten, empty, of other content: a picture, or ValueError with the file's name."""
    write_images(tmp_path, 1, kind=kind)
    whole = (tmp_path / f"00{kind}").read_bytes()
    random, refused, path = np.random.default_rng(0), 0, tmp_path / f"broken{kind}"
    damaged = [b"", b"not a picture", whole[:20], whole[: len(whole) // 2]]
    for _ in range(60):
        data = bytearray(whole)
        for place in random.integers(min(len(data), 400), size=4):
            data[place] = random.integers(256)
        damaged.append(bytes(data))
    for data in damaged:
        path.write_bytes(data)
        try:
            assert common.read_image(path).shape[0] == 3
        except ValueError as error:
            refused += 1
            assert str(path) in str(error) and "replace or remove" in str(error)
    assert refused >= 3
    with pytest.raises(ValueError, match="cannot be read"):
        common.read_image(tmp_path / "absent.png")


def test_a_flat_or_nested_folder_is_read_in_one_sorted_order(tmp_path):
    write_images(tmp_path / "b" / "deep", 2, kind=".JPEG")
    write_images(tmp_path / "a", 1)
    write_images(tmp_path, 2, kind=".Jpg")
    for name in ("notes.txt", ".hidden.png", "archive.zip"):
        (tmp_path / name).write_bytes(b"junk")
    images = common.find_data(str(tmp_path), "pretrain")
    found = [os.path.relpath(images.path(index), tmp_path) for index in range(len(images))]
    assert found == [
        "00.Jpg",
        "01.Jpg",
        os.path.join("a", "00.png"),
        os.path.join("b", "deep", "00.JPEG"),
        os.path.join("b", "deep", "01.JPEG"),
    ]
    assert images[0][1] == -1


@pytest.mark.parametrize("test_folder", ["val", "validation", "test"])
def test_imagenets_layout(tmp_path, test_folder):
    for split, count in (("train", 3), (test_folder, 2)):
        write_images(tmp_path / split / "n02", count, kind=".JPEG")
        write_images(tmp_path / split / "n01", 1, kind=".JPEG")
    assert len(common.find_data(str(tmp_path), "pretrain")) == 4  # nothing of the test images
    train, val = (common.find_data(str(tmp_path), split) for split in ("train", "val"))
    assert train.classes == val.classes == ("n01", "n02")
    assert train.labels.tolist() == [0, 1, 1, 1] and val.labels.tolist() == [0, 1, 1]
    assert [train[index][1] for index in range(4)] == [0, 1, 1, 1]
    assert "n01" in train.path(0) and "n02" in train.path(3)
    assert test_folder in val.name


def test_val_wins_over_test(tmp_path):
    for split in ("train", "test", "validation", "val"):
        write_images(tmp_path / split / "a", 1)
    assert common.find_data(str(tmp_path), "val").name.endswith("val")


def test_data_that_is_not_there(tmp_path, monkeypatch):
    monkeypatch.delenv("IMAGENET", raising=False)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"(?s)data.imagenet.*--data.*IMAGENET.*--demo"):
        common.find_data("", "pretrain")
    monkeypatch.setenv("IMAGENET", str(tmp_path / "elsewhere"))
    with pytest.raises(FileNotFoundError, match="elsewhere"):
        common.find_data("", "pretrain")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="holds no image"):
        common.find_data(str(tmp_path / "empty"), "pretrain")
    write_images(tmp_path / "flat", 1)
    for split, missing in (("train", "train"), ("val", "val.*validation.*test")):
        with pytest.raises(FileNotFoundError, match=missing):
            common.find_data(str(tmp_path / "flat"), split)
    (tmp_path / "flat" / "train").mkdir()
    with pytest.raises(FileNotFoundError, match="train holds no image"):
        common.find_data(str(tmp_path / "flat"), "pretrain")


def test_data_by_the_variable_and_the_default(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path / "data" / "imagenet", 2)
    monkeypatch.delenv("IMAGENET", raising=False)
    assert len(common.find_data("", "pretrain")) == 2
    monkeypatch.setenv("IMAGENET", str(write_images(tmp_path / "other", 3)))
    assert len(common.find_data("", "pretrain")) == 3
    assert len(common.find_data("data/imagenet", "pretrain")) == 2  # the flag wins


def test_images_outside_class_folders_are_refused(tmp_path):
    write_images(tmp_path / "train" / "a", 1)
    write_images(tmp_path / "train", 1)
    with pytest.raises(ValueError, match=r"00\.png.*outside the class folders"):
        common.find_data(str(tmp_path), "train")


def flat_val(root, lines, name="LOC_val_solution.csv"):
    """train/ of three classes, and val/ with three images and a list."""
    for label in ("n01", "n02", "n03"):
        write_images(root / "train" / label, 1)
    write_images(root / "val", 3, kind=".JPEG")
    (root / "val" / name).write_text("\n".join(lines) + "\n")
    return str(root)


@pytest.mark.parametrize(
    "name, lines",
    [
        (
            "LOC_val_solution.csv",
            ["ImageId,PredictionString", "01,n03 1 2 3 4 ", "00,n02 5 6 7 8 n02 1 2 3 4", "02,n01 1 2 3 4"],
        ),
        ("val.txt", ["00.JPEG 1", "01.JPEG 2", "02.JPEG 0"]),
        ("labels.txt", ["val/00.JPEG\tn02", "val/01.JPEG\tn03", "", "val/02.JPEG\tn01"]),
    ],
)
def test_a_flat_validation_folder_with_its_list(tmp_path, name, lines):
    root = flat_val(tmp_path, lines, name)
    train, val = (common.find_data(root, split) for split in ("train", "val"))
    assert val.classes == train.classes == ("n01", "n02", "n03")
    assert [val[index][1] for index in range(3)] == [1, 2, 0]
    assert len(common.find_data(root, "pretrain")) == 3


def test_a_list_beside_the_flat_folder(tmp_path):
    root = flat_val(tmp_path, ["00 n01", "01 n02", "02 n03"], "val.txt")
    (tmp_path / "val" / "val.txt").rename(tmp_path / "val.txt")
    (tmp_path / "val" / "readme.txt").write_text("not the list")
    assert common.find_data(root, "val").labels.tolist() == [0, 1, 2]


def test_class_folders_named_by_numbers_are_names(tmp_path):
    for label in ("2", "10"):
        write_images(tmp_path / "train" / label, 1)
    write_images(tmp_path / "val", 2)
    (tmp_path / "val" / "val.txt").write_text("00 2\n01 10\n")
    val = common.find_data(str(tmp_path), "val")
    assert val.classes == ("10", "2") and val.labels.tolist() == [1, 0]


@pytest.mark.parametrize(
    "lines, match",
    [
        (["00 n01", "01 n02"], r"names 2 images and .*val holds 3; 02 is in the folder only"),
        (["00 n01", "01 n02", "02 n03", "03 n01"], r"names 4 images .* 03 is in the list only"),
        (["00 1", "01 2", "02 3"], r"class index 3, and the 3 class folders of .*train are counted from 0"),
    ],
)
def test_a_list_that_does_not_fit_is_refused(tmp_path, lines, match):
    root = flat_val(tmp_path, lines)
    with pytest.raises(ValueError, match=match):
        common.find_data(root, "val")


def test_a_flat_validation_folder_without_a_list(tmp_path):
    root = flat_val(tmp_path, ["00 n01", "01 n02", "02 n03"], "a.txt")
    (tmp_path / "val" / "b.txt").write_text("two lists, neither of a known name")
    with pytest.raises(FileNotFoundError, match=r"without class folders.*LOC_val_solution.csv or val.txt"):
        common.find_data(root, "val")


def test_an_unreadable_first_image_is_named_before_training(tmp_path):
    write_images(tmp_path, 3)
    (tmp_path / "00.png").write_bytes(b"junk")
    with pytest.raises(ValueError, match=r"00\.png cannot be read"):
        common.find_data(str(tmp_path), "pretrain")


def test_built_in_scenes_have_three_different_parts():
    parts = {
        split: common.find_data("scenes", split, num_scenes=50) for split in ("pretrain", "train", "val")
    }
    assert [len(part) for part in parts.values()] == [50, 3000, 1500]
    assert len(parts["train"].classes) == 10 and set(parts["train"].labels.tolist()) == set(range(10))
    assert not any(torch.equal(parts["pretrain"][0][0], parts[split][0][0]) for split in ("train", "val"))


def test_scenes_without_their_folder_say_what_to_copy(monkeypatch):
    monkeypatch.setitem(sys.modules, "demo.scenes", None)
    with pytest.raises(FileNotFoundError, match="demo/"):
        common.find_data("scenes", "pretrain")


def test_cifar10_in_torchvisions_format(tmp_path, monkeypatch):
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    random = np.random.default_rng(0)
    names = [f"data_batch_{number}" for number in range(1, 6)] + ["test_batch"]
    batches = {name: random.integers(256, size=(2, 3072), dtype=np.uint8) for name in names}
    for number, name in enumerate(names):
        (folder / name).write_bytes(pickle.dumps({"data": batches[name], "labels": [number, 9]}))
    classes = [f"class {number}" for number in range(10)]
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": classes}))
    monkeypatch.setenv("CIFAR10", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="CIFAR10"):  # torchvision checks the files' sums
        common.find_data("cifar10", "train")
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
    train, val = common.find_data("cifar10", "pretrain"), common.find_data("cifar10", "val")
    assert (len(train), len(val), train.classes) == (10, 2, tuple(classes))
    assert train.labels.tolist() == [0, 9, 1, 9, 2, 9, 3, 9, 4, 9] and val.labels.tolist() == [5, 9]
    # A row of the file: 1024 red, 1024 green, 1024 blue values, each 32 x 32 in raster order.
    expected = batches["data_batch_2"][1].reshape(3, 32, 32)
    assert np.array_equal(train[3][0].numpy(), expected)


def test_cifar10_that_is_not_there(tmp_path, monkeypatch):
    monkeypatch.setenv("CIFAR10", str(tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError, match=r"nowhere.*CIFAR10.*download=True"):
        common.find_data("cifar10", "train")


class Draws:
    """A transform that gives away the picture and the generator it was handed."""

    def __call__(self, image, label):
        return image.float().mean(), torch.rand(3)


def test_a_sample_depends_on_seed_epoch_and_index_alone():
    images = common.Images(torch.randint(256, (6, 3, 4, 4), dtype=torch.uint8))
    samples = common.Samples(images, Draws(), seed=0)
    keys = [(epoch, index) for epoch in range(2) for index in range(6)]
    forwards = {key: samples[key] for key in keys}
    torch.rand(7)
    backwards = {key: samples[key] for key in reversed(keys)}
    assert all(torch.equal(a, b) for key in keys for a, b in zip(forwards[key], backwards[key]))
    assert len({tuple(draws.tolist()) for _, draws in forwards.values()}) == 12
    assert not torch.equal(samples[0, 0][1], common.Samples(images, Draws(), seed=1)[0, 0][1])


def test_a_file_that_breaks_during_training_is_replaced_with_a_warning(tmp_path, capsys):
    write_images(tmp_path, 12)
    images = common.find_data(str(tmp_path), "pretrain")
    samples = common.Samples(images, Draws(), seed=0)
    good, last = samples[0, 3], samples[0, 0]
    (tmp_path / "02.png").write_bytes(b"")
    assert torch.equal(samples[0, 2][0], good[0])
    warning = capsys.readouterr().err
    assert warning.count("\n") == 1 and "warning" in warning and "02.png" in warning
    (tmp_path / "11.png").unlink()
    assert torch.equal(samples[0, 11][0], last[0])  # the file after the last one is the first
    for index in range(12):
        (tmp_path / f"{index:02}.png").write_bytes(b"")
    with pytest.raises(ValueError, match="cannot be read"):
        samples[0, 0]


def keys_of(num_images, batch_size, micro_batch, world, start, stop, seed=0):
    """Per rank, the micro batches of the steps: {rank: [keys, keys, ...]}, and the plan."""
    plan = common.make_plan(num_images, batch_size, micro_batch, 100, world)
    ranks = [common.Processes(rank, world, torch.device("cpu")) for rank in range(world)]
    return [list(common.MicroBatches(num_images, plan, rank, seed, start, stop)) for rank in ranks], plan


def steps_of(*arguments, **more):
    """Per step, the keys of the global batch in their order: micro batch by micro batch, rank by rank."""
    ranks, plan = keys_of(*arguments, **more)
    dealt = [key for turn in zip(*ranks) for keys in turn for key in keys]
    return [dealt[place : place + plan.batch_size] for place in range(0, len(dealt), plan.batch_size)]


@pytest.mark.parametrize("micro, world", [(8, 1), (1, 1), (4, 2), (2, 2), (1, 4), (1, 8)])
def test_any_split_of_a_batch_over_ranks_and_micro_batches_sees_the_same_rows(micro, world):
    expected = steps_of(50, 8, 8, 1, 0, 13)
    assert len(expected) == 13
    assert steps_of(50, 8, micro, world, 0, 13) == expected
    ranks, plan = keys_of(50, 8, micro, world, 0, 13)
    assert all(len(keys) == micro for rank in ranks for keys in rank)
    assert all(len(rank) == 13 * plan.accumulation for rank in ranks)


def test_the_order_is_a_pure_function_of_the_step():
    whole = steps_of(50, 8, 2, 2, 0, 20)
    for begin in (1, 5, 6, 7, 19):
        assert steps_of(50, 8, 2, 2, begin, 20) == whole[begin:]
    assert steps_of(50, 8, 2, 2, 20, 20) == []
    assert steps_of(50, 8, 2, 2, 0, 20, seed=1) != whole


def test_an_epoch_has_no_image_twice_and_drops_the_incomplete_batch():
    steps = steps_of(50, 8, 8, 1, 0, 12)  # two epochs of six steps
    for epoch in (0, 1):
        keys = [key for step in steps[6 * epoch : 6 * epoch + 6] for key in step]
        assert {key[0] for key in keys} == {epoch}
        assert len(set(keys)) == 48 and {key[1] for key in keys} <= set(range(50))
    assert [key[1] for key in steps[0]] != [key[1] for key in steps[6]]
    seen = {key[1] for step in steps_of(50, 8, 8, 1, 0, 60) for key in step}
    assert seen == set(range(50))  # the dropped images are others in each epoch


@pytest.mark.parametrize("workers", [1, 2])
def test_the_loader_gives_the_same_batches_with_any_number_of_workers(tmp_path, workers):
    images = common.find_data(str(write_images(tmp_path, 10)), "pretrain")
    plan = common.make_plan(10, 4, 2, 5, 1)

    def batches(workers):
        config = common.RunConfig(workers=workers)
        loader = common.training_loader(common.Samples(images, Draws(), 0), plan, ONE, config, 1, 8)
        return [tensor for batch in loader for tensor in batch]

    alone, together = batches(0), batches(workers)
    assert len(alone) == 7 * 2 * 2 and all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


def test_normalise_by_numpy():
    images = torch.randint(256, (2, 3, 4, 5), dtype=torch.uint8)
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    expected = (images.numpy().transpose(0, 2, 3, 1) / 255 - mean) / std
    np.testing.assert_allclose(common.normalise(images).numpy(), expected.transpose(0, 3, 1, 2), atol=1e-6)
    np.testing.assert_allclose(
        common.normalise(images, (0, 0, 0), (1, 1, 1)).numpy(), images.numpy() / 255, atol=1e-6
    )


# -- 6  optimisation


@pytest.mark.parametrize(
    "arguments, expected",
    [
        ((1_281_167, 2048, 0, 300, 8), (2048, 256, 1, 625, 187_500)),  # the paper's run
        ((1_281_167, 2048, 0, 300, 1), (2048, 256, 8, 625, 187_500)),
        ((1_281_167, 2048, 64, 300, 4), (2048, 64, 8, 625, 187_500)),
        ((1000, 1000, 0, 2, 1), (1000, 250, 4, 1, 2)),  # the largest divisor up to 256
        ((100, 6, 0, 1, 3), (6, 2, 1, 16, 16)),
    ],
)
def test_plans(arguments, expected):
    assert dataclasses.astuple(common.make_plan(*arguments)) == expected


@pytest.mark.parametrize(
    "arguments, words",
    [
        ((63, 64, 0, 1, 1), "63 images.*--batch_size 63"),
        ((100, 64, 0, 1, 3), "--batch_size 64.*3 processes"),
        ((100, 64, 5, 1, 1), "--micro_batch 5 does not divide.*nearest.*4"),
        ((100, 64, 128, 1, 2), "--micro_batch 128.*32"),
    ],
)
def test_plans_that_cannot_be(arguments, words):
    with pytest.raises(ValueError, match=words):
        common.make_plan(*arguments)


def test_learning_rate_by_numpy():
    """The authors' schedule: linspace from 0 to the peak, then half a cosine over the rest."""
    peak, floor, warmup, total = 1.5e-3, 1e-5, 7, 40
    rest = np.arange(total - warmup)
    cosine = floor + 0.5 * (peak - floor) * (1 + np.cos(np.pi * rest / len(rest)))
    expected = np.concatenate([np.linspace(0, peak, warmup), cosine])
    rates = [common.learning_rate(step, peak, warmup, total, floor) for step in range(total)]
    np.testing.assert_allclose(rates, expected, rtol=1e-12, atol=1e-18)


@pytest.mark.parametrize("warmup", [0, 1])
def test_learning_rate_without_and_with_one_step_of_warm_up(warmup):
    rates = [common.learning_rate(step, 1.0, warmup, 10) for step in range(10)]
    assert (
        rates[0] == (0.0 if warmup else 1.0) and max(rates) == 1.0 and all(0 <= rate <= 1 for rate in rates)
    )


def test_parameter_groups_spare_biases_norms_and_gains():
    vit = common.ViT(**SMALL, init_values=0.1)
    decay, rest = common.parameter_groups(vit, 0.3)
    names = {id(parameter): name for name, parameter in vit.named_parameters()}
    decayed, spared = ({names[id(parameter)] for parameter in group["params"]} for group in (decay, rest))
    assert (decay["weight_decay"], rest["weight_decay"]) == (0.3, 0.0)
    assert decayed | spared == set(names.values()) - {"pos_embed"} and not decayed & spared
    matrices = (
        "qkv.weight",
        "attn.proj.weight",
        "fc1.weight",
        "fc2.weight",
        "patch_embed.proj.weight",
        "cls_token",
    )
    assert decayed == {name for name in names.values() if name.endswith(matrices)}


def test_blocks_of_every_drop_path_rate_are_compiled(monkeypatch):
    """torch gives up after 8 programs by default, and 12 rates in training and in tests are more."""
    from torch._dynamo.testing import CompileCounter
    counter, compile_module = CompileCounter(), nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda self: compile_module(self, backend=counter))
    vit = common.ViT(**{**SMALL, "embed_dim": 16, "num_heads": 1, "depth": 12}, drop_path_rate=0.2)
    common.compile_blocks(vit.blocks)
    images = torch.randn(2, 3, 32, 32)
    vit(images).sum().backward()
    assert counter.frame_count == 12
    with torch.no_grad():
        vit.eval()(images)
    assert counter.frame_count > 12


def test_flops_of_a_matrix_product():
    layer = nn.Linear(10, 20)
    assert common.count_flops(lambda: layer(torch.zeros(3, 10))) == 2 * 3 * 10 * 20
    with torch.device("meta"):
        layer = nn.Linear(10, 20)
    assert common.count_flops(lambda: layer(torch.zeros(3, 10, device="meta"))) == 2 * 3 * 10 * 20


# -- 5  processes


def test_one_process_needs_no_group(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    with common.processes("cpu") as processes:
        assert (processes.rank, processes.world, processes.device.type, processes.main) == (0, 1, "cpu", True)
        assert processes.sum(torch.tensor(3.0)) == 3
        processes.wait()
    assert not torch.distributed.is_initialized()


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_gpu_that_is_not_there_is_a_sentence():
    with pytest.raises(ValueError, match="--device cpu"):
        with common.processes("cuda"):
            pass


# -- 7  run folder


def test_a_writer_that_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "new folder" / "file.txt"
    common.write_atomically(path, lambda temporary: temporary.write_text("old"))

    def half(temporary):
        temporary.write_text("ne")
        raise RuntimeError("the disk is full")

    with pytest.raises(RuntimeError):
        common.write_atomically(path, half)
    assert path.read_text() == "old" and os.listdir(path.parent) == ["file.txt"]
    with open(path) as reader:  # whoever has the old file open goes on reading the old one
        common.write_atomically(path, lambda temporary: temporary.write_text("new"))
        assert os.name == "nt" or reader.read() == "old"
    assert path.read_text() == "new" and os.listdir(path.parent) == ["file.txt"]


def test_a_writer_killed_half_way_is_overwritten_by_the_next(tmp_path):
    path = tmp_path / "last.pt"
    common.write_atomically(
        path, lambda temporary: temporary.write_text("old") and (tmp_path / "name").write_text(temporary.name)
    )
    (tmp_path / (tmp_path / "name").read_text()).write_text("half of a fi")
    assert path.read_text() == "old"
    common.write_atomically(path, lambda temporary: temporary.write_text("new"))
    assert path.read_text() == "new" and sorted(os.listdir(tmp_path)) == ["last.pt", "name"]


@pytest.mark.skipif(os.name == "nt", reason="POSIX modes")
@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_files_get_the_mode_that_umask_asks_for(tmp_path, umask):
    before = os.umask(umask)
    try:
        common.save_encoder(common.ViT(**SMALL), tmp_path / "encoder.safetensors")
        common.write_atomically(tmp_path / "last.pt", lambda path: torch.save({}, path))
        common.save_panels(tmp_path / "preview.png", [[torch.zeros(3, 4, 4)]], ["one"])
    finally:
        os.umask(before)
    for name in ("encoder.safetensors", "last.pt", "preview.png"):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o666 & ~umask, name


def test_an_encoder_file_carries_weights_and_what_builds_them(tmp_path):
    vit = randomise(common.ViT(**{**SMALL, "img_size": (16, 32)}, init_values=0.1))
    common.save_encoder(vit, tmp_path / "encoder.safetensors", method="test", step=7)
    with safe_open(tmp_path / "encoder.safetensors", "pt") as file:
        assert set(file.keys()) == set(vit.state_dict())
        assert all(torch.equal(file.get_tensor(name), tensor) for name, tensor in vit.state_dict().items())
        metadata = json.loads(file.metadata()["about"])
    assert (metadata["method"], metadata["step"], metadata["kind"]) == ("test", 7, "encoder")
    again = common.ViT(**metadata["config"])
    assert again.config == vit.config


class Foreign:
    pass


def test_checkpoints_that_are_none(tmp_path):
    path = tmp_path / "file.pt"
    with pytest.raises(FileNotFoundError, match="file.pt"):
        common.read_checkpoint(path)
    with pytest.raises(FileNotFoundError, match="no checkpoint file"):
        common.read_checkpoint(tmp_path)  # a folder
    torch.save({"weights": torch.zeros(1000)}, path)
    whole = path.read_bytes()
    for name, content in {
        "empty": b"",
        "junk": b"\x80\x02junk" * 50,
        "text": b"hello",
        "cut": whole[: len(whole) // 2],
    }.items():
        path.write_bytes(content)
        with pytest.raises(ValueError, match="file.pt cannot be read") as caught:
            common.read_checkpoint(path)
        assert "\n" not in str(caught.value), name
    torch.save([1, 2], path)
    with pytest.raises(ValueError, match="holds a list"):
        common.read_checkpoint(path)


def test_a_checkpoint_with_a_foreign_class_is_refused_by_its_name(tmp_path):
    torch.save({"model": {}, "extra": Foreign()}, tmp_path / "file.pt")
    with pytest.raises(ValueError, match="Foreign") as caught:
        common.read_checkpoint(tmp_path / "file.pt")
    assert "\n" not in str(caught.value)


def test_a_pickle_that_runs_code_is_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "owned"),)

    (tmp_path / "file.pt").write_bytes(pickle.dumps({"model": Evil()}, protocol=2))
    torch.save({"model": Evil()}, tmp_path / "zip.pt")
    for name in ("file.pt", "zip.pt"):
        with pytest.raises(ValueError, match="cannot be read"):
            common.read_checkpoint(tmp_path / name)
    assert not (tmp_path / "owned").exists()


def test_the_namespace_in_published_checkpoints_is_allowed(tmp_path):
    torch.save({"model": {"a": torch.ones(2)}, "args": argparse.Namespace(lr=0.1)}, tmp_path / "file.pt")
    state = common.read_checkpoint(tmp_path / "file.pt")
    assert state["args"].lr == 0.1 and torch.equal(state["model"]["a"], torch.ones(2))


# -- 8  pictures


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_the_commit_is_that_of_the_code(tmp_path, monkeypatch):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.setattr(common, "__file__", str(tmp_path / "common.py"))
    assert common.commit() is None

    def git(*words):
        identity = ("-c", "user.name=x", "-c", "user.email=x")
        done = subprocess.run(["git", "-C", tmp_path, *identity, *words], check=True, capture_output=True, text=True)
        return done.stdout.strip()

    git("init", "-q")
    (tmp_path / "common.py").write_text("1")
    git("add", ".")
    git("commit", "-q", "-m", "x")
    assert common.commit() == git("rev-parse", "--short", "HEAD")
    (tmp_path / "common.py").write_text("2")
    assert common.commit().endswith("-dirty")
    monkeypatch.setenv("PATH", "")
    assert common.commit() is None


def test_colour_map_goes_from_dark_to_light(tmp_path):
    values = torch.linspace(0, 1, 101)[None].repeat(2, 1)
    colours = common.colour_map(values)
    assert colours.shape == (3, 2, 101) and 0 <= colours.min() and colours.max() <= 1
    lightness = (torch.tensor([0.2126, 0.7152, 0.0722])[:, None] * colours[:, 0]).sum(0)
    assert (lightness.diff() > 0).all() and lightness[0] < 0.15 and lightness[-1] > 0.8
    assert (colours[:, 0].diff(dim=1).abs() < 0.05).all()  # no jump
    outside = common.colour_map(torch.tensor([[-3.0, 5.0]]))
    torch.testing.assert_close(outside[:, 0], colours[:, 0, [0, -1]])


def test_panels_stand_in_their_places_with_captions(tmp_path):
    red, green, blue = (torch.eye(3)[channel][:, None, None].expand(3, 8, 8) for channel in range(3))
    rows = [[red, green, blue], [blue, 2 * red, green - 1]]  # 2 and -1 are cut off at 0 and 1
    common.save_panels(tmp_path / "panels.png", rows, ["one", "two", "three"], note="what this is")
    with Image.open(tmp_path / "panels.png") as image:
        assert image.format == "PNG" and image.mode == "RGB"
        pixels = np.asarray(image)
    panels = {
        name: (pixels == colour).all(-1)
        for name, colour in dict(
            red=(255, 0, 0), green=(0, 255, 0), blue=(0, 0, 255), black=(0, 0, 0)
        ).items()
    }
    area = panels["green"].sum()
    assert panels["red"].sum() == panels["blue"].sum() == 2 * area

    def centres(name):
        rows, columns = np.nonzero(panels[name])
        return rows, columns

    rows, columns = centres("red")
    green_rows, green_columns = centres("green")
    middle = pixels.shape[0] / 2
    first, second = columns[rows < middle], columns[rows >= middle]
    assert first.max() < green_columns.min() < green_columns.max()  # red stands left of green above,
    assert (second.min(), second.max()) == (green_columns.min(), green_columns.max())  # and below it,
    assert len(first) == len(second) == area
    assert (pixels[: rows.min()] < 128).any() and (
        pixels[pixels.shape[0] - 20 :] < 128
    ).any()  # caption and note


# -- 9  command line


@dataclasses.dataclass(frozen=True)
class Options:
    model: str = common.flag("small", "size")
    width: int = common.flag(1, "width, 50 % more")
    base_lr: float = common.flag(0.1, "rate")
    kind: typing.Literal["a", "b"] = common.flag("a", "kind")
    demo: bool = common.flag(False, "a small run")
    dry_run: bool = common.flag(False, "nothing")


PRESETS = {"small": {"width": 2}, "large": {"width": 3, "base_lr": 0.3}, "tiny": {"width": 4}}
DEMO = {"model": "tiny", "base_lr": 0.5}


def parse(*argv):
    return common.parse_config(Options, "title", PRESETS, DEMO, argv)


def test_defaults_then_size_then_demo_then_what_was_typed():
    assert (parse().width, parse().base_lr) == (2, 0.1)
    assert (parse("--model", "large").width, parse("--model", "large").base_lr) == (3, 0.3)
    assert parse("--demo") == Options("tiny", 4, 0.5, "a", True, False)
    assert parse("--demo", "--model=large") == Options("large", 3, 0.5, "a", True, False)
    assert parse("--demo", "--model=large", "--width=7", "--base_lr=0.1").width == 7
    assert parse("--demo", "--base_lr=0.1").base_lr == 0.1  # typed, although it is the default
    assert common.parse_config(Options, "title", argv=["--width", "5"]).width == 5  # without presets


def test_dash_and_underscore_are_one_flag():
    assert parse("--base-lr=0.7", "--dry-run") == parse("--base_lr", "0.7", "--dry_run")
    with pytest.raises(dataclasses.FrozenInstanceError):
        parse().width = 3


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--with", "3"], r"--with\b.*did you mean --width"),
        (["--base_l=3"], "--base_l.*did you mean --base_lr"),
        (["--base-lrr", "1"], "did you mean --base_lr"),
        (["--zzzz"], "unknown argument --zzzz"),
        (["stray"], "stray"),
        (["--wid", "3"], "--wid"),
        (["--dry"], "--dry"),
        (["--width", "x"], "--width.*'x'"),
        (["--width", "1.5"], "--width.*1.5"),
        (["--base_lr", "fast"], "--base.lr.*fast"),
        (["--kind", "c"], "--kind.*'c'.*a.*b"),
        (["--model", "huge"], "--model.*huge.*small"),
        (["--width"], "--width.*expected one argument"),
        (["--demo=yes"], "--demo"),
        (["-w", "3"], "-w"),
    ],
)
def test_flags_that_are_none(argv, words):
    with pytest.raises(ValueError, match=words) as caught:
        parse(*argv)
    assert "\n" not in str(caught.value)


def test_help_survives_a_percent_sign(capsys):
    with pytest.raises(SystemExit) as stop:
        parse("--help")
    assert stop.value.code == 0 and "50 % more" in capsys.readouterr().out


@pytest.mark.parametrize(
    "changes",
    [dict(micro_batch=-1), dict(save_every=-1), dict(max_steps=-5), dict(log_every=0), dict(seed=-1)],
)
def test_shared_flags_out_of_range(changes):
    with pytest.raises(ValueError, match=f"--{list(changes)[0]}"):
        common.RunConfig(**changes)


def test_workers_share_the_cores_of_the_machine(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 32)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert common.RunConfig().workers == 4 and common.RunConfig(workers=0).workers == 0
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    assert common.RunConfig().workers == 16


def outcome(capsys, error, monkeypatch, rank=0):
    """(exit code, stderr) of a script that raises `error`."""
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setattr(common.time, "sleep", lambda seconds: None)

    def main():
        raise error

    with pytest.raises(SystemExit) as stop:
        common.run_main(main)
    return stop.value.code, capsys.readouterr().err


@pytest.mark.parametrize(
    "error, words",
    [
        (ValueError("the flag is wrong"), "error: the flag is wrong\n"),
        (FileNotFoundError("nothing at x"), "error: nothing at x\n"),
        (OSError(28, "No space left on device", "runs/last.pt"), "No space left on device"),
        (PermissionError(13, "Permission denied", "runs/last.pt"), "runs/last.pt"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"), "--micro_batch"),
        (MemoryError(), "--micro_batch"),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
            "--micro_batch",
        ),
    ],
)
def test_what_a_user_can_mend_is_one_sentence(capsys, monkeypatch, error, words):
    code, text = outcome(capsys, error, monkeypatch)
    assert code == 1 and text.startswith("error: ") and text.count("\n") == 1 and words in text


def test_another_process_names_itself(capsys, monkeypatch):
    code, text = outcome(capsys, ValueError("wrong"), monkeypatch, rank=3)
    assert code == 1 and "wrong" in text and "process 3" in text


def test_a_mistake_of_ours_keeps_its_traceback():
    for error in (RuntimeError("shape mismatch"), KeyError("x"), TypeError("x")):
        with pytest.raises(type(error)):
            common.run_main(lambda: (_ for _ in ()).throw(error))


def test_the_real_configuration_follows_the_same_rules():
    config = common.parse_config(
        cae_v2.Config, "", cae_v2.SIZES, cae_v2.DEMO, ["--demo", "--mask-ratio", "0.25"]
    )
    assert (config.model, config.embed_dim, config.img_size, config.mask_ratio) == ("vit_demo", 128, 32, 0.25)


def test_a_folder_that_may_not_be_read_is_named(tmp_path, monkeypatch):
    """Skipped without a word, it would make the data smaller than the user thinks."""
    (tmp_path / "closed").mkdir()
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(PermissionError, match="closed"):
        common.list_images(tmp_path)
