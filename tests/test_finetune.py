"""eval/finetune.py: recipes, model, groups, augmentation against papers, timm and torch; whole runs."""

import hashlib
import json
import math
import re
import shutil
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data.auto_augment import rand_augment_transform
from timm.data.mixup import mixup_target
from timm.layers.pos_embed_rel import gen_relative_position_index
from timm.loss import SoftTargetCrossEntropy
from timm.models.beit import Beit
from timm.models.vision_transformer import VisionTransformer
from timm.optim import param_groups_layer_decay
from torch import nn
from torchvision.transforms import InterpolationMode, v2

import common
from eval import finetune
from eval.encoders import load_encoder
from eval.finetune import (RECIPES, Augment, Classifier, Config, build, evaluate, listed, load_classifier,
                           low_shot, main, make_mix, measured, predictions, relative_positions,
                           with_recipe)
from eval.protocol import layer_groups
from helpers import assert_same_run, call, differences, finish, load, numbers, start

GOLDEN = Path(__file__).parent / "golden"
CPU = torch.device("cpu")
ONE = common.Processes(0, 1, CPU)


def tiny(**changes):
    torch.manual_seed(3)
    return common.ViT(**{**dict(img_size=16, patch_size=8, embed_dim=16, depth=2, num_heads=2), **changes})


def resolved(method="cae_v2", width=16, **typed):
    return with_recipe(Config("x", recipe=method, **typed), Path("x"), wide(width))[0]


def wide(width):
    """All that a recipe asks of an encoder."""
    return SimpleNamespace(config=dict(embed_dim=width, num_heads=2), cls_token=1)


# -- recipes

# Typed from the papers' notes, one value per size; `lr` is what it comes to at the batch of the recipe.
PAPERS = """
method         size   epochs warm batch lr   decay drop_path mixup cutmix smooth rel fc_norm positions
cae_v2         vit_ti 100    5    1024  4e-3 0.85  0.0       0.2   0.0    0.0    on  encoder fixed
cae_v2         vit_s  200    20   1024  4e-4 0.75  0.1       0.8   1.0    0.1    on  encoder fixed
cae_v2         vit_b  100    5    1024  2e-4 0.75  0.1       0.8   1.0    0.1    on  encoder fixed
cae_v2         vit_l  50     5    4096  2e-3 0.75  0.2       0.8   1.0    0.1    on  encoder fixed
mfm_mae        vit_s  100    5    1024  2e-3 0.65  0.1       0.8   1.0    0.1    off fresh   learned
mfm_mae        vit_b  100    5    1024  2e-3 0.65  0.1       0.8   1.0    0.1    off fresh   learned
mfm_mae        vit_l  50     5    1024  4e-3 0.75  0.2       0.8   1.0    0.1    off fresh   learned
mfm_mae        vit_h  50     5    1024  4e-3 0.75  0.3       0.8   1.0    0.1    off fresh   learned
mae            vit_b  100    5    1024  2e-3 0.65  0.1       0.8   1.0    0.1    off fresh   learned
mae            vit_l  50     5    1024  4e-3 0.75  0.2       0.8   1.0    0.1    off fresh   learned
mae            vit_h  50     5    1024  4e-3 0.75  0.3       0.8   1.0    0.1    off fresh   learned
beyond_masking vit_b  100    5    1024  4e-3 0.75  0.1       0.8   1.0    0.1    off fresh   learned
"""
ROWS = [line.split() for line in PAPERS.strip().splitlines()[1:]]
WIDTH = dict(vit_ti=192, vit_s=384, vit_b=768, vit_l=1024, vit_h=1280)


@pytest.mark.parametrize("row", ROWS, ids=[f"{row[0]}-{row[1]}" for row in ROWS])
def test_recipes_are_the_papers(row):
    method, size, *numbers, rel, fc_norm, positions = row
    config, name, equation = with_recipe(Config("x", recipe=method), Path("x"), wide(WIDTH[size]))
    assert name == f"{method}, {size}"
    assert equation == ("absolute" if method == "cae_v2" else f"{config.lr / 4:g} x batch 1024 / 256")
    names = "epochs warmup_epochs batch_size lr layer_decay drop_path mixup cutmix smoothing".split()
    assert [getattr(config, name) for name in names] == pytest.approx([float(value) for value in numbers])
    assert (config.rel_pos_bias, config.fc_norm, config.positions) == (rel, fc_norm, positions)
    # What all papers share.
    assert (config.min_lr, config.weight_decay, config.randaugment, config.erasing) == (1e-6, 0.05, 9, 0.25)
    assert (config.pool, config.crop_min, config.ema) == ("mean", 0.08, 0.0)


def test_the_table_has_no_row_that_no_paper_gives():
    listed = {(row[0], row[1]) for row in ROWS} | {("mae", "vit_s")}
    assert {(method, size) for method in RECIPES for size in RECIPES[method]} == listed


def test_flags_win_and_the_base_lr_scales_with_the_batch():
    assert resolved("mae", 768, batch_size=512).lr == pytest.approx(1e-3)
    assert resolved("cae_v2", 768, batch_size=512).lr == 2e-4  # absolute
    config = resolved("mae", 768, lr=0.5, epochs=7, mixup=0.0, pool="cls", rel_pos_bias="on")
    assert (config.lr, config.epochs, config.mixup, config.pool) == (0.5, 7, 0, "cls")
    assert config.rel_pos_bias == "on" and config.cutmix == 1.0
    assert resolved("cae_v2", 128).layer_decay == 0.85  # nearest: ViT-Ti
    assert resolved("beyond_masking", 1024).epochs == 100  # the only row


