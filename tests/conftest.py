"""What all tests share: one thread each, the project on the path, the fixtures `shared` and `server`, and the marker `slow`."""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ["OMP_NUM_THREADS"] = "1"  # for the commands that tests start, too
os.environ["HF_HUB_OFFLINE"] = "1"  # transformers asks the hub about local directories otherwise

import pytest  # noqa: E402
import torch  # noqa: E402
from helpers import Server  # noqa: E402

torch.set_num_threads(1)


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="run the tests marked slow as well")


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes long; runs with --slow alone")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--slow"):
        for item in items:
            if item.get_closest_marker("slow"):
                item.add_marker(pytest.mark.skip(reason="slow; runs with --slow"))


@pytest.fixture(scope="session")
def shared():
    """The folder beside the project that holds the real data and GPT-2's vocabulary."""
    path = ROOT.parent / "shared"
    if not path.is_dir():
        pytest.skip("../shared is not here")
    return path


@pytest.fixture(autouse=True, scope="module")
def only_the_gpu_tests_use_a_gpu(request):
    """All others are about the CPU, and mean the same on a machine with a GPU."""
    with pytest.MonkeyPatch.context() as patch:
        if request.module.__name__ != "test_gpu":
            patch.setattr(torch.cuda, "is_available", lambda: False)
        yield


@pytest.fixture
def server(monkeypatch):
    """A server that stands for the hub, while nobody waits between two attempts."""
    server = Server()
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr("data.hub.time.sleep", lambda seconds: None)
    yield server
    server.close()
