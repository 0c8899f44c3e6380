"""eval/robustness.py: mapping by name, restricted arg max, errors and constants by hand; the command."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torchvision.transforms import InterpolationMode, v2

import common
from eval import robustness
from eval.finetune import Classifier
from eval.protocol import CentreViews
from eval.robustness import ALEXNET, Config, by_name, errors, main, mean_corruption_error
from helpers import call, finish, start, write_images
from results import made_up_sets

CPU = torch.device("cpu")
ONE = common.Processes(0, 1, CPU)

# As the authors of ImageNet-C publish them.
PUBLISHED = """gaussian_noise .886428, shot_noise .894468, impulse_noise .922640, defocus_blur .819880,
glass_blur .826268, motion_blur .785948, zoom_blur .798360, snow .866816, frost .826572, fog .819324,
brightness .564592, contrast .853204, elastic_transform .646056, pixelate .717840, jpeg_compression .606500"""


def test_constants_are_the_published_ones():
    pairs = map(str.split, PUBLISHED.replace("\n", " ").split(", "))
    assert {name: float(value) for name, value in pairs} == ALEXNET
    assert len(ALEXNET) == 15


def test_mce_is_100_for_alexnet_and_in_proportion_for_others():
    alexnet = {name: 100 * value for name, value in ALEXNET.items()}
    assert mean_corruption_error(alexnet) == pytest.approx(100)
    found = {name: 10 + place for place, name in enumerate(ALEXNET)}
    by_hand = np.mean([found[name] / 100 / ALEXNET[name] for name in found]) * 100
    assert mean_corruption_error(found) == pytest.approx(by_hand)
    assert mean_corruption_error(found) != pytest.approx(np.mean(list(found.values())))


def colour(number):
    return (40 + 7 * (number % 25), 40 + 50 * (number % 4), 255 - 3 * (number % 50))


def write(folder, names, count=2, size=(16, 16), offset=0):
    """`count` images of one colour per class; the colour says the class's number."""
    for name in names:
        (folder / name).mkdir(parents=True)
        for index in range(count):
            Image.new("RGB", size, colour(int(name[1:]) + offset)).save(folder / name / f"{index}.png")
    return folder


class Nearest(nn.Module):
    """A classifier that names the class whose colour is nearest, with hand-made second choices."""

    def __init__(self, classes):
        super().__init__()
        self.encoder = common.ViT(16, 8, embed_dim=8, depth=1, num_heads=1)
        colours = torch.tensor([colour(int(name[1:])) for name in classes])[:, :, None, None]
        self.colours = common.normalise(colours)

    def forward(self, images):
        return -(images.mean((2, 3))[:, None] - self.colours[None, :, :, 0, 0]).square().sum(2)


WNIDS = [f"n{number:08}" for number in (3, 4, 5, 6, 7, 8)]


def config(**changes):
    return Config(**{**dict(checkpoint="x", data="y", kind="r", workers=0, batch_size=4), **changes})


def test_labels_come_from_names_not_from_places(tmp_path):
    write(tmp_path, [WNIDS[5], WNIDS[1], WNIDS[3]])
    images = by_name(tmp_path, WNIDS)
    assert images.labels.tolist() == [1, 1, 3, 3, 5, 5]
    assert [Path(images.path(i)).parent.name for i in (0, 2, 4)] == [WNIDS[1], WNIDS[3], WNIDS[5]]


def test_errors_by_hand_with_and_without_a_restricted_arg_max(tmp_path):
    """The images of class i show the colour of class i+1, so every answer is wrong, unless that class may
    not be named and the next nearest colour is that of class i itself."""
    images = by_name(write(tmp_path, [WNIDS[1], WNIDS[4]], count=3, offset=1), WNIDS)
    model = Nearest(WNIDS)
    logits = model(common.normalise(torch.stack([images[i][0] for i in range(6)])))
    assert logits.argmax(1).tolist() == [2] * 3 + [5] * 3
    assert errors(model, images, config(), ONE) == [6, 6]
    expected = [max((1, 4), key=lambda place: row[place]) for row in logits.tolist()]
    wrong = sum(answer != label for answer, label in zip(expected, images.labels.tolist()))
    assert wrong < 6
    assert errors(model, images, config(), ONE, only=[1, 4]) == [wrong, 6]
    right = by_name(write(tmp_path / "right", WNIDS), WNIDS)
    assert errors(model, right, config(), ONE) == [0, 12]