def test_auto_takes_the_method_that_the_checkpoint_names(tmp_path):
    vit = tiny()
    common.save_encoder(vit, tmp_path / "e.safetensors", method="mfm_mae")
    assert with_recipe(Config("x"), tmp_path / "e.safetensors", vit)[1] == "mfm_mae, vit_s"
    torch.save(dict(method="beyond_masking"), tmp_path / "last.pt")
    assert with_recipe(Config("x"), tmp_path / "last.pt", vit)[1] == "beyond_masking, vit_b"
    torch.save(dict(model={}), tmp_path / "mae.pth")
    with pytest.raises(ValueError, match="mae.pth does not say which method trained it: give --recipe"):
        with_recipe(Config("x"), tmp_path / "mae.pth", vit)


# -- model


@pytest.mark.parametrize("name", ["A_base_like", "B_tiny_like_projected"])
@pytest.mark.parametrize("rel", [False, True])
def test_features_are_the_authors(tmp_path, name, rel):
    case = torch.load(GOLDEN / "cae_v2.pt")["cases"][name]
    torch.save(case["state_dict"], tmp_path / "official.pth")
    transfer = case["transfer"]
    for pool, expected in (("mean", "finetune_meanpool_fcnorm"), ("cls", "linear_probe_cls")):
        vit = load_encoder(tmp_path / "official.pth", num_heads=case["config"]["num_heads"])
        model = Classifier(vit, 5, pool, "encoder", rel_pos_bias=rel).eval()  # the bias starts at zero
        with torch.no_grad():
            torch.testing.assert_close(model.features(case["images"]), transfer[expected], atol=1e-5, rtol=0)


def test_mean_pooling_takes_the_last_block_before_the_norm():
    golden = torch.load(GOLDEN / "mfm_mae.pt")["mae"]
    config, state = golden["config"], golden["state_dict"]
    vit = common.ViT(config["img_size"], config["patch_size"], embed_dim=config["embed_dim"],
                     depth=config["depth"], num_heads=config["num_heads"])
    vit.load_state_dict({name: state[name] for name in vit.state_dict()})
    model = Classifier(vit, 5, "mean", "fresh").eval()
    x = golden["vit_patch_mean"].double().numpy()
    expected = (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + 1e-6)
    with torch.no_grad():
        np.testing.assert_allclose(model.features(golden["images"]).numpy(), expected, atol=2e-5)
        cls = Classifier(vit, 5, "cls").eval().features(golden["images"])
    torch.testing.assert_close(cls, golden["vit_cls_feature"].float(), atol=1e-5, rtol=0)


