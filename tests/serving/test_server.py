"""What the server does beside answering: limits, refusals, clients that go away, figures and logs."""

import json
import logging
import socket
import threading
import time
from contextlib import contextmanager

import pytest

from tests.helpers.http import PATIENCE, call, served
from tests.helpers.talking_llama import talking_llama

pytest.importorskip("starlette")
pytest.importorskip("prometheus_client")

from pyspec.serving.app import Application  # noqa: E402
from pyspec.serving.engine import Engine  # noqa: E402

BODY = {"model": "small", "prompt": "hello", "max_tokens": 8, "temperature": 0}


@contextmanager
def held_engine(**sizes):
    """An engine whose rounds wait for an event, and the event."""
    model, go_on = talking_llama(), threading.Event()
    verify = model.verify

    def held(trees):
        assert go_on.wait(PATIENCE)
        return verify(trees)

    model.verify = held
    with Engine(model, budget=4, **sizes) as engine:
        try:
            yield engine, go_on
        finally:
            go_on.set()


def wait_for(engine, **wanted):
    """Waits until engine.state() has these figures."""
    for _ in range(PATIENCE * 100):
        state = engine.state()
        if all(state[name] == value for name, value in wanted.items()):
            return
        time.sleep(0.01)
    raise AssertionError(f"{state} never had {wanted}")


def send(address, body, path="/v1/completions"):
    """A connection on which a request was sent."""
    host, _, port = address.partition(":")
    connection = socket.create_connection((host, int(port)), PATIENCE)
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    connection.sendall(head.encode() + data)
    return connection


# ==== the queue, and clients that go away ====


@pytest.mark.parametrize("stream", [True, False])
def test_a_full_queue_is_told_and_a_client_that_goes_away_leaves_its_place(stream):
    pytest.importorskip("uvicorn")
    with held_engine(slots=1, queue=1) as (engine, go_on), served(Application(engine, "small")) as address:
        first = send(address, BODY | {"stream": stream, "max_tokens": 1000})
        wait_for(engine, running=1, queued=0)
        second = send(address, BODY)
        wait_for(engine, running=1, queued=1)
        refused = call(Application(engine, "small"), "POST", "/v1/completions", BODY)
        assert refused.status == 429 and int(refused.headers["retry-after"]) >= 1
        assert refused.json["error"]["type"] == "rate_limit_error"
        first.close()
        wait_for_cancel = time.perf_counter() + PATIENCE
        go_on.set()
        answer = second.recv(10_000)  # only when the first one's slot is free
        assert b"200 OK" in answer and time.perf_counter() < wait_for_cancel
        wait_for(engine, running=0, queued=0, free=1, finished_cancelled=1, finished_length=1)
        second.close()


def test_a_client_that_goes_away_while_it_waits_leaves_the_queue():
    pytest.importorskip("uvicorn")
    with held_engine(slots=1, queue=4) as (engine, go_on), served(Application(engine, "small")) as address:
        first = send(address, BODY)
        wait_for(engine, running=1)
        waiting = [send(address, BODY | {"n": 1, "stream": index % 2 == 0}) for index in range(4)]
        wait_for(engine, queued=4)
        for connection in waiting:
            connection.close()
        time.sleep(0.2)  # the event loop hears of it; too short a time would only make this test easier to pass
        go_on.set()
        assert b"200 OK" in first.recv(10_000)
        wait_for(engine, running=0, queued=0, finished_cancelled=4, finished_length=1)
        first.close()


def test_texts_of_one_request_are_queued_together_or_not_at_all():
    with held_engine(slots=2, queue=1) as (engine, go_on):
        writing = [engine.submit("ab", max_new_tokens=2) for _ in range(2)]
        wait_for(engine, running=2)
        refused = call(Application(engine, "small"), "POST", "/v1/completions", BODY | {"n": 2})
        assert refused.status == 429
        go_on.set()
        for answer in writing:
            answer.result(PATIENCE)
        wait_for(engine, running=0, queued=0, finished_cancelled=1)


def test_an_answer_that_takes_too_long_is_broken_off():
    with held_engine(slots=2, queue=1) as (engine, go_on):
        application = Application(engine, "small", most_seconds=0.2)
        late = call(application, "POST", "/v1/completions", BODY)
        assert late.status == 504 and "0.2 seconds" in late.json["error"]["message"]
        late = call(application, "POST", "/v1/completions", BODY | {"stream": True})
        assert late.status == 200 and b'"code":"timeout"' in late.body and b"[DONE]" not in late.body
        go_on.set()
        wait_for(engine, running=0, queued=0, finished_cancelled=2)


