"""common.py against timm, numpy, torch's own optimiser and the file formats of other people."""

import argparse
import contextlib
import dataclasses
import itertools
import math
import os
import pickle
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from timm.models.vision_transformer import VisionTransformer
from torch import nn

import common
from helpers import ROOT, refused, write_images

CPU = torch.device("cpu")
SMALL = dict(img_size=32, patch_size=8, embed_dim=48, depth=3, num_heads=4)


def twins(**changes):
    """Our ViT and timm's with the same random weights, position table included, and images for them."""
    ours, generator = common.ViT(**{**SMALL, **changes}).eval(), torch.Generator().manual_seed(0)
    for tensor in ours.state_dict().values():
        tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.2 + 0.1)
    theirs = VisionTransformer(**{**SMALL, **changes}, num_classes=0, global_pool="").eval()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    return ours, theirs, torch.randn(3, ours.config["in_chans"], *ours.img_size, generator=generator)


def close(ours, theirs, atol=2e-5):
    assert ours.shape == theirs.shape
    torch.testing.assert_close(ours, theirs, atol=atol, rtol=1e-5)


@pytest.mark.parametrize("changes", [
    {}, dict(img_size=(16, 40)), dict(patch_size=(4, 16)), dict(img_size=(24, 32), patch_size=(8, 16)),
    dict(in_chans=1), dict(in_chans=5, patch_size=(8, 4)), dict(class_token=False), dict(init_values=0.1),
    dict(num_heads=1), dict(mlp_ratio=2.5)], ids=str)