def test_the_fine_tuned_model_is_timms_beit():
    """All of the model with non-zero tables, on a grid that is not square."""
    torch.manual_seed(0)
    theirs = Beit(img_size=(24, 16), patch_size=8, embed_dim=12, depth=2, num_heads=3, num_classes=5,
                  use_rel_pos_bias=True, init_values=0.1, global_pool="avg").eval()
    ours = Classifier(common.ViT((24, 16), 8, embed_dim=12, depth=2, num_heads=3, init_values=0.1), 5,
                      rel_pos_bias=True).eval()
    state = {}
    for name, parameter in ours.state_dict().items():
        if "norm." not in name or name.startswith("fc_norm"):
            parameter = torch.randn_like(parameter) * 0.5
        state[name] = parameter
    ours.load_state_dict(state)
    official = {}
    for name, value in state.items():
        name = re.sub(r"ls([12]).gamma", r"gamma_\1", name.removeprefix("encoder."))
        if name.endswith("qkv.bias"):  # BEiT has no key bias, and one changes nothing
            official[name.replace("qkv.bias", "q_bias")], _, official[name.replace("qkv.bias", "v_bias")] = \
                value.chunk(3)
        elif name not in ("norm.weight", "norm.bias"):
            official[name] = value
    theirs.load_state_dict(official)
    images = torch.randn(3, 3, 24, 16)
    with torch.no_grad():
        torch.testing.assert_close(ours(images), theirs(images), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("h, w, cls", [(3, 3, True), (2, 4, True), (4, 2, False), (1, 1, True)])
def test_relative_positions_pair_by_pair(h, w, cls):
    index = relative_positions((h, w), cls)
    N = h * w
    assert index.shape == (N + cls, N + cls)
    assert torch.equal(index, gen_relative_position_index((h, w), class_token=cls))
    patches = index[cls:, cls:]
    for q in range(N):
        for k in range(N):
            down, right = q // w - k // w, q % w - k % w
            assert patches[q, k] == (down + h - 1) * (2 * w - 1) + (right + w - 1)
    if cls:
        last = (2 * h - 1) * (2 * w - 1)
        assert set(index[0, 1:].tolist()) == {last} and set(index[1:, 0].tolist()) == {last + 1}
        assert index[0, 0] == last + 2


def test_table_of_14_patches_has_732_rows_and_starts_at_zero():
    model = Classifier(tiny(img_size=112, depth=1), 5, rel_pos_bias=True)
    table = model.encoder.blocks[0].attn.relative_position_bias_table
    assert table.shape == (732, 2) and not table.any() and table.requires_grad
    without = Classifier(tiny(img_size=112, depth=1, class_token=False), 5, rel_pos_bias=True)
    assert without.encoder.blocks[0].attn.relative_position_bias_table.shape == (729, 2)


def test_head_norm_positions_and_drop_path_of_each_recipe():
    for method in ("cae_v2", "mae"):
        vit = tiny(embed_dim=64, depth=3)
        nn.init.normal_(vit.norm.weight)
        model = build(resolved(method, 64, drop_path=0.2), vit, 500)
        assert model.head.weight.std().item() == pytest.approx(2e-5, rel=0.02) and not model.head.bias.any()
        assert model.head.weight.abs().max() < 2e-4
        same = torch.equal(model.fc_norm.weight, vit.norm.weight)
        assert same == (method == "cae_v2") and (same or bool((model.fc_norm.weight == 1).all()))
        assert model.fc_norm.weight is not vit.norm.weight and model.fc_norm.eps == 1e-6
        assert vit.pos_embed.requires_grad == (method == "mae")
        assert [block.drop_path.rate for block in vit.blocks] == pytest.approx([0, 0.1, 0.2])
        assert not vit.norm.weight.requires_grad  # no use for it: DDP would wait for its gradient
    first, again, other = (build(resolved(seed=seed), tiny(), 5) for seed in (0, 0, 1))
    assert differences(first.state_dict(), again.state_dict()) == []
    assert not torch.equal(other.head.weight, first.head.weight)


@pytest.mark.parametrize("pool", ["mean", "cls"])
@pytest.mark.parametrize("cls", [True, False])
def test_every_trained_parameter_gets_a_gradient(pool, cls):
    if pool == "cls" and not cls:
        with pytest.raises(ValueError, match="no class token, use --pool mean"):
            with_recipe(Config("x", recipe="mae", pool="cls"), Path("x"), tiny(class_token=False))
        return
    model = build(resolved("cae_v2", pool=pool, positions="learned"), tiny(class_token=cls), 5)
    nn.functional.cross_entropy(model(torch.randn(4, 3, 16, 16)), torch.arange(4)).backward()
    without = {name for name, p in model.named_parameters() if p.requires_grad and p.grad is None}
    assert without == set()


# -- groups


def scales(model, layer_decay, weight_decay=0.05):
    groups = layer_groups(model, model.encoder, weight_decay, layer_decay)
    of = {id(p): (group["lr_scale"], group["weight_decay"]) for group in groups for p in group["params"]}
    assert len(of) == sum(len(group["params"]) for group in groups)
    return {name: of[id(p)] for name, p in model.named_parameters() if id(p) in of}


def test_layer_scales_are_the_authors():
    for size, decay in (("tiny", 0.85), ("small", 0.75), ("base", 0.75)):
        golden = torch.load(GOLDEN / "cae_v2.pt")["finetune_layer_lr_scales"][size]
        ours = scales(Classifier(tiny(depth=12), 5, rel_pos_bias=True), decay)
        for name in ("cls_token", "patch_embed.proj.weight"):
            assert ours[f"encoder.{name}"][0] == pytest.approx(golden[0])
        for i in range(12):
            assert ours[f"encoder.blocks.{i}.mlp.fc1.bias"][0] == pytest.approx(golden[i + 1])
        assert ours["fc_norm.weight"][0] == ours["head.weight"][0] == pytest.approx(golden[13]) == 1


def test_groups_are_timms_layer_decay():
    theirs = VisionTransformer(img_size=16, patch_size=8, embed_dim=16, depth=3, num_heads=2, num_classes=5,
                               global_pool="avg", fc_norm=True, init_values=0.1)
    groups = param_groups_layer_decay(theirs, 0.05, theirs.no_weight_decay(), layer_decay=0.6)
    of = {id(p): (group["lr_scale"], group["weight_decay"]) for group in groups for p in group["params"]}
    expected = {name: of[id(p)] for name, p in theirs.named_parameters()}
    model = Classifier(tiny(depth=3, init_values=0.1), 5)
    model.encoder.pos_embed.requires_grad_(True)
    ours = {name.removeprefix("encoder."): value for name, value in scales(model, 0.6).items()}
    assert ours.keys() == expected.keys()
    for name, value in ours.items():
        assert value == pytest.approx(expected[name]), name


def test_bias_tables_decay_and_frozen_positions_are_left_out():
    ours = scales(Classifier(tiny(), 5, rel_pos_bias=True), 0.5, 0.07)
    assert ours["encoder.blocks.1.attn.relative_position_bias_table"] == (0.5, 0.07)
    assert "encoder.pos_embed" not in ours and "encoder.norm.weight" not in ours
    assert ours["encoder.cls_token"] == (0.125, 0.0)


# -- augmentation, mixing, loss


def test_crop_and_flip_are_torchvisions():
    augment = Augment(resolved(randaugment=0, erasing=0.0, crop_min=0.3), (16, 24))
    image = torch.randint(256, (3, 40, 50), dtype=torch.uint8)
    for seed in range(8):
        torch.manual_seed(seed)
        ours, label = augment(image, 7)
        torch.manual_seed(seed)
        crop = v2.RandomResizedCrop((16, 24), (0.3, 1.0), interpolation=InterpolationMode.BICUBIC)
        expected = v2.RandomHorizontalFlip()(crop(image))
        torch.testing.assert_close(ours, common.normalise(expected[None])[0], atol=1e-6, rtol=0)
        assert label == 7 and ours.dtype == torch.float32


def test_erasing_writes_noise_in_a_quarter_of_the_samples():
    augment = Augment(resolved(randaugment=0, erasing=0.25), (32, 32))
    black = torch.zeros(3, 32, 32, dtype=torch.uint8)
    floor = common.normalise(torch.zeros(1, 3, 1, 1, dtype=torch.uint8))[0]
    erased, values = [], []
    for seed in range(300):
        torch.manual_seed(seed)
        image, _ = augment(black, 0)
        changed = (image - floor).abs().amax(0) > 1e-4
        if changed.any():
            rows, columns = changed.any(1).nonzero(), changed.any(0).nonzero()
            box = image[:, rows[0]: rows[-1] + 1, columns[0]: columns[-1] + 1]
            erased.append(box[0].numel() / 32**2)
            values.append(box.flatten())
    values = torch.cat(values)
    assert 0.18 < len(erased) / 300 < 0.32
    assert 0.015 < min(erased) and 0.25 < max(erased) < 0.35
    assert abs(values.mean()) < 0.02 and abs(values.std() - 1) < 0.02
    assert values.unique().numel() > 0.9 * values.numel()  # per pixel and channel, not one colour


def test_strengths_of_randaugment_are_timms():
    """Brightness of a grey image tells factor and sign; timm's noise on the strength is switched off."""
    augment = Augment(resolved(randaugment=9, erasing=0.0), (8, 8))
    theirs = rand_augment_transform("rand-m9-inc1-n1", {})
    grey, levels, official = torch.full((3, 8, 8), 100, dtype=torch.uint8), {}, set()
    std, mean = (torch.tensor(value)[:, None, None] for value in (common.IMAGENET_STD, common.IMAGENET_MEAN))
    import random
    random.seed(0)
    np.random.seed(0)
    for seed in range(400):
        torch.manual_seed(seed)
        pixel = ((augment(grey, 0)[0] * std + mean) * 255).round()[0, 4, 4].int().item()
        levels[pixel] = levels.get(pixel, 0) + 1
        official.add(theirs(Image.new("RGB", (8, 8), (100, 100, 100))).getpixel((4, 4))[0])
    assert {181, 19} <= official and {181, 19} <= levels.keys()  # 100 (1 +- 0.9 x 0.9)
    # Two operations, each with probability 1/2: 1 sample in 4 has none, and most others keep grey as it is.
    assert levels[100] > 200
    assert rand_augment_transform("rand-m9-mstd0.5-inc1", {}).ops[0].prob == 0.5
    still = Augment(resolved(randaugment=0, erasing=0.0), (8, 8))
    assert len({still(grey, 0)[0].mean().item() for _ in range(20)}) == 1


def test_half_of_the_samples_have_each_operation(monkeypatch):
    counts = []
    monkeypatch.setattr(v2.RandAugment, "forward", lambda self, image: counts.append(self.magnitude) or image)
    augment = Augment(resolved(randaugment=4, erasing=0.0), (8, 8))
    for seed in range(400):
        torch.manual_seed(seed)
        augment(torch.zeros(3, 8, 8, dtype=torch.uint8), 0)
    assert 350 < len(counts) < 450 and set(counts) == {4}


@pytest.mark.parametrize("mixup, cutmix", [(0.8, 0.0), (0.0, 1.0), (0.8, 1.0)])
def test_mixed_targets_and_loss_are_timms(mixup, cutmix):
    mix = make_mix(resolved(mixup=mixup, cutmix=cutmix), 5)
    images, labels, seen = torch.rand(4, 3, 8, 8), torch.tensor([0, 3, 1, 3]), set()
    logits = torch.randn(4, 5)
    for seed in range(40):
        torch.manual_seed(seed)
        mixed, targets = mix(images, labels)
        partner = images.roll(1, 0)
        share = targets[0, 0].item()  # of the first image, whose partner has another label
        same = (mixed == images).all(1)
        if share in (0, 1):  # an empty box, say
            continue
        if torch.allclose(mixed, share * images + (1 - share) * partner, atol=1e-6):
            seen.add("mixup")
        else:
            seen.add("cutmix")
            assert torch.equal(same[0], same[1])  # one box for all
            assert same[0].float().mean().item() == pytest.approx(share, abs=1e-6)
            assert torch.equal(mixed[:, :, ~same[0]], partner[:, :, ~same[0]])
        # timm mixes with the reversed batch, so the partner's labels are written in that order.
        expected = share * mixup_target(labels, 5, smoothing=0.1) + (1 - share) * mixup_target(
            labels.roll(1), 5, smoothing=0.1)
        loss = nn.CrossEntropyLoss(label_smoothing=0.1)(logits, targets)
        torch.testing.assert_close(loss, SoftTargetCrossEntropy()(logits, expected), atol=1e-6, rtol=0)
    assert seen == {name for name, alpha in (("mixup", mixup), ("cutmix", cutmix)) if alpha}


def test_strength_of_mixing_is_alphas():
    """Var of Beta(a, a) is 1 / (4 (2a + 1))."""
    for alpha in (0.2, 2.0):
        mix = make_mix(resolved(mixup=alpha, cutmix=0.0), 2)
        torch.manual_seed(0)
        images, labels = torch.zeros(2, 3, 2, 2), torch.tensor([0, 1])
        shares = torch.stack([mix(images, labels)[1][0, 0] for _ in range(800)])
        assert shares.var().item() == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.15)


