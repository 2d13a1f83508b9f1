import pytest

from .planting import export


@pytest.fixture(scope="session")
def exported(tmp_path_factory):
    return export(tmp_path_factory.mktemp("compare") / "unfinished")