@torch.no_grad()
def test_vit_equals_timm_whole_and_masked(changes):
    ours, theirs, images = twins(**changes)
    close(ours(images), theirs(images))
    prefix, N = int(ours.config["class_token"]), math.prod(ours.grid)
    mask = common.random_masks(3, N, N // 2)
    for row in range(3):  # each by itself, with boolean indexing: no ids, no gather
        tokens = (theirs.patch_embed(images[row:row + 1]) + theirs.pos_embed[:, prefix:])[:, ~mask[row]]
        if prefix:
            tokens = torch.cat([theirs.cls_token + theirs.pos_embed[:, :1], tokens], dim=1)
        for block in theirs.blocks:
            tokens = block(tokens)
        close(ours(images, mask)[row:row + 1], theirs.norm(tokens))
    x = torch.randn(2, 5, 48) * 1e-3  # so small that epsilon outweighs the variance
    close(ours.blocks[0](x), theirs.blocks[0](x))
    close(ours.norm(x), theirs.norm(x))


@torch.no_grad()
def test_layers_equal_timm_block_outputs_in_the_order_asked_for():
    ours, theirs, images = twins(depth=4)
    for norm in (False, True):
        expected = theirs.forward_intermediates(images, indices=[0, 2, 3], return_prefix_tokens=True, norm=norm,
                                                output_fmt="NLC", intermediates_only=True)
        outputs = ours.layers(images, [0, 2, -1], norm=norm)
        for output, (patches, prefix) in zip(outputs, expected, strict=True):
            close(output, torch.cat([prefix, patches], dim=1))
    assert torch.equal(ours.layers(images, [2, 0], norm=True)[0], outputs[1])
    mask = common.random_masks(3, 16, 5)
    assert torch.equal(ours.layers(images, [-1], mask, norm=True)[0], ours(images, mask))
    refused("outside a depth of 4", ours.layers, images, [0, 4])
    block, x, ids = common.Block(8, 2), torch.randn(2, 5, 8), torch.tensor([[4, 1], [0, 3]])  # some tokens alone
    close(block(x, ids), common.gather(block(x), ids), atol=1e-6)


@torch.no_grad()
def test_hidden_pixels_reach_nothing_and_what_does_not_fit_is_refused():
    vit, _, images = twins()
    mask = common.random_masks(3, 16, 7)
    hidden = mask.view(3, 1, 4, 4).repeat_interleave(8, 2).repeat_interleave(8, 3)
    assert torch.equal(vit(images, mask), vit(torch.where(hidden, torch.nan, images), mask))
    assert torch.equal(vit(images, mask), vit(images, ids_keep=common.mask_to_ids(mask, CPU)[0]))
    refused("this ViT expects", vit, torch.zeros(2, 3, 32, 40))
    for changes in (dict(img_size=(32, 30)), dict(num_heads=5)):
        refused("not a multiple", common.ViT, **{**SMALL, **changes})


def test_a_new_vit_has_fixed_positions_and_maes_initialisation():
    torch.manual_seed(0)
    vit = common.ViT(img_size=32, patch_size=4, embed_dim=256, depth=1, num_heads=4)
    assert torch.equal(vit.pos_embed[0, 1:], common.sincos_2d(256, (8, 8), "column"))
    assert not vit.pos_embed.requires_grad and vit.pos_embed[0, 0].abs().max() == 0
    for layer in (vit.blocks[0].attn.qkv, vit.blocks[0].mlp.fc1, vit.patch_embed.proj):
        bound = math.sqrt(6 / sum(layer.weight.flatten(1).shape))
        assert bound * 0.99 < layer.weight.abs().max() <= bound
        assert layer.bias.abs().max() == 0 or layer is vit.patch_embed.proj
    assert vit.cls_token.std().item() == pytest.approx(0.02, rel=0.15)
    decay, rest = common.parameter_groups(vit, 0.3)  # timm's rule
    assert (decay["weight_decay"], rest["weight_decay"], len(decay["params"])) == (0.3, 0.0, 6)
    assert {*rest["params"]} == {p for p in vit.parameters() if p.ndim == 1}
    vit.set_positions(table := torch.randn(64, 256))
    assert torch.equal(vit.pos_embed[0], torch.cat([torch.zeros(1, 256), table]))


def test_attention_is_torchs_and_on_a_cpu_in_bf16_written_out(monkeypatch):
    q, k, v = torch.randn(3, 2, 4, 5, 8).bfloat16()
    exact = F.scaled_dot_product_attention(q.float(), k.float(), v.float())
    close(common.attention(q.float(), k.float(), v.float()), exact)
    monkeypatch.setattr(F, "scaled_dot_product_attention", None)
    assert (common.attention(q, k, v).float() - exact).abs().max() < 0.03
    vit, images = common.ViT(**SMALL), torch.randn(2, 3, 32, 32)
    with torch.autocast("cpu", torch.bfloat16):
        vit(images).sum().backward()
    with pytest.raises(TypeError):
        vit(images)


def test_drop_path_rises_linearly_and_drops_whole_samples_in_two_draws():
    vit = common.ViT(**{**SMALL, "depth": 5}, drop_path_rate=0.2)
    assert [block.drop_path.rate for block in vit.blocks] == pytest.approx([0, 0.05, 0.1, 0.15, 0.2])
    torch.manual_seed(0)
    block, x = common.Block(8, 2, drop_path=0.5).train(), torch.randn(400, 3, 8)
    with torch.no_grad():
        unchanged = (block(x) == x).flatten(1).all(1).float().mean().item()
    assert unchanged == pytest.approx(0.25, abs=0.09)  # both dropped; one draw for both would give 0.5
    ones = common.DropPath(0.2).train()(torch.ones(4000, 3, 8, dtype=torch.bfloat16))
    assert set(ones.unique().tolist()) == {0.0, 1.25} and ones.mean().item() == pytest.approx(1, abs=0.05)


def test_blocks_of_all_drop_path_rates_share_programs(monkeypatch):
    """Without drop path, with the first rate, with any other, and in tests: torch gives up after 8."""
    from torch._dynamo.testing import CompileCounter
    counter, compile_module = CompileCounter(), nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda self: compile_module(self, backend=counter))
    vit = common.ViT(32, 8, embed_dim=16, num_heads=1, depth=9, drop_path_rate=0.2)
    names, images = list(vit.state_dict()), torch.randn(2, 3, 32, 32)
    common.compile_blocks(argparse.Namespace(compile="on"), CPU, vit)
    vit(images).sum().backward()
    vit.eval()(images)
    assert counter.frame_count <= 4 and list(vit.state_dict()) == names