def test_without_mixing_labels_stay_labels():
    images, labels = torch.rand(2, 3, 4, 4), torch.tensor([1, 0])
    assert make_mix(resolved(mixup=0.0, cutmix=0.0), 5)(images, labels) == (images, labels)


# -- low-shot


def balanced(counts=(20, 40, 5)):
    labels = torch.cat([torch.full((count,), label) for label, count in enumerate(counts)])
    pixels = torch.arange(len(labels), dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 2, 2)
    return common.Images(pixels, labels, ("a", "b", "c"), "made")


def test_a_fraction_is_taken_from_each_class():
    few = low_shot(balanced(), Config("x", fraction=0.1))
    assert torch.bincount(few.labels).tolist() == [2, 4, 1]  # round(0.5) is 0, but one at least
    ids = few.pixels[:, 0, 0, 0].tolist()
    assert len(set(ids)) == 7 and [balanced().labels[i] for i in ids] == few.labels.tolist()
    assert low_shot(balanced(), Config("x", fraction=0.1)).pixels[:, 0, 0, 0].tolist() == ids
    other = low_shot(balanced(), Config("x", fraction=0.1, seed=1))
    assert other.pixels[:, 0, 0, 0].tolist() != ids
    assert low_shot(balanced(), Config("x")).labels.tolist() == balanced().labels.tolist()


def test_the_drawn_images_are_the_same_on_all_machines():
    """As drawn once: torch's CPU generator and the seeds' hash depend on no machine."""
    few = low_shot(balanced(), Config("x", fraction=0.1))
    assert few.pixels[:, 0, 0, 0].tolist() == DRAWN


