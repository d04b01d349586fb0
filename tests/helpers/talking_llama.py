"""A small random Llama that reads and writes printable ASCII, a token a character."""

from tests.helpers.random_llama import VOCABULARY, random_llama

END = VOCABULARY - 1


class Letters:
    """Printable ASCII from token 0 on, then the line feed, then the end token."""

    chat_template = "a template"
    fingerprint = "letters"
    vocab_size = VOCABULARY

    def encode(self, text, special=False):
        return [END - 1 if letter == "\n" else ord(letter) - 32 if " " <= letter <= "~" else 31 for letter in text]

    def chat(self, messages, tools=(), **variables):
        if variables.get("refuse"):
            raise ValueError("the template refuses the messages")
        said = "".join(f"{message['role']}: {message['content']}\n" for message in messages)
        described = "".join(f"tool {tool['function']['name']}\n" for tool in tools)
        chosen = "".join(f"{name}={variables[name]}\n" for name in sorted(variables))
        return self.encode(described + chosen + said)

    def token_bytes(self, token):
        return b"" if token == END else b"\n" if token == END - 1 else bytes([32 + token])


def talking_llama(context=3000):
    """The runner; each has the same weights."""
    runner = random_llama(context=context)
    runner.tokenizer, runner.eos_tokens = Letters(), frozenset({END})
    return runner
