"""One step of PromptKD with nothing but model.py, losses.py, prompt.py and sample.py, copied into a
folder, and this file beside them:

    python standalone.py CASE.pt RESULT.pt

CASE.pt: two configurations, the weights of both models, P, requests, responses, λ. RESULT.pt: the
means of the losses, and the gradients of P and of the student. It is run by
tests/method/test_core.py.
"""

import sys
from types import SimpleNamespace

import torch

from losses import prompt_loss, student_loss, sum_over_tokens
from model import GPT, Config
from prompt import freeze, response_hidden
from sample import pad


def make_batch(requests, responses):
    """Rows of request and response, and where the logits of the N response tokens are."""
    ids, _ = pad([x + y for x, y in zip(requests, responses)], "cpu")  # (B, T)
    rows = [b for b, y in enumerate(responses) for _ in y]
    columns = [len(x) - 1 + t for x, y in zip(requests, responses) for t in range(len(y))]
    positions = torch.tensor(rows), torch.tensor(columns)  # (N,) each
    return SimpleNamespace(ids=ids, response_positions=positions, n_tokens=len(rows))


def promptkd_step(q, p, P, batch, lam, lr):
    """Update P and accumulate the student's gradient. Returns what RESULT.pt has."""

    def L_P(p_prompted, q, p_bare):
        return prompt_loss(p_prompted, q, p_bare, lam=lam)

    with torch.no_grad():  # targets
        student, bare = response_hidden(q, batch), response_hidden(p, batch)
    means = sum_over_tokens(L_P, response_hidden(p, batch, P), student, bare) / batch.n_tokens
    means[0].backward()
    P_grad = P.grad.clone()
    torch.nn.utils.clip_grad_norm_([P], 1.0)
    torch.optim.AdamW([P], lr=lr, betas=(0.9, 0.999), weight_decay=1e-2).step()

    with torch.no_grad():  # a target
        prompted = response_hidden(p, batch, P)
    loss = sum_over_tokens(student_loss, response_hidden(q, batch), prompted) / batch.n_tokens
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in q.named_parameters()}
    return {"prompt_losses": means.detach(), "loss": loss.detach(), "P": P_grad, "q": gradients}


if __name__ == "__main__":
    case = torch.load(sys.argv[1], weights_only=True)
    models = []
    for role in ("student", "teacher"):
        model = GPT(Config(**case[role]["config"]))
        model.load_state_dict(case[role]["weights"])
        models.append(model.eval())
    q, p = models
    batch = make_batch(case["requests"], case["responses"])
    P = case["P"].requires_grad_()
    torch.save(promptkd_step(q, freeze(p), P, batch, case["lam"], case["lr"]), sys.argv[2])
