"""eval/frequency.py and eval/plot.py: curves against the released code's numbers and numpy; what is drawn."""

import builtins
import json
from pathlib import Path

import numpy as np
import pytest
import torch

import common
from eval import frequency, plot
from eval.encoders import load_encoder
from eval.frequency import curves, pick_images, relative_log_amplitude
from helpers import call

GOLDEN = torch.load(Path(__file__).parent / "golden" / "mfm_mae.pt", weights_only=True)


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


class Config:
    batch_size, workers = 2, 0


@pytest.mark.parametrize("name", ["mae", "mfm"])
def test_golden_curves(tmp_path, monkeypatch, name):
    case = GOLDEN[name]
    torch.save({dict(mae="model", mfm="state_dict")[name]: case["state_dict"]}, tmp_path / "x.pth")
    vit = load_encoder(tmp_path / "x.pth", num_heads=4)
    monkeypatch.setattr(common, "normalise", lambda images: images)  # the golden ones are normalised
    images = common.Images(case["images"])
    ours = curves(vit, images, Config, torch.device("cpu"))  # in batches of 2 and 1
    assert ours.shape == (1 + len(vit.blocks), 2)
    torch.testing.assert_close(ours, case["vit_fourier_rel_log_amp"], atol=1e-5, rtol=0)


def test_encoders_without_class_token():
    torch.manual_seed(0)
    images = torch.randint(256, (3, 3, 32, 32), dtype=torch.uint8)
    vit = common.ViT(32, 4, embed_dim=16, depth=2, num_heads=2, class_token=False)
    ours = curves(vit, common.Images(images), Config, torch.device("cpu"))
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
    lines = [dict(step=step, loss=1 / step, weight_0=0.4 + step / 100, weight_1=0.6 - step / 100) for step in (5, 10, 15)]
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_command(run, capsys):
    argv = ["--checkpoint", run, "--data", "scenes", "--images", 40, "--device", "cpu"]
    assert call(*argv, main=frequency.main) == 0
    result, line = json.loads((run / "frequency.json").read_text()), json.loads((run / "eval.jsonl").read_text())
    vit, images = load_encoder(run), pick_images(common.find_data("scenes", "val", 32), 40)
    expected = curves(vit, images, Config, torch.device("cpu"))
    torch.testing.assert_close(torch.tensor(result["encoder"]), expected, atol=1e-5, rtol=0)
    torch.manual_seed(0)
    floor = curves(common.ViT(**vit.config), images, Config, torch.device("cpu"))
    torch.testing.assert_close(torch.tensor(result["random_init"]), floor, atol=1e-5, rtol=0)
    assert line["kind"] == "frequency" and line["val_images"] == result["images"] == 40
    assert line["last_block"] == result["encoder"][-1][-1] and line["random_init"] == result["random_init"][-1][-1]
    assert f"pre-trained {line['last_block']:.2f}" in capsys.readouterr().out
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
    common.save_encoder(common.ViT((16, 32), 8, embed_dim=16, depth=1, num_heads=2), tmp_path / "oblong.safetensors")
    for argv, match in ((["--checkpoint", tmp_path / "oblong.safetensors", "--data", "scenes"], "a square grid is needed"),
                        (["--checkpoint", run, "--data", "scenes", "--images", 0], "--images 0 must be at least 1"),
                        (["--data", "scenes"], "--checkpoint is missing")):
        assert call(*argv, main=frequency.main) == 1
        assert match in capsys.readouterr().err
    assert not (run / "frequency.json").exists()


# -- the picture


def test_what_is_drawn(run):
    figure = pytest.importorskip("matplotlib.figure").Figure()
    (run / "frequency.json").write_text(json.dumps(dict(encoder=[[0, -1], [0, -2]], random_init=[[0, -3], [0, -4]])))
    runs, axes = {"a": plot.read_run(run), "b": plot.read_run(run)}, figure.subplots(1, 3)
    plot.draw_loss(axes[0], runs)
    plot.draw_weights(axes[1], "a", runs["a"])
    plot.draw_frequency(axes[2], runs)
    lines = [[(line.get_label(), list(line.get_xdata()), list(line.get_ydata())) for line in a.lines] for a in axes]
    assert lines[0] == [(name, [5, 10, 15], [1 / 5, 1 / 10, 1 / 15]) for name in "ab"]
    assert [line[0] for line in lines[1][:2]] == ["weight_0", "weight_1"]
    assert lines[1][0][1:] == ([5, 10, 15], pytest.approx([0.45, 0.5, 0.55])) and lines[1][2][2] == [0.5, 0.5]
    assert lines[2][:2] == [("a", [0, 1], [-1, -2]), ("a, random init", [0, 1], [-3, -4])] and len(lines[2]) == 4


def test_plot_command(run, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    from PIL import Image
    other = tmp_path / "other"
    other.mkdir()
    (other / "log.jsonl").write_text('{"step": 5, "loss": null}\n{"step": 6, "loss": 0.5}\n{"step": 7, "lo')
    assert plot.read_run(other) == {"loss": [(6, 0.5)]}
    for folders, panels in (([run], 2), ([run, other], 2), ([other], 1)):
        assert call(*folders, "--out", tmp_path / "x.png", main=plot.main) == 0
        assert Image.open(tmp_path / "x.png").size == (540 * panels, 432)
    capsys.readouterr()
    (tmp_path / "empty").mkdir()
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "log.jsonl").write_text("")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "log.jsonl").write_text('{"step": 5}\n')
    for argv, match in (([tmp_path / "empty"], "neither log.jsonl nor frequency.json"), ([tmp_path / "none"], "neither"),
                        ([tmp_path / "new"], "nothing has been logged"), ([tmp_path / "broken"], "cannot be read"),
                        ([], "required"), ([run, "--out", "x.gif"], "should end in .png")):
        assert call(*argv, main=plot.main) == 1
        assert match in capsys.readouterr().err, argv
