import os

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # before torch is loaded: threads that wait do not keep cores from others' work, on machines that are shared

import pytest  # noqa: E402
import torch  # noqa: E402


def pytest_generate_tests(metafunc):
    """A test that takes ``device`` runs on the CPU, and on CUDA too where there is a GPU: the same tests are the evidence for both backends."""
    if "device" in metafunc.fixturenames:
        metafunc.parametrize("device", ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"])


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
