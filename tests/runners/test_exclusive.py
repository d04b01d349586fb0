"""Runners that several threads use: every text is the text it has alone, and who would disturb another is refused."""

import copy
import ctypes
import pickle
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from pyspec import DraftTree, from_transformers, generate
from pyspec.drafters import new_drafter
from pyspec.drafters.layer_skip import LayerSkipDrafter
from pyspec.drafters.model import ModelDrafter
from pyspec.drafters.table_drafter import TableDrafter
from pyspec.drafters.tables.lookup import Lookup
from pyspec.runners.exclusive import exclusive_use, lock_of
from pyspec.runners.foreign import TransformersRunner
from tests.helpers.random_llama import VOCABULARY, random_llama, random_tokens
from tests.helpers.tiny_mambas import tiny_mamba

NEW_TOKENS = 24


@pytest.fixture(params=["llama", "mamba2", "transformers"])
def runner(request):
    if request.param == "llama":
        return random_llama()
    return from_transformers(tiny_mamba("mamba2") if request.param == "mamba2" else tiny_longrope())


def tiny_longrope():
    """A model of transformers that keeps the frequencies of its last call: longer texts have others."""
    import transformers

    torch.manual_seed(0)
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 8, "long_factor": [8.0] * 8}
    config = transformers.Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=256,
        initializer_range=0.3,
        eos_token_id=None,
        rope_parameters=rope | {"factor": 4.0, "original_max_position_embeddings": 20},
    )
    return transformers.Qwen3ForCausalLM(config).eval()


def text_of(model, seed, **options) -> list[int]:
    options = {"drafter": "merged", "budget": 8, "max_new_tokens": NEW_TOKENS, "temperature": 0.7} | options
    prompt = [token % model.vocab_size for token in random_tokens(5 + seed % 7, seed)]
    return generate(model, prompt, seed=seed, **options).tokens


def in_threads(jobs):
    """The results of functions that begin at once, each in a thread of its own."""
    barrier = threading.Barrier(len(jobs))

    def begin(job):
        barrier.wait()
        return job()

    with ThreadPoolExecutor(len(jobs)) as pool:
        return list(pool.map(begin, jobs))


def test_two_threads_on_one_runner_wait_for_each_other(runner):
    alone = [text_of(runner, seed, drafter=None) for seed in range(4)]
    assert len(set(map(tuple, alone))) == 4
    assert in_threads([lambda seed=seed: text_of(runner, seed) for seed in range(4)]) == alone


def test_a_thread_that_calls_the_runner_itself_waits_too(runner):
    alone = text_of(runner, 3)
    generating, done = threading.Event(), []

    class Drafter(TableDrafter):
        def propose(self, context, budget):
            generating.set()
            return super().propose(context, budget)

    def intrude():
        generating.wait()
        runner.prefill([[1, 2, 3]], capacity=20)
        done.append(True)

    drafter = Drafter([Lookup(runner.vocab_size)])
    texts = in_threads([lambda: text_of(runner, 3, drafter=drafter), intrude])
    assert texts[0] == alone and done and runner.lengths() == [3]


def test_nested_use_is_refused_by_name_and_a_fork_is_not(runner):
    alone, inside = text_of(runner, 1), text_of(runner, 2)

    class Nesting(TableDrafter):
        def propose(self, context, budget):
            texts.append(text_of(other, 2))
            return super().propose(context, budget)

    for other in (runner, runner.fork()):
        texts = []
        drafter = Nesting([Lookup(runner.vocab_size)])
        if other is runner:
            with pytest.raises(RuntimeError, match=f"model is in use.*{type(runner).__name__}.*fork"):
                text_of(runner, 1, drafter=drafter)
        else:
            assert text_of(runner, 1, drafter=drafter) == alone
            assert texts and all(text == inside for text in texts)
    assert text_of(runner, 1) == alone  # the lock is free again


@pytest.mark.parametrize("calls", ["prefill", "prefill, verify and commit"])
def test_a_batch_that_is_replaced_is_an_error_and_not_another_text(runner, calls):
    class Replacing(TableDrafter):
        def propose(self, context, budget):
            runner.prefill([[1]], capacity=20)
            if "verify" in calls:
                runner.verify({0: DraftTree.chain([1, 2])})
                runner.commit({0: [0, 1]})
            return super().propose(context, budget)

    with pytest.raises(RuntimeError, match="model must keep its batch while it generates.*fork"):
        text_of(runner, 1, drafter=Replacing([Lookup(runner.vocab_size)]))