def test_a_hand_made_confusion(tmp_path):
    """Of class 3 two of three are shown as themselves, of class 4 one of two."""
    for name, shown in (("n00000003", (3, 3, 5)), ("n00000004", (4, 8))):
        (tmp_path / name).mkdir()
        for index, number in enumerate(shown):
            Image.new("RGB", (16, 16), colour(number)).save(tmp_path / name / f"{index}.png")
    assert errors(Nearest(WNIDS), by_name(tmp_path, WNIDS), config(), ONE) == [2, 5]


def test_processes_share_the_images(tmp_path, monkeypatch):
    images, parts = by_name(write(tmp_path, WNIDS, count=3, offset=1), WNIDS), []
    model = Nearest(WNIDS)
    whole = errors(model, images, config(), ONE)
    monkeypatch.setattr(common.Processes, "sum", lambda self, x: parts.append(x.clone()) or x)
    for rank in range(4):
        errors(model, images, config(), common.Processes(rank, 4, CPU))
    assert torch.stack(parts).sum(0).tolist() == whole == [whole[0], 18] and 0 < whole[0]


@pytest.mark.parametrize("size", [(300, 400), (224, 224), (256, 256), (224, 300)])
def test_the_view_is_resize_256_crop_224_always(size):
    image = torch.randint(256, (3, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    images = common.Images(image[None], [4])
    papers = v2.Compose([v2.Resize(256, InterpolationMode.BICUBIC, antialias=True), v2.CenterCrop(224)])
    view, label = CentreViews(images, (224, 224), whole=False)[0]
    assert torch.equal(view, papers(image)) and label == 4
    whole, _ = CentreViews(images, (224, 224))[0]
    assert torch.equal(whole, image if size == (224, 224) else papers(image))


def test_made_up_sets_have_the_published_layouts(tmp_path):
    """Six classes: A and R hold every fifth; each corruption has five severities, the last one far from the image."""
    names = [f"n{index:08}" for index in range(6)]
    for name in names:
        write_images(tmp_path / "test" / name, count=2)
    made_up_sets.main(tmp_path / "test", tmp_path / "sets", 1)
    for kind, present in (("a", names[::5]), ("r", names[::5]), ("sketch", names)):
        images = by_name(tmp_path / "sets" / kind, names)
        assert [names[label] for label in images.labels] == present
    clean = common.read_image(tmp_path / "test" / names[0] / "00.png").float()
    for corruption in ALEXNET:
        changes = []
        for severity in robustness.SEVERITIES:
            images = by_name(tmp_path / "sets" / "c" / corruption / severity, names)
            assert len(images) == 6
            changes.append((images[0][0].float() - clean).abs().mean())
        assert changes[-1] > max(5, changes[0]), corruption


# -- the command, on a classifier of 1000 classes with random weights


THOUSAND = [f"n{number:08}" for number in range(1000)]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A folder as eval.finetune leaves it."""
    torch.manual_seed(0)
    vit = common.ViT(16, 8, embed_dim=16, depth=1, num_heads=2)
    model = Classifier(vit, 1000, rel_pos_bias=True)
    nn.init.normal_(model.head.weight)
    folder = tmp_path_factory.mktemp("run")
    torch.save(dict(kind="finetuning", model=model.state_dict(), classes=THOUSAND, encoder=vit.config, step=7,
                    config=dict(pool="mean", rel_pos_bias="on", epochs=3)), folder / "last.pt")
    return folder


def answers(run, files):
    """The logits of the classifier, computed here, for files of 16 x 16 pixels that are shown whole."""
    model = robustness.load_classifier(run)[0]
    pixels = torch.stack([torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1) for file in files])
    with torch.no_grad():
        return model(common.normalise(pixels)).numpy()


def noise(folder, names, count=3):
    generator = np.random.default_rng(0)
    for name in names:
        (folder / name).mkdir(parents=True)
        for index in range(count):
            Image.fromarray(generator.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(
                folder / name / f"{index}.png")
    return folder


def result(run):
    return json.loads((run / "eval.jsonl").read_text().splitlines()[-1])


def measure(run, folder, kind, *more):
    return call("--checkpoint", run, "--data", folder, "--kind", kind, "--workers=0", "--device=cpu",
                "--view=whole", *more, main=main)


@pytest.mark.parametrize("kind", ["a", "r", "sketch"])
def test_a_r_and_sketch(tmp_path, run, capsys, kind):
    present = [5, 77, 400, 901]
    folder = noise(tmp_path, [THOUSAND[place] for place in present], count=12)
    (folder / "README.txt").write_text("no image")
    logits = answers(run, [folder / THOUSAND[place] / f"{i}.png" for place in present for i in range(12)])
    labels = np.repeat(present, 12)
    if kind == "sketch":
        predicted = logits.argmax(1)
    else:
        predicted = np.array(present)[logits[:, present].argmax(1)]
    expected = 100 * (predicted == labels).mean()
    assert measure(run, folder, kind) == 0
    record, out = result(run), capsys.readouterr().out
    assert record["accuracy"] == pytest.approx(expected)
    assert kind == "sketch" or expected > 5
    assert f"top-1 {expected:.1f} % of 48 images of 4 classes" in out
    assert record["argmax_over"] == (1000 if kind == "sketch" else 4) and record["classes_present"] == 4
    assert record["kind"] == "robustness" and record["flags"]["kind"] == kind and record["images"] == 48
    assert record["checkpoint"] == str(run / "last.pt") and len(record["sha256"]) == 64
    assert record["trained_as"]["epochs"] == 3 and record["torch"] == torch.__version__


@pytest.fixture(scope="module")
def corrupted(tmp_path_factory):
    """All corruptions and severities, one image each."""
    root = tmp_path_factory.mktemp("imagenet-c")
    for place, name in enumerate(ALEXNET):
        for severity in range(1, 6):
            noise(root / name / str(severity), [THOUSAND[place]], count=1)
    return root


def test_mean_error_and_mce_are_both_labelled(run, corrupted, capsys, monkeypatch):
    """The errors themselves are replaced by a table; how they are put together is checked by hand."""
    table = {(name, str(s)): (3 * place + s * s) % 50 for place, name in enumerate(ALEXNET) for s in range(1, 6)}

    def told(model, images, config, processes):
        name, severity = Path(images.name).parts[-2:]
        count = 100 * (1 + int(severity) % 2)  # unequal, so that a mean of means is told from a mean of all
        return [table[name, severity] * 2 * count // 100, count]

    monkeypatch.setattr(robustness, "errors", told)
    assert measure(run, corrupted, "c") == 0
    per = {name: np.mean([2 * table[name, str(s)] for s in range(1, 6)]) for name in ALEXNET}
    mean, mce = np.mean(list(per.values())), np.mean([per[name] / ALEXNET[name] for name in per])
    record, out = result(run), capsys.readouterr().out
    assert record["mean_error"] == pytest.approx(mean) and record["mce"] == pytest.approx(mce)
    assert record["errors"] == pytest.approx(per) and record["missing"] == [] and record["images"] == 15 * 800
    assert f"mean error (plain, 15 corruptions) {mean:.1f} %" in out
    assert f"mCE (divided by AlexNet's errors) {mce:.1f} %" in out
    assert re.search(rf"fog +error +{per['fog']:.1f} %", out)


def test_c_as_a_whole_and_without_a_corruption(tmp_path, run, corrupted, capsys):
    assert measure(run, corrupted, "c") == 0
    record = result(run)
    logits = answers(run, [corrupted / "snow" / str(s) / THOUSAND[7] / "0.png" for s in range(1, 6)])
    assert record["errors"]["snow"] == pytest.approx(100 * (logits.argmax(1) != 7).mean())
    assert record["images"] == 75 and record["mce"] > 0
    part = tmp_path / "part"
    part.mkdir()
    for name in ("fog", "snow"):
        (part / name).symlink_to(corrupted / name)
    capsys.readouterr()
    assert measure(run, part, "c") == 0
    record, out = result(run), capsys.readouterr().out
    assert record["mce"] is None and len(record["missing"]) == 13
    assert record["errors"].keys() == {"fog", "snow"}
    assert "mean error (plain, 2 corruptions)" in out and "no mCE, missing: gaussian_noise, shot_noise" in out


def test_no_mce_for_other_classes_than_imagenets(tmp_path, run, capsys):
    state = torch.load(run / "last.pt")
    model = Classifier(common.ViT(**state["encoder"]), 15)
    state.update(classes=THOUSAND[:15], model=model.state_dict())
    state["config"]["rel_pos_bias"] = "off"
    torch.save(state, tmp_path / "last.pt")
    for place, name in enumerate(ALEXNET):
        for severity in range(1, 6):
            noise(tmp_path / "c" / name / str(severity), [THOUSAND[place]], count=1)
    assert measure(tmp_path, tmp_path / "c", "c") == 0
    assert "no mCE, AlexNet's errors are those of 1000 classes, not 15" in capsys.readouterr().out
    assert result(tmp_path)["mce"] is None and result(tmp_path)["missing"] == []


@pytest.mark.slow
def test_under_torchrun_the_numbers_are_the_same(tmp_path, run):
    folder = noise(tmp_path, THOUSAND[10:15], count=3)
    assert measure(run, folder, "r") == 0
    alone = result(run)
    process = start("--checkpoint", run, "--data", folder, "--kind", "r", "--workers=0", "--device=cpu",
                    "--view=whole", script=["-m", "eval.robustness"], processes=2)
    code, out, err = finish(process)
    assert code == 0, err
    assert out.count("ImageNet-R: top-1") == 1
    shared = result(run)
    assert (shared["accuracy"], shared["images"]) == (alone["accuracy"], 15)


def fails(capsys, *argv):
    capsys.readouterr()
    assert call(*argv, main=main) == 1
    return capsys.readouterr().err.splitlines()[-1].removeprefix("error: ")


def test_bad_input(tmp_path, run, capsys):
    given = ["--checkpoint", run, "--workers=0"]
    assert "--checkpoint is missing" in fails(capsys, "--kind=r", "--data=x")
    assert "--kind is missing: give a, r, sketch, c" in fails(capsys, *given, "--data=x")
    assert "--data is missing: give the folder of ImageNet-R" in fails(capsys, *given, "--kind=r")
    assert "belong to the classifier" in fails(capsys, *given, "--kind=r", "--data=x", "--img_size=32")
    assert "invalid choice" in fails(capsys, *given, "--kind=d", "--data=x")
    assert "there is no folder" in fails(capsys, *given, "--kind=r", "--data", tmp_path / "none")
    assert "holds no image" in fails(capsys, *given, "--kind=r", "--data", tmp_path)
    assert "has no folder gaussian_noise" in fails(capsys, *given, "--kind=c", "--data", tmp_path)
    noise(tmp_path / "odd", ["cat", THOUSAND[3]])
    sentence = fails(capsys, *given, "--kind=a", "--data", tmp_path / "odd")
    assert "odd has cat, which none of the classifier's 1000 classes (n00000000, n00000001" in sentence
    noise(tmp_path / "c" / "fog" / "1", [THOUSAND[3]])
    assert "there is no folder" in fails(capsys, *given, "--kind=c", "--data", tmp_path / "c")  # severity 2
    noise(tmp_path / "bad", [THOUSAND[3]])
    (tmp_path / "bad" / THOUSAND[3] / "1.png").write_bytes(b"junk")
    assert "1.png cannot be read as an image" in fails(capsys, *given, "--kind=a", "--data", tmp_path / "bad")
    torch.save(dict(model={}), tmp_path / "mae.pth")
    sentence = fails(capsys, "--checkpoint", tmp_path / "mae.pth", "--kind=a", "--data", tmp_path / "odd")
    assert "mae.pth is no fine-tuned classifier: give the folder of a run of eval.finetune" in sentence
    assert "no checkpoint file at" in fails(capsys, "--checkpoint", tmp_path / "odd", "--kind=a", "--data=x")


def test_every_decision_is_explained():
    source = Path(robustness.__file__).read_text()
    used, explained = (set(re.findall(pattern, source)) for pattern in (r"\[D(\d)\]", r"  \[D(\d)\] "))
    assert used == explained == {"1", "2"}
