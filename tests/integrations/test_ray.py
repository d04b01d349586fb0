"""pyspec.integrations.ray: a predictor without Ray, and workers on Ray's actors where it is installed."""

import numpy as np
import pytest

from pyspec import generate
from pyspec.integrations.ray import Predictor, actor_calls
from pyspec.serving.distributed import DistributedText, Worker
from tests.helpers.talking_llama import END, talking_llama


def test_a_predictor_adds_texts_to_a_batch():
    predictor = Predictor(talking_llama(), max_new_tokens=9, temperature=1.0, seed=3, budget=4)
    batch = {"prompt": np.array(["hello", "Why is the sky blue?"], dtype=object), "id": np.array([4, 5])}
    for _ in range(2):  # what the drafter has learned changes nothing
        found = predictor(batch)
        assert found["id"].tolist() == [4, 5] and found["prompt"] is batch["prompt"] and "text" not in batch
        for row, prompt in enumerate(batch["prompt"]):
            alone = talking_llama()
            tokens = alone.tokenizer.chat([{"role": "user", "content": prompt}])
            expected = generate(alone, tokens, drafter=None, max_new_tokens=9, temperature=1.0, seed=3)
            assert found["text"][row] == expected.text and found["finish_reason"][row] == expected.finish_reason
            assert found["new_tokens"][row] == len(expected.tokens) and found["prompt_tokens"][row] == len(tokens)
            assert found["error"][row] == ""
    with pytest.raises(KeyError, match="a column 'prompt', got text"):
        predictor({"text": np.array(["x"])})


def test_workers_on_actors_write_what_generate_writes():
    ray = pytest.importorskip("ray")
    ray.init(num_cpus=3, include_dashboard=False, log_to_driver=False)
    try:
        actors = [ray.remote(Worker).remote(talking_llama(), 200) for _ in range(3)]
        targets = [actor_calls(actor.verify) for actor in actors[1:]]
        prompt = talking_llama().tokenizer.encode("Why is the sky")
        found = DistributedText(actor_calls(actors[0].draft), targets, lookahead=3).generate(prompt, 20, ends=[END])
    finally:
        ray.shutdown()
    assert found == generate(talking_llama(), prompt, drafter=None, max_new_tokens=20).tokens
