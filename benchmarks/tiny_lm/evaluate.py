"""Score the bundled model (its float16-rounded weights, computed in float32) and print sample continuations.

Run: ``python benchmarks/tiny_lm/evaluate.py``. What is scored: every token of every held-out document once, and no
``<|endoftext|>``, as in ``trigram.py``. The documents are joined with ``<|endoftext|>`` before each of them and cut
into pieces of ``context - 1`` tokens; each piece is read with ``<|endoftext|>`` before it and nothing else.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizer import CONTEXT, EOT_ID, MODEL, Tokens, encode_split
from transformers import AutoTokenizer, GPT2LMHeadModel

PROMPTS = ("The President of the United States", "The website helps people to", "She looked at him and")
NEW_TOKENS = 60
TEMPERATURE = 0.8
TOP_K = 40


def padded_rows(docs: list[Tokens], context: int) -> Tokens:
    """Rows (EOT, then context - 1 tokens) of the joined documents; the last row is filled up with EOT."""
    stream = np.concatenate([np.concatenate(([EOT_ID], doc)) for doc in docs])
    stream = np.concatenate((stream, np.full(-len(stream) % (context - 1), EOT_ID, dtype=np.int64)))
    body = stream.reshape(-1, context - 1)
    return np.concatenate([np.full((len(body), 1), EOT_ID, dtype=np.int64), body], axis=1)


@torch.no_grad()
def cross_entropy(model: Any, docs: list[Tokens], context: int) -> tuple[float, int]:
    """(mean nats a token, number of tokens scored) over the documents' own tokens."""
    total, count = 0.0, 0
    rows = torch.from_numpy(padded_rows(docs, context))
    step = 4096 // context
    for low in range(0, len(rows), step):
        ids = rows[low : low + step]
        logs = torch.log_softmax(model(input_ids=ids).logits[:, :-1].float(), dim=-1)
        targets = ids[:, 1:]
        losses = -logs.gather(-1, targets[..., None])[..., 0]
        scored = targets != EOT_ID
        total += float(losses[scored].double().sum())
        count += int(scored.sum())
    return total / count, count


def samples(model: Any, folder: Path) -> list[str]:
    """One continuation of each prompt (EOT before it), top-k sampling from a fixed seed."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts: list[str] = []
    for prompt in PROMPTS:
        torch.manual_seed(0)
        ids = torch.tensor([[EOT_ID, *tokenizer(prompt)["input_ids"]]])
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=True,
            temperature=TEMPERATURE,
            top_k=TOP_K,
            max_new_tokens=NEW_TOKENS,
            pad_token_id=EOT_ID,
        )
        texts.append(str(tokenizer.decode(out[0, 1:].tolist())))
    return texts


def main() -> None:
    """Print parameters, held-out cross-entropy at contexts 256 and 128, and the samples."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    # Any: the library's own annotations of generate() and eval() do not accept its own model class.
    model: Any = GPT2LMHeadModel.from_pretrained(args.model, dtype=torch.float32)
    model.eval()
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters")
    docs = encode_split("heldout")
    for context in (CONTEXT, CONTEXT // 2):
        mean, count = cross_entropy(model, docs, context)
        print(f"context {context}: {mean:.4f} nats a token over {count} held-out tokens")
    for text in samples(model, args.model):
        print("---", text, sep="\n")


if __name__ == "__main__":
    main()
