"""For all tests: one thread, signals put back, some images."""

import signal
import sys

import pytest
import torch

import common
from helpers import write_images

torch.set_num_threads(1)  # the models are so small that a second thread only costs


def pytest_terminal_summary(terminalreporter):
    """The table of tests/test_faults.py."""
    for fault, tries, lost in getattr(sys.modules.get("test_faults"), "ROWS", []):
        terminalreporter.write_line(f"| {fault} | {tries} | {lost} |")


@pytest.fixture(autouse=True)
def signals():
    """A run that ends by an error leaves its handlers behind: none may leak into the next test."""
    before = {number: signal.getsignal(number) for number in common.SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """A folder of 24 images; tests that change it take a copy."""
    return write_images(tmp_path_factory.mktemp("data") / "images")