def test_a_model_that_fails_is_an_error_of_the_server_and_the_next_request_is_answered():
    model = talking_llama()
    verify = model.verify
    with Engine(model, slots=2, budget=4) as engine:
        application = Application(engine, "small")
        expected = call(application, "POST", "/v1/completions", BODY).json["choices"][0]["text"]

        def fail(trees):
            model.verify = verify
            raise RuntimeError("secret words")

        model.verify = fail
        failed = call(application, "POST", "/v1/completions", BODY)
        assert failed.status == 500 and failed.json["error"]["type"] == "server_error"
        assert call(application, "POST", "/v1/completions", BODY).json["choices"][0]["text"] == expected


def test_requests_after_the_engine_is_closed_are_refused():
    engine = Engine(talking_llama(), slots=1)
    engine.close()
    refused = call(Application(engine, "small"), "POST", "/v1/completions", BODY)
    assert refused.status == 503 and refused.json["error"]["code"] == "closing"


# ==== what is refused before it is read ====


def test_bodies_are_json_of_a_limited_size(server):
    application = Application(server.engine, "small", most_bytes=200)
    large = json.dumps(BODY | {"prompt": "x" * 200}).encode()
    for headers in ({}, {"content-length": str(len(large))}, {"content-length": "9" * 30}):
        refused = call(application, "POST", "/v1/completions", large, headers)
        assert refused.status == 413 and "200 bytes" in refused.json["error"]["message"]
    refused = call(application, "POST", "/v1/completions", BODY, {"content-type": "text/plain"})
    assert refused.status == 415  # what a web page may send without asking
    assert (
        call(application, "POST", "/v1/completions", BODY, {"content-type": "application/json; charset=utf-8"}).status
        == 200
    )


def test_a_key_opens_all_but_health(server):
    application = Application(server.engine, "small", api_key="secret")
    key = {"authorization": "Bearer secret"}
    for path, method in (("/v1/models", "GET"), ("/metrics", "GET"), ("/v1/completions", "POST"), ("/nowhere", "GET")):
        for wrong in (
            {},
            {"authorization": "secret"},
            {"authorization": "Bearer secre"},
            {"authorization": "Bearer é"},
        ):
            refused = call(application, method, path, BODY, wrong)
            assert refused.status == 401 and refused.json["error"]["code"] == "invalid_api_key"
    assert call(application, "GET", "/v1/models", headers=key).status == 200
    assert call(application, "POST", "/v1/completions", BODY, key).status == 200
    assert call(application, "GET", "/health").json["status"] == "ok"


def test_other_paths_and_methods_are_refused_in_the_same_form(server):
    for method, path, status in (("GET", "/v1/nothing", 404), ("GET", "/v1/completions", 405), ("PUT", "/health", 405)):
        refused = call(server.application, method, path)
        assert refused.status == status and refused.json["error"]["type"] == "invalid_request_error"


# ==== figures and logs ====


def test_metrics_count_requests_and_tokens(server):
    application = Application(server.engine, "small")
    before = server.engine.state()
    usage = call(application, "POST", "/v1/completions", BODY).json["usage"]
    call(application, "POST", "/v1/completions", BODY | {"n": 99})
    call(application, "GET", "/some/where")
    wait_for(server.engine, running=0)
    text = call(application, "GET", "/metrics").body.decode()
    figures = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert figures['pyspec_http_requests_total{path="/v1/completions",status="200"}'] == "1.0"
    assert figures['pyspec_http_requests_total{path="/v1/completions",status="400"}'] == "1.0"
    assert figures['pyspec_http_requests_total{path="other",status="404"}'] == "1.0"
    assert float(figures["pyspec_new_tokens_total"]) == before["new_tokens"] + usage["completion_tokens"]
    assert figures["pyspec_running"] == "0.0" and figures["pyspec_slots"] == "4.0"
    assert figures["pyspec_first_piece_seconds_count"] == "1.0"


def test_logs_have_no_word_of_prompt_or_text(server, caplog, monkeypatch):
    caplog.set_level(logging.DEBUG)
    words = "confidential words of mine"
    text = call(server.application, "POST", "/v1/completions", BODY | {"prompt": words}).json["choices"][0]["text"]
    call(server.application, "POST", "/v1/completions", BODY | {"prompt": words, words: words})

    def fail(*arguments, **settings):
        raise LookupError(words)

    monkeypatch.setattr(server.engine, "submit", fail)
    failed = call(server.application, "POST", "/v1/completions", BODY | {"prompt": words})
    assert failed.status == 500 and words not in failed.body.decode()
    ours = [record.getMessage() for record in caplog.records if record.name.startswith("pyspec")]
    assert sum("/v1/completions 200" in line for line in ours) == 1 and any("LookupError" in line for line in ours)
    assert words not in caplog.text and text not in caplog.text
