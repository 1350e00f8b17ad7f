"""The watchdog: what counts as a death, what it sets free, and what it never does."""

from __future__ import annotations

import http.server
import threading
import time
from collections.abc import Iterator

import pytest

from verl_grad_routing.training.watchdog import RolloutDied, Watchdog, health


class _Answers(http.server.BaseHTTPRequestHandler):
    status = 200

    def do_GET(self) -> None:
        self.send_response(self.status if self.path == "/health" else 404)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        return None


@pytest.fixture
def server() -> Iterator[http.server.HTTPServer]:
    _Answers.status = 200
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Answers)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def _address(server: http.server.HTTPServer) -> str:
    return f"127.0.0.1:{server.server_port}"


def test_health_of_a_real_server(server: http.server.HTTPServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    assert health(_address(server)) is None
    _Answers.status = 503
    assert health(_address(server)) == "its health check answers 503"
    server.shutdown()
    server.server_close()
    assert health(_address(server)).startswith("no connection")


class _Run:
    """A watchdog on made-up answers, and what it did."""

    def __init__(self, answers: list[str | None], grace_s: float = 5.0):
        self.answers, self.released, self.ended = answers, threading.Event(), threading.Event()
        self.dog = Watchdog(
            self.released.set, every_s=0.01, grace_s=grace_s, ask=lambda _: self.ask(), end=self.ended.set
        )

    def ask(self) -> str | None:
        return self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]


def test_one_bad_answer_is_no_death() -> None:
    run = _Run([None, "gone", None, "gone", None])
    run.dog.start(["a:1"])
    time.sleep(0.2)
    run.dog.stop()
    assert run.dog.cause is None and not run.released.is_set()


def test_two_in_a_row_release_the_workers_and_name_the_cause() -> None:
    run = _Run([None, None, "gone"])
    run.dog.start(["a:1"])
    with pytest.raises(RolloutDied, match="the rollout server at a:1 died: gone"), run.dog.names_the_cause():
        assert run.released.wait(5)
        raise RuntimeError("the actor died")
    time.sleep(0.1)
    assert not run.ended.is_set()


def test_a_process_that_does_not_end_is_ended() -> None:
    run = _Run([None, "gone"], grace_s=0.05)
    run.dog.start(["a:1"])
    assert run.ended.wait(5)


def test_a_server_that_never_answered_is_not_watched(capsys: pytest.CaptureFixture[str]) -> None:
    run = _Run(["no connection"])
    run.dog.start(["a:1"])
    time.sleep(0.1)
    assert not run.released.is_set()
    assert "['a:1'] cannot be asked for their health" in capsys.readouterr().out


def test_other_errors_stay_what_they_are() -> None:
    run = _Run([None])
    run.dog.start(["a:1"])
    with pytest.raises(ValueError, match="of its own"), run.dog.names_the_cause():
        raise ValueError("of its own")
    assert run.dog._stopped.is_set()
