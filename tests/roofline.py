"""The roofline bound of bench.py: the least time that an iteration takes on this machine."""

import time

import torch

PROMPT_LENGTH = 7  # of the teacher's soft prompt


def machine_rates(device, dtype):
    """Operations/s of a large matrix product and bytes/s of a large copy; the best of five."""
    n = 8192 if device.type == "cuda" else 2048
    a = torch.randn(n, n, device=device, dtype=dtype)
    x = torch.zeros(1 << 26, device=device)
    y = torch.empty_like(x)

    def least_seconds(work):
        seconds = []
        for _ in range(6):
            start = time.perf_counter()
            work()
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
        return min(seconds[1:])

    operations = 2 * n**3 / least_seconds(lambda: a @ a)
    return operations, 2 * x.nbytes / least_seconds(lambda: y.copy_(x))


def count_work(case, examples, itemsize=4):
    """The least work of an iteration: {phase: [(operations, bytes) of each part]}.

    The parts of a phase cannot overlap. itemsize: bytes of a weight as it is multiplied.

    Forward of n layers of width C over rows of T tokens, where a row's last token is predicted but
    never read:
        body      2 · 12 n C² T in matrices, 2 n C T (T + 1) in causal attention, summed over rows
        head      2 · C V per predicted token
    Backward to the activations costs as much again, to activations and weights twice as much. The
    prompt makes the teacher's rows longer. Each forward and backward reads all weights once.
        sampling  the student's forward of the requests, which predicts the first tokens; then
                  max(response) - 1 steps, each of which reads all weights and the keys and values
        prompt    forward of the student and of the bare teacher; forward and backward to the
                  activations of the prompted teacher
        student   forward of the prompted teacher; forward and full backward of the student; AdamW,
                  which reads 4 numbers per weight and writes 3
    """
    V, requests = case["vocab"], [len(e.request) for e in examples]
    whole = [len(e.request) + len(e.response) - 1 for e in examples]
    n_tokens = sum(len(e.response) for e in examples)
    n_q, C_q = (int(size) for size in case["student"].split("x")[:2])
    n_p, C_p = (int(size) for size in case["teacher"].split("x")[:2])

    def forward(n, C, lengths, n_predicted):
        body = sum(24 * n * C**2 * T + 2 * n * C * T * (T + 1) for T in lengths)
        return body + 2 * C * V * n_predicted

    first = forward(n_q, C_q, requests, len(examples))
    q = forward(n_q, C_q, whole, n_tokens)
    p = forward(n_p, C_p, whole, n_tokens)
    prompted = forward(n_p, C_p, [T + PROMPT_LENGTH for T in whole], n_tokens)
    w_q, w_p = 12 * n_q * C_q**2 + C_q * V, 12 * n_p * C_p**2 + C_p * V
    # Numbers that the decoding steps read: weights, then keys and values of every row so far
    read = w_q * (max(len(e.response) for e in examples) - 1)
    read += 2 * n_q * C_q * sum(sum(range(n, T)) for n, T in zip(requests, whole))
    return {
        "sampling": [(first, itemsize * w_q), (q - first, itemsize * read)],
        "prompt": [(q + p + 2 * prompted, itemsize * (w_q + 3 * w_p))],
        "student": [(3 * q + prompted, itemsize * (3 * w_q + w_p)), (0, 7 * 4 * w_q)],
    }


def bound_seconds(work, rates):
    """The least seconds of each phase and of the whole, at (operations, bytes) per second.

    Each part takes as long as its operations or its bytes, whichever takes longer.
    """
    seconds = {
        phase: sum(max(count / rate for count, rate in zip(part, rates)) for part in parts)
        for phase, parts in work.items()
    }
    return seconds | {"whole": sum(seconds.values())}
