"""Train the demo's tokenizer, a byte-level BPE as in GPT-2 (Sennrich et al. 2016; Radford et al.
2019), on the demo's pre-training text.

`python -m tests.make_demo_bpe` writes data/demo_bpe. A test holds that the files there are what
this gives, so it is to be run again if the demo's pre-training text or words change.
"""

import json
from collections import Counter
from pathlib import Path

import regex
from tiktoken_ext.openai_public import r50k_pat_str

from data.models.tokenizer import BYTE_ENCODER, END_OF_TEXT
from data.process.files import write_atomic
from data.sets.demo import TOKENIZER_DIR, make_documents

MAX_VOCAB_SIZE = 1000  # training ends before if every word of the text is one token


def write_tokenizer(directory):
    """Train the tokenizer on the pre-training text, and write its vocab.json and merges.txt."""
    counts = Counter(
        word for text in make_documents(10) for word in regex.findall(r50k_pat_str, text)
    )
    parts = {word: [BYTE_ENCODER[byte] for byte in word.encode()] for word in counts}
    # GPT-2's order of the token ids: 256 bytes, the merges, end-of-text.
    tokens, merges = [*BYTE_ENCODER.values()], ["#version: 0.2"]
    while len(tokens) < MAX_VOCAB_SIZE - 1:  # merge the most frequent pair of tokens
        pair_counts = Counter()
        for word, word_parts in parts.items():
            for pair in zip(word_parts, word_parts[1:]):
                pair_counts[pair] += counts[word]
        if not pair_counts:
            break  # every word is one token
        # Of two pairs with the same count, take the later one in the alphabet.
        left, right = max(pair_counts, key=lambda pair: (pair_counts[pair], pair))
        tokens.append(left + right)
        merges.append(f"{left} {right}")
        for word_parts in parts.values():
            for i in range(len(word_parts)):
                if word_parts[i : i + 2] == [left, right]:
                    word_parts[i : i + 2] = [left + right]
    vocab = {token: i for i, token in enumerate([*tokens, END_OF_TEXT])}
    write_atomic(Path(directory) / "vocab.json", json.dumps(vocab, ensure_ascii=False))
    write_atomic(Path(directory) / "merges.txt", "\n".join([*merges, ""]))


def main():
    write_tokenizer(TOKENIZER_DIR)


if __name__ == "__main__":
    main()
