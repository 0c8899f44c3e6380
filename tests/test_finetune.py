"""eval/finetune.py: recipes, model, groups, augmentation against papers, timm and torch; what its runs have
beside those of tests/test_runs.py: tests after each epoch, the average of the weights, the result line."""

import hashlib
import json
from concurrent import futures
import math
import random
import re
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
from eval.finetune import (RECIPES, Augment, Classifier, Config, build, evaluate, load_classifier, low_shot, main,
                           make_mix, measured, relative_positions, with_recipe)
from eval.protocol import layer_groups
from helpers import assert_same_run, call, differences, load, numbers

CASES = torch.load(Path(__file__).parent / "golden" / "cae_v2.pt")
ONE, *THREE = (common.Dist(*ranks, torch.device("cpu")) for ranks in ((0, 1), (0, 3), (1, 3), (2, 3)))
PLAIN = Config(checkpoint="x", workers=0)


def tiny(**changes):
    torch.manual_seed(3)
    return common.ViT(**{**dict(img_size=16, patch_size=8, embed_dim=16, depth=2, num_heads=2), **changes})


def wide(width):
    return SimpleNamespace(config=dict(embed_dim=width, num_heads=2), cls_token=1)


def resolved(method="cae_v2", width=16, **typed):
    return with_recipe(Config(checkpoint="x", recipe=method, **typed), Path("x"), wide(width))[0]


# Typed from the papers' notes; `lr` is what it comes to at the batch of the recipe.
PAPERS = """
cae_v2         vit_ti 100    5    1024  4e-3 0.85  0.0       0.2   0.0    0.0    on  encoder fixed
cae_v2         vit_s  200    20   1024  4e-4 0.75  0.1       0.8   1.0    0.1    on  encoder fixed
cae_v2         vit_b  100    5    1024  2e-4 0.75  0.1       0.8   1.0    0.1    on  encoder fixed
cae_v2         vit_l  50     5    4096  2e-3 0.75  0.2       0.8   1.0    0.1    on  encoder fixed
mfm_mae        vit_s  100    5    1024  2e-3 0.65  0.1       0.8   1.0    0.1    off fresh   learned
mfm_mae        vit_b  100    5    1024  2e-3 0.65  0.1       0.8   1.0    0.1    off fresh   learned
mfm_mae        vit_l  50     5    1024  4e-3 0.75  0.2       0.8   1.0    0.1    off fresh   learned
mfm_mae        vit_h  50     5    1024  4e-3 0.75  0.3       0.8   1.0    0.1    off fresh   learned
beyond_masking vit_b  100    5    1024  4e-3 0.75  0.1       0.8   1.0    0.1    off fresh   learned
"""
HEAD = "epochs warmup_epochs batch_size lr layer_decay drop_path mixup cutmix smoothing".split()
ROWS = [line.split() for line in PAPERS.strip().splitlines()]
WIDTH = dict(vit_ti=192, vit_s=384, vit_b=768, vit_l=1024, vit_h=1280)


@pytest.mark.parametrize("row", [*ROWS, *(["mae", *row[1:]] for row in ROWS if row[0] == "mfm_mae")])
def test_recipes_are_the_papers(row):
    method, size, *values, rel, fc_norm, positions = row
    asked = Config(checkpoint="x", recipe=method)
    config, name, equation = with_recipe(asked, Path("x"), wide(WIDTH[size]))
    assert name == f"{method}, {size}" and equation == (
        "absolute" if method == "cae_v2" else f"{config.lr / 4:g} x batch 1024 / 256")
    assert [getattr(config, name) for name in HEAD] == pytest.approx([float(value) for value in values])
    assert (config.rel_pos_bias, config.fc_norm, config.positions) == (rel, fc_norm, positions)
    # What all papers share.
    assert (config.min_lr, config.weight_decay, config.randaugment, config.erasing) == (1e-6, 0.05, 9, 0.25)
    assert (config.pool, config.crop_min, config.ema) == ("mean", 0.08, 0.0)


