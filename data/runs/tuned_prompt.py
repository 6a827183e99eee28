"""What the tuned soft prompt of a run does: the body of prompt.py's command."""

import math
import os

import torch
from torch.nn.functional import normalize

from data.models.checkpoint import read_config
from data.models.hub import file_hash, find_model_dir, hub_repository, model_hash
from data.models.named import load_model, resolve_input
from data.models.prompts import load_prompt, save_adapter
from data.models.sampling import sample_all
from data.process import dist
from data.process.command_line import ArgumentParser
from data.process.errors import InputError
from data.process.files import check_output_dir
from data.runs import report, runs
from data.runs.methods import DEFAULTS, Settings
from data.runs.names import public_name
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


N_RESPONSES = 3  # that are shown token by token
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


def describe_run(directory, s, teacher, device, dtype, rows):
    """What `report.write_prompt` shows of a run with settings `s` (a dict), on its validation rows.
    teacher: the name of its teacher from here."""
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

    # Responses that are sampled from the student, token by token
    shown, responses = examples[:N_RESPONSES], []
    requests, keys = zip(*((e.request, (s["seed"], "prompt", e.index + 1)) for e in shown))
    sampled, _ = sample_all(q, requests, keys, eos, s["max_new_tokens"], dtype=dtype)
    for e, response in zip(shown, sampled):
        batch = make_batch([Example(0, e.request, response)], device)
        probabilities = (-measure(p, q, P, batch, dtype)[3:]).exp().tolist()  # (3, N)
        by_model = dict(zip(("bare teacher", "prompted teacher", "student"), probabilities))
        tokens = list(map(show, response))
        responses.append({"row": e.index + 1, "tokens": tokens, "probabilities": by_model})
    references = dict(zip(MEASURES, means.tolist()))
    return {"vectors": vectors, "references": references, "responses": responses}


def check_inputs(directory, record, inputs):
    """Raise InputError if what a run was made with has changed since. inputs: {name: SHA-256}."""
    known = {name: value for name, value in inputs.items() if name in record.get("inputs", {})}
    for name in inputs.keys() - known.keys():
        print(f"warning: {directory}: its run.json does not have the hash of its {name}")
    runs.check_inputs(directory, record, known, "put back what it was, or train the run again")


def write_adapter(directory, record, teacher, target):
    """Write a run's prompt as an adapter of its teacher (see `prompts.save_adapter`)."""
    check_output_dir(target, "--peft")
    inputs = {"teacher": model_hash(teacher)}
    check_inputs(directory, record, inputs)
    config = read_config(find_model_dir(teacher))
    P = load_prompt(directory / "best", config.n_embd)
    name = public_name(teacher) if os.path.exists(teacher) else hub_repository(teacher)
    save_adapter(P, target, config, name, inputs["teacher"])
    print(f"{target}: an adapter of {len(P)} virtual tokens for {name}")


def main(argv=None):
    parser = ArgumentParser("prompt.py", description="What a run's tuned prompt does.")
    parser.add_argument("run", metavar="RUN", help="the directory of a complete PromptKD run")
    help = "only write the prompt there, as a prompt-tuning adapter of PEFT for the run's teacher"
    parser.add_argument("--peft", metavar="DIR", help=help)
    args = parser.parse_args(argv)
    directory, record = runs.run_dir(args.run), runs.read_record(args.run)
    s = DEFAULTS | record.get("settings", {})
    if s.get("method") != "promptkd" or not record.get("complete"):
        raise InputError(f"{directory}: is not a complete run of train.py --method promptkd")
    teacher, data = (resolve_input(directory, s[field]) for field in ("teacher", "data"))
    device, dtype = dist.init_process(s["dtype"])
    if args.peft is not None:
        dist.run_on_rank0(write_adapter, directory, record, teacher, args.peft)
        return
    path = prepare.find_data_dir(data) / "dev.jsonl"
    rows = read_rows(path, s["max_dev_rows"])

    def check():
        inputs = {"dev.jsonl": file_hash(path), "teacher": model_hash(teacher)}
        check_inputs(directory, record, inputs)

    dist.run_on_rank0(check)
    content = describe_run(directory, s, teacher, device, dtype, rows)
    dist.run_on_rank0(report.write_prompt, directory, content)
