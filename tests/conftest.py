"""Every test starts from the same random state, and every file of tests is read from it."""

import os

import pytest
import torch

if "PYTEST_XDIST_WORKER" in os.environ:  # workers and the processes they start share the cores
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"


def _note_skipped(report):
    """Names what is skipped in the file NDM_CT_SKIPPED, for a run once more packages are installed."""
    path = os.environ.get("NDM_CT_SKIPPED")
    if path and report.skipped and not hasattr(report, "wasxfail") and "PYTEST_XDIST_WORKER" not in os.environ:
        with open(path, "a") as file:
            print(report.nodeid, file=file)


def pytest_runtest_logreport(report):
    _note_skipped(report)


def pytest_collectreport(report):
    _note_skipped(report)


def pytest_collectstart():
    torch.manual_seed(0)  # for networks and data that are made as a file is read: torch itself starts anywhere


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(1234)