def colours(root, train=6, val=4, classes=("red", "green", "blue"), size=(20, 18), gain=8):
    """Images whose class is a colour, a faint one unless `gain` is large."""
    generator = np.random.default_rng(0)
    for split, count in (("train", train), ("val", val)):
        for place, name in enumerate(classes):
            (root / split / name).mkdir(parents=True, exist_ok=True)
            for index in range(count):
                pixels = generator.integers(0, 90, (*size, 3), dtype=np.uint8)
                pixels[..., place % 3] += gain
                Image.fromarray(pixels).save(root / split / name / f"{name}_{index}.png")
    return root


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return colours(tmp_path_factory.mktemp("colours"))


def test_a_list_names_files_or_paths(tmp_path, data):
    images = common.find_data(str(data), "train")
    (tmp_path / "list.txt").write_text("red_3.png\n\ngreen/green_0.png\n red_1.png \nred/red_3.png\n")
    few = low_shot(images, Config("x", list=str(tmp_path / "list.txt")))
    assert [Path(few.path(i)).name for i in range(len(few))] == ["green_0.png", "red_1.png", "red_3.png"]
    assert few.labels.tolist() == [1, 2, 2] and few.classes == ("blue", "green", "red")
    (tmp_path / "list.txt").write_text("\n")
    with pytest.raises(ValueError, match="list.txt names no image"):
        listed(images, tmp_path / "list.txt")
    (tmp_path / "list.txt").write_text("red_77.png\n")
    with pytest.raises(ValueError, match="list.txt: 0 images of .*train are called red_77.png"):
        listed(images, tmp_path / "list.txt")
    shutil.copytree(data, tmp_path / "twice")
    shutil.copy(data / "train/red/red_0.png", tmp_path / "twice/train/blue/red_0.png")
    (tmp_path / "list.txt").write_text("red_0.png\n")
    with pytest.raises(ValueError, match="2 images of .* are called red_0.png"):
        listed(common.find_data(str(tmp_path / "twice"), "train"), tmp_path / "list.txt")
    with pytest.raises(ValueError, match="made has none: give --data FOLDER, or --fraction"):
        listed(balanced(), tmp_path / "list.txt")
    with pytest.raises(FileNotFoundError, match="no such file"):
        listed(images, tmp_path / "none.txt")


# -- test


class Told(nn.Module):
    """Answers each image with the logits that its first pixel numbers."""

    def __init__(self, logits):
        super().__init__()
        self.logits, self.encoder = logits, common.ViT(8, 8, embed_dim=8, depth=1, num_heads=1)

    def forward(self, images):
        mean, std = common.IMAGENET_MEAN[0], common.IMAGENET_STD[0]
        return self.logits[((images[:, 0, 0, 0] * std + mean) * 255).round().long()]


def told(count=23, classes=7):
    logits = torch.randn(count, classes, generator=torch.Generator().manual_seed(1))
    labels = torch.randint(classes, (count,), generator=torch.Generator().manual_seed(2))
    pixels = torch.arange(count, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 8, 8)
    return Told(logits), common.Images(pixels, labels, map(str, range(classes)), "told"), logits, labels


def test_accuracy_of_a_hand_made_ranking():
    model, images, logits, labels = told()
    rank = (-logits.numpy()).argsort(1)
    top1 = np.mean([label == row[0] for row, label in zip(rank, labels.tolist())]) * 100
    top5 = np.mean([label in row[:5] for row, label in zip(rank, labels.tolist())]) * 100
    assert 0 < top1 < top5 < 100
    result = evaluate(model.train(), images, 5, 0, ONE)
    assert result == dict(accuracy=pytest.approx(top1), top5=pytest.approx(top5)) and not model.training
    model, images, logits, labels = told(classes=3)
    assert evaluate(model, images, 4, 0, ONE)["top5"] == 100


def test_processes_share_the_images_and_none_counts_twice(monkeypatch):
    model, images, logits, labels = told()
    seen = []
    for rank in range(3):
        batches = list(predictions(model, images, 4, 0, common.Processes(rank, 3, CPU)))
        seen += [row for rows, _ in batches for row in rows.tolist()]
    assert sorted(seen) == sorted(logits.tolist())
    # The sum over the processes is what `evaluate` gives in each of them.
    parts, total = [], evaluate(model, images, 4, 0, ONE)
    monkeypatch.setattr(common.Processes, "sum", lambda self, x: parts.append(x.clone()) or x)
    for rank in range(3):
        evaluate(model, images, 4, 0, common.Processes(rank, 3, CPU))
    counts = torch.stack(parts).sum(0).tolist()
    assert [100 * counts[0] / counts[2], 100 * counts[1] / counts[2]] == pytest.approx(list(total.values()))
    assert counts[2] == 23


def test_predictions_that_are_not_finite():
    model, images, logits, _ = told()
    logits[3, 2] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        evaluate(model, images, 5, 0, ONE)


# -- whole runs


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    path = tmp_path_factory.mktemp("pretrained") / "encoder.safetensors"
    common.save_encoder(tiny(), path, method="cae_v2")
    return path


# 18 images, 3 steps an epoch. All that draws is on, and the average of the weights.
FLAGS = ("--epochs=3 --batch_size=6 --micro_batch=3 --warmup_epochs=0.5 --lr=3e-3 --drop_path=0.3 "
         "--mixup=0.8 --cutmix=1.0 --ema=0.9 --workers=0 --device=cpu --compile=off --log_every=1").split()


@pytest.fixture(scope="module")
def unbroken(data, encoder, tmp_path_factory):
    out = tmp_path_factory.mktemp("unbroken") / "run"
    assert tune(data, encoder, out) == 0
    return out