def test_flags_win_the_base_lr_scales_and_the_nearest_width_counts():
    assert resolved("mae", 768, batch_size=512).lr == pytest.approx(1e-3)
    assert resolved("cae_v2", 768, batch_size=512).lr == 2e-4  # absolute
    config = resolved("mae", 768, lr=0.5, epochs=7, mixup=0.0, pool="cls", rel_pos_bias="on")
    assert (config.lr, config.epochs, config.mixup, config.pool) == (0.5, 7, 0, "cls")
    assert config.rel_pos_bias == "on" and config.cutmix == 1.0
    assert resolved("cae_v2", 128).layer_decay == 0.85 and resolved("beyond_masking", 1024).epochs == 100
    assert sum(map(len, RECIPES.values())) == len(ROWS) + len(RECIPES["mae"])  # no row that no paper gives


def test_auto_takes_the_method_that_the_checkpoint_names(tmp_path):
    vit, auto = tiny(), Config(checkpoint="x")
    common.save_encoder(vit, tmp_path / "e.safetensors", method="mfm_mae")
    assert with_recipe(auto, tmp_path / "e.safetensors", vit)[1] == "mfm_mae, vit_s"
    torch.save(dict(method="beyond_masking"), tmp_path / "last.pt")
    assert with_recipe(auto, tmp_path / "last.pt", vit)[1] == "beyond_masking, vit_b"
    torch.save(dict(model={}), tmp_path / "mae.pth")
    with pytest.raises(ValueError, match="mae.pth does not say which method trained it: give --recipe"):
        with_recipe(auto, tmp_path / "mae.pth", vit)


@pytest.mark.parametrize("name", ["A_base_like", "B_tiny_like_projected"])
@pytest.mark.parametrize("pool, key", [("mean", "finetune_meanpool_fcnorm"), ("cls", "linear_probe_cls")])
def test_features_are_the_authors(tmp_path, name, pool, key):
    case = CASES["cases"][name]
    torch.save(case["state_dict"], tmp_path / "official.pth")
    for rel in (False, True):  # the bias starts at zero
        vit = load_encoder(tmp_path / "official.pth", num_heads=case["config"]["num_heads"])
        with torch.no_grad():
            ours = Classifier(vit, 5, pool, "encoder", rel_pos_bias=rel).eval().features(case["images"])
        torch.testing.assert_close(ours, case["transfer"][key], atol=1e-5, rtol=0)


def test_the_fine_tuned_model_is_timms_beit():
    """All of the model with non-zero tables, on a grid that is not square; and their index alone on others."""
    for grid, cls in ((3, 3), True), ((2, 4), True), ((4, 2), False), ((1, 1), True):
        assert torch.equal(relative_positions(grid, cls), gen_relative_position_index(grid, class_token=cls))
    torch.manual_seed(0)
    theirs = Beit(img_size=(24, 16), patch_size=8, embed_dim=12, depth=2, num_heads=3, num_classes=5,
                  use_rel_pos_bias=True, init_values=0.1, global_pool="avg").eval()
    ours = Classifier(common.ViT((24, 16), 8, embed_dim=12, depth=2, num_heads=3, init_values=0.1), 5,
                      rel_pos_bias=True).eval()
    state = {name: value if name.startswith("encoder.norm") else torch.randn_like(value) * 0.5
             for name, value in ours.state_dict().items()}
    ours.load_state_dict(state)
    official = {}
    for name, value in state.items():
        name = re.sub(r"ls([12]).gamma", r"gamma_\1", name.removeprefix("encoder."))
        if name.endswith("qkv.bias"):  # BEiT has no key bias, and one changes nothing
            q, _, v = value.chunk(3)
            official |= {name.replace("qkv.bias", "q_bias"): q, name.replace("qkv.bias", "v_bias"): v}
        elif name not in ("norm.weight", "norm.bias"):
            official[name] = value
    theirs.load_state_dict(official)
    images = torch.randn(3, 3, 24, 16)
    with torch.no_grad():
        torch.testing.assert_close(ours(images), theirs(images), atol=1e-4, rtol=1e-4)


