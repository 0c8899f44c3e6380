"""eval/robustness.py: classes by name, restricted arg max, errors and constants by hand; the command."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import common
from eval import robustness
from eval.finetune import Classifier
from eval.protocol import centre_view
from eval.robustness import ALEXNET, Config, by_name, errors, main, mean_corruption_error
from helpers import call, write_images
from results import made_up_sets

CPU = torch.device("cpu")
WNIDS = [f"n{number:08}" for number in range(1000)]
WHOLE = Config(checkpoint="x", data="y", kind="r", workers=0, batch_size=4, view="whole")

# As the authors of ImageNet-C publish them.
PUBLISHED = """
gaussian_noise .886428, shot_noise .894468, impulse_noise .922640, defocus_blur .819880, glass_blur .826268,
motion_blur .785948, zoom_blur .798360, snow .866816, frost .826572, fog .819324, brightness .564592,
contrast .853204, elastic_transform .646056, pixelate .717840, jpeg_compression .606500"""


def test_mce_is_100_for_alexnet():
    published = {name: float(value) for name, value in map(str.split, PUBLISHED.split(","))}
    assert published == ALEXNET and len(ALEXNET) == 15
    assert mean_corruption_error({name: 100 * published[name] for name in ALEXNET}) == pytest.approx(100)


def noise(folder, names, count=3):
    """`count` images of noise in a folder per name, each of them another one."""
    for name in names:
        (folder / name).mkdir(parents=True)
        for index in range(count):
            generator = np.random.default_rng([index, *name.encode()])
            pixels = generator.integers(0, 256, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{index}.png")
    return folder


def save_run(folder, count):
    """A folder as eval.finetune leaves it: a classifier of random weights for the first `count` WNIDs."""
    torch.manual_seed(0)
    vit = common.ViT(16, 8, embed_dim=16, depth=1, num_heads=2)
    model = Classifier(vit, count, rel_pos_bias=True)
    nn.init.normal_(model.head.weight)
    folder.mkdir(exist_ok=True)
    flags = dict(pool="mean", rel_pos_bias="on", epochs=3)
    torch.save(dict(kind="finetuning", model=model.state_dict(), classes=WNIDS[:count], encoder=vit.config,
                    step=7, config=flags), folder / "last.pt")
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return save_run(tmp_path_factory.mktemp("run"), 1000)


@torch.no_grad()
def logits(run, files):
    """Those of the classifier, computed here, for files of 16 x 16 pixels that are shown whole."""
    pixels = np.stack([np.array(Image.open(file)) for file in files])  # (n, h, w, 3)
    images = (pixels / 255 - common.IMAGENET_MEAN) / common.IMAGENET_STD
    return robustness.load_classifier(run)[0](torch.tensor(images).permute(0, 3, 1, 2).float()).numpy()


def test_labels_come_from_names_and_processes_share_the_images(tmp_path, run, monkeypatch):
    noise(tmp_path, [WNIDS[5], WNIDS[1], WNIDS[3]])
    images, model = by_name(tmp_path, WNIDS[:6]), robustness.load_classifier(run)[0]
    assert images.labels.tolist() == [1, 1, 1, 3, 3, 3, 5, 5, 5]
    values, parts = logits(run, map(images.path, range(9))), []
    monkeypatch.setattr(common.Dist, "all_reduce", lambda self, x: parts.append(x.clone()) or x)
    for allowed in ([1, 3, 5], [0, 3], range(1000)):
        pred = np.array(allowed)[values[:, list(allowed)].argmax(1)]
        for rank in range(4):
            errors(model, images, allowed, WHOLE, common.Dist(rank, 4, CPU))
        assert torch.stack(parts[-4:]).sum(0).tolist() == [(pred != images.labels.numpy()).sum(), 9]


@pytest.mark.parametrize("size", [(300, 400), (224, 224)])
def test_a_view_that_fits_is_cropped_too_unless_whole(size, monkeypatch):
    model, image, shown = nn.Module(), torch.randint(256, (3, *size), dtype=torch.uint8), []
    model.encoder = common.ViT(224, 112, embed_dim=8, depth=1, num_heads=1)
    monkeypatch.setattr(robustness, "predictions", lambda model, views, *_: shown.append(views[0][0]) or [])
    for view in ("crop", "whole"):
        settings = dataclasses.replace(WHOLE, view=view)
        errors(model, common.Images(image[None], [4]), [4], settings, common.Dist(0, 1, CPU))
        assert torch.equal(shown[-1], centre_view(image, (224, 224), whole=view == "whole"))


def test_made_up_sets_have_the_published_layouts(tmp_path):
    """Six classes: A and R hold every fifth; a corruption has five severities, the last a strong one."""
    names = WNIDS[:6]
    for name in names:
        write_images(tmp_path / "test" / name, count=2)
    made_up_sets.main(tmp_path / "test", tmp_path / "sets", 1)
    for kind, present in (("a", names[::5]), ("r", names[::5]), ("sketch", names)):
        assert [names[label] for label in by_name(tmp_path / "sets" / kind, names).labels] == present
    clean = common.read_image(tmp_path / "test" / names[0] / "00.png").float()
    for corruption in ALEXNET:
        sets = [by_name(tmp_path / "sets" / "c" / corruption / severity, names) for severity in "12345"]
        changes = [(images[0][0].float() - clean).abs().mean() for images in sets]
        assert {len(images) for images in sets} == {6} and changes[-1] > max(5, changes[0]), corruption


def measure(run, folder, kind, capsys):
    """(the last line of eval.jsonl, what was printed)."""
    capsys.readouterr()
    flags = ("--workers=0", "--device=cpu", "--view=whole")
    assert call("--checkpoint", run, "--data", folder, "--kind", kind, *flags, main=main) == 0
    return json.loads((run / "eval.jsonl").read_text().splitlines()[-1]), capsys.readouterr().out


@pytest.mark.parametrize("kind", ["a", "r", "sketch"])
def test_a_r_and_sketch(tmp_path, run, capsys, kind):
    present = [5, 77, 400, 901]
    folder = noise(tmp_path, [WNIDS[place] for place in present], count=12)
    (folder / "README.txt").write_text("no image")
    values = logits(run, [folder / WNIDS[place] / f"{i}.png" for place in present for i in range(12)])
    allowed = range(1000) if kind == "sketch" else present
    pred = np.array(allowed)[values[:, list(allowed)].argmax(1)]
    expected = 100 * (pred == np.repeat(present, 12)).mean()
    record, out = measure(run, folder, kind, capsys)
    assert record["accuracy"] == pytest.approx(expected) and (kind == "sketch" or expected > 5)
    assert f"top-1 {expected:.1f} % of 48 images of 4 classes, arg max over {len(allowed)}" in out
    facts = dict(argmax_over=len(allowed), classes_present=4, images=48, kind="robustness", classes=1000,
                 checkpoint=str(run / "last.pt"), step=7)
    assert facts.items() <= record.items() and record["trained_as"]["epochs"] == 3


@pytest.fixture(scope="module")
def corrupted(tmp_path_factory):
    sets = [f"{name}/{level}/{WNIDS[place]}" for place, name in enumerate(ALEXNET) for level in "12345"]
    return noise(tmp_path_factory.mktemp("imagenet-c"), sets, count=1)


def test_mean_error_and_mce_are_both_labelled(run, corrupted, capsys, monkeypatch):
    """The errors themselves are replaced by a table; how they are put together is checked by hand."""
    table = {(name, s): (3 * place + s * s) % 50 for place, name in enumerate(ALEXNET) for s in range(1, 6)}

    def read(model, images, *rest):
        name, severity = Path(images.name).parts[-2:]
        count = 100 * (1 + int(severity) % 2)  # unequal: a mean of means is not the mean of all
        return [table[name, int(severity)] * 2 * count // 100, count]

    monkeypatch.setattr(robustness, "errors", read)
    record, out = measure(run, corrupted, "c", capsys)
    per = {name: np.mean([2 * table[name, s] for s in range(1, 6)]) for name in ALEXNET}
    mean, mce = np.mean(list(per.values())), np.mean([per[name] / ALEXNET[name] for name in per])
    assert record["mean_error"] == pytest.approx(mean) and record["mce"] == pytest.approx(mce)
    assert record["errors"] == pytest.approx(per) and (record["missing"], record["images"]) == ([], 12_000)
    assert f"15 corruptions) {mean:.1f} %" in out and f"(divided by AlexNet's errors) {mce:.1f} %" in out


def test_c_as_a_whole_without_a_corruption_and_with_other_classes(tmp_path, run, corrupted, capsys):
    record, _ = measure(run, corrupted, "c", capsys)
    values = logits(run, [corrupted / "snow" / str(s) / WNIDS[7] / "0.png" for s in range(1, 6)])
    assert record["errors"]["snow"] == pytest.approx(100 * (values.argmax(1) != 7).mean())
    assert record["images"] == 75 and record["mce"] > 0
    record, out = measure(save_run(tmp_path / "few", 15), corrupted, "c", capsys)
    assert "no mCE, it is for 1000 classes, not 15" in out
    assert record["mce"] is None and record["missing"] == []
    (tmp_path / "part").mkdir()
    for name in ("fog", "snow"):
        (tmp_path / "part" / name).symlink_to(corrupted / name)
    record, out = measure(run, tmp_path / "part", "c", capsys)
    assert record["mce"] is None and record["errors"].keys() == {"fog", "snow"}
    assert "(plain, 2 corruptions)" in out and "no mCE, missing: gaussian_noise, shot_noise" in out


def test_bad_input(tmp_path, run, capsys):
    noise(tmp_path, ["odd/cat", f"odd/{WNIDS[3]}", f"c/fog/1/{WNIDS[3]}"])
    torch.save(dict(model={}), tmp_path / "mae.pth")
    for sentence, argv in {"--checkpoint is missing: give a run of eval.finetune": ["--checkpoint="],
        "--kind is missing: give a, r, sketch, c": ["--kind="],
        "--data is missing: give the folder of ImageNet-R": ["--data="], "has no folder gaussian_noise": ["--kind=c"],
        "c/fog/2, which should hold one folder per class": ["--kind=c", "--data", tmp_path / "c"],
        "has cat, which none of the classifier's 1000 classes (n00000000": ["--data", tmp_path / "odd"],
        "mae.pth is not from a finetuning run": ["--checkpoint", tmp_path / "mae.pth"]}.items():
        assert call("--checkpoint", run, "--kind=r", "--data", tmp_path, *argv, main=main) == 1
        assert sentence in capsys.readouterr().err
