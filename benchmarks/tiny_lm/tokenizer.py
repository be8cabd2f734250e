"""Train the bundled tokenizer (byte-level BPE, 4,096 entries) on the train split; encode splits.

Run: ``python benchmarks/tiny_lm/tokenizer.py`` after ``corpus.py``.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import numpy.typing as npt
from corpus import REPO, read_split, write_bytes
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

TEXT = REPO / "saezoo" / "bundled" / "text"
MODEL = REPO / "saezoo" / "bundled" / "tiny-lm"
VOCAB = 4096
EOT = "<|endoftext|>"
EOT_ID = 0
CONTEXT = 256

Tokens = npt.NDArray[np.int64]


def train_tokenizer(texts: list[str]) -> Tokenizer:
    """Byte-level BPE with GPT-2's pre-tokenizer pattern; id 0 is ``<|endoftext|>``."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    # The full byte alphabet makes every string encodable, also bytes that the train split lacks.
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=[EOT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer, length=len(texts))
    if tokenizer.get_vocab_size() != VOCAB or tokenizer.token_to_id(EOT) != EOT_ID:
        raise RuntimeError(f"vocabulary of {tokenizer.get_vocab_size()}, expected {VOCAB}")
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json, as ``AutoTokenizer`` reads them."""
    config = {
        "add_prefix_space": False,
        "bos_token": EOT,
        "eos_token": EOT,
        "unk_token": EOT,
        "clean_up_tokenization_spaces": False,
        "model_max_length": CONTEXT,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    write_bytes(folder / "tokenizer.json", tokenizer.to_str(pretty=False).encode("utf-8"))
    write_bytes(folder / "tokenizer_config.json", (json.dumps(config, indent=2) + "\n").encode("utf-8"))


def encode_split(name: str) -> list[Tokens]:
    """Token ids of every document of a bundled split (``train`` or ``heldout``), without BOS."""
    tokenizer = Tokenizer.from_file(str(MODEL / "tokenizer.json"))
    encodings = tokenizer.encode_batch(read_split(TEXT / f"{name}.jsonl.xz"), add_special_tokens=False)
    return [np.asarray(encoding.ids, dtype=np.int64) for encoding in encodings]


def pack_rows(docs: list[Tokens], length: int) -> Tokens:
    """Rows of ``length`` tokens: ``<|endoftext|>`` first in each row, then a piece of the joined documents.

    The documents are joined with ``<|endoftext|>`` before each of them, and cut every ``length - 1`` tokens.
    The incomplete last piece is dropped.
    """
    stream = np.concatenate([np.concatenate(([EOT_ID], doc)) for doc in docs])
    pieces = len(stream) // (length - 1)
    body = stream[: pieces * (length - 1)].reshape(pieces, length - 1)
    return np.concatenate([np.full((pieces, 1), EOT_ID, dtype=np.int64), body], axis=1)


def main() -> None:
    """Train on the train split only, save, and check that held-out text survives a round trip."""
    tokenizer = train_tokenizer(read_split(TEXT / "train.jsonl.xz"))
    save_tokenizer(tokenizer, MODEL)
    held = read_split(TEXT / "heldout.jsonl.xz")
    broken = sum(tokenizer.decode(tokenizer.encode(text).ids) != text for text in held)
    for name in ("train", "heldout"):
        docs = encode_split(name)
        print(f"{name}: {len(docs)} documents, {sum(map(len, docs))} tokens")
    print(f"{broken} of {len(held)} held-out documents change in a round trip")


if __name__ == "__main__":
    main()
