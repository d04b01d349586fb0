"""A verify of an 8B-shaped model: first its bits, then its times, then a prompt, then which kernels take the time.

    python bench/gpu/verify.py bf16|int8|int4|fp32

Bits: every node of trees of 1 to 64 nodes has the logits that its path has when it is decoded token by token. Times: of
the graph and launch by launch, behind 512 tokens, over the floor of bytes. A prompt: of 2,048 tokens, in pieces of 512,
replayed and launched, over the floor of operations. fp32 is tried on the shape of 1B. What calls for other dtypes have
found here today is kept.
"""

import json
import sys
import time

import bench_verify
import steps
import torch
from command_line import DTYPES
from inside import record_prompt
from where import DEVICE, IS_DRY

from pyspec import measure
from pyspec.measure.results import RESULTS
from pyspec.ops import lay_out_weight
from pyspec.runners import native
from pyspec.runners.replay import launch_by_launch
from pyspec.tree import DraftTree

SHAPES = {"bf16": "Llama-3.1-8B", "int8": "Llama-3.1-8B", "int4": "Llama-3.1-8B", "fp32": "Llama-3.2-1B"}
PROMPT = 90  # tokens: the trees reach from one tile of keys into the next
TREES = (2, 3, 5, 8, 16, 33, 64)
LONG_PROMPT = 2048  # tokens
REPEATS = 2 if IS_DRY else 11
PROFILED = (1, 64)  # nodes
if IS_DRY:
    from tests.helpers.fake_recorder import FakeRecorder

    native.GraphRecorder = FakeRecorder
    bench_verify.SHAPES = dict.fromkeys(bench_verify.SHAPES, (64, 96, 2, 4, 2, 64, 300, True))
    TREES, LONG_PROMPT = (2, 5), 1024
    steps.CONTEXT, steps.SIZES = PROMPT, (1, 4)
CAPACITY = steps.CONTEXT + 64


