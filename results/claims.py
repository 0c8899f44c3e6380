"""The papers' claims in miniature: every run of every claim, and the tables and plots of claims.md.

    python -m results.claims 3 --data CIFAR10_FOLDER --teacher tiny_clip:FILE    what is missing of one claim
    python -m results.claims all ... --camvid FOLDER [--jobs 2]                   of all five
    python -m results.claims beyond_masking/mask/steps/S/0 ...                    a run again, beside its line
    python -m results.claims --rebuild                                           tables and plots, from the log

results/cifar_teacher.py makes the teacher, results/miniature.py trains and tests. Each finished run is one line of
logs/claims.jsonl: a killed command goes on with the runs that it was in. `--tier smoke` takes two minutes on
built-in images and shows only that this file works; `cpu` is what claims.md holds; `gpu` trains longer.

A run is called KIND/WHAT/HOW MUCH/SIZE/SEED. All runs of a seed see the same images in the same order. Pre-training
sees all training images. Of their labels 2,000 choose the settings of the probes and, at seed 100, the learning
rates: for all of CAE v2 that of `both` with 25 % hidden, for all tasks that of `mask`, for MFM that of MAE, for all
shares of the labels that of 10 %. No choice sees a test image."""

import argparse
import itertools
import json
import os
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch comes: waiting threads are to leave the cores alone
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `python results/claims.py`, too
import common  # noqa: E402
from beyond_masking import TASKS  # noqa: E402
from results.miniature import METHODS, TIERS, execute  # noqa: E402
from results.tables import chart, judged, spread, table  # noqa: E402

HERE = Path(__file__).resolve().parent
RATES = (1e-3, 2e-3, 4e-3)
SUPERVISE, RATIOS, SHARES = ("visible", "masked", "both"), ("0", "0.15", "0.25", "0.5", "0.75"), ("0.01", "0.1", "1")
INTRODUCTION = """# The papers' claims in miniature

Runs of about a minute on CIFAR-10 (50,000 images of 32 pixels, patches of 4): they can contradict a claim or go
along with it at this scale, no more. S and L are ViTs of 3 blocks x 64 and 6 x 128, in bf16; claims 3 and 5 are
about S. Unless a column says something else, numbers are per cent of the 10,000 test images by a linear probe in
closed form on the mean patch token, mean ± standard deviation over seeds. `random`, fine-tuned, is supervised
training from scratch; the teacher is one and the same at each seed, and was trained with the names of the classes
(77.1 % zero-shot, [log](logs/cifar_teacher.jsonl)), so CAE v2's rows compare with one another only. decolor's
encoder has seen grey images only and is tested on coloured ones.

A difference is taken between runs of the same seed, which see the same images in the same order. It *shows* if it
is above 0 with 95 % confidence (Student's t over the seeds; *opposite*: below 0); of many differences that are
tested so, one in twenty shows by chance. Learning rates were chosen from three, for all variants by one of them
(top of [claims.py](claims.py)), and the best was often the first or the last of the three: another variant might
gain from another rate. Each run: [the log](logs/claims.jsonl).

    python results/cifar_teacher.py CIFAR CLIP.safetensors
    python -m results.claims all --data CIFAR --teacher tiny_clip:CLIP.safetensors --camvid CAMVID --jobs 2

Two runs at a time, a thread each, on the two threads of one core of an AMD EPYC, mostly beside other work.
"""


def runs(claim, seeds):
    """The names of a claim's runs."""
    kinds = {1: [[["cae_v2"], SUPERVISE, ["0.5"], "SL"]], 2: [[["cae_v2"], ["both"], RATIOS, "SL"]],
             3: [[["beyond_masking"], TASKS, ["steps"], "S"]], 4: [[["mfm_mae"], ["mae", "mfm"], ["long"], "SL"]],
             5: [[METHODS.values(), "S"], [["frozen"], [*METHODS, "random", "teacher"], "-", "S"],
                 [["tune"], [*METHODS, "random"], SHARES, "S"]]}[claim]
    return ["/".join(map(str, row)) for kind in kinds for row in itertools.product(*kind, range(seeds))]


def rate_runs(name):
    """The runs at seed 100 that choose a run's learning rate, or none."""
    kind, what, much, size, _ = name.split("/")
    plain = dict(cae_v2="both/0.25", beyond_masking="mask/steps", mfm_mae=f"mae/{much}", tune=f"{what}/0.1")
    return [f"{kind}/{plain[kind]}/{size}/100/{rate:g}" for rate in RATES] if kind in plain else []


def read(log, tier):
    """{name: line} of the runs that are in the log."""
    lines = [json.loads(line) for line in (log.read_text() if log.exists() else "").splitlines() if line[-1:] == "}"]
    return {line["name"]: line for line in lines if line["tier"] == tier}