def test_head_norm_positions_and_drop_path_of_each_recipe():
    for method in ("cae_v2", "mae"):
        vit = tiny(embed_dim=64, depth=3)
        nn.init.normal_(vit.norm.weight)
        model = build(resolved(method, 64, drop_path=0.2), vit, 500)
        assert model.head.weight.std().item() == pytest.approx(2e-5, rel=0.02) and not model.head.bias.any()
        expected = vit.norm.weight if method == "cae_v2" else torch.ones(64)
        assert torch.equal(model.fc_norm.weight, expected) and model.fc_norm.weight is not vit.norm.weight
        assert vit.pos_embed.requires_grad == (method == "mae") and model.fc_norm.eps == 1e-6
        assert [block.drop_path.rate for block in vit.blocks] == pytest.approx([0, 0.1, 0.2])
    first, again, other = (build(resolved(seed=seed), tiny(), 5) for seed in (0, 0, 1))
    assert differences(first.state_dict(), again.state_dict()) == []
    assert not torch.equal(other.head.weight, first.head.weight)


@pytest.mark.parametrize("pool, cls", [("mean", True), ("mean", False), ("cls", True)])
def test_every_trained_parameter_gets_a_gradient(pool, cls):
    """DDP would wait for one that gets none."""
    model = build(resolved("cae_v2", pool=pool, positions="learned"), tiny(class_token=cls), 5)
    nn.functional.cross_entropy(model(torch.randn(4, 3, 16, 16)), torch.arange(4)).backward()
    assert [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None] == []


def scales(groups, model):
    """{name: (share of the learning rate, weight decay)} of the parameters in an optimiser's groups."""
    of = {p: (group["lr_scale"], group["weight_decay"]) for group in groups for p in group["params"]}
    assert len(of) == sum(len(group["params"]) for group in groups)
    return {name.removeprefix("encoder."): of[p] for name, p in model.named_parameters() if p in of}


def test_layer_scales_are_the_authors_and_groups_timms():
    model = Classifier(tiny(depth=12, init_values=0.1), 5, rel_pos_bias=True)
    for size, decay in (("tiny", 0.85), ("small", 0.75), ("base", 0.75)):
        ours = scales(layer_groups(model, model.encoder, 0.07, decay), model)
        names = ["cls_token", *(f"blocks.{index}.mlp.fc1.bias" for index in range(12)), "fc_norm.weight"]
        assert [ours[name][0] for name in names] == pytest.approx(CASES["finetune_layer_lr_scales"][size])
        assert ours["blocks.10.attn.relative_position_bias_table"] == (pytest.approx(decay**2), 0.07)
        assert "pos_embed" not in ours  # frozen
    theirs = VisionTransformer(img_size=16, patch_size=8, embed_dim=16, depth=12, num_heads=2, num_classes=5,
                               global_pool="avg", fc_norm=True, init_values=0.1)
    groups = param_groups_layer_decay(theirs, 0.07, theirs.no_weight_decay(), layer_decay=decay)
    model.encoder.pos_embed.requires_grad_(True)
    expected, ours = scales(groups, theirs), scales(layer_groups(model, model.encoder, 0.07, decay), model)
    assert {name: ours[name] for name in expected} == {name: pytest.approx(pair) for name, pair in expected.items()}


def test_crop_flip_and_erasing_are_torchvisions():
    """Erasing writes normal noise per pixel and channel, with timm's areas and aspects."""
    augment = Augment(resolved(randaugment=0, erasing=0.25, crop_min=0.3), (16, 24))
    image = torch.randint(256, (3, 40, 50), dtype=torch.uint8)
    crop = v2.RandomResizedCrop((16, 24), (0.3, 1.0), interpolation=InterpolationMode.BICUBIC)
    erase = v2.RandomErasing(0.25, scale=(0.02, 1 / 3), ratio=(0.3, 1 / 0.3), value="random")
    for seed in range(40):
        torch.manual_seed(seed)
        ours, label = augment(image, 7)
        torch.manual_seed(seed)
        expected = v2.RandomHorizontalFlip()(crop(image))
        torch.testing.assert_close(ours, erase(common.normalise(expected[None])[0]), atol=1e-6, rtol=0)
        assert label == 7 and ours.dtype == torch.float32


