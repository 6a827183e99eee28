"""Small makers that several test files share. Nothing here uses the code's own ways of writing a checkpoint."""

import functools
import json
import os
import re
import subprocess
import sys
import threading
import zlib
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import tiktoken
import torch
from safetensors.torch import save_file
from tiktoken_ext.openai_public import r50k_pat_str

from data.cli import InputError
from data.tokenizer import BYTE_OF_LETTER, END, tokenizer_files
from model import GPT, TRANSPOSED, Config

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = Path(__file__).resolve().parent / "golden" / "gpt2.json"

TINY = Config(n_layer=2, n_embd=32, n_head=4, vocab_size=61, n_positions=48, dropout=0.0)


def stored_weights(config):
    """The tensors of a GPT-2 under the official names and in the stored form, (in, out): numbers from NumPy that hang on the
    tensor's name alone, large enough that attention, biases and every LayerNorm matter."""
    C, V = config.n_embd, config.vocab_size
    shapes = {
        "wte.weight": (V, C),
        "wpe.weight": (config.n_positions, C),
        "ln_f.weight": (C,),
        "ln_f.bias": (C,),
    }
    for n in range(config.n_layer):
        for name, size in {
            "ln_1": (C,),
            "attn.c_attn": (C, 3 * C),
            "attn.c_proj": (C, C),
            "ln_2": (C,),
            "mlp.c_fc": (C, 4 * C),
            "mlp.c_proj": (4 * C, C),
        }.items():
            shapes |= {f"h.{n}.{name}.weight": size, f"h.{n}.{name}.bias": size[-1:]}
    weights = {}
    for name, shape in shapes.items():
        numbers = 2 * np.random.default_rng(zlib.crc32(name.encode())).random(shape) - 1
        scale = (
            0.5
            if "wte" in name
            else 0.3
            if len(shape) == 1 or "wpe" in name
            else 2.5 / shape[0] ** 0.5
        )
        offset = 1 if "ln_" in name and name.endswith("weight") else 0
        weights[name] = torch.from_numpy((offset + scale * numbers).astype(np.float32))
    return weights


def tiny_model(config=TINY):
    """A GPT with these weights, for evaluation."""
    model = GPT(config).eval()
    model.load_state_dict(
        {
            name: w.T if name.endswith(TRANSPOSED) else w
            for name, w in stored_weights(config).items()
        }
    )
    return model


def soft_prompt(length, width=TINY.n_embd):
    """A soft prompt (P, C) of NumPy's numbers, as large as the embeddings."""
    return torch.from_numpy(
        (np.random.default_rng(length).random((length, width)) - 0.5).astype(np.float32)
    )


def hf_config(config):
    """The values of a Hugging Face config.json."""
    return {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-05,
        "n_layer": config.n_layer,
        "n_embd": config.n_embd,
        "n_head": config.n_head,
        "vocab_size": config.vocab_size,
        "n_positions": config.n_positions,
        "n_ctx": config.n_positions,
        "resid_pdrop": 0.1,
        "embd_pdrop": 0.1,
        "attn_pdrop": 0.1,
        "bos_token_id": config.vocab_size - 1,
        "eos_token_id": config.vocab_size - 1,
    }


def write_checkpoint(directory, config=TINY, tokenizer=None):
    """A Hugging Face GPT-2 directory with these weights, and the tokenizer's files if one is given."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(hf_config(config)))
    save_file(stored_weights(config), directory / "model.safetensors")
    if tokenizer is not None:
        for name, text in zip(("vocab.json", "merges.txt"), tokenizer_files(tokenizer)):
            (directory / name).write_text(text, encoding="utf-8")
    return directory


@functools.cache
def tiny_tokenizer():
    """A byte-level BPE that knows the words of the template, one merge a letter, so that a request is 50 to 100 tokens."""
    words = "Below is an instruction that describes a task, paired with an input provides further context. Write response appropriately completes the request."
    tokens = [bytes([byte]) for byte in BYTE_OF_LETTER.values()]
    for word in words.replace(".", "").replace(",", "").split():
        tokens += [f" {word}"[:n].encode() for n in range(2, len(word) + 2)]
    ranks = {token: number for number, token in enumerate(dict.fromkeys(tokens))}
    return tiktoken.Encoding(
        "tiny", pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens={END: len(ranks)}
    )


def talker_config():
    """The sizes of a tiny model that tiny_tokenizer fits, with room for a request of the template's."""
    return replace(TINY, vocab_size=tiny_tokenizer().n_vocab, n_positions=288)


