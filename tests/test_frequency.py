"""eval/frequency.py and eval/plot.py: curves against the released code's numbers and numpy; what is drawn."""

import json
import sys

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
from helpers import ROOT, call, refused, sentence
from test_linear_probe import ONE, results

GOLDEN = torch.load(ROOT / "tests" / "golden" / "mfm_mae.pt", weights_only=True)
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
    for count, grid in ((g * g + 1, g), (4 * g * g, (4 * g, g))):  # a class token, and an oblong grid
        with pytest.raises(ValueError, match="a square grid is needed"):
            relative_log_amplitude(torch.zeros(2, count, 3), grid)


class Half(common.Dist):  # one of two processes
    def all_reduce(self, tensor):
        return 2 * tensor


@pytest.mark.parametrize("name", ["mae", "mfm"])
def test_golden_curves(tmp_path, monkeypatch, name):
    case = GOLDEN[name]
    torch.save({dict(mae="model", mfm="state_dict")[name]: case["state_dict"]}, tmp_path / "x.pth")
    vit = load_encoder(tmp_path / "x.pth", num_heads=4)
    monkeypatch.setattr(common, "normalise", lambda images, *statistics: images)  # the golden ones are normalised
    images = common.Images(case["images"], name="golden")
    ours = curves(vit, images, TWO, ONE)  # in batches of 2 and 1
    torch.testing.assert_close(ours, case["vit_fourier_rel_log_amp"], atol=1e-5, rtol=0)
    halves = [curves(vit, images, TWO, Half(rank, 2, ONE.device)) for rank in (0, 1)]
    torch.testing.assert_close((halves[0] + halves[1]) / 2, ours)


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
    folder = tmp_path / "run"
    torch.manual_seed(1)
    common.save_encoder(common.ViT(32, 8, embed_dim=16, depth=2, num_heads=2), folder / "encoder.safetensors")
    write_log(folder, *(dict(step=step, loss=1 / step, lr=1, weight_0=step / 20, weight_1=1 - step / 20)
                        for step in (5, 10, 15)))
    return folder


def write_log(folder, *lines, rest=""):
    folder.mkdir(exist_ok=True)
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + rest)


@pytest.mark.parametrize("picture", [True, False])
def test_command_with_and_without_matplotlib(run, monkeypatch, capsys, picture):
    if picture:
        pytest.importorskip("matplotlib")
    else:
        monkeypatch.setitem(sys.modules, "matplotlib.figure", None)  # as if it were missing
    argv = ["--checkpoint", run, "--data", "scenes", "--images", 40, "--device", "cpu"]
    assert call(*argv, main=frequency.main) == 0
    result, (line,) = json.loads((run / "frequency.json").read_text()), results(run)
    vit, images = load_encoder(run), pick_images(find_labelled("scenes", "val", 32), 40)
    for name, encoder in (("encoder", vit), ("random_init", random_encoder(vit, 0))):
        expected = curves(encoder, images, TWO, ONE)
        torch.testing.assert_close(torch.tensor(result[name]), expected, atol=1e-5, rtol=0)
    assert line["kind"] == "frequency" and line["val_images"] == result["images"] == 40
    last, baseline = (result[name][-1][-1] for name in ("encoder", "random_init"))
    assert (line["last_block"], line["random_init"]) == (last, baseline) and last != baseline
    out = capsys.readouterr().out
    assert f"random init {baseline:.2f}, pre-trained {last:.2f}" in out and ("pip install matplotlib" in out) != picture
    assert Image.open(run / "frequency.png").size == (540, 432) if picture else not (run / "frequency.png").exists()


def test_what_is_drawn(run, tmp_path, monkeypatch):
    matplotlib_figure, drawn = pytest.importorskip("matplotlib.figure"), []
    monkeypatch.setattr(matplotlib_figure.Figure, "savefig",
                        lambda figure, path, dpi: (path.write_bytes(b""), drawn.extend(figure.axes)))
    (run / "frequency.json").write_text(json.dumps(dict(encoder=[[0, -1], [0, -2]], random_init=[[0, -3], [0, -4]])))
    write_log(tmp_path / "tuned", dict(step=3, loss=0.5, lr=1), dict(step=3, epoch=1, accuracy=20, top5=60),
              dict(step=6, loss=None, lr=1), dict(step=6, epoch=2, accuracy=40, top5=70), rest='{"step": 7, "lo')
    write_log(tmp_path / "probe", dict(step=5, loss_2=2, loss_8=8), dict(step=9, loss_2=1, loss_8=4))
    monkeypatch.chdir(tmp_path)
    plot.draw(["run", "tuned", "probe"], "x.png")
    lines = {axes.get_title(): {line.get_label(): list(zip(*line.get_data())) for line in axes.lines} for axes in drawn}
    start = lines["fusion weights, run"].popitem()[1]
    assert lines == {
        "loss": {"run": [(5, 1 / 5), (10, 1 / 10), (15, 1 / 15)], "tuned": [(3, 0.5)],
                 "probe, loss_2": [(5, 2), (9, 1)], "probe, loss_8": [(5, 8), (9, 4)]},
        "accuracy": {"tuned": [(3, 20), (6, 40)], "tuned, top5": [(3, 60), (6, 70)]},
        "fusion weights, run": {"run, weight_0": [(5, 0.25), (10, 0.5), (15, 0.75)],
                                "run, weight_1": [(5, 0.75), (10, 0.5), (15, 0.25)]},
        "frequency": {"run, encoder": [(0, -1), (1, -2)], "run, random_init": [(0, -3), (1, -4)]}}
    assert start == [(0, 0.5), (1, 0.5)] and len({line.get_color() for line in drawn[3].lines}) == 1


def test_our_own_run_is_drawn_beside(run, tmp_path, monkeypatch):
    write_log(tmp_path / "mfm_mae", dict(step=10, loss=1))
    monkeypatch.setattr(plot, "REFERENCE", tmp_path)
    refused("names no method with a run", plot.references, [run])  # no config.json
    (run / "config.json").write_text('{"method": "mfm_mae"}')
    monkeypatch.setattr(plot, "draw", lambda folders, out: drawn.append(list(map(str, folders))))
    drawn = []
    assert call(run, "--reference", main=plot.main) == call(run, main=plot.main) == 0
    assert drawn == [[str(run), str(tmp_path / "mfm_mae")], [str(run)]]
    assert (plot.Path(common.__file__).parent / "results/reference/mfm_mae/log.jsonl").exists()


def test_plot_command(run, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    assert call(run, run, "--out", tmp_path / "x.png", main=plot.main) == 0
    assert Image.open(tmp_path / "x.png").size == (2 * 540, 432)  # loss, weights
    write_log(tmp_path / "new")
    write_log(tmp_path / "broken", dict(loss=5))
    for argv, match in (([run, tmp_path / "none"], "none: log.jsonl and frequency.json are missing"),
                        ([tmp_path / "new"], "no run in"), ([tmp_path / "broken"], "no run in"),
                        ([], "required"), ([run, "--out", "x.gif"], "new file that ends in .png")):
        assert call(*argv, main=plot.main) == 1
        assert match in sentence(capsys.readouterr().err), argv