def run(names, args, log):
    """Runs what is missing: what chooses a rate before what needs it, encoders before what tests them."""
    done, text = read(log, args.tier), log.read_text() if log.exists() else ""
    text = text[:text.rfind("\n") + 1]  # without a line that was cut off

    def rate_of(name):
        if name.count("/") == 5:
            return float(name.split("/")[5])
        lines = [done[other] for other in rate_runs(name)]
        held_out = [line["accuracy_chosen"][1] if "accuracy_chosen" in line else line["accuracy"] for line in lines]
        return lines[held_out.index(max(held_out))]["rate"] if lines else None

    early, late = ([x for x in names if x.startswith(("frozen", "tune")) == wanted] for wanted in (False, True))
    pool = ProcessPoolExecutor(args.jobs, get_context("spawn"))
    try:
        for wave in (sum(map(rate_runs, early), []), early, sum(map(rate_runs, late), []), late):
            for future in as_completed([pool.submit(execute, name, rate_of(name), args)
                                        for name in dict.fromkeys(wave) if name not in done]):
                line = future.result()
                done[line["name"]], text = line, text + json.dumps(line) + "\n"
                common.write_atomically(log, lambda file: file.write_text(text))
                print(f"{time.strftime('%H:%M')} {line['name']}: {line['accuracy']} %", flush=True)
    finally:
        pool.shutdown(cancel_futures=True)  # after an error the queue is not worked through


def minus(one, two):
    return [a - b for a, b in zip(one, two)]


def mean(*lists):
    return [statistics.mean(row) for row in zip(*lists)]


# Each claim: rows of its table, differences by what is claimed, columns and series of its plot; `get(name, key)`
# lists a run's results over the seeds.
def claim_1(get):
    cell = {(what, size): get(f"cae_v2/{what}/0.5/{size}") for what in SUPERVISE for size in "SL"}
    return ([["supervised", "S", "L"]] + [[what, *(spread(cell[what, size]) for size in "SL")] for what in SUPERVISE],
            {f"{a} - {b}, {size}": minus(cell[a, size], cell[b, size])
             for a, b in (("visible", "masked"), ("both", "masked"), ("both", "visible")) for size in "SL"},
            SUPERVISE, {size: [cell[what, size] for what in SUPERVISE] for size in "SL"})


def claim_2(get):
    cell = {(ratio, size): get(f"cae_v2/both/{ratio}/{size}") for ratio in RATIOS for size in "SL"}
    best = {size: [float(max(zip(row, RATIOS))[1]) for row in zip(*(cell[ratio, size] for ratio in RATIOS))]
            for size in "SL"}
    half = {size: minus(cell["0.5", size], cell["0.15", size]) for size in "SL"}
    return ([["hidden", "S", "L"]] + [[ratio, *(spread(cell[ratio, size]) for size in "SL")] for ratio in RATIOS]
            + [["the best", *(spread(best[size], 2) for size in "SL")]],
            {"best ratio of L - of S": minus(best["L"], best["S"]),
             "(0.5 - 0.15) of L - of S": minus(half["L"], half["S"]),
             **{f"0.15 - 0, {size}": minus(cell["0.15", size], cell["0", size]) for size in "SL"}},
            RATIOS, {size: [cell[ratio, size] for ratio in RATIOS] for size in "SL"})


def claim_3(get):
    task = {name: get(f"beyond_masking/{name}/steps/S") for name in TASKS}
    geometry, looks = (mean(*(task[name] for name in names)) for names in (TASKS[1:4], TASKS[4:6]))
    return ([["task", "linear probe"]] + [[name, spread(task[name])] for name in TASKS],
            {"mean of zoom_in, zoom_out, distort - mean of blur, decolor": minus(geometry, looks),
             "the same - blur alone": minus(geometry, task["blur"]),
             **{f"{name} - mask": minus(task[name], task["mask"]) for name in (TASKS[6], *TASKS[1:6], *TASKS[7:])}},
            TASKS, {"S": list(task.values())})


def claim_4(get):
    pair = list(itertools.product("SL", ("mae", "mfm")))
    end, probes, share, wave = ({(size, what): get(f"mfm_mae/{what}/long/{size}", key) for size, what in pair}
                                for key in ("accuracy", "probes", "weights", "frequency"))
    course = {cell: [*map(list, zip(*probes[cell])), end[cell]] for cell in pair}
    gain = {size: minus(end[size, "mfm"], end[size, "mae"]) for size in "SL"}
    head = ["", "probe at a third", "two thirds", "the end", "high frequency", "fusion weights, from the first block"]
    return ([head]
            + [[f"{what.upper()}, {size}", *map(spread, course[size, what]), spread(wave[size, what], 2),
                ", ".join(f"{weight:.2f}" for weight in mean(*share[size, what]))] for size, what in pair],
            {**{f"MFM - MAE, {size}": gain[size] for size in "SL"},
             "that of S - that of L": minus(gain["S"], gain["L"]),
             **{f"MFM at two thirds - MAE at the end, {size}": minus(course[size, "mfm"][1], end[size, "mae"])
                for size in "SL"},
             **{f"high frequency of MAE - of MFM, {size}": minus(wave[size, "mae"], wave[size, "mfm"])
                for size in "SL"}},
            head[1:4], {f"{what.upper()}, {size}": course[size, what] for size, what in pair})


