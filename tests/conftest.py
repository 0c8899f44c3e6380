"""For all tests: a mark for the long ones (`pytest -m slow`), one thread, and signals put back."""

import signal

import pytest
import torch


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes more than a few seconds")
    torch.set_num_threads(1)  # the models are so small that a second thread only costs


@pytest.fixture(autouse=True)
def signals():
    """A run that ends by an error leaves its handlers behind: none may leak into the next test."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