def test_a_fork_shares_weights_and_nothing_that_changes(runner):
    fork = runner.fork()
    shared = "model" if isinstance(runner, TransformersRunner) else "weights"
    assert getattr(fork, shared) is getattr(runner, shared) and fork.fingerprint == runner.fingerprint
    (logits,) = runner.prefill([[1, 2, 3]], capacity=20)
    assert fork.lengths() == [] and torch.equal(fork.prefill([[1, 2, 3]], capacity=20)[0], logits)
    fork.prefill([[4] * 9], capacity=30)
    assert runner.lengths() == [3] and lock_of(fork) is not lock_of(runner)


def test_a_thread_that_has_a_runner_keeps_no_other_thread_from_a_fork():
    model = random_llama()
    fork = model.fork()
    with exclusive_use(model), ThreadPoolExecutor(1) as pool:
        assert pool.submit(text_of, fork, 5).result(timeout=60)


@pytest.mark.parametrize("kind", ["merged", "model"])
def test_a_drafter_may_be_shared_by_threads(kind):
    model = random_llama()
    forks = [model.fork() for _ in range(4)]
    if kind == "merged":
        drafter = new_drafter("merged", model)
    else:
        drafter = ModelDrafter(model.fork(), model)
    alone = [text_of(model, seed, drafter=None) for seed in range(4)]
    for _ in range(3):
        jobs = [lambda seed=seed, fork=fork: text_of(fork, seed, drafter=drafter) for seed, fork in enumerate(forks)]
        assert in_threads(jobs) == alone


def test_layers_may_be_skipped_in_several_threads_of_one_runner():
    model = random_llama()
    alone = [text_of(model, seed, drafter=None) for seed in range(3)]
    drafter = LayerSkipDrafter(model, [1])
    assert in_threads([lambda seed=seed: text_of(model, seed, drafter=drafter) for seed in range(3)]) == alone


class Cancelled(BaseException):
    """Like KeyboardInterrupt: it comes between any two steps of a thread."""


def cancelled_soon(seconds: float) -> threading.Timer:
    """Raises Cancelled in this thread after a while, wherever it is then."""
    this, cancel = ctypes.c_ulong(threading.get_ident()), ctypes.pythonapi.PyThreadState_SetAsyncExc
    timer = threading.Timer(seconds, cancel, (this, ctypes.py_object(Cancelled)))
    timer.start()
    return timer


def stress(runners, shared, requests: int, threads: int = 8) -> None:
    """Random requests on random runners, a third of them cancelled somewhere; what is said is what is said alone."""
    seeds = range(12)
    alone = {seed: text_of(shared, seed, drafter=None) for seed in seeds}
    text_of(shared, 0, drafter="suffix")  # imports what a thread that is cancelled would leave locked for all

    def serve(number: int) -> int:
        choose, said = random.Random(number), 0
        for _ in range(requests):
            seed, model = choose.choice(seeds), shared if choose.random() < 0.3 else choose.choice(runners)
            drafter = choose.choice(["merged", "suffix", None])
            text = None
            try:
                timer = cancelled_soon(choose.random() * 0.05) if choose.random() < 0.3 else None
                text = text_of(model, seed, drafter=drafter)
                if timer is not None:
                    timer.join()
                    end = time.monotonic() + 5
                    while time.monotonic() < end:  # it has been sent; where it comes in a finalizer, Python drops it
                        pass
            except Cancelled:
                continue
            assert text == alone[seed], (seed, drafter)
            said += 1
        return said

    with ThreadPoolExecutor(threads) as pool:
        said = list(pool.map(serve, range(threads)))
    assert min(said) > 0
    for model in (*runners, shared):  # nothing is locked or spoilt
        assert text_of(model, 0) == alone[0]


def test_stress(runner):
    stress([runner.fork() for _ in range(3)], runner, requests=6)


@pytest.mark.slow
def test_long_stress(runner):
    stress([runner.fork() for _ in range(3)], runner, requests=50)


def test_calls_of_transformers_generate_wait_too():
    integration = pytest.importorskip("pyspec.integrations.transformers")
    model = tiny_longrope()
    ids = [torch.tensor([random_tokens(5 + seed, seed)]) for seed in range(4)]

    def said(ids):
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        return model.generate(**inputs, custom_generate=integration.generate, max_new_tokens=20, do_sample=False)

    alone = [said(prompt).tolist() for prompt in ids]
    texts = in_threads([lambda ids=prompt: said(ids) for prompt in ids])
    assert [text.tolist() for text in texts] == alone


def test_a_model_may_be_copied_after_it_has_generated():
    integration = pytest.importorskip("pyspec.integrations.transformers")
    model, ids = tiny_longrope(), torch.tensor([[5, 9, 17, 3]])
    for copied in (lambda: copy.deepcopy(model), lambda: pickle.loads(pickle.dumps(model))):
        inputs = {"attention_mask": torch.ones_like(ids), "custom_generate": integration.generate, "max_new_tokens": 4}
        text = model.generate(ids, **inputs, do_sample=False)
        assert torch.equal(copied().generate(ids, **inputs, do_sample=False), text)