def claim_5(get):
    names, keys = [*METHODS, "random", "teacher"], {"linear": "accuracy", "kNN": "knn", "CamVid, mIoU": "mIoU"}
    columns = {label: {name: get(f"frozen/{name}/-/S", key) for name in names} for label, key in keys.items()}
    columns |= {f"{float(share):.0%} of labels": {name: get(f"tune/{name}/{share}/S") for name in names[:-1]}
                for share in SHARES}
    columns = {label: {name: row for name, row in column.items() if None not in row}
               for label, column in columns.items()}
    return ([["", *columns]] + [[name, *(spread(column[name]) if name in column else "-"
                                         for column in columns.values())] for name in names],
            {f"{name} - random, {label}": minus(column[name], column["random"])
             for label, column in columns.items() for name in METHODS if name in column},
            names[:-1], {label: [column[name] for name in names[:-1]] for label, column in columns.items()
                         if names[0] in column and "CamVid" not in label})


def report(log, tier, out):
    """Writes claims.md and a plot per claim, from the log alone: the same bytes each time."""
    done, seeds, text = read(log, tier), range(TIERS[tier]["seeds"]), INTRODUCTION
    for number, (title, claim, count) in enumerate(CLAIMS, 1):
        text += f"\n## {number}. {title}\n\n"
        lines = [done.get(name) for name in runs(number, len(seeds))]
        if None in lines:
            text += f"Not run: {lines.count(None)} of {len(lines)} runs are missing.\n"
            continue
        rows, differences, columns, series = claim(
            lambda name, key="accuracy": [done[f"{name}/{seed}"].get(key) for seed in seeds])
        judgements = [judged(name, values) for name, values in differences.items()]
        commits, torches, machines = (", ".join(sorted({line[key] for line in lines}))
                                      for key in ("commit", "torch", "hardware"))
        rates = ", ".join(f"{rate:g}" for rate in sorted({line["rate"] for line in lines if line["rate"]}))
        text += (
            f"**At this scale:** {'; '.join(f'{name}: {word}' for name, _, _, word in judgements[:count])}.\n\n"
            f"{table(rows)}\n\n{table([['difference, same seeds', 'mean', 's.e.', 'verdict'], *judgements])}\n\n"
            f"![claim {number}](claim{number}.svg)\n\n`python -m results.claims {number}`: {len(lines)} runs, "
            f"{sum(line['seconds'] for line in lines) / 60:.0f} min; commit {commits}; torch {torches}; {machines}; "
            f"learning rates {rates}.\n")
        common.write_atomically(out / f"claim{number}.svg", lambda file: file.write_text(chart(columns, series)))
    text += f"\nThe tier `gpu`: {len(read(log, 'gpu')) or 'not'} run.\n"
    common.write_atomically(out / "claims.md", lambda file: file.write_text(text))


# What is claimed, and how many of the differences are just that.
CLAIMS = [("CAE v2: supervision on visible patches does at least as well as on masked ones", claim_1, 2),
          ("CAE v2: the best mask ratio grows with the model", claim_2, 2),
          ("Beyond Masking: geometry teaches more than appearance; `mask+zoom_in` beats `mask`", claim_3, 3),
          ("MFM: fusion beats MAE, more for a small model; faster; with less high frequency", claim_4, 7),
          ("All methods beside one another", claim_5, 4)]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("what", nargs="*", help="1 to 5, all, or names of runs")
    parser.add_argument("--rebuild", action="store_true", help="write claims.md and its plots")
    parser.add_argument("--tier", default="cpu", choices=TIERS)
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    for name, default, text in (("data", "cifar10", "as for the evaluations"), ("teacher", "", "as for CAE v2"),
                                ("camvid", "", "folder, for claim 5"), ("runs", "runs/claims", "where encoders stay"),
                                ("out", HERE, "where claims.md and logs/claims.jsonl are")):
        parser.add_argument(f"--{name}", default=default, help=text)
    args = parser.parse_args()
    args.teacher = args.teacher or "demo" * (args.tier == "smoke")
    out, seeds, words = Path(args.out), TIERS[args.tier]["seeds"], set(args.what)
    log, of_claim = out / "logs/claims.jsonl", {str(number): runs(number, seeds) for number in range(1, 6)}
    again = words - {*of_claim, "all"}
    if odd := again - set(sum(of_claim.values(), [])):
        raise ValueError(f"{min(odd)} is no claim and no run: those are called like {of_claim['1'][0]}")
    run([name for claim, names in of_claim.items() if words & {claim, "all"} for name in names], args, log)
    for name in again:
        line = read(log, args.tier).get(name)
        if not line:
            raise ValueError(f"{name} has no line in {log} yet: run its claim first")
        print(f"logged: {line}\nagain:  {execute(name, line['rate'], args)}")
    if args.rebuild:
        report(log, args.tier, out)


if __name__ == "__main__":
    common.run_main(main)