def test_randaugment_is_timms(monkeypatch):
    """Brightness of a grey image shows factor and sign; timm's noise on the strength is switched off."""
    augment = Augment(resolved(randaugment=9, erasing=0.0), (8, 8))
    theirs = rand_augment_transform("rand-m9-inc1-n1", {})
    grey, levels, official, counts = torch.full((3, 8, 8), 100, dtype=torch.uint8), set(), set(), []
    for generator in (torch.manual_seed, random.seed, np.random.seed):
        generator(0)
    for _ in range(400):
        levels.add((255 * common.unnormalise(augment(grey, 0)[0])).round()[0, 4, 4].int().item())
        official.add(theirs(Image.new("RGB", (8, 8), (100, 100, 100))).getpixel((4, 4))[0])
    assert {181, 19} <= official and {181, 19} <= levels  # 100 (1 +- 0.9 x 0.9)
    monkeypatch.setattr(v2.RandAugment, "forward", lambda self, image: counts.append(1) or image)
    for _ in range(400):
        augment(grey, 0)
    assert 350 < len(counts) < 450  # of 800
    assert [operation.prob for operation in theirs.ops] == [0.5] * 15


@pytest.mark.parametrize("mixup, cutmix", [(0.8, 0.0), (0.0, 1.0), (0.8, 1.0)])
def test_mixed_targets_and_loss_are_timms(mixup, cutmix):
    mix = make_mix(resolved(mixup=mixup, cutmix=cutmix), 5)
    images, logits, labels = torch.rand(4, 3, 8, 8), torch.randn(4, 5), torch.tensor([0, 3, 1, 3])
    partner, seen = images.roll(1, 0), set()
    for seed in range(40):
        torch.manual_seed(seed)
        mixed, targets = mix(images, labels)
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
        expected = sum(part * mixup_target(order, 5, smoothing=0.1)
                       for part, order in ((share, labels), (1 - share, labels.roll(1))))
        loss = nn.CrossEntropyLoss(label_smoothing=0.1)(logits, targets)
        torch.testing.assert_close(loss, SoftTargetCrossEntropy()(logits, expected), atol=1e-6, rtol=0)
    assert seen == {name for name, alpha in (("mixup", mixup), ("cutmix", cutmix)) if alpha}
    assert [kind.alpha for kind in mix.transforms] == [alpha for alpha in (mixup, cutmix) if alpha]
    assert make_mix(resolved(mixup=0.0, cutmix=0.0), 5)(images, labels) == (images, labels)


def test_a_fraction_is_taken_from_each_class():
    labels = torch.arange(3).repeat_interleave(torch.tensor([20, 40, 5]))
    images = common.Images(torch.arange(65).byte()[:, None, None, None], labels, "abc", "made")
    few = low_shot(images, Config(checkpoint="x", fraction=0.1))
    assert torch.bincount(few.labels).tolist() == [2, 4, 1]  # round(0.5) is 0, but one at least
    # As drawn once: torch's CPU generator and the seeds' hash depend on no machine.
    assert few.pixels.flatten().tolist() == [7, 18, 37, 41, 45, 52, 64]
    other = low_shot(images, Config(checkpoint="x", fraction=0.1, seed=1))
    assert not torch.equal(other.pixels, few.pixels) and low_shot(images, PLAIN) is images


def test_accuracy_by_hand_and_shares_of_the_images(monkeypatch):
    torch.manual_seed(1)
    images = common.Images(torch.randint(256, (23, 3, 16, 16), dtype=torch.uint8), torch.randint(7, (23,)))
    model, parts = build(resolved(drop_path=0.9), tiny(), 7), []
    nn.init.normal_(model.head.weight)
    rank = model.eval()(common.normalise(images.pixels)).argsort(1, descending=True)
    hits = rank == images.labels[:, None]
    first, five = hits[:, 0].sum().item(), hits[:, :5].sum().item()
    expected = pytest.approx(dict(accuracy=100 * first / 23, top5=100 * five / 23))
    assert evaluate(model.train(), images, 5, PLAIN, ONE) == expected and 0 < first < five < 23
    monkeypatch.setattr(common.Dist, "all_reduce", lambda self, x: parts.append(x.clone()) or x)
    for dist in THREE:  # none counts twice
        evaluate(model, images, 4, PLAIN, dist)
    assert torch.stack(parts).sum(0).tolist() == [first, five, 23]
    model.head.bias.data[2] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        evaluate(model, images, 5, PLAIN, ONE)
    images.labels %= 3
    assert evaluate(build(resolved(), tiny(), 3), images, 9, PLAIN, ONE)["top5"] == 100


