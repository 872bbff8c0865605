"""No secret of a URL, a header or the environment reaches a line, a file or a server."""

from __future__ import annotations

import io
import os
import string
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch
from urllib.parse import quote, unquote

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from foundation import cli
from foundation.config import from_dict
from foundation.config_text import Problem
from foundation.errors import ConfigError, DataError
from foundation.training.events import plain
from foundation.training.mlflow_store import _text, short
from shards.redaction import bare, redact, redacted, tells
from shards.store import Store

MARK = "S3CR3T"
BRIEF = settings(max_examples=50, deadline=None)
RAW = st.text("abXY01-._~%+/@:?#&='(),;", max_size=60).map(MARK.__add__)
ENCODED = st.text("".join(set(string.printable) - set(string.whitespace)), max_size=30).map(
    lambda text: quote(MARK + text, safe="")
)
AROUND = st.sampled_from(["{}", "'{}'", "cannot reach '{}', given up", '{{"uri": "{}"}}', "(url={})", "{}: no answer"])


@st.composite
def leaky(draw: st.DrawFn) -> str:
    """Text as libraries make it, around a secret."""
    secret = draw(RAW | ENCODED)
    plain_secret = draw(ENCODED)
    kind = draw(
        st.sampled_from(
            [
                f"http://me:{secret}@127.0.0.1:5000/x",
                f"postgresql+psycopg://mlflow:{secret}@database/mlflow",
                f"s3://AKIA:{secret}@bucket/run",
                f"https://{plain_secret}@host",
                f"https://host/c/0.tar?X-Amz-Signature={plain_secret}&X-Amz-Date=1",
                f"https://host/c#access={plain_secret}",
                f"Max retries exceeded with url: /c/0.tar?sig={plain_secret}",
                f"invalid header value: 'Bearer {plain_secret}",
                f"Authorization: Basic {plain_secret}",
                f"host=db user=me password={plain_secret}",
                f"aws_secret_access_key = {plain_secret}",
            ]
        )
    )
    return draw(AROUND).format(kind)


OUTPUTS: dict[str, Callable[[str], object]] = {
    "what happened": lambda text: DataError(text, do="y"),
    "where": lambda text: DataError("x", where=text, do="y"),
    "what to do": lambda text: DataError("x", do=text),
    "the fields of an error": lambda text: vars(DataError(text, where=text, do=text)),
    "a problem of the configuration": lambda text: Problem("tracking.uri", text, "text"),
    "a note about MLflow": lambda text: short(OSError(text)),
    "a parameter or tag": lambda text: _text(text),
    "an event": lambda text: plain({"reason": text, "more": [text]}),
    "the place of a catalog": lambda text: Store(text).where("0.tar") if "://" in text else "",
}


@pytest.mark.parametrize("output", OUTPUTS)
@BRIEF
@given(text=leaky())
def test_no_output_shows_a_secret(output: str, text: str) -> None:
    assert MARK not in str(OUTPUTS[output](text))


@BRIEF
@given(text=leaky())
def test_what_is_redacted_stays_as_it_is(text: str) -> None:
    assert redact(redact(text)) == redact(text)


@BRIEF
@given(secret=RAW, before=st.text(max_size=9), name=st.sampled_from(["MLFLOW_TRACKING_TOKEN", "AWS_SECRET_ACCESS_KEY"]))
def test_a_secret_of_the_environment_is_found_wherever_it_stands(secret: str, before: str, name: str) -> None:
    with patch.dict(os.environ, {name: secret + "\n"}):
        assert MARK not in redact(f"{before}{secret}{before}")


@BRIEF
@given(secret=ENCODED)
def test_a_password_of_a_url_of_the_environment_is_found_without_its_url_and_decoded(secret: str) -> None:
    with patch.dict(os.environ, {"MLFLOW_TRACKING_URI": f"https://me:{secret}@host/x"}):
        assert MARK not in redact(f"login failed for me/{secret} ({unquote(secret)})")


@pytest.mark.parametrize(
    "text",
    [
        "s3://bucket/a@b/c",
        "http://127.0.0.1:5000: no answer",
        "sqlite:////runs/mlflow.db",
        "did you mean data.catalog?",
        "export pool=token, 196 tokens, cls_token: [1, 1, 384]",
        "me@example.org",
    ],
)
def test_other_text_stays_as_it_is(text: str) -> None:
    assert redact(text) == bare(text) == text
    assert not tells(text)


@settings(max_examples=10, deadline=None)
@given(url=st.one_of(*(RAW.map(form.format) for form in ("s3://me:{}@b/x", "https://host/x?{}", "s3://AKIA:{}@b"))))
@pytest.mark.parametrize("key", ["tracking.uri", "data.catalog", "model.init", "run_root"])
def test_a_configuration_takes_no_url_with_a_secret(key: str, url: str) -> None:
    section, _, name = key.rpartition(".")
    tree: dict[str, Any] = {section: {name: url}} if section else {name: url}
    with pytest.raises(ConfigError, match="a URL without user name or query") as error:
        from_dict(tree)
    assert MARK not in str(error.value)


def test_a_stream_takes_secrets_out_and_is_otherwise_the_one_below() -> None:
    below = io.StringIO()
    print("at http://me:hunter2@host", file=redacted(below))
    assert below.getvalue() == "at http://***@host\n"
    assert redacted(below).closed is False


def test_an_unexpected_error_is_printed_without_secrets(capsys: pytest.CaptureFixture[str]) -> None:
    try:
        raise OSError("http://me:hunter2@host") from ValueError("http://host?sig=hunter2")
    except OSError as error:
        cli._unexpected(type(error), error, error.__traceback__)
    shown = capsys.readouterr().err
    assert "Traceback" in shown
    assert "OSError: http://***@host" in shown
    assert "hunter2" not in shown


@pytest.mark.slow
@pytest.mark.usefixtures("reported")
def test_a_whole_run_under_an_address_with_a_password_leaves_no_trace_of_it(
    tmp_path: Path, tiny_yaml: Path, command: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    secrets = {"MLFLOW_TRACKING_URI": "http://me:hunter2pass@127.0.0.1:9", "AWS_SECRET_ACCESS_KEY": "hunter2key"}
    for name, value in secrets.items():
        monkeypatch.setenv(name, value)
    run, short_run = tmp_path / "runs" / "tiny", ("train.samples=16", "tracking.mlflow=true")
    shown = [command("train", tiny_yaml, *short_run)]
    assert shown[0].code == 0
    assert "MLflow does not answer (http://***@127.0.0.1:9: " in shown[0].err, "the store was asked"
    shown += [command("track", run), command("inspect", run)]
    shown += [command("export", run, tmp_path / "encoder", "--format", "torch")]
    shown += [command("train", tiny_yaml, f"tracking.uri={secrets['MLFLOW_TRACKING_URI']}")]
    shown += [command("report", run, "--data", "https://me:hunter2pass@127.0.0.1:9/corpus?sig=hunter2key")]
    assert [each.code for each in shown] == [0, 2, 0, 0, 2, 2]
    assert all("hunter2" not in text for each in shown for text in (each.out, each.err))
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {"report.html", "events.jsonl", "environment.json", "README.md"} <= {path.name for path in files}
    assert [path for path in files if b"hunter2" in path.read_bytes()] == []
