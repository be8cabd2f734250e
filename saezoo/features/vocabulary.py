"""What each token id stands for, as bytes: a byte-level tokenizer cuts letters in two, so text would not do."""

from __future__ import annotations

from typing import Any, NamedTuple

from saezoo.errors import WeightsError, shown


class Vocabulary(NamedTuple):
    """The tokens of a model, by id."""

    tokens: tuple[bytes, ...]
    """Empty for an id that the tokenizer does not know."""
    special: frozenset[int]
    """Ids of tokens that stand for no text, such as <|endoftext|>; their bytes are their own names."""


def vocabulary(tokenizer: Any, size: int) -> Vocabulary:
    """Of a byte-level BPE tokenizer (GPT-2's and its like), `size` ids in all; models may have more ids than their
    tokenizers. WeightsError for a tokenizer of another kind."""
    added = tokenizer.added_tokens_decoder
    own = tokenizer.convert_ids_to_tokens([i for i in range(min(size, len(tokenizer))) if i not in added])
    spelled = iter(own)
    letters = _bytes_of_letters()
    tokens = []
    for i in range(size):
        if i in added:
            tokens.append(added[i].content.encode())
            continue
        token = next(spelled, None) or ""
        try:
            tokens.append(bytes(letters[letter] for letter in token))
        except KeyError:
            raise WeightsError(
                f"token {i}, {shown(token)!r}, is not spelled as byte-level BPE does; "
                "dashboards need a tokenizer like GPT-2's"
            ) from None
    special = {i for i, token in added.items() if token.special} | set(tokenizer.all_special_ids)
    return Vocabulary(tuple(tokens), frozenset(special & set(range(size))))


def _bytes_of_letters() -> dict[str, int]:
    """The letter that GPT-2's vocabulary writes for each byte -> the byte (openai/gpt-2, src/encoder.py,
    bytes_to_unicode): a byte that prints stands for itself, the others for the letters from U+0100 on."""
    printed = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in set(printed)]
    return {chr(byte): byte for byte in printed} | {chr(256 + i): byte for i, byte in enumerate(others)}
