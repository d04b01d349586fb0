"""A language model without a network: a law of the context, behind the calls of a real runner."""

import copy
import hashlib

import torch

from pyspec.runners.verified import Verified
from pyspec.tree import DraftTree

WORDS = [b" the", b" tree", b"ing", b"\n\n", b"user: ", b"\xf0\x9f", b"\x8c\xb3", b"st", b"op!"]
EOS = 256 + len(WORDS)


class FakeTokenizer:
    """Bytes, a few longer pieces (two of them halves of a character), and an end token."""

    chat_template = "a template"
    fingerprint = "bytes"

    def encode(self, text, special=False):
        return list(text.encode())

    def chat(self, messages):
        return self.encode("".join(f"{message['role']}: {message['content']}\n" for message in messages))

    def token_bytes(self, token):
        return bytes([token]) if token < 256 else WORDS[token - 256] if token < EOS else b"<end>"


class FakeRunner:
    """Checks that it is called as the protocol says; subclasses say what the model says.

    By its own clock a prefill takes a second, and so does a verify, two for 64 nodes; everything else takes no time.
    """

    vocab_size = EOS + 1
    context_length = 4096
    device = torch.device("cpu")
    dtype = torch.float32
    fingerprint = "fake"
    eos_tokens = frozenset({EOS})
    now = 0.0

    def __init__(self, tokenizer=True):
        self.tokenizer = FakeTokenizer() if tokenizer else None
        self.trees = None
        self.committed = []
        self.verified = 0

    def logits(self, context):
        """[V]: a sharp law of the last two tokens, so that texts repeat themselves now and then."""
        key = int.from_bytes(hashlib.sha256(repr(context[-2:]).encode()).digest()[:8], "little") >> 1
        generator = torch.Generator().manual_seed(key)
        logits = torch.full((self.vocab_size,), -30.0)
        logits[97 + torch.randperm(26, generator=generator)[:6]] = torch.randn(6, generator=generator) * 2
        return logits

    def prefill(self, tokens, *, capacity=None, observe=None):
        assert all(tokens) and capacity >= max(map(len, tokens))
        self.now += 1.0
        self.capacity = capacity
        self.committed = [list(prompt) for prompt in tokens]
        self.prompts = [len(prompt) for prompt in tokens]
        if observe is not None:
            for sequence, prompt in enumerate(tokens):
                for start in range(0, len(prompt), 4):
                    ends = range(start + 1, min(start + 4, len(prompt)) + 1)
                    rows = torch.stack([self.logits(prompt[:end]) for end in ends])
                    observe(sequence, DraftTree.chain(prompt[start : ends[-1]]), Verified(rows))
        return [self.logits(list(prompt)) for prompt in tokens]

    def clock(self):
        return self.now

    def seconds(self, nodes):
        return 1.0 + (nodes - 1) / 63

    def verify(self, trees):
        self.now += self.seconds(sum(map(len, trees.values())))
        assert trees and set(trees) <= set(range(len(self.committed)))
        self.trees = trees
        self.verified += 1
        return {slot: Verified(self._tree_logits(self.committed[slot], tree)) for slot, tree in trees.items()}

    def _tree_logits(self, committed, tree):
        assert len(committed) + len(tree) <= self.capacity
        assert len(committed) + int(tree.depths.max()) < self.context_length
        contexts = []
        for token, parent in zip(tree.tokens.tolist(), tree.parents.tolist(), strict=True):
            contexts.append([*(contexts[parent] if contexts else committed), token])
        return torch.stack([self.logits(context) for context in contexts])

    def commit(self, paths):
        assert set(paths) <= set(self.trees)
        for slot, path in paths.items():
            tree = self.trees[slot]
            assert path[0] == 0 and [int(tree.parents[node]) for node in path[1:]] == list(path[:-1])
            self.committed[slot] += [int(tree.tokens[node]) for node in path]
        self.trees = None

    def fork(self):
        fork = copy.copy(self)
        fork.trees, fork.committed = None, []
        return fork

    def lengths(self):
        return [len(committed) for committed in self.committed]


class ScriptedRunner(FakeRunner):
    """Says one script after each prompt, whatever the prompt, as bytes or a list of tokens."""

    def __init__(self, script, **settings):
        super().__init__(**settings)
        self.script = list(script)

    def logits(self, context):
        said = len(context) - getattr(self, "prompt_length", 1)
        logits = torch.zeros(self.vocab_size)
        logits[self.script[said] if 0 <= said < len(self.script) else EOS] = 20.0
        return logits