@pytest.mark.parametrize("patch", [(2, 2), (3, 2), (1, 6)])
def test_patchify_is_torchs_unfold_with_colours_last(patch):
    images, (P, Q) = torch.randn(2, 3, 6, 12), patch
    tokens = common.patchify(images, patch)
    unfolded = nn.functional.unfold(images, patch, stride=patch).reshape(2, 3, P * Q, -1).permute(0, 3, 2, 1)
    assert torch.equal(tokens, unfolded.flatten(2))
    assert torch.equal(common.unpatchify(tokens, patch, (6 // P, 12 // Q)), images)
    assert torch.equal(common.patchify(images, 2), common.patchify(images, (2, 2)))


def test_position_tables_by_independent_formulas():
    for grid, first in itertools.product([(5, 5), (3, 7), (1, 4)], ["column", "row"]):
        table = common.sincos_2d(24, grid, first)
        assert table.dtype == torch.float32 and table.shape == (grid[0] * grid[1], 24)
        for row, column, k in itertools.product(range(grid[0]), range(grid[1]), range(6)):
            place = (column, row) if first == "column" else (row, column)
            angles = [x / 10000 ** (k / 6) for x in place]
            expected = [wave(angle) for angle in angles for wave in (math.sin, math.cos)]
            assert table[row * grid[1] + column, k::6].tolist() == pytest.approx(expected, abs=1e-6)
    table = common.sinusoid_1d(10, 7)
    for n, j in itertools.product(range(7), range(10)):
        angle = n / 10000 ** (2 * (j // 2) / 10)
        assert table[n, j] == pytest.approx(math.cos(angle) if j % 2 else math.sin(angle), abs=1e-6)


def test_random_masks_hide_the_same_number_everywhere_alike():
    masks, again = (common.random_masks(20_000, 12, 3, torch.Generator().manual_seed(0)) for _ in range(2))
    assert masks.dtype == torch.bool and masks.shape == (20_000, 12) and (masks.sum(1) == 3).all()
    assert (masks.float().mean(0) - 0.25).abs().max() < 4.5 * math.sqrt(0.25 * 0.75 / 20_000)
    both = (masks.float().T @ masks.float() / 20_000)[~torch.eye(12, dtype=torch.bool)]  # pairs of patches
    assert (both - 3 / 12 * 2 / 11).abs().max() < 5 * math.sqrt(0.045 / 20_000) and torch.equal(masks, again)
    for count in (0, 11):
        assert (common.random_masks(3, 12, count).sum(1) == count).all()
    for count in (-1, 12):
        refused("0 to 11", common.random_masks, 3, 12, count)


def test_ids_ascend_and_tokens_are_gathered_by_row():
    mask, tokens = common.random_masks(5, 30, 11), torch.randn(5, 30, 3)
    ids_keep, ids_masked = common.mask_to_ids(mask, CPU)
    for row in range(5):
        assert ids_keep[row].tolist() == [n for n in range(30) if not mask[row, n]]
        assert ids_masked[row].tolist() == [n for n in range(30) if mask[row, n]]
        assert torch.equal(common.gather(tokens, ids_masked)[row], tokens[row][mask[row]])
    mask[2, ids_masked[2, 0]] = False
    refused("same number", common.mask_to_ids, mask, CPU)


class Draws:
    def __call__(self, image, label):
        return image.float().mean(), torch.rand(3)


def test_a_sample_depends_on_seed_epoch_and_index_alone():
    """One number is written down: another one would break the resumption of every run on disk."""
    keys = list(itertools.product(range(3), ("sample", "order"), range(5), range(50))) + [(1, 23), (12, 3)]
    assert common.seed_for(0, "sample", 3, 7) == 8602463054367235400
    assert len({common.seed_for(*key) for key in keys}) == len(keys)
    images = common.Images(torch.randint(256, (6, 3, 4, 4), dtype=torch.uint8))
    samples = [common.Samples(images, Draws(), seed) for seed in (0, 1)]
    keys = list(itertools.product((0, 1), range(2), range(6)))
    forwards = {key: samples[key[0]][key[1:]][1] for key in keys}
    assert all(torch.equal(samples[key[0]][key[1:]][1], forwards[key]) for key in reversed(keys))
    assert len({tuple(draws.tolist()) for draws in forwards.values()}) == 24


def steps_of(num_images, batch_size, micro_batch, world, start, stop, seed=0):
    """Per step, the keys of the global batch in their order: micro batch by micro batch, rank by rank."""
    plan = common.make_plan(num_images, batch_size, micro_batch, 100, world)
    ranks = [list(common.micro_batch_keys(num_images, plan, common.Dist(rank, world, CPU), seed, start, stop))
             for rank in range(world)]
    assert all(len(keys) == micro_batch for rank in ranks for keys in rank)
    dealt = [key for turn in zip(*ranks, strict=True) for keys in turn for key in keys]
    return [dealt[place:place + batch_size] for place in range(0, len(dealt), batch_size)]


def test_the_order_of_images():
    """A pure function of seed and step, whatever the split; no image twice in an epoch, no incomplete batch."""
    whole = steps_of(50, 8, 8, 1, 0, 60)
    assert len(whole) == 60
    for micro, world in ((1, 1), (4, 2), (2, 2), (1, 4), (1, 8)):
        assert steps_of(50, 8, micro, world, 0, 13) == whole[:13]
    for begin in (1, 5, 6, 7, 60):
        assert steps_of(50, 8, 2, 2, begin, 60) == whole[begin:]
    assert steps_of(50, 8, 8, 1, 0, 60, seed=1) != whole
    for epoch in range(10):
        keys = [key for step in whole[6 * epoch:6 * epoch + 6] for key in step]
        assert {key[0] for key in keys} == {epoch} and len(set(keys)) == 48
    assert [key[1] for key in whole[0]] != [key[1] for key in whole[6]]
    assert {key[1] for step in whole for key in step} == set(range(50))  # others are dropped each time


def test_images_of_files_and_of_a_tensor_and_every_kind_of_picture(tmp_path):
    red = Image.new("RGB", (8, 6), (200, 40, 30))
    kinds = {"palette.png": red.convert("P", palette=Image.Palette.ADAPTIVE), "a b.jpg": red.convert("CMYK"),
             "日本.png": red.convert("RGBA"), "ä" * 60 + ".webp": red, "grey.jpg": Image.new("L", (8, 6), 77),
             "binary.tiff": Image.new("1", (8, 6), 1)}
    files = common.Images([tmp_path / name for name in kinds], labels=range(10, 16))
    files = pickle.loads(pickle.dumps(files))  # as a worker gets it where processes are spawned
    for index, (name, image) in enumerate(kinds.items()):
        image.save(tmp_path / name, quality=95)
        colour = {"grey.jpg": [77] * 3, "binary.tiff": [255] * 3}.get(name, [200, 40, 30])
        pixels, label = files[index]  # (3, 6, 8), uint8
        assert files.path(index) == str(tmp_path / name) and (label, pixels.dtype) == (10 + index, torch.uint8)
        assert pixels[:, :, 0].T.tolist() == [pytest.approx(colour, abs=8)] * 6 and pixels.shape[2] == 8, name
    images = common.Images(torch.randint(256, (5, 3, 4, 4), dtype=torch.uint8), [0, 1, 0, 1, 1])
    assert (len(files), len(images), images[3][1], common.Images(images.pixels)[0][1]) == (6, 5, 1, -1)
    assert torch.equal(images[3][0], images.pixels[3])


def test_grey_of_more_than_8_bits_is_scaled_and_what_has_no_white_is_refused(tmp_path):
    """65535 is white, or the largest value of the bits; a grey of 16 bits has the pixels of its 8-bit twin."""
    grey = np.random.default_rng(0).integers(0, 256, (6, 9), dtype=np.uint8)
    wide = grey.astype(np.uint16) * 257
    swapped = Image.frombytes("I;16B", (9, 6), wide.astype(">u2").tobytes())
    maxval = b"P5 9 6 4095\n" + np.round(grey * (4095 / 255)).astype(">u2").tobytes()
    twelve = np.round(grey * (4095 / 255)).astype(np.uint16)
    for name, image in {"a.png": Image.fromarray(wide), "b.tif": Image.fromarray(wide), "c.tif": swapped,
                        "d.ppm": Image.fromarray(wide), "e.png": Image.fromarray(grey)}.items():
        image.save(tmp_path / name)
        assert common.read_image(tmp_path / name)[1].numpy().tolist() == grey.tolist(), name
    (tmp_path / "f.ppm").write_bytes(maxval)
    assert np.abs(common.read_image(tmp_path / "f.ppm")[0].numpy() - grey.astype(int)).max() <= 1
    for tag, value, expected in ((262, 0, 255 - grey), (258, 12, grey)):  # min is white; 12 bits
        image = Image.fromarray(wide if tag == 262 else twelve)
        image.format, image.tag_v2 = "TIFF", {tag: value if tag == 262 else (value,)}
        assert np.abs(np.asarray(common.eight_bits(image)).astype(int) - expected).max() <= (tag == 258)
    for array in (wide.astype(np.int32), grey / np.float32(255)):
        Image.fromarray(array).save(tmp_path / "g.tif")
        refused(r"g\.tif cannot .*32 bits.*save them with 8 or 16", common.read_image, tmp_path / "g.tif")
    image = Image.new("RGB", (9, 6))
    image.format, image.tag_v2 = "TIFF", {277: 5}
    refused("5 bands", common.eight_bits, image)


@pytest.mark.parametrize("kind, options", [(".png", {}), (".tif", {}), (".webp", dict(lossless=True))])
def test_an_exif_rotation_is_undone_unless_only_the_stored_size_is_the_annotations(tmp_path, kind, options):
    picture = np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8)
    stored = {1: picture, 2: picture[:, ::-1], 3: picture[::-1, ::-1], 4: picture[::-1], 5: picture.swapaxes(0, 1),
              6: np.rot90(picture), 7: np.rot90(picture.swapaxes(0, 1), 2), 8: np.rot90(picture, -1)}
    for tag, array in stored.items():  # what a viewer does with the tag gives the picture
        exif = Image.Exif()
        exif[0x0112] = tag
        Image.fromarray(array.copy()).save(tmp_path / f"x{kind}", exif=exif, **options)
        for size in (None, (6, 9), (7, 7)):
            assert np.array_equal(common.read_image(tmp_path / f"x{kind}", size).permute(1, 2, 0), picture), tag
        as_stored = common.read_image(tmp_path / f"x{kind}", (9, 6)).permute(1, 2, 0)
        assert np.array_equal(as_stored, array if tag > 4 and kind != ".tif" else picture)  # PIL turns TIFF itself
    broken = exif.tobytes()[:9] + b"\xff" * 4 + exif.tobytes()[13:]
    Image.fromarray(picture).save(tmp_path / "y.webp", lossless=True, exif=broken)
    assert np.array_equal(common.read_image(tmp_path / "y.webp").permute(1, 2, 0), picture)  # a broken tag is none


@pytest.mark.parametrize("content, what", [
    (b"<!DOCTYPE html>\n<html>", "a web page"), (b"\xef\xbb\xbf\n<html>", "a web page"),
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "a Git LFS pointer: `git lfs pull`"),
    (b"\x1f\x8b\x08" + bytes(40), "an archive"), (b"Rar!\x1a\x07", "an archive"), (b"\x89HDF\r\n", "an HDF5"),
    (b"Entry not found", "a text, b?'Entry not found'"), (b'{"error": "no"}\n', "a text"), (b"", "empty"),
    (None, "a zip archive"), (bytes([90] + [0] * 7) + b'{"__metadata__":{}}', "a safetensors file")])
def test_what_lies_where_weights_or_an_image_should_be_is_named(tmp_path, content, what):
    for name, read in (("x.pth", common.read_checkpoint), ("x.png", common.read_image)):
        if content is None:
            with zipfile.ZipFile(tmp_path / name, "w") as archive:
                archive.writestr("weights.txt", "none")
        else:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"{name} cannot be read as .*it is {what}") as caught:
            read(tmp_path / name)
        assert "weights_only" not in str(caught.value) and "\n" not in str(caught.value)


def test_images_too_large_for_pil_and_too_thin_to_resize(tmp_path, monkeypatch):
    Image.new("L", (1, 12000), 9).save(tmp_path / "line.png")
    assert common.Images([tmp_path / "line.png"])[0][0].shape == (3, 16, 1)  # its middle
    assert common.Images(torch.zeros(1, 3, 4, 64, dtype=torch.uint8))[0][0].shape == (3, 4, 64)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 5000)
    refused(r"line\.png: .*MAX_IMAGE_PIXELS.* allows it", common.read_image, tmp_path / "line.png")
    run = subprocess.run([sys.executable, "-c", "import common; print(common.Image.MAX_IMAGE_PIXELS)"], text=True,
                         cwd=ROOT, env=os.environ | dict(MAX_IMAGE_PIXELS="777"), capture_output=True)
    assert run.stdout == "777\n"


@pytest.mark.filterwarnings("ignore")  # Pillow's own remarks on damaged files
@pytest.mark.parametrize("kind", [".png", ".jpg", ".webp", ".tif", ".bmp"])
def test_no_broken_file_escapes_the_sentence(tmp_path, kind):
    """Cut, overwritten, empty, of other content: a picture, or ValueError with the file's name."""
    write_images(tmp_path, 1, kind=kind)
    whole, random = (tmp_path / f"00{kind}").read_bytes(), np.random.default_rng(0)
    damaged, path, told = [b"", b"not a picture", whole[:20], whole[:len(whole) // 2]], tmp_path / f"x{kind}", 0
    for _ in range(60):
        content = np.frombuffer(whole, np.uint8).copy()
        content[random.integers(min(len(whole), 400), size=4)] = random.integers(256, size=4)
        damaged.append(content.tobytes())
    for content in damaged:
        path.write_bytes(content)
        try:
            assert common.read_image(path).shape[0] == 3
        except ValueError as error:
            told += str(path) in str(error)
    assert told >= 3


def test_folders_of_images(tmp_path, monkeypatch):
    """Flat or nested, in one sorted order; of ImageNet's layout what belongs to the split."""
    def found(split="pretrain", spec=tmp_path):
        images = common.find_data(str(spec), split)
        return [os.path.relpath(images.path(index), tmp_path) for index in range(len(images))]
    write_images(tmp_path / "b" / "deep", 2, kind=".JPEG")
    write_images(tmp_path / "linked", 1)
    (tmp_path / "a").symlink_to(tmp_path / "linked")
    write_images(tmp_path, 2, kind=".Jpg")
    for name in ("notes.txt", ".hidden.png", "archive.zip"):
        (tmp_path / name).write_bytes(b"junk")
    assert found() == ["00.Jpg", "01.Jpg", "b/deep/00.JPEG", "b/deep/01.JPEG", "linked/00.png"]
    for split, folders in dict(train="Training train", val="Testing test Validation valid val").items():
        for folder in folders.split():  # each one comes before those before it
            write_images(tmp_path / folder, 1)
            assert found(split) == [f"{folder}/00.png"]
    assert found() == ["train/00.png"]
    monkeypatch.setenv("IMAGENET", str(tmp_path / "b"))
    monkeypatch.chdir(tmp_path)
    assert found(spec="")[0] == "b/deep/00.JPEG" and found(spec="a") == ["a/00.png"]  # the flag wins
    monkeypatch.delenv("IMAGENET")
    assert found(spec=write_images(tmp_path / "data" / "imagenet", 2)) == found(spec="")


def test_hidden_folders_links_and_other_endings(tmp_path, capsys, monkeypatch):
    """Hidden is left out; a real folder is listed once, under its own name; what is left out is counted."""
    for folder in ("a", "b/deep", ".git", "a/.thumbnails", "@eaDir", "b/@eaDir"):
        write_images(tmp_path / "data" / folder, 1)
    write_images(tmp_path / "outside" / "c", 1)
    links = {"0": "a", "a/up": "..", "b/up": "..", "b/self": "deep", "0out": "../outside", "out2": "../outside"}
    for link, target in links.items():
        (tmp_path / "data" / link).symlink_to(target)
    (tmp_path / "outside" / "back").symlink_to("../data")
    found = [os.path.relpath(path, tmp_path / "data") for path in common.list_images(tmp_path / "data")]
    assert found == ["0out/c/00.png", "a/00.png", "b/deep/00.png"] and capsys.readouterr().out == ""
    for name in (".lock", "run/.lock", "run/log.jsonl", "run/preview.png"):  # a lock alone is no run
        (tmp_path / "data" / name).parent.mkdir(exist_ok=True), (tmp_path / "data" / name).touch()
    for name in ("1.gif", "2.gif", "3.JFIF", "none", ".hidden.gif"):
        (tmp_path / "data" / "a" / name).touch()
    assert len(common.list_images(tmp_path / "data")) == 3
    assert "left out 4 files of other endings in" in (out := capsys.readouterr().out)
    assert ".gif (2)" in out and ".jfif (1)" in out and "no ending (1)" in out
    monkeypatch.setenv("RANK", "1")  # one process says it
    assert common.list_images(tmp_path / "data") and capsys.readouterr().out == ""


def test_data_that_is_not_there(tmp_path, monkeypatch):
    monkeypatch.setenv("IMAGENET", str(tmp_path / "elsewhere"))
    refused("elsewhere.*--data.*IMAGENET.*--demo", common.find_data, "", error=FileNotFoundError)
    refused("holds no image", common.find_data, str(tmp_path), error=FileNotFoundError)
    for split in ("train", "val"):
        refused(f"has no folder {split}", common.find_data, str(tmp_path), split, error=FileNotFoundError)
    (tmp_path / "00.png").write_bytes(b"junk")
    refused(r"00\.png cannot be read", common.find_data, str(tmp_path))  # before the training
    monkeypatch.setattr(os, "scandir", lambda path: (_ for _ in ()).throw(PermissionError(13, "denied", path)))
    refused("denied", common.find_data, str(tmp_path), error=PermissionError)  # else data would be missing silently


def test_cifar10_in_torchvisions_format_and_built_in_scenes(tmp_path, monkeypatch):
    folder = tmp_path / "cifar-10-batches-py"
    monkeypatch.setenv("CIFAR10", str(tmp_path))
    refused("CIFAR10.*download=True", common.find_data, "cifar10", "train", error=FileNotFoundError)
    folder.mkdir()
    rows = np.random.default_rng(0).integers(256, size=(6, 2, 3072), dtype=np.uint8)
    for number, name in enumerate([f"data_batch_{number}" for number in range(1, 6)] + ["test_batch"]):
        (folder / name).write_bytes(pickle.dumps({"data": rows[number], "labels": [number, 9]}))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
    train, val = common.find_data("cifar10", "pretrain"), common.find_data("cifar10", "val")
    assert train.labels.tolist() == [0, 9, 1, 9, 2, 9, 3, 9, 4, 9] and val.labels.tolist() == [5, 9]
    # A row of the file: 1024 red, 1024 green, 1024 blue values, each 32 x 32 in raster order.
    assert np.array_equal(train[3][0], rows[1, 1].reshape(3, 32, 32)) and train.classes == tuple("abcdefghij")
    parts = [common.find_data("scenes", split, 16, num_scenes=50) for split in ("pretrain", "train", "val")]
    assert [len(part) for part in parts] == [50, 3000, 1500]
    assert len(torch.stack([part[0][0] for part in parts]).unique(dim=0)) == 3  # none is in two parts


def test_a_file_that_breaks_during_training_is_replaced_with_a_warning(tmp_path, capsys):
    samples = common.Samples(common.find_data(str(write_images(tmp_path, 12))), Draws(), seed=0)
    good, first = samples[0, 3], samples[0, 0]
    for name in ("02.png", "11.png"):
        (tmp_path / name).write_bytes(b"")
    assert torch.equal(samples[0, 2][0], good[0])
    warning = capsys.readouterr().err
    assert warning.count("\n") == 1 and "warning" in warning and "02.png" in warning
    assert torch.equal(samples[0, 11][0], first[0])  # the file after the last one is the first
    for path in tmp_path.iterdir():
        path.write_bytes(b"")
    with pytest.raises(ValueError, match="cannot be read"):  # ten in a row
        samples[0, 0]


def test_normalise_by_numpy_and_back():
    images = torch.randint(256, (2, 3, 4, 5), dtype=torch.uint8)
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    expected = ((images.numpy().transpose(0, 2, 3, 1) / 255 - mean) / std).transpose(0, 3, 1, 2)
    np.testing.assert_allclose(common.normalise(images).numpy(), expected, atol=1e-6)
    close(common.normalise(images, (0, 0, 0), (1, 1, 1)), images / 255)
    close(common.unnormalise(common.normalise(images)), images / 255)
    assert common.channels((0.1, 0.2), CPU, torch.float32) is common.channels((0.1, 0.2), CPU, torch.float32)
    many = common.Samples(common.Images(images.repeat_interleave(3, dim=0)), lambda image, label: image, seed=0)
    assert torch.equal(common.preview_batch(many, 2), images)  # from all over the data


def test_torchcodec_gives_pils_pixels_or_leaves_a_file_to_it(tmp_path, monkeypatch):
    if common.decode_jpeg is None:
        pytest.skip("torchcodec (the extra `fast`) is not installed")
    noise, seen, decode = torch.randint(256, (30, 45, 3), dtype=torch.uint8), [], common.decode_jpeg
    monkeypatch.setattr(common, "decode_jpeg", lambda content: seen.append(1) or decode(content))
    exif = Image.Exif()
    exif[0x0112] = 6
    for number, (image, options, fast) in enumerate([
            (noise, {}, 1), (noise, dict(quality=40, progressive=True), 1), (noise, dict(subsampling=0), 1),
            (noise[..., 0], {}, 0), (noise, dict(exif=exif), 0)]):
        path = tmp_path / f"{number}.jpg"
        Image.fromarray(image.numpy()).save(path, **options)
        seen.clear()
        ours = common.read_image(path)
        with monkeypatch.context() as patch:
            patch.setattr(common, "decode_jpeg", None)
            assert torch.equal(ours, common.read_image(path)) and len(seen) == fast
    whole = (tmp_path / "0.jpg").read_bytes()
    for end in range(0, len(whole), 97):  # what PIL refuses is refused
        path.write_bytes(whole[:end])
        refused("cannot be read as an image", common.read_image, path)


@pytest.mark.parametrize("arguments, expected", [
    ((1_281_167, 2048, 0, 300, 8), (2048, 256, 1, 625, 187_500)),  # the paper's run
    ((1_281_167, 2048, 64, 300, 4), (2048, 64, 8, 625, 187_500)), ((100, 6, 0, 1, 3), (6, 2, 1, 16, 16)),
    ((1000, 1000, 0, 2, 1), (1000, 250, 4, 1, 2)),  # the largest divisor up to 256
    ((63, 64, 0, 1, 1), "63 images.*--batch_size 63"), ((100, 64, 0, 1, 3), "--batch_size 64.*3 processes"),
    ((100, 64, 5, 1, 1), "--micro_batch 5 .*nearest.*4"), ((100, 64, 128, 1, 2), "--micro_batch 128.*32")])
def test_plans(arguments, expected):
    with contextlib.nullcontext() if isinstance(expected, tuple) else pytest.raises(ValueError, match=expected):
        assert dataclasses.astuple(common.make_plan(*arguments)) == expected


def test_learning_rate_by_numpy():
    """Linspace from the start to the peak, then half a cosine over the rest."""
    peak, floor, warmup, total = 1.5e-3, 1e-5, 7, 40
    rest = np.arange(total - warmup)
    cosine = floor + 0.5 * (peak - floor) * (1 + np.cos(np.pi * rest / len(rest)))
    for start in (0.0, 1e-4):
        expected = np.concatenate([np.linspace(start, peak, warmup), cosine])
        rates = [common.learning_rate(step, peak, warmup, total, floor, start) for step in range(total)]
        np.testing.assert_allclose(rates, expected, rtol=1e-12, atol=1e-18)
    for warmup in (0, 1):
        rates = [common.learning_rate(step, 1.0, warmup, 10) for step in range(10)]
        assert rates[0] == 1.0 - warmup and max(rates) == 1.0 and all(0 <= rate <= 1 for rate in rates)


def test_a_writer_that_fails_or_is_killed_leaves_the_old_file(tmp_path):
    path, seen = tmp_path / "new folder" / "last.pt", []
    common.write_atomically(path, lambda temporary: seen.append(temporary) or temporary.write_text("old"))
    def half(temporary):
        temporary.write_text("ne")
        raise RuntimeError("the disk is full")  # as torch says it
    refused("last.pt", common.write_atomically, path, half, error=OSError)
    assert path.read_text() == "old" and os.listdir(path.parent) == ["last.pt"]
    seen[0].write_text("half of a fi")  # as a killed process leaves it
    with open(path) as reader:  # whoever has the old file open goes on reading the old one
        common.write_atomically(path, lambda temporary: temporary.write_text("new"))
        assert os.name == "nt" or reader.read() == "old"
    assert path.read_text() == "new" and os.listdir(path.parent) == ["last.pt"]


def test_checkpoints_that_cannot_be_read_and_code_that_is_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    evil = type("Evil", (), {"__reduce__": lambda self: (os.mkdir, ("owned",))})()
    torch.save({"model": {"a": torch.ones(2)}, "args": argparse.Namespace(lr=0.1)}, "published.pth")
    assert common.read_checkpoint("published.pth")["args"].lr == 0.1
    files = dict(empty=b"", junk=b"\x80\x02junk" * 50, text=b"hello", evil=pickle.dumps(evil, protocol=2),
                 cut=(tmp_path / "published.pth").read_bytes()[:500])
    for name, kind in itertools.product(files, ("pt", "safetensors")):
        (tmp_path / f"{name}.{kind}").write_bytes(files[name])
    for name, content in dict(zip={"model": evil}, foreign={"model": Draws()}, list=[1, 2]).items():
        torch.save(content, f"{name}.pt")
    for path in {*tmp_path.iterdir()} - {tmp_path / "published.pth"}:
        with pytest.raises(ValueError, match=f"{path.name} cannot be read") as caught:
            common.read_checkpoint(path)
        assert "\n" not in str(caught.value) and ("Draws" in str(caught.value)) == (path.stem == "foreign")
    assert not (tmp_path / "owned").exists()
    refused("no checkpoint file", common.read_checkpoint, tmp_path, error=FileNotFoundError)  # a folder


def test_pictures(tmp_path):
    """Colours from dark to light without a jump; panels in their places, with captions and a note."""
    colours = common.colour_map(torch.linspace(0, 1, 101)[None].repeat(2, 1))
    assert colours.shape == (3, 2, 101) and 0 <= colours.min() and colours.max() <= 1
    lightness = (torch.tensor([0.2126, 0.7152, 0.0722])[:, None] * colours[:, 0]).sum(0)
    assert (lightness.diff() > 0).all() and lightness[0] < 0.15 and lightness[-1] > 0.8
    assert (colours[:, 0].diff(dim=1).abs() < 0.05).all()
    close(common.colour_map(torch.tensor([[-3.0, 5.0]]))[:, 0], colours[:, 0, [0, -1]])
    red, green, blue = (torch.eye(3)[channel][:, None, None].expand(3, 8, 8) for channel in range(3))
    rows = [[red, green, blue], [blue, 2 * red, green - 1]]  # 2 and -1 are cut off at 0 and 1
    common.save_panels(tmp_path / "panels.png", rows, ["one", "two", "three"], note="what this is")
    pixels = np.asarray(Image.open(tmp_path / "panels.png", formats=["PNG"]).convert("RGB"))
    centres = pixels[106::174, 90::174][:2, :3].tolist()
    assert centres == [[[255, 0, 0], [0, 255, 0], [0, 0, 255]], [[0, 0, 255], [255, 0, 0], [0, 0, 0]]]
    assert (pixels == (255, 0, 0)).all(-1).sum() == 2 * 168**2
    assert (pixels[:16] < 128).any() and (pixels[-20:] < 128).any()  # captions and note
