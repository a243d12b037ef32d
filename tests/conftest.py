"""For all tests: none touches the user's own files, and those for a GPU run only where there is one."""

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def _own_base_dir(tmp_path_factory):
    """A test that forgets to choose a base directory gets an empty one, and no test believes itself under torchrun."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOCHAT_BASE_DIR", str(tmp_path_factory.mktemp("base")))
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
            patch.delenv(name, raising=False)
        yield


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
