"""Draws docs/beyond_masking.png: a row per task, from the runs that `make demo-beyond` leaves behind.

    python -m docs.draw_tasks        (from the top of the repository)
"""

from pathlib import Path

import torch

import beyond_masking
import common


def main():
    rows, labels = [], []
    for task in beyond_masking.TASKS:
        state = common.read_checkpoint(Path("runs/beyond_demo", task, "last.pt"))
        config = beyond_masking.Config(**state["config"])
        model = beyond_masking.build(config)
        model.load_state_dict(state["model"])
        images = beyond_masking.find_images(config, num_scenes=100)
        samples = common.Samples(images, beyond_masking.Augment(config), seed=1)
        batch = common.preview_batch(samples, 3)
        rows.append(beyond_masking.preview_rows(config, model, batch, torch.device("cpu"))[2])
        labels.append(f"{task}\nstep {state['step']}")
    common.save_panels("docs/beyond_masking.png", rows, ["clean", "seen", "target", "answer"],
                       "Target and answer: pixels in units of their patch's deviation.", labels)


if __name__ == "__main__":
    common.run_main(main)
