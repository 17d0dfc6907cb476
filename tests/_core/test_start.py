"""What the package imports, and when; how it stops."""

import os
import signal
import subprocess
import sys
import threading

import pytest

import ndm_ct
from ndm_ct._core.signals import stop_signals

HEAVY = ("torch", "torchdiffeq", "torchsde", "scipy", "sklearn", "matplotlib", "tqdm", "pandas")


def imported(code):
    """Which of the heavy modules a fresh interpreter has after running the code, and its exit code."""
    program = f"""
import sys
try:
    {code}
except SystemExit as stop:
    print("exit", stop.code or 0)
print("modules", *(name for name in {HEAVY!r} if name in sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    lines = dict(line.partition(" ")[::2] for line in done.stdout.splitlines() if line[:4] in ("exit", "modu"))
    return set(lines["modules"].split()), int(lines.get("exit", 0))


@pytest.mark.parametrize(("arguments", "code"), [
    (["--help"], 0), (["--version"], 0), (["train", "--help"], 0), (["sample", "--help"], 0), (["demo", "--help"], 0),
    (["train"], 2), (["nonsense"], 2), (["sample", "run", "--steps", "many", "--out", "x.csv"], 2),
    (["train", "x.csv", "--out", "run", "--seed", "-1"], 2),
])  # fmt: skip
def test_help_and_usage_errors_load_no_torch(arguments, code):
    assert imported(f"from ndm_ct.cli import main; raise SystemExit(main({arguments!r}))") == (set(), code)


def test_the_package_loads_what_is_used():
    assert imported("import ndm_ct; assert 'loglik' in dir(ndm_ct)") == (set(), 0)
    found, _ = imported("import ndm_ct; ndm_ct.NDM, ndm_ct.loglik, ndm_ct.sample, ndm_ct.fit, ndm_ct.evaluate")
    assert not found & {"torchdiffeq", "torchsde", "scipy", "sklearn", "matplotlib"}
    found, _ = imported("import ndm_ct; [getattr(ndm_ct, name) for name in ndm_ct.__all__ if name != 'estimator']")
    assert not found & {"torchdiffeq", "torchsde", "sklearn", "matplotlib"}


def test_a_fresh_process_knows_the_classes_of_files():
    """Whatever it has imported until then."""
    program = """
import pkgutil, importlib, ndm_ct
from ndm_ct._core import config
assert config._class("Preconditioned") is not None
known = set(config.Configurable.registry)
for info in pkgutil.walk_packages(ndm_ct.__path__, "ndm_ct."):
    if info.name.split(".")[1] not in ("estimator", "__main__"):
        importlib.import_module(info.name)
print(*sorted(set(config.Configurable.registry) - known))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_every_public_name_is_there():
    for name in ndm_ct.__all__:
        if name == "estimator":
            pytest.importorskip("sklearn", minversion="1.6")
        assert getattr(ndm_ct, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'loglikelihood'"):
        _ = ndm_ct.loglikelihood


@pytest.mark.skipif(os.name == "nt", reason="Windows sends no such signals")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_request_to_stop_is_an_interruption(number):
    before = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt), stop_signals():  # noqa: PT012
        os.kill(os.getpid(), number)
        threading.Event().wait(5)
    assert signal.getsignal(number) is before
    told = []
    with stop_signals(), stop_signals(lambda *arguments: told.append(arguments[0])):  # the inner block has it
        os.kill(os.getpid(), number)
        threading.Event().wait(0.1)
    assert told == [number]


@pytest.mark.skipif(os.name == "nt", reason="Windows sends no such signals")
def test_a_handler_of_the_program_is_left_alone():
    told = []
    before = signal.signal(signal.SIGUSR1, lambda *arguments: told.append(arguments[0]))
    try:
        with stop_signals():
            os.kill(os.getpid(), signal.SIGUSR1)
            threading.Event().wait(0.1)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert told == [signal.SIGUSR1]
