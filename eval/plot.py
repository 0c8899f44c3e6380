"""Draws what runs have logged, several runs in one picture: losses, accuracies, weights, frequencies.

    python -m eval.plot runs/mae_demo runs/mfm_mae_demo --out both.png

    python -m eval.plot runs/mfm_mae_demo --reference      beside our own run of 10,000 steps

Each argument is the folder of a run of any of our scripts. One panel has the losses of all runs, one has
their accuracies, one per run has the weights of its fused blocks (MFM), all from log.jsonl; one has what
eval/frequency.py wrote. Empty panels are left out. Needs matplotlib, the extra `plot`."""

import argparse
import json
from pathlib import Path

if not __package__:  # started by its file name, Python does not find common.py
    raise SystemExit("error: start it in the folder of common.py as `python -m eval.plot`")
import common

# The panels with their axes, and the panel of a value in the log by the first word of its name.
PANELS = dict(loss=("step", "loss"), accuracy=("step", "per cent"), weights=("step", "weight"),
              frequency=("blocks passed", "relative log amplitude"))
REFERENCE = Path(common.__file__).resolve().parent / "results" / "reference"  # a run's log per method
LOGGED = dict(loss="loss", accuracy="accuracy", top5="accuracy", weight="weights")


def read_run(folder):
    """{panel: {name: [(x, y) ...]}} of a run's folder; for "frequency", y is the last entry of a curve."""
    folder, found = Path(folder).expanduser(), {}
    frequency = folder / "frequency.json"
    try:
        for line in common.read_log(folder)[0]:
            for name, value in line.items():
                panel = LOGGED.get(name.split("_")[0])  # a sweep of probes logs loss_0.05, loss_0.1 ...
                if panel and value is not None:
                    found.setdefault(panel, {}).setdefault(name, []).append((line["step"], value))
        if frequency.exists():
            rows = json.loads(frequency.read_text())
            found["frequency"] = {name: list(enumerate(curve[-1] for curve in rows[name]))
                                  for name in ("encoder", "random_init")}
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise ValueError(f"the log in {folder} cannot be read ({type(error).__name__}: {error})") from error
    if not found:
        raise FileNotFoundError(f"no run in {folder}: log.jsonl and frequency.json are missing or empty")
    return found


def references(folders):
    """The folders of our own runs of the methods in `folders`. Raises ValueError if there is none."""
    configs = [common.json_or_none(Path(folder).expanduser() / "config.json") or {} for folder in folders]
    methods = sorted({config["method"] for config in configs if "method" in config})
    found = [REFERENCE / method for method in methods if (REFERENCE / method).is_dir()]
    if not found:
        raise ValueError(f"--reference: config.json in {folders[0]} names no method with a run in {REFERENCE}")
    return found


def draw(folders, path, panels=PANELS):
    """Draws those of `panels` that have values. Dotted: the start of the weights, the random encoder."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return print("no picture: matplotlib is missing, pip install matplotlib brings it")
    drawn, runs = {}, {str(folder): read_run(folder) for folder in folders}
    for panel in panels:
        for folder, run in runs.items():
            title = f"fusion weights, {folder}" if panel == "weights" else panel
            for name, points in run.get(panel, {}).items():
                label = folder if name == panel else f"{folder}, {name}"
                drawn.setdefault((panel, title), {})[label] = points
    figure = Figure(figsize=(4.5 * len(drawn), 3.6), layout="constrained")
    places = figure.subplots(1, len(drawn), squeeze=False)[0]
    for axes, ((panel, title), curves) in zip(places, drawn.items()):
        for number, (label, points) in enumerate(curves.items()):
            style = dict(accuracy=".-", frequency="x:" if number % 2 else "o-").get(panel, "-")
            colour = number // 2 if panel == "frequency" else number
            axes.plot(*zip(*points), style, label=label, color=f"C{colour}")
        if panel == "weights":
            axes.axhline(1 / len(curves), color="grey", linewidth=0.6, linestyle=":")
        axes.set(title=title, xlabel=PANELS[panel][0], ylabel=PANELS[panel][1])
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.legend(fontsize=8)
    common.write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=120))
    print(f"drew {path}")


def main(argv=None):
    def refuse(message):
        raise ValueError(f"{message} (--help lists the flags)")

    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.error = refuse
    parser.add_argument("runs", nargs="+", help="folders of runs")
    parser.add_argument("--out", default="plot.png", help="the picture, a PNG (default: plot.png)")
    parser.add_argument("--reference", action="store_true", help="draw our own run of the method, too")
    given = parser.parse_args(argv)
    common.check_picture(given.out)
    draw(given.runs + (references(given.runs) if given.reference else []), given.out)


if __name__ == "__main__":
    common.run_main(main)