def transformers_model(config=TINY):
    """transformers' GPT-2 with these weights; the test skips where transformers is not installed."""
    transformers = pytest.importorskip("transformers")
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**hf_config(config)))
    missing, unexpected = model.transformer.load_state_dict(stored_weights(config))
    assert not missing and not unexpected
    return model.eval()


@torch.no_grad()
def transformers_logits(hf, row, prompt=None):
    """The logits (T, V) of one row, behind a soft prompt if there is one."""
    x = hf.transformer.wte(torch.tensor(row))
    x = x if prompt is None else torch.cat([prompt, x])
    return hf(inputs_embeds=x[None]).logits[0, -len(row) :]


def greedy_by_transformers(hf, row, n_new, end):
    out = hf.generate(
        torch.tensor([row]),
        attention_mask=torch.ones(1, len(row)),
        max_new_tokens=n_new,
        do_sample=False,
        eos_token_id=end,
        pad_token_id=end,
    )
    return out[0, len(row) :].tolist()


def write_rows(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def run_command(*arguments, timeout=120, **environment):
    """`python arguments...` in the project's folder, on the CPU. Returns the finished process, with its output as text."""
    environment = {
        **os.environ,
        "CUDA_VISIBLE_DEVICES": "",
        "HF_ENDPOINT": "http://127.0.0.1:9",
        **environment,
    }
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def after_device(stderr):
    """What a command printed on standard error after the first line, which names the device where the command came that far."""
    first, _, rest = stderr.partition("\n")
    named = r"device: CPU, \d+ threads; ranks: \d+; precision: (float32|bfloat16)"
    if not re.fullmatch(named, first):
        return stderr
    return re.sub(r"\Awarning: this PyTorch is built for GPUs .*\n", "", rest)


def files_below(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def error_of(function, *arguments):
    """The message of the InputError that a call must raise; it must be one line."""
    with pytest.raises(InputError) as caught:
        function(*arguments)
    message = str(caught.value)
    assert message and "\n" not in message
    return message


class Cut(bytes):
    """An answer that promises all of these bytes and breaks off half way."""


class CutChunks(bytes):
    """The same without a Content-Length: the answer comes in chunks and the last one is missing."""


class Short(bytes):
    """An answer that promises half of these bytes and sends them all."""


class Server:
    """A web server on loopback. `answers` maps a path to what is sent: bytes, Cut, CutChunks, Short, the number of an error, or
    a list of these, one a request (the last one stays). Any other path is a 404. `asked` lists the paths that were asked for."""

    def __init__(self):
        self.answers, self.asked = {}, []
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                server.asked.append(self.path)
                answer = server.answers.get(self.path, 404)
                if isinstance(answer, list):
                    answer = answer.pop(0) if len(answer) > 1 else answer[0]
                if isinstance(answer, int):
                    self.send_error(answer)
                    return
                broken = isinstance(answer, Cut | CutChunks)
                body = answer[: len(answer) // 2] if broken else answer
                self.send_response(200)
                if isinstance(answer, CutChunks):
                    self.send_header("Transfer-Encoding", "chunked")
                    body = b"%x\r\n%s\r\n" % (len(body), body)
                else:
                    self.send_header(
                        "Content-Length",
                        str(len(answer) // 2 if isinstance(answer, Short) else len(answer)),
                    )
                self.end_headers()
                self.wfile.write(body)
                self.close_connection = broken or isinstance(answer, Short)

            def log_message(self, *arguments):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(
            target=self.http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True
        ).start()

    def serve(self, repository, **contents):
        """Serve a repository's files: `model_safetensors=...` for model.safetensors, and so on."""
        for name, answer in contents.items():
            stem, _, ending = name.rpartition("_")
            self.answers[f"/{repository}/resolve/main/{stem}.{ending}"] = answer

    def close(self):
        self.http.shutdown()
        self.http.server_close()
