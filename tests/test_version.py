import pytest

from trainer.cli import main
from trainer.version import __version__


def test_version_is_the_package_s(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as end:
        main(["--version"])
    assert end.value.code == 0
    assert capsys.readouterr().out == f"trainer {__version__}\n"