def tune(data, encoder, out, *more):
    return call("--checkpoint", encoder, "--data", data, "--out", out, *FLAGS, *more, main=main)


def test_what_a_run_writes(unbroken, encoder, data):
    state = load(unbroken)
    assert (state["kind"], state["step"], state["classes"]) == ("finetuning", 9, ["blue", "green", "red"])
    assert state["encoder"]["embed_dim"] == 16
    assert state["encoder_sha256"] == hashlib.sha256(encoder.read_bytes()).hexdigest()
    lines = numbers(unbroken)
    assert [line["step"] for line in lines if "accuracy" in line] == [3, 6, 9]
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 10))
    assert lines[-1].keys() >= {"accuracy", "top5"} and lines[-1]["top5"] == 100
    assert json.loads((unbroken / "config.json").read_text())["layer_decay"] == 0.85
    with Image.open(unbroken / "preview.png") as picture:
        assert picture.size == (3 * 174 + 6, 22 + 6 * 174 + 22)
    # The rate of a layer is the schedule's times its scale; the last step's schedule in closed form.
    lr = 1e-6 + (3e-3 - 1e-6) * 0.5 * (1 + math.cos(math.pi * (8 - 2) / (9 - 2)))
    for group in state["optimizer"]["param_groups"]:
        assert group["lr"] == pytest.approx(lr * group["lr_scale"], rel=1e-9)
        assert group["betas"] == (0.9, 0.999) and group["eps"] == 1e-8
    found = sorted({group["lr_scale"] for group in state["optimizer"]["param_groups"]})
    assert found == pytest.approx([0.85**3, 0.85**2, 0.85, 1])


def test_the_result_line_has_all_to_repeat_it(unbroken, encoder, data):
    record = json.loads((encoder.parent / "eval.jsonl").read_text().splitlines()[0])
    assert record["kind"] == "finetune" and record["recipe"] == "cae_v2, vit_ti"
    assert record["accuracy"] == numbers(unbroken)[-1]["accuracy"]
    assert record["checkpoint"] == str(encoder) and record["run"] == str(unbroken)
    assert record["sha256"] == record["encoder_sha256"] == hashlib.sha256(encoder.read_bytes()).hexdigest()
    assert (record["train_images"], record["val_images"], record["classes"]) == (18, 12, 3)
    assert (record["steps"], record["world"], record["micro_batch"], record["seed"]) == (9, 1, 3, 0)
    flags = record["flags"]
    assert flags["layer_decay"] == 0.85 and flags["rel_pos_bias"] == "on" and flags["num_heads"] == 2
    assert -1 not in flags.values() and flags["lr"] == 3e-3
    assert record["torch"] == torch.__version__ and record["torchvision"] and record["command"]


@pytest.mark.parametrize("stops", [[4], [3, 7]])
def test_a_stopped_run_goes_on_bit_for_bit(tmp_path, data, encoder, unbroken, stops):
    for stop in stops:
        assert tune(data, encoder, tmp_path / "run", f"--max_steps={stop}") == 0
        assert load(tmp_path / "run")["step"] == stop
    assert tune(data, encoder, tmp_path / "run", "--save_every=2") == 0
    assert_same_run(tmp_path / "run", unbroken)


def test_each_micro_batch_of_each_step_draws_anew(tmp_path, data, encoder, monkeypatch):
    """Mixing and drop path: from (seed, step, row) alone, so a resumed run has the seeds of the whole one."""
    seeds = []

    def spy(config, num_classes):
        mix = make_mix(config, num_classes)
        return lambda *batch: (seeds.append(torch.initial_seed()), mix(*batch))[1]

    monkeypatch.setattr(finetune, "make_mix", spy)
    monkeypatch.setattr(finetune, "preview", lambda *arguments: None)
    assert tune(data, encoder, tmp_path / "run", "--max_steps=3") == 0
    expected = [common.seed_for(0, "step", step, row) for step in range(3) for row in (0, 3)]
    assert seeds == expected and len(set(seeds)) == 6


def test_steps_train_in_train_mode_with_smoothing_and_tests_see_the_average(tmp_path, data, encoder, monkeypatch):
    modes, tested, given = set(), [], {}
    forward, measure, criterion = Classifier.forward, evaluate, nn.CrossEntropyLoss

    def spy(self, images):
        modes.add((torch.is_grad_enabled(), self.training))
        return forward(self, images)

    monkeypatch.setattr(Classifier, "forward", spy)
    monkeypatch.setattr(finetune, "evaluate", lambda model, *rest: (
        tested.append(model.head.weight.clone()), measure(model, *rest))[1])
    monkeypatch.setattr(nn, "CrossEntropyLoss", lambda **words: (given.update(words), criterion(**words))[1])
    for ema in ("0", "0.9"):
        tested.clear()
        assert tune(data, encoder, tmp_path / "run", "--epochs=2", "--smoothing=0.15", "--ema", ema, "--fresh") == 0
        assert modes == {(True, True), (False, False)} and given == dict(label_smoothing=0.15)
    state = load(tmp_path / "run-2")
    assert torch.equal(tested[-1], state["ema"]["module.head.weight"]) and len(tested) == 2
    assert not torch.equal(tested[-1], state["model"]["head.weight"])


def test_a_run_killed_before_its_test_is_tested(tmp_path, data, encoder, unbroken, monkeypatch, capsys):
    class Killed(Exception):
        pass

    def killed(*arguments):
        raise Killed

    for epochs in (1, 3):  # after the first epoch, and after the last
        out = tmp_path / str(epochs)
        assert epochs == 1 or tune(data, encoder, out, "--max_steps=8") == 0
        monkeypatch.setattr(finetune, "test", killed)
        with pytest.raises(Killed):
            tune(data, encoder, out)
        monkeypatch.undo()
        assert load(out)["step"] == 3 * epochs and 3 * epochs not in measured(out)
        assert tune(data, encoder, out) == 0
        assert_same_run(out, unbroken)
        capsys.readouterr()
        assert tune(data, encoder, out) == 0
        assert "is finished, step 9" in capsys.readouterr().out
        assert_same_run(out, unbroken)


