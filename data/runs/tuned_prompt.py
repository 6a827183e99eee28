"""What the tuned soft prompt of a run does: the body of prompt.py's command."""

import math

import torch
from torch.nn.functional import normalize

from data.models.hub import file_hash, model_hash
from data.models.named import load_model, resolve_input
from data.models.sampling import sample_all
from data.models.tensors import load_prompt
from data.process import dist
from data.process.command_line import ArgumentParser
from data.process.errors import InputError
from data.runs import report, runs
from data.runs.methods import DEFAULTS, Settings
from data.sets import prepare
from data.sets.rows import Example, encode_training_rows, make_batch, micro_batches, read_rows
from losses import cross_entropy, kl
from model import head_logits, precision
from prompt import initial_prompt, response_hidden


def untuned_prompt(s, embedding, tokenizer):
    """The prompt of a run with Settings `s` before it is tuned (see `prompt.initial_prompt`).
    embedding: the teacher's (V, C). Raises InputError if its text is empty."""
    text = tokenizer.encode_ordinary(s.prompt_text)
    if not text:
        raise InputError("--prompt-text is empty; give a sentence")
    return initial_prompt(
        embedding,
        init=s.prompt_init,
        length=s.prompt_length or len(text),
        text_tokens=text,
        pad_token=tokenizer.eot_token,
        seed=s.seed,
    )


@torch.no_grad()
def describe_vectors(P, P_0, wte):
    """How far each vector of P (prompt_length, C) has moved from P_0, ‖P_i - P_0i‖ / ‖P_0i‖, and
    its cosine with P_0i; the cosines of the five nearest embeddings of wte (V, C), and which they
    are: four lists. Nearest by angle: a tuned vector may be longer than all embeddings."""
    # A vector of zeros has no direction: its cosines are 0, and no distance is relative to it.
    moved = (P - P_0).norm(dim=1) / P_0.norm(dim=1)  # (prompt_length,)
    cosines = normalize(P) @ normalize(wte).T  # (prompt_length, V)
    moved = [value if math.isfinite(value) else None for value in moved.tolist()]
    columns = torch.cosine_similarity(P, P_0), *cosines.topk(5)
    return [moved, *(column.tolist() for column in columns)]


MEASURES = ("KL(p || q)", "KL(p_P || q)", "KL(p_P || p)", "loss of p", "loss of p_P", "loss of q")


@torch.no_grad()
def measure(p, q, P, batch, dtype):
    """MEASURES of a batch's N response tokens, in nats, (6, N). p_P: the teacher p with the prompt
    P; q: the student."""
    with precision(P.device, dtype):
        bare = head_logits(*response_hidden(p, batch))  # (N, V)
        prompted = head_logits(*response_hidden(p, batch, P))  # (N, V)
        student = head_logits(*response_hidden(q, batch))  # (N, V)
    kls = [kl(bare, student), kl(prompted, student), kl(prompted, bare)]  # (N,) each
    losses = [cross_entropy(logits, batch.targets) for logits in (bare, prompted, student)]
    return torch.stack([*kls, *losses])


def check_inputs(directory, record, dev_path, teacher):
    """Raise InputError if a run's validation rows or its teacher have changed since."""
    inputs = {"dev.jsonl": file_hash(dev_path), "teacher": model_hash(teacher)}
    known = {name: value for name, value in inputs.items() if name in record.get("inputs", {})}
    for name in inputs.keys() - known.keys():
        print(f"warning: {directory}: its run.json does not have the hash of its {name}")
    runs.check_inputs(directory, record, known, "put back what it was, or train the run again")


def main(argv=None):
    parser = ArgumentParser("prompt.py", description="What a run's tuned prompt does.")
    parser.add_argument("run", metavar="RUN", help="the directory of a complete PromptKD run")
    run = parser.parse_args(argv).run
    directory, record = runs.run_dir(run), runs.read_record(run)
    s = DEFAULTS | record.get("settings", {})
    if s.get("method") != "promptkd" or not record.get("complete"):
        raise InputError(f"{directory}: is not a complete run of train.py --method promptkd")
    teacher, data = (resolve_input(directory, s[field]) for field in ("teacher", "data"))
    device, dtype = dist.init_process(s["dtype"])
    path = prepare.find_data_dir(data) / "dev.jsonl"
    rows = read_rows(path, s["max_dev_rows"])
    dist.run_on_rank0(check_inputs, directory, record, path, teacher)
    q, tokenizer = load_model(directory, device)
    p, _ = load_model(teacher, device)
    P = load_prompt(directory / "best", p.config.n_embd).to(device)

    def show(token):
        return "-" if token is None else repr(tokenizer.decode([token]))

    text, eos = tokenizer.encode_ordinary(s["prompt_text"]), tokenizer.eot_token
    settings = Settings(**s | {"prompt_length": len(P)})
    P_0 = untuned_prompt(settings, p.wte.weight, tokenizer).to(device)
    source = {"text": text, "padding": [eos], "random": [None]}[s["prompt_init"]]
    columns, vectors = describe_vectors(P, P_0, p.wte.weight), []
    for i, (moved, cosine, cosines, tokens) in enumerate(zip(*columns)):
        began_as, near = show(source[i % len(source)]), list(zip(map(show, tokens), cosines))
        vectors.append({"began_as": began_as, "moved": moved, "cosine": cosine, "nearest": near})

    examples = encode_training_rows(rows, tokenizer)
    batches = micro_batches(examples, 1024, device, len(P))
    means = torch.cat([measure(p, q, P, batch, dtype) for batch in batches], dim=1).mean(1)  # (6,)

    request, row = examples[0].request, examples[0].index + 1
    rng_key = (s["seed"], "prompt", row)
    [response], _ = sample_all(q, [request], [rng_key], eos, s["max_new_tokens"], dtype=dtype)
    batch = make_batch([Example(0, request, response)], device)
    probabilities = (-measure(p, q, P, batch, dtype)[3:]).exp().tolist()  # (3, N)
    by_model = dict(zip(("bare teacher", "prompted teacher", "student"), probabilities))
    response = {"row": row, "tokens": list(map(show, response)), "probabilities": by_model}
    means = dict(zip(MEASURES, means.tolist()))
    content = {"vectors": vectors, "references": means, "response": response}
    dist.run_on_rank0(report.write_prompt, directory, content)
