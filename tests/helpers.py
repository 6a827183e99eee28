"""What several test files share: tiny models and data, processes, a web server.

Checkpoints are written here without the project's own code."""

import contextlib
import functools
import importlib
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import traceback
import zlib
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from time import sleep
from types import SimpleNamespace

import numpy as np
import pytest
import tiktoken
import torch
from safetensors.torch import save_file
from tiktoken_ext.openai_public import r50k_pat_str

import train
from data.models.tokenizer import BYTE_DECODER, END_OF_TEXT, tokenizer_files
from data.process.command_line import run_command_line
from data.process.errors import InputError
from data.runs.methods import METHODS
from model import GPT, TRANSPOSED, Config

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = Path(__file__).resolve().parent / "golden" / "gpt2.json"

# PromptKD's settings of the prompt, but for its learning rate
PROMPT = METHODS["promptkd"].option_defaults()
# The others have a step of another method, with no settings of their own.
METHODS_WITH_STEPS = [name for name in METHODS if name not in ("pretrain", "seqkd")]

TINY = Config(n_layer=2, n_embd=32, n_head=4, vocab_size=61, n_positions=48, dropout=0.0)


def stored_weights(config):
    """The tensors of a GPT-2 under the official names and in the stored form, (in, out). The values
    depend only on the tensor's name and are large enough that attention, biases and every LayerNorm
    matter."""
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
        if "wte" in name:
            scale = 0.5
        elif len(shape) == 1 or "wpe" in name:
            scale = 0.3
        else:
            scale = 2.5 / shape[0] ** 0.5
        offset = 1 if "ln_" in name and name.endswith("weight") else 0
        weights[name] = torch.from_numpy((offset + scale * numbers).astype(np.float32))
    return weights


def tiny_model(config=TINY):
    """A GPT with these weights, in eval mode."""
    model, weights = GPT(config).eval(), stored_weights(config)
    model.load_state_dict(
        {name: w.T if name.endswith(TRANSPOSED) else w for name, w in weights.items()}
    )
    return model


def soft_prompt(length, width=TINY.n_embd):
    """A soft prompt (prompt_length, C) whose values are as large as the embeddings'."""
    values = np.random.default_rng(length).random((length, width)) - 0.5
    return torch.from_numpy(values.astype(np.float32))


def hf_config(config):
    """The content of a Hugging Face config.json."""
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
    """A Hugging Face GPT-2 directory with these weights and, if given, the tokenizer's files."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(hf_config(config)))
    save_file(stored_weights(config), directory / "model.safetensors")
    if tokenizer is not None:
        for name, text in zip(("vocab.json", "merges.txt"), tokenizer_files(tokenizer)):
            (directory / name).write_text(text, encoding="utf-8")
    return directory


@functools.cache
def tiny_tokenizer():
    """A byte-level BPE of the template's words, one merge per letter: a request has 50 to 100
    tokens."""
    words = (
        "Below is an instruction that describes a task paired with an input provides further "
        "context Write response appropriately completes the request"
    )
    tokens = [bytes([byte]) for byte in BYTE_DECODER.values()]
    for word in words.split():
        tokens += [f" {word}"[:n].encode() for n in range(2, len(word) + 2)]
    ranks = {token: number for number, token in enumerate(dict.fromkeys(tokens))}
    return tiktoken.Encoding(
        "tiny",
        pat_str=r50k_pat_str,
        mergeable_ranks=ranks,
        special_tokens={END_OF_TEXT: len(ranks)},
    )


def talker_config():
    """The sizes of a tiny model for tiny_tokenizer, with enough positions for a request."""
    return replace(TINY, vocab_size=tiny_tokenizer().n_vocab, n_positions=384)


def transformers_model(config=TINY):
    """transformers' GPT-2 with these weights. Skips the test if transformers is not installed."""
    transformers = pytest.importorskip("transformers")
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**hf_config(config)))
    missing, unexpected = model.transformer.load_state_dict(stored_weights(config))
    assert not missing and not unexpected
    return model.eval()


@torch.no_grad()
def transformers_logits(hf, row, prompt=None):
    """The logits (T, V) of one row, with a soft prompt prepended if given."""
    x = hf.transformer.wte(torch.tensor(row))
    x = x if prompt is None else torch.cat([prompt, x])
    return hf(inputs_embeds=x[None]).logits[0, -len(row) :]