# -- runs: 3 steps an epoch; all that draws is on, and the average of the weights

FLAGS = ("--epochs=3 --batch_size=6 --micro_batch=3 --warmup_epochs=0.5 --lr=3e-3 --drop_path=0.3 "
         "--mixup=0.8 --cutmix=1 --ema=0.9 --workers=0 --device=cpu --compile=off --log_every=1").split()


def colours(root, gain=8):
    """18 images to train on, 12 to test, whose class is a colour, a faint one unless `gain` is large."""
    generator = np.random.default_rng(0)
    for split, count in (("train", 6), ("val", 4)):
        for place, name in enumerate(("red", "green", "blue")):
            (root / split / name).mkdir(parents=True)
            for index in range(count):
                pixels = generator.integers(0, 90, (20, 18, 3), dtype=np.uint8)
                pixels[..., place] += gain
                Image.fromarray(pixels).save(root / split / name / f"{name}_{index}.png")
    return root


def tune(root, out, *more):
    place = ["--checkpoint", root / "encoder", "--data", root / "data", "--out", out]
    return call(*place, *FLAGS, *more, main=main)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("root")
    colours(root / "data")
    common.save_encoder(tiny(), root / "encoder" / "encoder.safetensors", method="cae_v2")
    assert tune(root, root / "run") == 0
    return root


def test_what_a_run_writes(root):
    state, lines = load(root / "run"), numbers(root / "run")
    assert (state["kind"], state["step"], state["classes"]) == ("finetuning", 9, ["blue", "green", "red"])
    assert [line["step"] for line in lines if "accuracy" in line] == [3, 6, 9]
    assert Image.open(root / "run" / "preview.png").width == 3 * 174 + 6
    # The rate of a layer is the schedule's times its scale; the last step's schedule in closed form.
    lr = 1e-6 + (3e-3 - 1e-6) * 0.5 * (1 + math.cos(math.pi * (8 - 2) / (9 - 2)))
    groups = state["optimizer"]["param_groups"]
    assert [group["lr"] for group in groups] == pytest.approx([lr * group["lr_scale"] for group in groups])
    assert min(group["lr_scale"] for group in groups) == pytest.approx(0.85**3)
    # The result line has all to repeat it.
    path = root / "encoder" / "encoder.safetensors"
    record = json.loads(path.with_name("eval.jsonl").read_text().splitlines()[0])
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert record["sha256"] == record["encoder_sha256"] == state["encoder_sha256"] == digest
    expected = dict(kind="finetune", recipe="cae_v2, vit_ti", accuracy=lines[-1]["accuracy"], top5=100,
                    checkpoint=str(path), run=str(root / "run"), train_images=18, val_images=12, classes=3,
                    steps=9, world=1, micro_batch=3, seed=0, random_init=False)
    flags = dict(layer_decay=0.85, rel_pos_bias="on", num_heads=2, lr=3e-3, smoothing=0.0, batch_size=6)
    assert expected.items() <= record.items() and flags.items() <= record["flags"].items()


def test_another_encoder_stops_a_run(root, tmp_path, capsys):
    """Under the same name; a flag of an older version, --list, does not."""
    common.save_encoder(tiny(), tmp_path / "other.safetensors", method="cae_v2", step=7)
    changed = dict(checkpoint=str(tmp_path / "other.safetensors"), out=str(tmp_path), list="")
    state = load(root / "run")
    torch.save(dict(state, config=state["config"] | changed), tmp_path / "last.pt")
    sentence = fails(capsys, root, tmp_path, "--checkpoint", tmp_path / "other.safetensors")
    assert "is not the file any more that the run in" in sentence


