"""A verify of an 8B-shaped model: first its bits, then its times, then which kernels take them.

    python bench/gpu/verify.py [bf16] [int8] [fp32]

Bits: every node of trees of 1 to 64 nodes has the logits that its path has when it is decoded token by token. Times: of
the graph and launch by launch, behind 512 tokens, over the floor of bytes. fp32 is tried on the shape of 1B.
"""

import sys
from functools import partial
from unittest import mock

import bench_verify
import steps
import torch
from where import DEVICE, IS_DRY

from pyspec import measure
from pyspec.kernels.early_launch import launch_options
from pyspec.tree import DraftTree

SHAPES = {"bf16": "Llama-3.1-8B", "int8": "Llama-3.1-8B", "fp32": "Llama-3.2-1B"}
PROMPT = 90  # tokens: the trees reach from one tile of keys into the next
TREES = (2, 3, 5, 8, 16, 33, 64)
if IS_DRY:
    bench_verify.SHAPES = dict.fromkeys(bench_verify.SHAPES, (64, 96, 2, 4, 2, 64, 300, True))
    TREES = (2, 5)
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


def kernel_times(model, nodes: int, rounds: int = 3) -> dict:
    """Microseconds of one verify by the kernel, and launches."""
    from torch.profiler import ProfilerActivity, profile

    tree = steps.tree_of(nodes)
    model.verify({0: tree})
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        for _ in range(rounds):
            model.verify({0: tree})
        torch.cuda.synchronize()
    rows = sorted(found.key_averages(), key=lambda row: -row.self_device_time_total)
    return {row.key: {"us": row.self_device_time_total / rounds, "launches": row.count / rounds} for row in rows[:25]}


def seconds_without_early_launches(model) -> dict:
    """Of a verify whose kernels each wait for the end of the one in front before they are set up."""
    with mock.patch.object(torch.cuda, "get_device_capability", lambda device=None: (8, 0)):
        launch_options.cache_clear()
        other = model.fork()
        other.prefill([[0] * steps.CONTEXT], capacity=CAPACITY)
        calls = {nodes: partial(other.verify, [steps.tree_of(nodes)]) for nodes in (1, 8, 64)}
        found = measure.in_turn(calls, repeats=11)
    launch_options.cache_clear()
    return {str(nodes): seconds for nodes, seconds in found.items()}


def main() -> int:
    result, is_right = {"machine": measure.machine(), "device": DEVICE, "bits": {}, "results": [], "kernels": {}}, True
    for dtype in sys.argv[1:] or SHAPES:
        shape = SHAPES[dtype]
        model = bench_verify.random_model(shape, bench_verify.DTYPES[dtype], DEVICE)
        bits = result["bits"][f"{shape}, {dtype}"] = check_bits(model)
        is_right &= not any(row["different"] for row in bits.values())
        print(shape, dtype, "nodes that differ:", {nodes: len(row["different"]) for nodes, row in bits.items()})
        measure.save("verify_cuda", result)
        result["results"].append(bench_verify.times(model, shape, dtype, repeats=2 if IS_DRY else 11))
        measure.save("verify_cuda", result)
        bench_verify.show(result["results"][-1])
        if not IS_DRY:
            late = result["results"][-1]["seconds_without_early_launches"] = seconds_without_early_launches(model)
            print("without early launches:", {nodes: f"{seconds * 1e3:.2f} ms" for nodes, seconds in late.items()})
        for nodes in () if IS_DRY else (1, 16, 64):
            table = result["kernels"][f"{shape}, {dtype}, {nodes} nodes"] = kernel_times(model, nodes)
            measure.save("verify_cuda", result)
            print(f"{nodes} nodes: {sum(row['us'] for row in table.values()):.0f} us in kernels")
            for name, row in list(table.items())[:14]:
                print(f"  {row['us']:8.1f} us {row['launches']:6.0f} x {name[:90]}")
        del model
        torch.cuda.empty_cache()
    return 0 if is_right else 1


if __name__ == "__main__":
    sys.exit(main())