def greedy_by_transformers(hf, row, n_new, eos_token_id):
    out = hf.generate(
        torch.tensor([row]),
        attention_mask=torch.ones(1, len(row)),
        max_new_tokens=n_new,
        do_sample=False,
        eos_token_id=eos_token_id,
        pad_token_id=eos_token_id,
    )
    return out[0, len(row) :].tolist()


def write_rows(path, rows):
    """A file of JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def run_command(*arguments, timeout=120, **environment):
    """`python arguments...` in the project's directory on the CPU. Returns the finished process."""
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


def call_command(main, *arguments):
    """A program's `main` as a command, but in this process, which saves the seconds of starting
    Python. Returns what `run_command` does."""
    stdout, stderr, status = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
        try:
            run_command_line(lambda: main([*map(str, arguments)]))
        except SystemExit as exit:
            status = exit.code
    return SimpleNamespace(returncode=status, stdout=stdout.getvalue(), stderr=stderr.getvalue())


class Interrupted(BaseException):
    """Not caught by the code, like a kill."""


def stop_in_step(patch, method, stop_step):
    """Patch the step of a method: step t = stop_step raises Interrupted; None: no step does."""
    step = train.STEPS[method]

    def stopping(run, examples, t):
        if t == stop_step:
            raise Interrupted
        return step(run, examples, t)

    patch.setitem(train.STEPS, method, stopping)


