"""The soft prompt P (PromptKD, section 3.2): trainable embeddings in front of a frozen teacher.
`python prompt.py RUN` shows what the tuned prompt of a run does."""

from data.threads import configure_threads

configure_threads()  # before torch is imported

import torch

from data import dist, models, prepare, report, runs
from data import rows as data_rows
from data.cli import ArgumentParser, InputError, run_command_line
from data.tensors import load_prompt
from losses import cross_entropy, kl, kls
from model import head_logits, precision
from sample import sample_all


def hidden_states(model, ids, P=None, output_positions=None):
    """Hidden states (B, S, C) of ids (B, S): for p(y | P, x), or for p(y | x) if P is None.

    P: (prompt_length, C), in front of every row at positions 0 to prompt_length - 1, so that ids
    move right; its own states are cut off. output_positions: two tensors (N,), rows and positions
    in ids; if given, only the states there are returned, (N, C). The model adds prompt_length to
    these positions, so they mean the same tokens with and without P.
    """
    hidden = model(ids, prefix=P, output_positions=output_positions)
    if P is None or output_positions is not None:
        return hidden
    return hidden[:, len(P) :]


@torch.no_grad()
def response_hidden(model, batch, P=None):
    """The hidden states (N, C) that predict a batch's N response tokens, and the head (V, C).

    No gradient and no dropout, also for the student's q in equation 1: there q is only a target.
    `batch.response_positions` are one to the left of the response tokens, as logits predict ahead.
    """
    model.eval()  # no dropout; train.student_backward switches the student back
    return hidden_states(model, batch.ids, P, batch.response_positions), model.wte.weight


def freeze(teacher, dtype="float32"):
    """Make a teacher p: no gradients to its weights, no dropout.

    In bfloat16 only the linear layers of the blocks are converted, which halves their memory.
    bfloat16 autocast would convert them at each use anyway, so no result changes. Embeddings, head
    and LayerNorm stay float32.
    """
    if dtype == "bfloat16":
        for module in teacher.modules():
            if isinstance(module, torch.nn.Linear):
                module.bfloat16()
    return teacher.eval().requires_grad_(False)


def initial_prompt(embedding, init, length, text_tokens, pad_token, seed):
    """The prompt before it is tuned: float32 (length, C).

    embedding: the teacher's token embedding (V, C). init is one of the three of Figure 4:
      "text"     the embeddings of text_tokens (paper: "Suppose you are a student.", 7 tokens), cut
                 or repeated to length
      "padding"  the embedding of pad_token (GPT-2's end-of-text), repeated to length
      "random"   standard normal numbers as in the released code; much larger than GPT-2's
                 embeddings
    """
    if init == "random":
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(length, embedding.shape[1], generator=generator)
    source = text_tokens if init == "text" else [pad_token]
    tokens = [source[i % len(source)] for i in range(length)]
    return embedding.detach()[tokens].float().cpu().clone()


def untuned_prompt(s, embedding, tokenizer):
    """The prompt of a run with Settings `s` before it is tuned (see `initial_prompt`). Raises
    InputError if its text is empty."""
    text = tokenizer.encode_ordinary(s.prompt_text)
    if not text:
        raise InputError("--prompt-text is empty; give a sentence")
    length, eos = s.prompt_length or len(text), tokenizer.eot_token
    return initial_prompt(embedding, s.prompt_init, length, text, eos, s.seed)


# --- The command: what a tuned prompt does ---


@torch.no_grad()
def describe_vectors(P, P_0, wte):
    """How far each vector of P (prompt_length, C) has moved from P_0, ‖P_i - P_0i‖ / ‖P_0i‖, and
    its cosine with P_0i; the cosines of the five nearest embeddings of wte (V, C), and which they
    are: four lists. Nearest by angle: a tuned vector may be longer than all embeddings."""
    moved = (P - P_0).norm(dim=1) / P_0.norm(dim=1)  # (prompt_length,)
    cosines = P @ wte.T / P.norm(dim=1, keepdim=True) / wte.norm(dim=1)  # (prompt_length, V)
    columns = moved, torch.cosine_similarity(P, P_0), *cosines.topk(5)
    return [column.tolist() for column in columns]