def test_eval_only_gives_the_runs_number(data, encoder, unbroken, capsys):
    assert call("--checkpoint", unbroken, "--data", data, "--eval_only", "--workers=0", main=main) == 0
    record = json.loads((unbroken / "eval.jsonl").read_text().splitlines()[-1])
    assert record["accuracy"] == numbers(unbroken)[-1]["accuracy"]
    assert record["checkpoint"] == str(unbroken / "last.pt") and record["trained_as"]["epochs"] == 3
    assert f"fine-tuned classifier: {record['accuracy']:.2f} %" in capsys.readouterr().out
    model, classes, state, path = load_classifier(unbroken)
    assert not model.training and classes == ["blue", "green", "red"] and path == unbroken / "last.pt"
    name = "head.weight"
    assert torch.equal(model.state_dict()[name], state["ema"][f"module.{name}"])  # the average, not the last
    assert not torch.equal(model.state_dict()[name], state["model"][name])


def test_the_average_is_that_of_the_formula(tmp_path, data, encoder):
    """w <- decay w + (1 - decay) now; the first step starts it, as torch's AveragedModel does."""
    steps = []
    for stop in (1, 2, 3):
        assert tune(data, encoder, tmp_path / "run", f"--max_steps={stop}") == 0
        steps.append({k: v.double() for k, v in load(tmp_path / "run")["model"].items()})
    ema = load(tmp_path / "run")["ema"]
    for name, value in steps[0].items():
        expected = 0.9 * (0.9 * value + 0.1 * steps[1][name]) + 0.1 * steps[2][name]
        torch.testing.assert_close(ema[f"module.{name}"].double(), expected, atol=1e-6, rtol=1e-5)


def test_colours_are_learnt_and_the_encoder_moves(tmp_path, encoder):
    quiet = [*"--epochs=15 --lr=5e-3 --mixup=0 --cutmix=0".split(),
             *"--randaugment=0 --erasing=0 --drop_path=0 --ema=0".split()]
    assert tune(colours(tmp_path / "data", gain=150), encoder, tmp_path / "run", *quiet) == 0
    assert numbers(tmp_path / "run")[-1]["accuracy"] == 100
    before, after = tiny().state_dict(), load(tmp_path / "run")["model"]
    still = {name for name in before if torch.equal(before[name], after[f"encoder.{name}"])}
    assert still == {"pos_embed", "norm.weight", "norm.bias"}
    assert after["encoder.blocks.0.attn.relative_position_bias_table"].any()
    with pytest.raises(ValueError, match="does not compute, blocks.0.attn.relative_position_bias_table"):
        load_encoder(tmp_path / "run")


def test_an_encoder_without_class_token_and_another_size(tmp_path, data):
    common.save_encoder(tiny(class_token=False), tmp_path / "encoder.safetensors", method="beyond_masking")
    more = ("--img_size=24", "--ema=0", "--epochs=1")
    assert tune(data, tmp_path / "encoder.safetensors", tmp_path / "run", *more) == 0
    encoder = load_encoder(tmp_path / "run")  # no bias: a plain ViT
    assert encoder.grid == (3, 3) and encoder.cls_token is None
    before = load_encoder(tmp_path / "encoder.safetensors", img_size=24)
    assert not torch.equal(encoder.pos_embed, before.pos_embed)  # learnt there
    assert load_classifier(tmp_path / "run")[0].encoder.img_size == (24, 24)


