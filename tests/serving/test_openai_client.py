"""The openai package, unchanged, and each answer is what generate says of the same prompt alone."""

import json

import pytest

from pyspec import generate
from tests.helpers.http import served

openai = pytest.importorskip("openai")
pytest.importorskip("uvicorn")

SAY = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why is the sky blue?"}]
PROMPT = "Why is the sky"


@pytest.fixture(scope="module")
def client(server):
    with served(server.application) as address:
        yield openai.OpenAI(base_url=f"http://{address}/v1", api_key="none", max_retries=0)


def alone(server, prompt, **settings):
    return generate(server.alone, prompt, drafter=None, **settings)


# what the client asks for, and what generate is called with for the same text
CASES = {
    "greedy": ({"temperature": 0}, {}),
    "seed": ({"seed": 7}, {"seed": 7, "temperature": 1.0}),
    "negative seed": ({"seed": -7}, {"seed": 2**64 - 7, "temperature": 1.0}),
    "temperature": ({"seed": 7, "temperature": 1.7}, {"seed": 7, "temperature": 1.7}),
    "top_p": ({"seed": 7, "top_p": 0.3}, {"seed": 7, "temperature": 1.0, "top_p": 0.3}),
    "penalties": (
        {"temperature": 0, "frequency_penalty": 1.5, "presence_penalty": 0.5},
        {"frequency_penalty": 1.5, "presence_penalty": 0.5},
    ),
    "logit_bias": ({"temperature": 0, "logit_bias": {"33": 100}}, {"logit_bias": {33: 100}}),
    "beyond OpenAI": (
        {"seed": 7, "extra_body": {"top_k": 3, "repetition_penalty": 1.2}},
        {"seed": 7, "temperature": 1.0, "top_k": 3, "repetition_penalty": 1.2},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_text_is_the_one_that_generate_writes_alone(server, client, name):
    asked, settings = CASES[name]
    tokens, prompt = server.alone.tokenizer.chat(SAY), server.alone.tokenizer.encode(PROMPT)
    expected = alone(server, tokens, max_new_tokens=24, **settings)
    answer = client.chat.completions.create(model="small", messages=SAY, max_completion_tokens=24, **asked)
    assert (answer.object, answer.model) == ("chat.completion", "small")
    assert answer.choices[0].message.content == expected.text and answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason == {"length": "length", "eos": "stop"}[expected.finish_reason]
    assert answer.usage.prompt_tokens == len(tokens) and answer.usage.completion_tokens == len(expected.tokens)

    chunks = list(client.completions.create(model="small", prompt=PROMPT, max_tokens=24, stream=True, **asked))
    expected = alone(server, prompt, max_new_tokens=24, **settings)
    assert "".join(chunk.choices[0].text for chunk in chunks) == expected.text
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1].choices[0].finish_reason is not None


def test_a_stop_string_ends_the_text_before_it_begins(server, client):
    whole = alone(server, server.alone.tokenizer.chat(SAY), max_new_tokens=40).text
    stop = whole[12:15]
    chunks = client.chat.completions.create(
        model="small", messages=SAY, max_tokens=40, temperature=0, stop=[stop, "\0"], stream=True
    )
    chunks = list(chunks)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole[: whole.index(stop)]
    assert chunks[0].choices[0].delta.role == "assistant" and chunks[-1].choices[0].finish_reason == "stop"


def test_n_texts_have_seeds_of_their_own(server, client):
    tokens = server.alone.tokenizer.chat(SAY)
    expected = [alone(server, tokens, max_new_tokens=12, temperature=1.0, seed=seed).text for seed in (5, 6, 7)]
    asked = dict(model="small", messages=SAY, max_tokens=12, seed=5, n=3)
    answer = client.chat.completions.create(**asked)
    assert [choice.message.content for choice in answer.choices] == expected
    assert answer.usage.prompt_tokens == len(tokens)  # once
    streamed = ["", "", ""]
    for chunk in client.chat.completions.create(stream=True, **asked):
        for choice in chunk.choices:
            streamed[choice.index] += choice.delta.content or ""
    assert streamed == expected
    answer = client.completions.create(model="small", prompt=["ab", "cd"], n=2, max_tokens=5, seed=5)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    prompts = [server.alone.tokenizer.encode(text) for text in ("ab", "ab", "cd", "cd")]
    expected = [
        alone(server, prompt, max_new_tokens=5, temperature=1.0, seed=seed).text
        for prompt, seed in zip(prompts, (5, 6, 5, 6), strict=True)
    ]
    assert [choice.text for choice in answer.choices] == expected


def test_logprobs_are_those_of_generate(server, client):
    tokens = server.alone.tokenizer.chat(SAY)
    expected = alone(server, tokens, max_new_tokens=10, logprobs=2)
    asked = dict(model="small", messages=SAY, max_tokens=10, temperature=0, logprobs=True, top_logprobs=2)
    whole = client.chat.completions.create(**asked).choices[0].logprobs.content
    streamed = [
        entry
        for chunk in client.chat.completions.create(stream=True, **asked)
        if chunk.choices[0].logprobs is not None
        for entry in chunk.choices[0].logprobs.content
    ]
    for found in (whole, streamed):
        assert [entry.logprob for entry in found] == [each.logprob for each in expected.logprobs]
        assert (
            "".join(entry.token for entry in found)
            == expected.text
            == bytes(sum((e.bytes for e in found), [])).decode()
        )
        assert [[top.logprob for top in entry.top_logprobs] for entry in found] == [
            list(each.top.values()) for each in expected.logprobs
        ]
    told = client.completions.create(model="small", prompt=tokens, max_tokens=10, temperature=0, logprobs=2)
    told = told.choices[0].logprobs
    assert told.token_logprobs == [each.logprob for each in expected.logprobs]
    assert told.text_offset == list(range(10)) and all(len(top) == 2 for top in told.top_logprobs)


def test_counts_at_the_end_of_a_stream_have_accepted_drafts(server, client):
    asked = dict(model="small", prompt="ababababababab", max_tokens=40, temperature=0, logit_bias={"33": 50, "34": 50})
    *chunks, last = client.completions.create(stream=True, stream_options={"include_usage": True}, **asked)
    assert last.choices == [] and all(chunk.usage is None for chunk in chunks)
    usage = client.completions.create(**asked).usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (14, 40, 54)
    assert last.usage.completion_tokens == 40
    details = usage.completion_tokens_details
    assert 0 < details.accepted_prediction_tokens < 40 and details.rejected_prediction_tokens >= 0
    assert 0 <= usage.prompt_tokens_details.cached_tokens < 14


def test_response_format_keeps_the_text_to_a_schema(server, client):
    pytest.importorskip("llguidance")
    schema = {"type": "object", "properties": {"a": {"enum": [3]}}, "required": ["a"], "additionalProperties": False}
    asked = {"type": "json_schema", "json_schema": {"name": "a", "strict": True, "schema": schema}}
    answer = client.chat.completions.create(model="small", messages=SAY, response_format=asked, temperature=0)
    assert json.loads(answer.choices[0].message.content) == {"a": 3} and answer.choices[0].finish_reason == "stop"
    with pytest.raises(openai.BadRequestError, match="grammar") as caught:
        broken = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "nonsense"}}}
        client.chat.completions.create(model="small", messages=SAY, response_format=broken)
    assert caught.value.param == "response_format"


def test_errors_are_those_the_client_knows(server, client):
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="large", messages=SAY)
    assert caught.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="small", prompt="x" * 3000)
    assert caught.value.code == "context_length_exceeded" and "3000" in caught.value.message
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="small", prompt="x", extra_body={"surprise": 1})
    assert caught.value.code == "unknown_parameter" and caught.value.param == "surprise"
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="small", prompt="x", logit_bias={"97": 1})
    assert caught.value.param == "logit_bias"


def test_models_are_listed(client):
    assert [model.id for model in client.models.list()] == ["small"]
    assert client.models.retrieve("small").owned_by == "pyspec"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("some/other")
