"""Tapes: a run has the bits of the ops one by one, wherever the memory lies, and says what cannot be recorded."""

import gc
from contextlib import nullcontext

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pyspec.ops import lay_out_weight, linear, rms_norm, row_statistics, swiglu
from pyspec.ops._checks import BadData
from pyspec.runners import replay
from pyspec.runners.tape import Arena, Tape, can_record
from tests.helpers.random_llama import random_llama, random_tokens, random_tree, root_path, verify_all
from tests.helpers.tiny_hybrids import tiny_hybrid
from tests.helpers.tiny_mambas import tiny_mamba

pytestmark = pytest.mark.skipif(not can_record(), reason="the compiled kernels are not there")


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


LAYERS = [
    (random(48), lay_out_weight(random(128, 48, seed=i)), lay_out_weight(random(48, 64, seed=9 + i))) for i in range(4)
]


def forward(hidden, layers=LAYERS):
    delta = None
    for norm, gate_up, down in layers:
        x = rms_norm(hidden, norm, 1e-5, delta=delta)
        delta = linear(swiglu(linear(x, gate_up)), down)
    return [rms_norm(hidden, layers[0][0], 1e-5, delta=delta), rms_norm(hidden, None, 1e-5)]


@torch.inference_mode()
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_a_run_has_the_bits_of_the_ops(threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        hidden = torch.empty(5, 48)
        tape = Tape(lambda: forward(hidden), Arena())
        for seed in range(3):
            hidden.copy_(random(5, 48, seed=seed))
            expected = forward(hidden.clone())
            assert all(map(torch.equal, tape.run(), expected))
    finally:
        torch.set_num_threads(before)


@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8, "int4"], ids=str)
def test_rows_of_weights_and_statistics_are_recorded(dtype):
    """An index is read anew by every run, and looked at; what comes next may write to the rows."""
    weight, delta = lay_out_weight(random(45, 64), dtype), random(3, 64, seed=2)
    index = torch.zeros(3, dtype=torch.int32)

    def program():
        hidden = rms_norm(weight.rows(index), None, 0.0, delta=delta)
        return [hidden, *row_statistics(hidden)[:4]]

    tape = Tape(program, Arena())
    for rows in ([0, 44, 7], [3, 3, 31]):
        index.copy_(torch.tensor(rows))
        found = tape.run()
        assert all(map(torch.equal, found, program()))
        assert torch.equal(found[0], weight.unpack()[index.long()] + delta)
    index[1] = 45
    with pytest.raises(RuntimeError, match=r"index must be in \[0, 45\), got 45 at 1"):
        tape.run()
    with pytest.raises(BadData, match="index must be int32 and contiguous in a recording"):
        Tape(lambda: [weight._rows(torch.zeros(3, dtype=torch.int64))], Arena())


@torch.inference_mode()
def test_results_in_between_share_memory_and_tapes_an_arena():
    arena, hidden, larger = Arena(), torch.empty(5, 48), torch.empty(70, 48)
    tape = Tape(lambda: forward(hidden), arena)
    one_layer = 4 * 5 * (48 + 128 + 64 + 48)
    assert 4 * 5 * (128 + 64) <= tape.nbytes < 2 * one_layer + 2000  # of four layers, and the norm behind them
    assert Tape(lambda: forward(hidden, LAYERS * 5), arena).nbytes == tape.nbytes
    address = arena.address
    other = Tape(lambda: forward(larger), arena)  # the arena grows, and lies elsewhere
    assert arena.memory.nbytes >= other.nbytes > tape.nbytes and arena.address % 64 == 0
    del address
    for seed in range(2):
        for each in (hidden, larger):
            each.copy_(random(*each.shape, seed=seed))
        expected = forward(hidden.clone()), forward(larger.clone())
        assert all(map(torch.equal, [*tape.run(), *other.run()], [*expected[0], *expected[1]]))