def test_steps_are_smoothed_and_tests_see_the_average(root, tmp_path, monkeypatch):
    """w <- decay w + (1 - decay) now; the first step starts it, as torch's AveragedModel does."""
    tested, steps, seen, measure, forward = [], [], set(), evaluate, nn.CrossEntropyLoss.forward
    monkeypatch.setattr(finetune, "evaluate", lambda model, *rest: (
        tested.append(model.head.weight.clone()) or measure(model, *rest)))
    monkeypatch.setattr(nn.CrossEntropyLoss, "forward", lambda self, logits, targets: (
        seen.add((self.label_smoothing, *targets.shape)) or forward(self, logits, targets)))
    for stop in (1, 2, 3):
        assert tune(root, tmp_path / "run", "--smoothing=0.15", f"--max_steps={stop}") == 0
        steps.append(load(tmp_path / "run")["model"])
    ema = load(tmp_path / "run")["ema"]
    for name, value in steps[0].items():
        expected = 0.9 * (0.9 * value + 0.1 * steps[1][name]) + 0.1 * steps[2][name]
        torch.testing.assert_close(ema[f"module.{name}"], expected, atol=1e-6, rtol=1e-5)
    assert len(tested) == 1 and torch.equal(tested[0], ema["module.head.weight"])
    assert not torch.equal(tested[0], steps[2]["head.weight"])
    assert seen == {(0.15, 3, 3)}  # soft targets, as mixed


@pytest.mark.parametrize("epochs", [1, 3])  # after the first epoch, and after the last
def test_a_run_killed_before_its_test_is_tested(root, tmp_path, monkeypatch, capsys, epochs):
    out = tmp_path / "run"
    assert epochs == 1 or tune(root, out, "--max_steps=8") == 0

    def die(*_):
        futures.wait([runs[-1].saving])  # as a process does that ends
        raise TypeError

    runs, save = [], common.Run.save
    monkeypatch.setattr(common.Run, "save", lambda self, *a, **k: runs.append(self) or save(self, *a, **k))
    monkeypatch.setattr(finetune, "test", die)
    with pytest.raises(TypeError):  # dies between save and test
        tune(root, out, "--save_every=3")
    monkeypatch.undo()
    assert load(out)["step"] == 3 * epochs and 3 * epochs not in measured(out)
    for sentence in ("fine-tuned on 18 images", "is finished, step 9"):
        assert tune(root, out) == 0
        assert sentence in capsys.readouterr().out
        assert_same_run(out, root / "run")


def test_eval_only_gives_the_runs_number(root, capsys):
    run = root / "run"
    assert call("--checkpoint", run, "--data", root / "data", "--eval_only", "--workers=0", main=main) == 0
    record = json.loads((run / "eval.jsonl").read_text().splitlines()[-1])
    assert record["accuracy"] == numbers(run)[-1]["accuracy"] and record["trained_as"]["epochs"] == 3
    assert f"fine-tuned classifier: {record['accuracy']:.2f} %" in capsys.readouterr().out
    model, classes, state, path = load_classifier(run)
    assert not model.training and classes == ["blue", "green", "red"] and path == run / "last.pt"
    assert torch.equal(model.head.weight, state["ema"]["module.head.weight"])  # the average, not the last
    assert not torch.equal(model.head.weight, state["model"]["head.weight"])


def test_colours_are_learnt_and_the_encoder_moves(root, tmp_path):
    more = "--epochs=15 --lr=5e-3 --mixup=0 --cutmix=0 --randaugment=0 --erasing=0 --drop_path=0 --ema=0"
    bright = colours(tmp_path / "data", gain=150)
    assert tune(root, tmp_path / "run", "--data", bright, *more.split()) == 0
    assert numbers(tmp_path / "run")[-1]["accuracy"] == 100
    before, after = tiny().state_dict(), load(tmp_path / "run")["model"]
    still = {name for name in before if torch.equal(before[name], after[f"encoder.{name}"])}
    assert still == {"pos_embed", "norm.weight", "norm.bias"}
    assert after["encoder.blocks.0.attn.relative_position_bias_table"].any()
    with pytest.raises(ValueError, match="does not compute, blocks.0.attn.relative_position_bias_table"):
        load_encoder(tmp_path / "run")


