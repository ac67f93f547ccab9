"""api/check.py: the table of what the configured upstreams answer."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from api.check import main
from sandbox.sites import Sandbox


def test_a_table_of_what_came(web: Sandbox, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "upstreams.toml"
    url = web.url("/api/weather") + "?city={city}&key=${KEY}"
    good = f"[weather]\nurl = '{url}'\nparameters = {{ city = 'Oslo' }}\n"
    path.write_text(good)
    environ = pytest.MonkeyPatch()
    environ.setenv("KEY", "s3cret")
    try:
        assert main(["--check", str(path)]) == 0
        head, line = capsys.readouterr().out.splitlines()
        assert head.split() == ["source", "answer", "ms", "bytes"]
        assert re.fullmatch(r'weather  ok      +\d+  +\d\d\d?  \{"serial":.*', line), line
        bad = "timeout = 5\nretries = 0\nfallback = 1\n"
        path.write_text(
            f"{good}[gone]\nurl = '{web.url('/status/404')}'\n{bad}headers = {{ X = '${{KEY}}' }}\n"
            f"[part]\nurl = '{web.url('/api/news')}'\n{bad}keep = 'items.none'\n"
        )
        assert main(["--check", str(path)]) == 1
        out = capsys.readouterr().out
        lines = [line.split()[:2] for line in out.splitlines()[1:]]
        assert lines == [["weather", "ok"], ["gone", "error"], ["part", "error"]]
        assert "http: 404" in out and "missing: items.none" in out and "s3cret" not in out
    finally:
        environ.undo()


@pytest.mark.parametrize(
    ("text", "message"),
    [(None, "No such file"), ("[a]", "a.url: missing"), ("[a]\nurl = 'http://h/${NO_SUCH}'", "NO_SUCH")],
)
def test_a_wrong_file_is_one_line(
    text: str | None, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "upstreams.toml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(SystemExit, match="2"):
        main(["--check", str(path)])
    assert message in capsys.readouterr().err.splitlines()[-1]