@torch.inference_mode()
def test_what_cannot_be_recorded():
    hidden = random(5, 48)
    outside = random(5, 48)
    with pytest.raises(RuntimeError, match="was not made by the ops that were recorded"):
        Tape(lambda: [outside], Arena())
    with pytest.raises(RuntimeError, match="must be a whole tensor"):
        Tape(lambda: [forward(hidden)[0][1:]], Arena())
    with pytest.raises(RuntimeError, match="records one already"):
        Tape(lambda: Tape(lambda: forward(hidden), Arena()).run(), Arena())
    with pytest.raises(ValueError, match="hidden must be"):
        Tape(lambda: forward(random(48)), Arena())
    with pytest.raises(RuntimeError, match="gate_up must be contiguous in a recording"):
        Tape(lambda: swiglu(linear(rms_norm(hidden, LAYERS[0][0], 1e-5), LAYERS[0][1])[:, ::2]), Arena())
    assert all(
        map(torch.equal, Tape(lambda: forward(hidden), Arena()).run(), forward(random(5, 48)))
    )  # none is left open


class OnlyOurs(TorchDispatchMode):
    """Refuses what a tape would not know of: all but pyspec's ops and views."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **kwargs or {})
        if func.namespace != "pyspec":
            views = found if isinstance(found, (list, tuple)) else [found]
            memory = args[0].untyped_storage().data_ptr()
            assert all(view.untyped_storage().data_ptr() == memory for view in views), f"{func} is not recorded"
        return found


def runners():
    from pyspec import from_transformers

    yield random_llama(windows=(9, None), biases=True)
    yield random_llama(dtype=torch.int8)
    yield from_transformers(tiny_mamba("mamba"))
    yield from_transformers(tiny_mamba("mamba2"), dtype=torch.bfloat16)
    yield from_transformers(tiny_hybrid("bamba"))


@torch.inference_mode()
def test_forwards_are_straight_lines_of_ops(monkeypatch):
    """Nothing else is called while a family's forward is recorded, and nothing that dies when it returns is read."""

    class Checked(Tape):
        def __init__(self, program, arena):
            def checked():
                with OnlyOurs():
                    return program()

            super().__init__(checked, arena)

    monkeypatch.setattr(replay, "Tape", Checked)
    for runner in runners():
        found = []
        for by_launch in (False, True):
            with replay.launch_by_launch() if by_launch else nullcontext():
                rows = runner.prefill([random_tokens(40) + [1] * 100, [3, 4]], capacity=300)
                gc.collect()
                for seed in range(3):
                    trees = [random_tree(4 + seed, seed), random_tree(9, seed)]
                    rows += verify_all(runner, trees)
                    runner.commit({0: root_path(trees[0], 3), 1: [0]})
            found.append(torch.cat([row.flatten() for row in rows]))
        assert torch.equal(*found)


@torch.inference_mode()
def test_shapes_are_bounded(monkeypatch):
    monkeypatch.setattr(replay, "MOST_TAPES", 3)
    runner = random_llama()
    runner.prefill([random_tokens(9)], capacity=60)
    kept = runner._replays._replays
    expected = {size: runner.verify({0: random_tree(size)})[0].logits for size in range(1, 9)}
    assert [shape.rows for shape, _ in kept] == [6, 7, 8]
    runner.verify({0: random_tree(6)})
    assert [shape.rows for shape, _ in kept] == [7, 8, 6]
    assert all(torch.equal(runner.verify({0: random_tree(size)})[0].logits, expected[size]) for size in expected)


@torch.inference_mode()
def test_a_runner_that_shares_weights_leaves_tapes_alone():
    runner = random_llama(dtype=torch.bfloat16)
    runner.prefill([random_tokens(9)], capacity=60)
    expected = runner.verify({0: random_tree(5)})[0].logits
    other = type(runner)(runner.config, runner.weights)
    gc.collect()
    assert torch.equal(runner.verify({0: random_tree(5)})[0].logits, expected)
    other.prefill([random_tokens(9)], capacity=60)
    assert torch.equal(other.verify({0: random_tree(5)})[0].logits, expected)


@torch.inference_mode()
def test_an_interrupt_leaves_no_recording_open():
    """Whenever it comes: what follows would else be appended to a tape that nobody runs."""

    def interrupted():
        forward(random(5, 48))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Tape(interrupted, Arena())
    hidden = random(5, 48)
    assert all(map(torch.equal, Tape(lambda: forward(hidden), Arena()).run(), forward(random(5, 48))))