def test_random_init_is_the_floor(tmp_path, data, encoder, monkeypatch):
    """The same shape, weights of the seed, a folder of its own, and said in the result line."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(encoder.parent, "own")
    still = "--epochs=1 --lr=1e-12 --min_lr=0 --weight_decay=0 --ema=0 --random_init --seed=5".split()
    assert call("--checkpoint", "own", "--data", data, *FLAGS, *still, main=main) == 0
    after = load(tmp_path / "runs" / "finetune_own_random")["model"]
    torch.manual_seed(5)
    for name, value in common.ViT(**load_encoder("own").config).state_dict().items():
        torch.testing.assert_close(after[f"encoder.{name}"], value, atol=1e-7, rtol=0)
    record = json.loads(Path("own/eval.jsonl").read_text().splitlines()[-1])
    assert record["random_init"] is True


def test_two_processes_are_one(tmp_path, data, encoder):
    """Without what is drawn per micro batch. And the script runs under torchrun."""
    more = "--mixup=0 --cutmix=0 --drop_path=0 --epochs=1".split()
    assert tune(data, encoder, tmp_path / "one", *more) == 0
    shutil.copytree(encoder.parent, tmp_path / "own")
    argv = ["--checkpoint", tmp_path / "own", "--data", data, "--out", tmp_path / "two", *FLAGS, *more]
    process = start(*argv, script=["-m", "eval.finetune"], processes=2)
    code, out, err = finish(process)
    assert code == 0, err
    assert out.count("loaded ") == 1 and out.count("fine-tuned on 18 images") == 1
    one, two = load(tmp_path / "one"), load(tmp_path / "two")
    for name, value in one["model"].items():
        torch.testing.assert_close(two["model"][name], value, atol=2e-5, rtol=1e-4)
    left, right = numbers(tmp_path / "one"), numbers(tmp_path / "two")
    for a, b in zip(left, right, strict=True):
        assert a == pytest.approx(b, rel=1e-3)
    record = json.loads((tmp_path / "own" / "eval.jsonl").read_text().splitlines()[-1])
    assert record["world"] == 2 and record["val_images"] == 12


@pytest.mark.slow
def test_sigterm_saves_and_the_same_command_goes_on(tmp_path, data, encoder, unbroken):
    argv = ["--checkpoint", encoder, "--data", data, "--out", tmp_path / "run", *FLAGS, "--epochs=300"]
    process = start(*argv, script=["-m", "eval.finetune"])
    while not (tmp_path / "run" / "last.pt").exists():
        assert process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    code, out, err = finish(process)
    assert code == 128 + signal.SIGTERM and "the same command goes on" in out
    saved = load(tmp_path / "run")["step"]
    assert call(*argv, f"--max_steps={saved + 2}", main=main) == 0
    assert load(tmp_path / "run")["step"] == saved + 2


# -- bad input


def fails(capsys, *argv):
    capsys.readouterr()
    assert call(*argv, main=main) == 1
    error, = capsys.readouterr().err.splitlines()
    return error.removeprefix("error: ")


def test_bad_flags(capsys, encoder, data):
    given = ["--checkpoint", encoder, "--data", data]
    assert "--checkpoint is missing" in fails(capsys, "--data", data)
    for flag, sentence in {
        "--fraction=0": "--fraction 0 must be greater than 0",
        "--fraction=1.5": "--fraction 1.5 must be at most 1",
        "--layer_decay=0": "--layer_decay 0 must be greater than 0",
        "--layer_decay=1.2": "--layer_decay 1.2 must be at most 1",
        "--drop_path=1": "--drop_path and --ema must be below 1",
        "--randaugment=11": "--randaugment at most 10",
        "--mixup=-0.5": "--mixup -0.5 must be at least 0",
        "--epochs=0": "--epochs 0 must be at least 1",
        "--epochs=3": "--warmup_epochs 5 must be shorter than the run of 3 epochs",
        "--ema=1": "--ema must be below 1",
        "--recipe=dino": "invalid choice: 'dino'",
        "--smoothing=2": "--smoothing 2 must be at most 1",
        "--batch_size=100": "the data hold 18 images, less than one batch of 100",
        "--laier_decay=1": "did you mean --layer_decay?",
    }.items():
        assert sentence in fails(capsys, *given, flag), flag
    assert "give one of them" in fails(capsys, *given, "--fraction=0.5", "--list=x")


def test_bad_checkpoints(capsys, tmp_path, data, unbroken):
    assert "there is no checkpoint at" in fails(capsys, "--checkpoint", tmp_path / "x.pth", "--data", data)
    common.save_encoder(tiny(), tmp_path / "e.safetensors")
    sentence = fails(capsys, "--checkpoint", tmp_path / "e.safetensors", "--data", data)
    assert "does not say which method trained it: give --recipe" in sentence
    torch.save(dict(model=dict(a=torch.zeros(2))), tmp_path / "other.pth")
    assert "no vision transformer" in fails(capsys, "--checkpoint", tmp_path / "other.pth", "--data", data)
    torch.save(dict(kind="pretraining"), tmp_path / "last.pt")
    sentence = fails(capsys, "--checkpoint", tmp_path, "--data", data, "--eval_only")
    assert "last.pt is no fine-tuned classifier" in sentence
    # A fine-tuned encoder that needs its relative bias.
    assert "does not compute" in fails(capsys, "--checkpoint", unbroken, "--data", data, "--recipe=mae")


def test_a_changed_encoder_or_flag_stops_the_resumed_run(capsys, tmp_path, data):
    path = tmp_path / "encoder.safetensors"
    common.save_encoder(tiny(), path, method="cae_v2")
    assert tune(data, path, tmp_path / "run", "--max_steps=2") == 0
    argv = ["--checkpoint", path, "--data", data, "--out", tmp_path / "run", *FLAGS]
    assert "--seed was 0" in fails(capsys, *argv, "--seed=1")
    assert "--layer_decay was 0.85" in fails(capsys, *argv, "--layer_decay=0.5")
    common.save_encoder(tiny(), path, method="cae_v2", step=7)
    assert "is not the file any more that the run in" in fails(capsys, *argv)


def test_bad_data(capsys, tmp_path, encoder):
    folder = colours(tmp_path / "data")
    argv = ["--checkpoint", encoder, "--data", folder, *FLAGS, "--out", tmp_path / "run", "--epochs=1"]
    (folder / "val/blue").rename(folder / "val/pink")
    sentence = fails(capsys, *argv)
    assert "must be the same; in one of them only: blue, pink" in sentence and not (tmp_path / "run").exists()
    (folder / "val/pink").rename(folder / "val/blue")
    (folder / "val/blue/blue_1.png").write_bytes(b"junk")
    assert call(*argv, main=main) == 1
    assert "val/blue/blue_1.png cannot be read as an image" in capsys.readouterr().err.splitlines()[-1]
    shutil.rmtree(folder / "val")
    assert "has no folder val/ or validation/ or test/" in fails(capsys, *argv)
    assert "no data folder" in fails(capsys, "--checkpoint", encoder, "--data", tmp_path / "none")


def test_an_unreadable_training_image_is_replaced_and_named(capsys, tmp_path, encoder):
    folder = colours(tmp_path / "data")
    (folder / "train/blue/blue_4.png").write_bytes(b"junk")
    assert tune(folder, encoder, tmp_path / "run", "--epochs=1") == 0
    assert "blue_4.png cannot be read" in capsys.readouterr().err


def test_every_decision_is_explained():
    source = Path(finetune.__file__).read_text()
    used, explained = (set(re.findall(pattern, source)) for pattern in (r"\[D(\d)\]", r"  \[D(\d)\] "))
    assert used == explained == set("12345678")


DRAWN = [7, 18, 37, 41, 45, 52, 64]