def tree_of(nodes: int) -> DraftTree:
    """Every third node goes deeper, so that paths are long and trees wide."""
    return DraftTree(list(range(7, 7 + nodes)), [(2 * node - 1) // 3 if node else -1 for node in range(nodes)])


def leaves(tree: DraftTree) -> list[int]:
    return sorted(set(range(len(tree))) - set(tree.parents.tolist()))


def path_to(tree: DraftTree, node: int) -> list[int]:
    path = [node]
    while tree.parents[path[-1]] >= 0:
        path.append(int(tree.parents[path[-1]]))
    return path[::-1]


def check_bits(model) -> dict:
    """Nodes whose logits differ from those of their path decoded token by token, of how many, by the tree's size."""
    prompt, found = [place * 31 % model.vocab_size for place in range(PROMPT)], {}
    trees = {nodes: tree_of(nodes) for nodes in TREES}
    model.prefill([prompt], capacity=CAPACITY)
    together = {nodes: model.verify({0: tree})[0].logits.clone() for nodes, tree in trees.items()}
    largest, alone = trees[max(TREES)], {}  # the trees are the beginnings of one
    for leaf in leaves(largest):
        model.prefill([prompt], capacity=CAPACITY)
        for node in path_to(largest, leaf):
            logits = model.verify({0: DraftTree.chain([int(largest.tokens[node])])})[0].logits
            model.commit({0: [0]})
            alone.setdefault(node, logits[0].clone())
    for nodes, logits in together.items():
        different = [node for node in range(nodes) if not torch.equal(logits[node], alone[node])]
        worst = max(float((logits[node] - alone[node]).abs().max()) for node in range(nodes))
        found[str(nodes)] = {"different": different, "largest_difference": worst}
    return found


def prompt_times(model) -> dict:
    """Seconds of a long prompt, replayed and launched, and its floor: operations over the rate of a large product."""
    prompt, config = [place * 31 % model.vocab_size for place in range(LONG_PROMPT)], model.config

    def read() -> None:
        model.prefill([prompt], capacity=LONG_PROMPT + 64)

    def launch() -> None:
        with launch_by_launch():
            read()

    read()
    record_prompt(model, LONG_PROMPT)
    matrices = [getattr(layer, name) for layer in model.weights.layers for name in layer.MATRICES]
    products = 2 * LONG_PROMPT * sum(matrix.outputs * matrix.inputs for matrix in matrices)
    attention = 2 * config.layers * config.heads * config.head_dim * LONG_PROMPT**2  # of a causal mask
    seconds = measure.in_turn({"replayed": read, "launched": launch}, repeats=3, warmup=1)
    floor = (products + attention) / measure.multiply_rate(model.dtype, DEVICE)
    rate = LONG_PROMPT / seconds["replayed"]
    return {"tokens": LONG_PROMPT, "seconds": seconds, "tokens_per_second": rate, "floor_seconds": floor}


def kernel_times(model, nodes: int, rounds: int = 3) -> dict:
    """Microseconds of one verify by the kernel, and launches."""
    from torch.profiler import ProfilerActivity, profile

    tree = steps.tree_of(nodes)
    model.prefill([[0] * steps.CONTEXT], capacity=CAPACITY)
    model.verify({0: tree})
    with profile(activities=[ProfilerActivity.CPU if IS_DRY else ProfilerActivity.CUDA]) as found:
        for _ in range(rounds):
            model.verify({0: tree})
        if not IS_DRY:
            torch.cuda.synchronize()
    rows = sorted(found.key_averages(), key=lambda row: -row.self_device_time_total)
    return {row.key: {"us": row.self_device_time_total / rounds, "launches": row.count / rounds} for row in rows[:25]}


def so_far() -> dict:
    """What calls for other dtypes have found here today."""
    empty = {"machine": measure.machine(), "device": DEVICE, "bits": {}, "results": [], "prompts": {}, "kernels": {}}
    try:
        found = json.loads((RESULTS / "verify_cuda.json").read_text())
    except (OSError, ValueError):
        return empty
    return found if found.keys() == empty.keys() and found["machine"] == empty["machine"] else empty


def is_known(dtype: torch.dtype | str) -> bool:
    """Whether weights can be laid out so."""
    try:
        lay_out_weight(torch.ones(64, 256, dtype=torch.bfloat16, device=DEVICE), dtype)
    except (TypeError, ValueError):
        return False
    return True


def main() -> int:
    start, name = time.perf_counter(), sys.argv[1]
    dtype, shape = (DTYPES | {"int4": "int4"})[name], SHAPES[name]
    if not is_known(dtype):
        print(f"{name}: weights cannot be laid out so")
        return 0
    result = so_far()

    def keep(what: str) -> None:
        measure.save("verify_cuda", result)
        print(f"{what} (after {time.perf_counter() - start:.0f} s)")

    model = bench_verify.random_model(shape, dtype, DEVICE)
    model._records_graphs = True  # in a dry run too
    bits = result["bits"][f"{shape}, {name}"] = check_bits(model)
    keep(f"{shape} {name} nodes that differ: { {nodes: len(row['different']) for nodes, row in bits.items()} }")
    result["results"] = [row for row in result["results"] if (row["model"], row["weights"]) != (shape, name)]
    result["results"].append(bench_verify.times(model, shape, name, REPEATS))
    bench_verify.show(result["results"][-1])
    keep("times")
    prompt = result["prompts"][f"{shape}, {name}"] = prompt_times(model)
    keep(f"a prompt: {prompt}")
    for nodes in PROFILED if name != "fp32" else ():
        table = result["kernels"][f"{shape}, {name}, {nodes} nodes"] = kernel_times(model, nodes)
        keep(f"{nodes} nodes: {sum(row['us'] for row in table.values()):.0f} us in kernels")
        for kernel, row in list(table.items())[:14]:
            print(f"  {row['us']:8.1f} us {row['launches']:6.0f} x {kernel[:90]}")
    return 1 if any(row["different"] for row in bits.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