def test_another_size_without_class_token_and_the_random_baseline(root, tmp_path, monkeypatch):
    """The baseline has the same shape, weights of the seed, a folder of its own, a word in the result."""
    monkeypatch.chdir(tmp_path)
    common.save_encoder(tiny(class_token=False), "own/encoder.safetensors", method="beyond_masking")
    still = "--epochs=1 --lr=1e-12 --min_lr=0 --weight_decay=0 --ema=0 --random_init --seed=5 --img_size=24"
    assert tune(root, "", "--checkpoint=own", *still.split()) == 0
    after = load_encoder("runs/finetune_own_random")  # no bias: a plain ViT
    assert after.grid == (3, 3) and after.cls_token is None
    torch.manual_seed(5)
    expected = common.ViT(**after.config).state_dict()
    torch.testing.assert_close(after.state_dict(), expected, atol=1e-7, rtol=0)
    assert load_classifier("runs/finetune_own_random")[0].encoder.img_size == (24, 24)
    assert json.loads(Path("own/eval.jsonl").read_text().splitlines()[-1])["random_init"] is True


def test_a_fine_tuned_file_and_statistics_of_its_own(root, tmp_path, capsys, monkeypatch):
    """Without a final norm it serves where none is read; --mean_std reaches training, test and --eval_only."""
    state = tiny().state_dict()
    state["fc_norm.weight"], state["fc_norm.bias"] = state.pop("norm.weight"), state.pop("norm.bias")
    torch.save({"model": state}, tmp_path / "x.pth")
    own = ["--checkpoint", tmp_path / "x.pth", "--num_heads=2", "--max_steps=1", "--recipe=mae"]
    for flags in (["--fc_norm=encoder"], ["--pool=cls"]):
        assert "without the encoder's final norm" in fails(capsys, root, tmp_path / "run", *own, *flags)
    seen, embed = [], common.ViT.embed
    monkeypatch.setattr(common.ViT, "embed", lambda vit, x, *more: seen.append(x) or embed(vit, x, *more))
    plain = "--epochs=1 --mixup=0 --cutmix=0 --randaugment=0 --erasing=0 --mean_std=half --max_steps=3"
    assert tune(root, tmp_path / "run", *own, *plain.split()) == 0
    config = load(tmp_path / "run")["encoder"]
    assert (config["mean"], config["std"]) == ([0.5] * 3, [0.5] * 3)
    assert call("--checkpoint", tmp_path / "run", "--data", root / "data", "--eval_only", "--workers=0", main=main) == 0
    grid = (torch.cat([images.flatten() for images in seen]) / 2 + 0.5) * 255  # 0 .. 255 again, with 0.5 and 0.5
    assert torch.allclose(grid, grid.round(), atol=1e-3) and grid.min() >= -1e-3


def fails(capsys, *argv):
    capsys.readouterr()
    assert tune(*argv) == 1
    return capsys.readouterr().err.splitlines()[-1].removeprefix("error: ")


def test_what_is_refused(capsys, root, tmp_path):
    for flag, sentence in (("--fraction=0", "--fraction"), ("--fraction=1.5", "--fraction 1.5 must be at most 1"),
            ("--mixup=-0.5", "--mixup"), ("--drop_path=1", "--drop_path and --ema must be below 1"),
            ("--randaugment=11", "--randaugment at most 10"), ("--warmup_epochs=3", "shorter than the run"),
            ("--batch_size=100", "18 images are less than one batch of 100")):
        assert sentence in fails(capsys, root, tmp_path / "run", flag), flag
    with pytest.raises(ValueError, match="no class token, use --pool mean"):
        with_recipe(Config(checkpoint="x", recipe="mae", pool="cls"), Path("x"), tiny(class_token=False))
