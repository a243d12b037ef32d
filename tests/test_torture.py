"""A run that is killed again and again ends as if it had not been; dev/torture.py does it 50 times."""
import pytest

from dev import torture


@pytest.mark.slow
def test_five_kills(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path)) # restored afterwards: torture sets its own
    torture.main(["--kills=5", "--stages", "base"])
    assert "base: the same weights and losses as undisturbed after 200 steps" in capsys.readouterr().out
