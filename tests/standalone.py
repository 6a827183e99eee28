"""PromptKD with nothing but model.py, losses.py, prompt.py and sample.py, copied into a folder, and
beside them this file and promptkd.py, the last block of docs/walkthrough.md:

    python standalone.py CASE.pt RESULT.pt

CASE.pt: two configurations, the weights of both models, P, requests and their responses; and some
runs, each as how often it trains on these, and its learning rate. RESULT.pt: for each run the
gradients of P and of the student, before they are clipped, at the last time. It is run by
tests/method/test_core.py.
"""

import sys

import promptkd
import torch

from model import GPT, Config
from prompt import freeze


def gradients_of(case, n_batches, lr):
    """The gradients of P and of the student in the last step of a run."""
    models = []
    for role in ("student", "teacher"):
        model = GPT(Config(**case[role]["config"]))
        model.load_state_dict(case[role]["weights"])
        models.append(model.eval())
    (q, p), P, gradients = models, case["P"].clone().requires_grad_(), []

    def keep_and_clip(parameters, max_norm):
        gradients.append([parameter.grad.clone() for parameter in parameters])
        return clip(parameters, max_norm)

    clip, torch.nn.utils.clip_grad_norm_ = torch.nn.utils.clip_grad_norm_, keep_and_clip
    batches = [case["requests"]] * n_batches
    promptkd.promptkd(q, freeze(p), P, batches, 0, 0, lr=lr, prompt_lr=lr)
    torch.nn.utils.clip_grad_norm_ = clip
    return dict(zip(("P", "q"), gradients[-2:]))


if __name__ == "__main__":
    case = torch.load(sys.argv[1], weights_only=True)
    promptkd.sample = lambda *_: (case["responses"], None)
    torch.save([gradients_of(case, *run) for run in case["runs"]], sys.argv[2])
