"""Malformed requests, hundreds of them: each is refused with a sentence, and none breaks or keeps anything."""

import json
import random

import pytest

from pyspec import generate
from tests.helpers.http import call
from tests.helpers.talking_llama import talking_llama

pytest.importorskip("starlette")
pytest.importorskip("prometheus_client")

CHAT = {"model": "small", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 2, "seed": 1}
TEXT = {"model": "small", "prompt": "hello", "max_tokens": 2, "seed": 1}
FIELDS = """model messages prompt max_tokens max_completion_tokens temperature top_p top_k min_p typical_p mirostat n
stop stream stream_options seed logprobs top_logprobs logit_bias frequency_penalty presence_penalty repetition_penalty
banned_tokens forced_tokens grammar response_format tools tool_choice parallel_tool_calls user metadata echo suffix
best_of functions modalities store service_tier chat_template_kwargs reasoning_effort prediction surprise""".split()
VALUES = [None, True, False, 0, 1, -1, 2, 3.5, -0.5, 1e308, -1e308, 10**30, -(10**30), 2**63, "", "x", "\0", "é" * 50]
VALUES += ["\ud800", "hello" * 100, [], [[]], [None], [1, 2], [1, [2]], ["a", 1], [-1], [96], [97], [10**20], [True]]
VALUES += [{}, {"": None}, {"1": 1}, {"x": 1}, {"97": 1}, {"1": 1e9}, {"1": "1"}, {"type": "text"}, {"type": []}]
VALUES += [{"type": "json_object"}, {"type": "json_schema", "json_schema": {"schema": {"type": 3}}}, {"regex": "("}]
VALUES += [{"lark": "nothing"}, {"role": "user"}, [{"role": "user", "content": [{}]}], [{"role": "tool", "content": 1}]]
VALUES += [[{"role": "assistant", "tool_calls": [{"function": {"name": 1}}]}], [{"type": "function", "function": {}}]]
VALUES += [{"include_usage": []}, {"messages": 1}, {"tools": 1}, {"refuse": True}]


def malformed(generator: random.Random) -> tuple[str, str, bytes, dict]:
    """Method, path, body and headers of a request that is broken in one or a few ways, or in none."""
    path, body = generator.choice([("/v1/chat/completions", CHAT), ("/v1/completions", TEXT)])
    body = dict(body)
    for _ in range(generator.choice([1, 1, 1, 2, 4])):
        body[generator.choice(FIELDS)] = generator.choice(VALUES)
    data = json.dumps(body).encode()
    way = generator.randrange(10)
    if way == 0:
        data = data[: generator.randrange(len(data))]
    elif way == 1:
        place = generator.randrange(len(data))
        data = data[:place] + generator.randbytes(generator.randrange(1, 9)) + data[place + 1 :]
    elif way == 2:
        data = generator.choice([b"[" * 9999, b"null", b"", b'"', generator.randbytes(50), b'{"model":' * 2000])
    method = generator.choice(["GET", "PUT", "PATCH"]) if generator.randrange(30) == 0 else "POST"
    headers = {"content-length": generator.choice(["-1", "x", "9" * 40, "0"])} if generator.randrange(20) == 0 else {}
    if generator.randrange(30) == 0:
        headers["content-type"] = generator.choice(["", "text/plain", "application/xml", "é"])
    return method, path, data, headers


def send_malformed(application, count: int, seed: int) -> dict[int, int]:
    """Sends so many; returns how many had each status. An answer or a refusal with a sentence is all there may be."""
    generator, statuses = random.Random(seed), {}
    for _ in range(count):
        method, path, data, headers = malformed(generator)
        response = call(application, method, path, data, headers)
        statuses[response.status] = statuses.get(response.status, 0) + 1
        shown = (method, path, data[:300], headers, response)
        assert response.status == 200 or 400 <= response.status < 500, shown
        if response.status != 200 and method != "HEAD":
            error = response.json["error"]
            assert error.keys() == {"message", "type", "param", "code"} and len(error["message"]) > 10, shown
            assert error["type"] == "invalid_request_error", shown
    return statuses


def test_malformed_requests_are_refused_and_leave_nothing_behind():
    from pyspec.serving.app import Application
    from pyspec.serving.engine import Engine

    with Engine(talking_llama(context=100), slots=4, queue=4, budget=4) as engine:
        application = Application(engine, "small")
        statuses = send_malformed(application, 400, seed=0)
        assert statuses[400] > 200 and statuses[200] > 10 and len(statuses) >= 4
        state = engine.state()
        assert state["running"] == state["queued"] == 0 and state["free"] == 4
        alone = talking_llama(context=100)
        expected = generate(alone, alone.tokenizer.encode("hello"), max_new_tokens=2, temperature=1.0, seed=1).text
        assert call(application, "POST", "/v1/completions", TEXT).json["choices"][0]["text"] == expected
