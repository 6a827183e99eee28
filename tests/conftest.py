"""What all tests share: one thread, the import path, signals, the fixtures `shared`, `online` and
`server`, and the marker `slow`."""

import os
import signal
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ["OMP_NUM_THREADS"] = "1"  # also for the commands that tests start
os.environ["HF_HUB_OFFLINE"] = "1"  # or transformers queries the hub about local directories
os.environ.pop("PROMPTKD_DATA_DIR", None)
# nohup ignores SIGHUP, and a background job of a script SIGINT. The commands that tests start would
# inherit that. What has a handler here, they have by default.
signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
    signal.signal(signal.SIGHUP, lambda *_: None)

import pytest  # noqa: E402
import torch  # noqa: E402
from helpers import Server  # noqa: E402

torch.set_num_threads(1)


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="run the tests marked slow as well")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--slow"):
        for item in items:
            if item.get_closest_marker("slow"):
                item.add_marker(pytest.mark.skip(reason="slow; runs with --slow"))


@pytest.fixture(scope="session")
def shared():
    """The directory next to the project that has the real data and GPT-2's vocabulary."""
    path = ROOT.parent / "shared"
    if not path.is_dir():
        pytest.skip("there is no ../shared")
    return path


@pytest.fixture(autouse=True, scope="module")
def only_the_gpu_tests_use_a_gpu(request):
    """All others run on the CPU, so that their results are the same on a machine with a GPU."""
    with pytest.MonkeyPatch.context() as patch:
        if request.module.__name__ != "test_gpu":
            patch.setattr(torch.cuda, "is_available", lambda: False)
        yield


@pytest.fixture
def online(monkeypatch):
    """Downloads are allowed, as they are for a user without settings and without a token."""
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_TOKEN_PATH", os.devnull)


@pytest.fixture
def server(online, monkeypatch):
    """A server in place of the hub. There is no delay between two attempts of a download."""
    server = Server()
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr("data.models.hub.time.sleep", lambda seconds: None)
    yield server
    server.close()
