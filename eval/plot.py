"""Draws what runs have logged, several runs in one picture: losses, fusion weights, frequency curves.

    python -m eval.plot runs/mae_demo runs/mfm_mae_demo --out both.png

Each argument is the folder of a run. One panel shows the losses (log.jsonl) of all of them, one per run the
weights of its fused blocks if there are such in the log (MFM), one the frequency content of each block
(frequency.json, see eval/frequency.py). Needs matplotlib, the extra `plot`.
"""

import json
from pathlib import Path

import common

KINDS = ("loss", "weights", "frequency")


def read_run(folder):
    """{"loss": [(step, loss) ...], "weights": {name: [(step, weight) ...]},
    "frequency": {name: [last entry of each curve ...]}}, as far as the folder has them.

    Raises FileNotFoundError for a folder without log.jsonl and frequency.json, ValueError for a broken one.
    """
    folder, found = Path(folder).expanduser(), {}
    log, frequency = folder / "log.jsonl", folder / "frequency.json"
    if not log.exists() and not frequency.exists():
        raise FileNotFoundError(f"{folder} holds neither log.jsonl nor frequency.json: give folders of runs")
    try:
        if log.exists():
            lines = [json.loads(line) for line in log.read_text().splitlines() if line.endswith("}")]
            found["loss"] = [(line["step"], line["loss"]) for line in lines if line["loss"] is not None]
            names = [name for name in lines[-1] if name.startswith("weight_")] if lines else []
            found["weights"] = {name: [(line["step"], line[name]) for line in lines] for name in names}
        if frequency.exists():
            curves = json.loads(frequency.read_text())
            found["frequency"] = {name: [row[-1] for row in curves[name]]
                                  for name in ("encoder", "random_init")}
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"the log in {folder} cannot be read ({type(error).__name__}: {error})") from error
    return {kind: content for kind, content in found.items() if content}


def draw_loss(axes, runs):
    for name, run in runs.items():
        axes.plot(*zip(*run["loss"]), label=name)
    axes.set(xlabel="step", ylabel="loss", title="loss")
    axes.legend(fontsize=8)


def draw_weights(axes, name, run):
    """The fused blocks' shares, from the shallowest to the last; dotted: 1 over their number, the start."""
    for label, points in run["weights"].items():
        axes.plot(*zip(*points), label=label)
    axes.axhline(1 / len(run["weights"]), color="grey", linewidth=0.6, linestyle=":")
    axes.set(xlabel="step", ylabel="weight", title=f"fusion weights, {name}")
    axes.legend(fontsize=8)


def draw_frequency(axes, runs):
    """Highest against zero frequency after each block; 0 on the x axis is the patch embedding."""
    for number, (name, run) in enumerate(runs.items()):
        for kind, style in (("encoder", "o-"), ("random_init", "x:")):
            ends = run["frequency"][kind]
            axes.plot(range(len(ends)), ends, style, color=f"C{number}",
                      label=name if kind == "encoder" else f"{name}, random init")
    axes.set(xlabel="blocks passed", ylabel="relative log amplitude", title="highest frequency")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend(fontsize=8)


def draw(folders, path, kinds=KINDS):
    """Draws the panels `kinds` that these folders have something for; without matplotlib, says so."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return print("no picture: matplotlib is missing, pip install matplotlib brings it")
    runs = {str(folder): read_run(folder) for folder in folders}
    having = {kind: {name: run for name, run in runs.items() if kind in run} for kind in kinds}
    panels = [lambda axes: draw_loss(axes, having["loss"])] if having.get("loss") else []
    for name, run in having.get("weights", {}).items():
        panels.append(lambda axes, name=name, run=run: draw_weights(axes, name, run))
    if having.get("frequency"):
        panels.append(lambda axes: draw_frequency(axes, having["frequency"]))
    if not panels:
        raise ValueError(f"nothing has been logged yet in {', '.join(runs)}")
    figure = Figure(figsize=(4.5 * len(panels), 3.6), layout="constrained")
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels):
        panel(axes)
    common.write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=120))
    print(f"drew {path}")


def main(argv=None):
    parser = common.Parser(description=__doc__, allow_abbrev=False)
    parser.add_argument("runs", nargs="+", help="folders of runs")
    parser.add_argument("--out", default="plot.png", help="the picture, a PNG (default: plot.png)")
    given = parser.parse_args(argv)
    if not given.out.endswith(".png"):
        raise ValueError(f"--out {given.out} should end in .png")
    draw(given.runs, given.out)


if __name__ == "__main__":
    common.run_main(main)
