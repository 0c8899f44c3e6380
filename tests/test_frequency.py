"""eval/frequency.py and eval/plot.py: curves against the released code's numbers and numpy; what is drawn."""

import builtins
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import common
from eval import frequency, plot
from eval.data import find_labelled
from eval.encoders import load_encoder
from eval.frequency import Config, curves, pick_images, relative_log_amplitude
from eval.protocol import random_encoder
from helpers import ROOT, call, sentence
from test_linear_probe import ONE, results

GOLDEN = torch.load(Path(__file__).parent / "golden" / "mfm_mae.pt", weights_only=True)
TWO = Config(checkpoint="x", batch_size=2, workers=0)


def by_hand(features, g):
    """The steps of the specification, one after the other, in numpy: transform, roll, average, diagonal."""
    maps = features.double().numpy().transpose(0, 2, 1).reshape(len(features), -1, g, g)
    logs = np.log(np.abs(np.fft.fft2(maps)) + 1e-6)
    logs = np.roll(logs, (g // 2, g // 2), axis=(2, 3)).mean(axis=(0, 1))
    diagonal = np.array([logs[i, i] for i in range(g // 2, g)])
    return diagonal - diagonal[0]


@pytest.mark.parametrize("g", [1, 4, 7, 8, 14])
def test_curve_by_hand(g):
    features = torch.randn(3, g * g, 5, generator=torch.Generator().manual_seed(g)).double() + 1
    curve = relative_log_amplitude(features, (g, g))
    assert curve.shape == ((g + 1) // 2,) and curve[0] == 0
    assert curve.numpy() == pytest.approx(by_hand(features, g), abs=1e-12)


def test_curves_in_closed_form():
    """A single patch has a flat spectrum; a constant map has nothing but frequency 0."""
    delta = torch.zeros(2, 64, 3)
    delta[:, 20] = 2.0
    assert relative_log_amplitude(delta, 8).abs().max() < 1e-6
    constant = relative_log_amplitude(torch.ones(2, 64, 3).double(), 8)
    assert constant[1:].tolist() == pytest.approx([np.log(1e-6) - np.log(64 + 1e-6)] * 3, rel=1e-6)
    rows, columns = torch.meshgrid(torch.arange(8), torch.arange(8), indexing="ij")
    wave = torch.cos(2 * np.pi * 3 * (rows + columns) / 8).flatten()[None, :, None].double() + 1
    curve = relative_log_amplitude(wave, 8)
    assert curve[3] == pytest.approx(np.log(0.5), abs=1e-6) and curve[1:3].max() < -10


@pytest.mark.parametrize("shape, grid", [((2, 8, 3), (2, 4)), ((2, 17, 3), (4, 4))])
def test_only_square_grids(shape, grid):
    with pytest.raises(ValueError, match="square grid"):
        relative_log_amplitude(torch.zeros(shape), grid)


@pytest.mark.parametrize("name", ["mae", "mfm"])
def test_golden_curves(tmp_path, monkeypatch, name):
    case = GOLDEN[name]
    torch.save({dict(mae="model", mfm="state_dict")[name]: case["state_dict"]}, tmp_path / "x.pth")
    vit = load_encoder(tmp_path / "x.pth", num_heads=4)
    monkeypatch.setattr(common, "normalise", lambda images: images)  # the golden ones are normalised
    images = common.Images(case["images"], name="golden")
    ours = curves(vit, images, TWO, ONE)  # in batches of 2 and 1
    assert ours.shape == (1 + len(vit.blocks), 2)
    torch.testing.assert_close(ours, case["vit_fourier_rel_log_amp"], atol=1e-5, rtol=0)


def test_encoders_without_class_token():
    torch.manual_seed(0)
    images = torch.randint(256, (3, 3, 32, 32), dtype=torch.uint8)
    vit = common.ViT(32, 4, embed_dim=16, depth=2, num_heads=2, class_token=False)
    ours = curves(vit, common.Images(images, name="x"), TWO, ONE)
    tokens = vit.layers(common.normalise(images), [1])[0].detach()
    assert ours[2].numpy() == pytest.approx(by_hand(tokens, 8), abs=1e-4)


def test_images_are_spread_over_all_classes():
    images = common.Images(torch.arange(100, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 4, 4))
    values = [int(image[0, 0, 0]) for image, _ in pick_images(images, 5)]
    assert values == [0, 25, 50, 74, 99] and len(pick_images(images, 1000)) == 100


@pytest.fixture
def run(tmp_path):
    """The folder of a run with an encoder and a log, as MFM leaves it."""
    torch.manual_seed(1)
    folder = tmp_path / "run"
    common.save_encoder(common.ViT(32, 8, embed_dim=16, depth=2, num_heads=2), folder / "encoder.safetensors")
    write_log(folder, *(dict(step=step, loss=1 / step, lr=1, weight_0=0.4 + step / 100, weight_1=0.6 - step / 100)
                        for step in (5, 10, 15)))
    return folder


def write_log(folder, *lines, rest=""):
    folder.mkdir(exist_ok=True)
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + rest)


def test_command(run, capsys):
    argv = ["--checkpoint", run, "--data", "scenes", "--images", 40, "--device", "cpu"]
    assert call(*argv, main=frequency.main) == 0
    result, (line,) = json.loads((run / "frequency.json").read_text()), results(run)
    vit, images = load_encoder(run), pick_images(find_labelled("scenes", "val", 32), 40)
    for name, encoder in (("encoder", vit), ("random_init", random_encoder(vit, 0))):
        expected = curves(encoder, images, TWO, ONE)
        torch.testing.assert_close(torch.tensor(result[name]), expected, atol=1e-5, rtol=0)
    assert line["kind"] == "frequency" and line["val_images"] == result["images"] == 40
    last = line["last_block"], line["random_init"]
    assert last == (result["encoder"][-1][-1], result["random_init"][-1][-1]) and last[0] != last[1]
    assert f"random init {last[1]:.2f}, pre-trained {last[0]:.2f}" in capsys.readouterr().out
    pytest.importorskip("matplotlib")
    assert (run / "frequency.png").read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_the_numbers_are_written(run, monkeypatch, capsys):
    real = builtins.__import__

    def refuse(name, *rest):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", refuse)
    argv = ["--checkpoint", run, "--data", "scenes", "--images", 5, "--device", "cpu"]
    assert call(*argv, main=frequency.main) == 0
    assert "pip install matplotlib" in capsys.readouterr().out
    assert (run / "frequency.json").exists() and not (run / "frequency.png").exists()


def test_bad_commands(run, tmp_path, capsys):
    oblong = tmp_path / "oblong.safetensors"
    common.save_encoder(common.ViT((16, 32), 8, embed_dim=16, depth=1, num_heads=2), oblong)
    for argv, match in (([oblong], "a square grid is needed"), ([run, "--images", 0], "--images 0 must be above 0")):
        assert call("--data", "scenes", "--checkpoint", *argv, main=frequency.main) == 1
        assert match in sentence(capsys.readouterr().err)
    assert not (run / "frequency.json").exists()


# -- the picture


def test_what_is_drawn(run, tmp_path, monkeypatch):
    figure = pytest.importorskip("matplotlib.figure")
    drawn = []
    monkeypatch.setattr(figure.Figure, "savefig", lambda self, path, **_: (drawn.append(self), path.write_bytes(b"")))
    (run / "frequency.json").write_text(json.dumps(dict(encoder=[[0, -1], [0, -2]], random_init=[[0, -3], [0, -4]])))
    write_log(tmp_path / "tuned", dict(step=3, loss=0.5, lr=1), dict(step=3, epoch=1, accuracy=20.0, top5=60.0),
              dict(step=6, loss=None, lr=1), dict(step=6, epoch=2, accuracy=40.0, top5=70.0), rest='{"step": 7, "lo')
    write_log(tmp_path / "probe", dict(step=5, loss_2=2.0, loss_8=8.0), dict(step=9, loss_2=1.0, loss_8=4.0))
    folders = [run, tmp_path / "tuned", tmp_path / "probe"]
    plot.draw(folders, tmp_path / "x.png")
    axes = {a.get_title().replace(f"{tmp_path}/", ""): a for a in drawn[0].axes}
    lines = {title: {line.get_label().replace(f"{tmp_path}/", ""): list(zip(*line.get_data())) for line in a.lines}
             for title, a in axes.items()}
    assert list(lines) == ["loss", "accuracy", "fusion weights, run", "frequency"]
    assert lines["loss"] == {"run": [(5, 1 / 5), (10, 1 / 10), (15, 1 / 15)], "tuned": [(3, 0.5)],
                             "probe, loss_2": [(5, 2), (9, 1)], "probe, loss_8": [(5, 8), (9, 4)]}
    assert lines["accuracy"] == {"tuned": [(3, 20), (6, 40)], "tuned, top5": [(3, 60), (6, 70)]}
    first, second, start = lines["fusion weights, run"].values()
    assert first == pytest.approx([(5, 0.45), (10, 0.5), (15, 0.55)]) and start == [(0, 0.5), (1, 0.5)]
    assert lines["frequency"] == {"run, encoder": [(0, -1), (1, -2)], "run, random_init": [(0, -3), (1, -4)]}
    assert len({line.get_color() for line in axes["frequency"].lines}) == 1
    assert len({line.get_color() for line in axes["loss"].lines}) == 4
    plot.draw(folders, tmp_path / "x.png", panels=("frequency",))
    assert [a.get_title() for a in drawn[1].axes] == ["frequency"]


def test_every_log_in_results_can_be_drawn():
    """The runs of all scripts that were kept."""
    for log in (ROOT / "results" / "logs").glob("*.jsonl"):
        pass


def test_plot_command(run, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    write_log(tmp_path / "other", dict(step=6, loss=0.5))
    for folders, panels in (([run], 2), ([run, tmp_path / "other"], 2), ([tmp_path / "other"], 1)):
        assert call(*folders, "--out", tmp_path / "x.png", main=plot.main) == 0
        assert Image.open(tmp_path / "x.png").size == (540 * panels, 432)
    write_log(tmp_path / "new")
    write_log(tmp_path / "broken", dict(loss=5))
    for argv, match in (([run, tmp_path / "none"], "none has no values in log.jsonl, no frequency.json"),
                        ([tmp_path / "new"], "new has no values"), ([tmp_path / "broken"], "cannot be read"),
                        ([], "required"), ([run, "--out", "x.gif"], "should end in .png")):
        assert call(*argv, main=plot.main) == 1
        assert match in sentence(capsys.readouterr().err), argv