@contextmanager
def interrupted_in_step(method, stop_step):
    """In this context the method is interrupted in step t = stop_step."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupted):
        stop_in_step(patch, method, stop_step)
        yield


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def torchrun(n_ranks, *options):
    """The arguments of `python` that start a script on some ranks of this machine."""
    address = ("--master_addr=127.0.0.1", f"--master_port={free_port()}")
    return "-m", "torch.distributed.run", f"--nproc_per_node={n_ranks}", *address, *options


def fork_ranks(command, n_ranks, log):
    """Fork the ranks of a command, in the environment that torchrun gives them: that saves the
    seconds of starting Python. Each rank's output is appended to `log` plus its number. Returns the
    process ids."""
    sys.stdout.flush()
    # PyTorch imports a thousand modules for the first tensor without storage, the first optimizer
    # and the first one that is sharded. Now, or each rank would spend seconds on that.
    torch.optim.AdamW([torch.empty(1, device="meta").normal_()])
    importlib.import_module("torch.distributed.optim")
    port, processes = free_port(), []
    for rank in range(n_ranks):
        process = os.fork()
        if process == 0:
            try:
                sys.stdout = sys.stderr = open(f"{log}{rank}", "a")  # noqa: SIM115
                if n_ranks > 1:
                    os.environ |= {
                        "RANK": str(rank),
                        "LOCAL_RANK": str(rank),
                        "WORLD_SIZE": str(n_ranks),
                        "LOCAL_WORLD_SIZE": str(n_ranks),
                        "MASTER_ADDR": "127.0.0.1",
                        "MASTER_PORT": str(port),
                        "TORCHELASTIC_RUN_ID": "forked",
                    }
                run_command_line(command)
                status = 0
            except SystemExit as exit:
                status = exit.code
            except BaseException:
                traceback.print_exc()
                status = 1
            sys.stdout.flush()
            os._exit(status)
        processes.append(process)
    return processes


def wait_for(processes, timeout):
    """The exit statuses of processes, negative for a signal. Kills them and raises TimeoutError if
    they take longer than `timeout` seconds of waiting (not of the clock: a machine may sleep)."""
    statuses = {}
    for _ in range(timeout * 200):
        for process in processes:
            if process not in statuses:
                ended, status = os.waitpid(process, os.WNOHANG)
                if ended:
                    statuses[process] = os.waitstatus_to_exitcode(status)
        if len(statuses) == len(processes):
            return [statuses[process] for process in processes]
        sleep(0.005)
    for process in processes:
        if process not in statuses:
            os.kill(process, signal.SIGKILL)
    raise TimeoutError(f"still running after {timeout} seconds")


def after_device(stderr):
    """Standard error without the lines that init_process prints: the device and a warning."""
    first, _, rest = stderr.partition("\n")
    device = r"device: CPU, \d+ threads; ranks: \d+; precision: (float32|bfloat16)"
    if not re.fullmatch(device, first):
        return stderr
    return re.sub(r"\Awarning: this PyTorch is built for GPUs .*\n", "", rest)


def files_below(directory):
    paths = [path.relative_to(directory) for path in directory.rglob("*") if path.is_file()]
    return sorted(map(str, paths))


def error_of(function, *arguments):
    """The message of the InputError that a call raises, which must be one line."""
    with pytest.raises(InputError) as caught:
        function(*arguments)
    message = str(caught.value)
    assert message and "\n" not in message
    return message


class Cut(bytes):
    """An answer that announces all of these bytes and breaks off half way."""


class CutChunks(bytes):
    """The same without a Content-Length: the answer comes in chunks and the last one is missing."""


class Short(bytes):
    """An answer that announces half of these bytes and sends them all."""


class Redirect(str):
    """An answer that sends the client to this URL."""


class Server:
    """A web server on loopback.

    answers: {path: bytes, Cut, CutChunks, Short, Redirect, an error's status, perhaps with headers,
    or a list of these, one per request (the last one is repeated)}. Any other path is a 404. etags:
    {path: ETag}, or a list of these, as of answers; a file with one may be asked for in ranges.
    asked: the paths requested so far. authorizations, ranges: the Authorization and Range headers
    of each request, None without one.
    """

    def __init__(self):
        self.answers, self.etags, self.asked = {}, {}, []
        self.authorizations, self.ranges = [], []
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True  # or each answer waits for 40 ms

            def do_GET(self):
                server.asked.append(self.path)
                server.authorizations.append(self.headers["Authorization"])
                server.ranges.append(self.headers["Range"])
                answer, etag = server.answers.get(self.path, 404), server.etags.get(self.path)
                if isinstance(answer, list):
                    answer = answer.pop(0) if len(answer) > 1 else answer[0]
                if isinstance(etag, list):
                    etag = etag.pop(0) if len(etag) > 1 else etag[0]
                if isinstance(answer, int):
                    self.send_error(answer)
                    return
                if isinstance(answer, tuple):
                    status, headers = answer
                    self.send_response(status)
                    for name, value in {"Content-Length": "0", **headers}.items():
                        self.send_header(name, value)
                    self.end_headers()
                    return
                if isinstance(answer, Redirect):
                    self.send_response(302)
                    self.send_header("Location", answer)
                    self.send_header("Content-Length", "0")
                    self.end_headers()
                    return
                start, size = 0, len(answer)
                if etag and self.headers["If-Range"] == etag:
                    start = int(self.headers["Range"].removeprefix("bytes=").removesuffix("-"))
                broken = isinstance(answer, Cut | CutChunks)
                if start and start >= size:
                    self.send_response(416)
                    answer = type(answer)()
                    self.send_header("Content-Range", f"bytes */{size}")
                else:
                    self.send_response(206 if start else 200)
                    answer = type(answer)(answer[start:])
                    if start:
                        self.send_header("Content-Range", f"bytes {start}-{size - 1}/{size}")
                body = answer[: len(answer) // 2] if broken else answer
                if etag:
                    self.send_header("ETag", etag)
                if isinstance(answer, CutChunks):
                    self.send_header("Transfer-Encoding", "chunked")
                    body = b"%x\r\n%s\r\n" % (len(body), body)
                else:
                    length = len(answer) // 2 if isinstance(answer, Short) else len(answer)
                    self.send_header("Content-Length", str(length))
                self.end_headers()
                self.wfile.write(body)
                self.close_connection = broken or isinstance(answer, Short)

            def log_message(self, *arguments):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        kwargs = {"poll_interval": 0.02}
        threading.Thread(target=self.http.serve_forever, kwargs=kwargs, daemon=True).start()

    def serve(self, repository, **contents):
        """Serve a repository's files: `model_safetensors=...` for model.safetensors, and so on."""
        for name, answer in contents.items():
            stem, _, suffix = name.rpartition("_")
            self.answers[f"/{repository}/resolve/main/{stem}.{suffix}"] = answer

    def close(self):
        self.http.shutdown()
        self.http.server_close()