MEASURES = ("KL(p || q)", "KL(p_P || q)", "KL(p_P || p)", "loss of p", "loss of p_P", "loss of q")


@torch.no_grad()
def measure(p, q, P, batch, dtype):
    """MEASURES of a batch's N response tokens, in nats, (6, N). p_P: the teacher p with the prompt
    P; q: the student."""
    with precision(P.device, dtype):
        inputs = (p, batch), (p, batch, P), (q, batch)
        logits = [head_logits(*response_hidden(*each)) for each in inputs]  # (N, V) each
    losses = [cross_entropy(z, batch.targets) for z in logits]
    bare, prompted, student = logits
    return torch.stack([kl(bare, student), *kls(prompted, student, bare), *losses])


def main(argv=None):
    parser = ArgumentParser("prompt.py", description="What a run's tuned prompt does.")
    parser.add_argument("run", metavar="RUN", help="the directory of a complete PromptKD run")
    run = parser.parse_args(argv).run
    directory, record = runs.run_dir(run), runs.read_record(run)
    s = record.get("settings", {})
    if s.get("method") != "promptkd" or not record.get("complete"):
        raise InputError(f"{directory}: is not a complete run of train.py --method promptkd")
    paths = {field: directory.parent / s[field] for field in ("teacher", "data")}
    teacher, data = (str(path) if path.exists() else s[field] for field, path in paths.items())
    device, dtype = dist.init_process(s["dtype"])
    rows = data_rows.read_rows(prepare.find_data_dir(data) / "dev.jsonl", s["max_dev_rows"])
    q, tokenizer = models.load_model(directory, device)
    p, _ = models.load_model(teacher, device)
    P = load_prompt(directory / "best", p.config.n_embd).to(device)

    def show(token):
        return "-" if token is None else repr(tokenizer.decode([token]))

    text, eos = tokenizer.encode_ordinary(s["prompt_text"]), tokenizer.eot_token
    settings = runs.Settings(**s | {"prompt_length": len(P)})
    P_0 = untuned_prompt(settings, p.wte.weight, tokenizer).to(device)
    source = {"text": text, "padding": [eos], "random": [None]}[s["prompt_init"]]
    columns, vectors = describe_vectors(P, P_0, p.wte.weight), []
    for i, (moved, cosine, cosines, tokens) in enumerate(zip(*columns)):
        began_as, near = show(source[i % len(source)]), list(zip(map(show, tokens), cosines))
        vectors.append({"began_as": began_as, "moved": moved, "cosine": cosine, "nearest": near})

    examples = data_rows.encode_training_rows(rows, tokenizer)
    batches = data_rows.micro_batches(examples, 1024, device, len(P))
    means = torch.cat([measure(p, q, P, batch, dtype) for batch in batches], dim=1).mean(1)  # (6,)

    request, row = examples[0].request, examples[0].index + 1
    rng_key = (s["seed"], "prompt", row)
    [response], _ = sample_all(q, [request], [rng_key], eos, s["max_new_tokens"], dtype=dtype)
    batch = data_rows.make_batch([data_rows.Example(0, request, response)], device)
    probabilities = (-measure(p, q, P, batch, dtype)[3:]).exp().tolist()  # (3, N)
    by_model = dict(zip(("bare teacher", "prompted teacher", "student"), probabilities))
    response = {"row": row, "tokens": list(map(show, response)), "probabilities": by_model}
    means = dict(zip(MEASURES, means.tolist()))
    report.write_prompt(directory, {"vectors": vectors, "references": means, "response": response})


if __name__ == "__main__":
    run_command_line(main)
