"""Peak memory of every stage of the paper's main results, estimated without a GPU.

    python tests/memory.py                 all stages, at 8 ranks of 24 GB and at 1 of 80 GB
    python tests/memory.py --ranks 8 --dtype float32 --stages teacher promptkd-large

The product's own functions run at full size on fake tensors, which have shapes but no values. A
meter counts the bytes of every storage from its allocation until it is freed. docs/memory.md says
what is counted and what is not. GB = 1e9 bytes.
"""

import argparse
import sys
import time
import weakref
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

import sample
import train
from data.models import sampling
from data.process import dist
from data.runs import stages, validation
from data.runs.methods import METHODS, SIZES, Settings, preset
from data.runs.optim import adamw
from data.runs.paper import PAPER_COSTS
from data.runs.report import format_table
from data.sets.rows import MAX_LENGTH, MAX_NEW_TOKENS, MAX_REQUEST, Batch, Example
from model import GPT, Config, KVCache, precision
from prompt import freeze

CONFIGS = {
    "base": Config(12, 768, 12),
    "medium": Config(24, 1024, 16),
    "large": Config(36, 1280, 20),
    "xl": Config(48, 1600, 25),
}
TEACHER = "xl"
# (kind, size of the trained model). Nothing is trained in "responses", SeqKD's sampling from the
# teacher, and in "evaluation", evaluate.py.
STAGES = [("teacher", TEACHER), ("responses", TEACHER), ("evaluation", TEACHER)]
STAGES += [
    (kind, size)
    for size in ("base", "medium", "large")
    for kind in ("init", *(name for name in METHODS if name != "pretrain"))
]
# In the order of a run, except that "saving" is also what a stage holds between two steps.
MOMENTS = ["loading", "resuming", "prompt step", "student step", "update"]
MOMENTS += ["validation", "sampling", "saving"]

DEVICE = torch.device("cpu")
PROMPT_LENGTH = 7  # of "Suppose you are a student."
VALIDATION_ROWS = 1000  # of the paper's split of Dolly
TOKENIZER = SimpleNamespace(eot_token=50256, n_vocab=50257)
TOKENIZER.encode_ordinary = lambda text: [0] * PROMPT_LENGTH


def card_bytes(n_ranks):
    """What PyTorch reports as a card's memory: one card of 80 GB, or several of 24 GB."""
    return 85.0e9 if n_ranks == 1 else 25.4e9


def stage_name(kind, size):
    return kind if size == TEACHER else f"{kind}-{size}"


# ---- counting ------------------------------------------------------------------------------------


class Meter(TorchDispatchMode):
    """Counts the bytes of every storage that is made within it until the storage is freed."""

    def __init__(self):
        super().__init__()
        self.sizes, self.now, self.peak = {}, 0, 0
        self.moments = {}  # {moment: the most bytes at once}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for value in tree_iter(out):
            if isinstance(value, torch.Tensor):
                self.count(value.untyped_storage())
        return out

    def count(self, storage):
        key = storage._cdata
        if key not in self.sizes:
            self.sizes[key] = -(-storage.nbytes() // 512) * 512  # the allocator's unit
            self.now += self.sizes[key]
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.forget, key)

    def forget(self, key):
        self.now -= self.sizes.pop(key)

    def mark(self, moment, extra=0):
        """End a moment: its peak is that since the last mark, or `extra` bytes more than now."""
        peak = max(self.peak, self.now + extra)
        self.moments[moment] = max(self.moments.get(moment, 0), peak)
        self.peak = self.now


# ---- what stands in for a GPU and for the other ranks --------------------------------------------


class BucketDDP(torch.nn.Module):
    """The memory of DistributedDataParallel with gradient_as_bucket_view, as in its reducer.cpp.

    Its buckets hold a view for each gradient and live as long as it does. A gradient that autograd
    makes because `.grad` is None lies outside of them, next to them, until a backward pass that
    synchronizes copies it and lets `.grad` be the view.
    """

    def __init__(self, module, device_ids=None, gradient_as_bucket_view=True):
        super().__init__()
        self.module, self.synchronizes = module, True
        for p in module.parameters():
            p.register_post_accumulate_grad_hook(partial(self.reduce, torch.empty_like(p)))

    def reduce(self, bucket_view, p):
        if self.synchronizes and p.grad is not bucket_view:
            bucket_view.copy_(p.grad)
            p.grad = bucket_view

    @contextmanager
    def no_sync(self):
        self.synchronizes = False
        yield
        self.synchronizes = True

    @property
    def head(self):
        return self.module.head

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)


@contextmanager
def fake_ranks(n_ranks, rank=0):
    """Within it, this process is one of n ranks. Collective calls do nothing."""
    if n_ranks > 1:
        store = FakeStore()
        torch.distributed.init_process_group("fake", rank=rank, world_size=n_ranks, store=store)
    try:
        yield
    finally:
        if n_ranks > 1:
            torch.distributed.destroy_process_group()


def shard_bytes(size, n_ranks):
    """Bytes of each rank's states of AdamW for a model of this size."""
    with torch.device("meta"):
        parameters = list(GPT(CONFIGS[size]).parameters())
    with fake_ranks(n_ranks):
        optimizer = adamw(parameters, make_settings("sft", size, "float32"), sharded=True)
        shards = [optimizer.param_groups] if n_ranks == 1 else optimizer._partition_parameters()
    return [8 * sum(p.numel() for group in shard for p in group["params"]) for shard in shards]


def load_model(name, device, dropout=None):
    """A model by its size, with the dropout of a GPU."""
    with torch.device(device):
        gpt = GPT(replace(CONFIGS[name], dropout=dropout or 0.0))
    for p in gpt.parameters():
        torch.isfinite(p)  # the check of each tensor in model.convert_stored
    for block in gpt.h:
        block.attn.dropout = 0.0  # a CPU would keep matrices for it; a GPU keeps a seed
    return gpt.eval(), TOKENIZER


def gpu_dropout(self, x):
    """A GPU's dropout keeps one byte per element for the backward pass."""
    if self.p == 0 or not self.training:
        return x
    return torch.native_dropout(x, self.p, True)[0]


def to_bfloat16(self):
    """nn.Module's own conversion fails on fake tensors."""
    for name, p in list(self.named_parameters()):
        setattr(self, name, torch.nn.Parameter(p.detach().bfloat16()))


@contextmanager
def gpu_form(meter, batches):
    """Within it, the product's functions have the form of a GPU. They take `batches`, a list, as
    their micro-batches, and mark their moments."""

    def clip_and_step(optimizer):
        # The gradients are complete. P is the only parameter of its optimizer.
        is_prompt = sum(len(group["params"]) for group in optimizer.param_groups) == 1
        meter.mark("prompt step" if is_prompt else "student step")
        result = clip_and_step_of_train(optimizer)
        meter.mark("update")
        return result

    clip_and_step_of_train = train.clip_and_step
    patches = [
        (torch.Tensor, "is_cpu", False),
        (torch.nn.Dropout, "forward", gpu_dropout),
        (torch.nn.Linear, "bfloat16", to_bfloat16),
        (dist, "DDP", BucketDDP),
        (train, "load_model", load_model),
        (train, "check_same_vocabulary", lambda *arguments: None),
        (train, "rollout", lambda run, examples, t: examples),
        (train, "split_global_batch", lambda run, examples: (batches, 1000)),
        (validation, "micro_batches", lambda *arguments: batches[-1:]),
        (train, "clip_and_step", clip_and_step),
    ]
    with ExitStack() as stack:
        for arguments in patches:
            stack.enter_context(patch.object(*arguments))
        yield


# ---- the moments of a stage ----------------------------------------------------------------------


def make_settings(kind, size, dtype):
    """The Settings of the paper's stage (see data.runs.methods.preset)."""
    method = "sft" if kind in ("teacher", "init") else kind
    teacher = TEACHER if METHODS[method].needs_teacher else None
    values = preset(kind, size)
    return Settings(method, size, "dolly", teacher=teacher, dtype=dtype, **values)


def default_tokens(s):
    with patch.object(stages, "count_parameters", SIZES.get):
        return stages.default_micro_batch_tokens(s)


def make_batch(n_rows, length):
    """A micro-batch in which every token is predicted, the most that there can be."""
    ids = torch.zeros(n_rows, length, dtype=torch.long)
    positions = torch.zeros(n_rows * length, dtype=torch.long)
    example = Example(0, [0], [0], [[0.0] * 3] * (n_rows * length))
    return Batch([example], ids, (positions, positions.clone()), positions.clone())


def full_batch(n_tokens, prompt_length):
    """A micro-batch of n tokens with their prompts, in as few rows as can be, or of one row."""
    n_rows = -(-n_tokens // (MAX_LENGTH + prompt_length))
    return make_batch(n_rows, MAX_LENGTH if n_rows == 1 else n_tokens // n_rows - prompt_length)


def sampling_rows(models, dtype, n_rows, card, share=sampling.CACHE_SHARE):
    """`data.models.sampling.sampling_batch_size` on a GPU with so many bytes."""
    max_seq_len = MAX_REQUEST + MAX_NEW_TOKENS
    row_bytes = sum(KVCache.row_bytes(m.config, max_seq_len, dtype) for m in models)
    return max(1, min(n_rows, int(share * card) // row_bytes))


@torch.no_grad()
def sample_at_full_length(models, n_rows, dtype):
    """What `sample.sample` does with n rows of the longest requests: the first token, the last one,
    and dropping a quarter of the rows. Models: a student, and perhaps a teacher to mix it with."""
    student, *teachers = models
    student.eval()
    mix = (teachers[0], train.TEACHER_MIX) if teachers else None
    ids = torch.zeros(n_rows, MAX_REQUEST, dtype=torch.long)
    lengths = torch.full((n_rows,), MAX_REQUEST)
    lengths.max = lambda: MAX_REQUEST  # a fake tensor has no values
    uniforms = torch.zeros(n_rows)
    with precision(DEVICE, dtype):
        decoder = sample.Decoder(student, mix, lengths, MAX_NEW_TOKENS, dtype)
        logits = decoder.prefill(ids)
        sample.sample_next_token(logits, uniforms)
        for cache in decoder.caches:
            cache.longest = cache.keys.shape[2] - 1
        logits = decoder.step(torch.zeros(n_rows, 1, dtype=torch.long))
        sample.sample_next_token(logits, uniforms)
        for cache in decoder.caches:
            cache.select_rows(torch.arange(max(1, 3 * n_rows // 4)))


def estimate(stage, n_ranks, dtype, n_tokens=None, card=None):
    """The peak of each moment of a stage on the rank with the most states: {moment: bytes}.

    n_tokens: of a micro-batch, None for the default. card: bytes of the GPU.
    """
    kind, size = stage
    shards, card = shard_bytes(size, n_ranks), card or card_bytes(n_ranks)
    meter, batches = Meter(), []
    ranks, form = fake_ranks(n_ranks, shards.index(max(shards))), gpu_form(meter, batches)
    with FakeTensorMode(allow_non_fake_inputs=True), meter, ranks, form, torch.device(DEVICE):
        if kind in ("responses", "evaluation"):
            measure_sampling(meter, kind, size, dtype, card)
        else:
            s = make_settings(kind, size, dtype)
            measure_training(meter, batches, s, max(shards), n_tokens or default_tokens(s), card)
    return meter.moments


def measure_sampling(meter, kind, size, dtype, card):
    """The moments of `stages.sample_responses` and of `evaluate.evaluate_models`."""
    model, _ = load_model(size, DEVICE)
    if kind == "responses":
        freeze(model, dtype)
    meter.mark("loading")
    n_rows = sampling_rows([model], dtype, 10**6, card, sampling.CACHE_SHARE_ALONE)
    sample_at_full_length([model], n_rows, dtype)
    meter.mark("sampling")


def measure_training(meter, batches, s, shard, n_tokens, card):
    """The moments of `train.run_stage`. shard: bytes of this rank's states of AdamW."""
    n_ranks, examples = dist.world_size(), [Example(0, [0], [0])]
    steps = {"total_steps": 100, "steps_per_epoch": 10, "rollout_steps": 2}
    run = train.build(s, steps | {"global_batch_size": 1}, TOKENIZER, n_tokens, DEVICE)
    meter.mark("loading")
    # ZeroRedundancyOptimizer.load_state_dict copies its shard to the device twice.
    meter.mark("resuming", extra=shard if n_ranks == 1 else 2 * shard)
    if s.method == "minillm":
        run.scored_rollout = run.lm_blocks = examples
    small, large = make_batch(1, 8), full_batch(n_tokens, 0 if run.P is None else len(run.P))
    # The first step makes the states of AdamW. In the second one, the small batch makes gradients
    # before the large one starts. At an odd t MiniLLM makes no rollout.
    for batches[:] in ([small], [small, large]):
        train.STEPS[s.method](run, examples, t=1)
    validate(meter, run, examples)
    batches.clear()
    sampled = [([run.student], VALIDATION_ROWS)] if s.metric_for_best == "rouge_l" else []
    sampled += [([run.student, run.teacher], s.rollout_size)] if s.method == "minillm" else []
    for models, n_rows in sampled:
        n_rows = sampling_rows(models, s.dtype, -(-n_rows // n_ranks), card)
        sample_at_full_length(models, n_rows, s.dtype)
        meter.mark("sampling")
    meter.mark("saving")  # tensors are copied to the CPU one by one


def validate(meter, run, examples):
    """The losses of `validation.validate`; the teacher's are also those of MiniLLM's scoring."""
    sums = SimpleNamespace(tolist=lambda: [0.0, 1.0])  # fake tensors have no values
    with patch.object(dist, "all_reduce_sum", lambda tensor: sums):
        validation.validation_loss(run, run.student, examples)
        if run.teacher is not None:
            validation.validation_loss(run, run.teacher, examples, run.P)
    meter.mark("validation")


def host_bytes(size, n_ranks):
    """Main memory that all ranks of one machine take for a stage that trains a model of this size,
    besides that of Python, its libraries and CUDA: {moment: bytes}.

    Loading a model and resuming: each rank copies one tensor at a time from a file that is mapped
    into memory. Saving: each other rank copies a tensor of its states to the CPU and sends it to
    rank 0, which holds those of all and copies one of its own at a time. Then it copies the model.
    """
    with torch.device("meta"):
        sizes = [4 * p.numel() for p in GPT(CONFIGS[size]).parameters()]
    tensors, own = n_ranks * max(sizes), shard_bytes(size, n_ranks)[0]
    saving = max(2 * sum(sizes) - own + tensors, sum(sizes))
    return {"loading": tensors, "resuming": tensors, "saving": saving}


# ---- tables --------------------------------------------------------------------------------------


def gb(n_bytes, digits=2):
    return f"{n_bytes / 1e9:.{digits}f}"


def moments_table(peaks):
    """A row per stage and a column per moment; the largest is bold. peaks: {stage: moments}."""
    rows = [["stage", *MOMENTS]]
    for stage, moments in peaks.items():
        most = max(moments, key=moments.get)
        cells = {m: f"**{gb(n)}**" if m == most else gb(n) for m, n in moments.items()}
        rows.append([stage_name(*stage), *(cells.get(moment, "") for moment in MOMENTS)])
    return format_table(rows, markdown=True)


def peaks_table(by_dtype):
    """A row per stage: its peak and the moment that has it, in each dtype, and the paper's Table 2.
    by_dtype: {dtype: peaks}."""
    rows = [["stage", *(f"{dtype}, GB" for dtype in by_dtype), "the peak is in", "the paper, GB"]]
    for stage in next(iter(by_dtype.values())):
        stage_moments = [peaks[stage] for peaks in by_dtype.values()]
        moments = dict.fromkeys(max(moments, key=moments.get) for moments in stage_moments)
        allocated, reserved, _ = PAPER_COSTS.get(" ".join(stage), (None, None, None))
        paper = f"{allocated:.2f} ({reserved:.2f} reserved)" if allocated else ""
        peaks = [gb(max(moments.values()), 1) for moments in stage_moments]
        rows.append([stage_name(*stage), *peaks, ", ".join(moments), paper])
    return format_table(rows, markdown=True)


def parse_args(argv):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    option = parser.add_argument
    option("--ranks", type=int, nargs="+", default=[8, 1])
    option("--dtype", nargs="+", choices=dist.DTYPES, default=["bfloat16", "float32"])
    names = [stage_name(*stage) for stage in STAGES]
    option("--stages", nargs="+", default=names, choices=names, metavar="STAGE")
    option("--tokens", type=int, help="of a micro-batch; by default the stage's own")
    return parser.parse_args(argv)


def main(argv=None):
    args, start = parse_args(argv), time.perf_counter()
    chosen = [stage for stage in STAGES if stage_name(*stage) in args.stages]
    for n_ranks in args.ranks:
        ranks, by_dtype = f"{n_ranks} rank{'s' * (n_ranks > 1)}", {}
        for dtype in args.dtype:
            by_dtype[dtype] = peaks = {}
            for kind, size in chosen:
                # SeqKD's step is KD's on other responses.
                kd = peaks.get(("kd", size)) if kind == "seqkd" else None
                peaks[kind, size] = kd or estimate((kind, size), n_ranks, dtype, args.tokens)
            print(f"\n{ranks}, {dtype}, GB\n\n{moments_table(by_dtype[dtype])}", flush=True)
        print(f"\n{ranks}, the peaks\n\n{peaks_table(by_dtype)}")
        rows = [["trained model", "loading", "resuming", "saving"]]
        for size in CONFIGS:
            rows.append([size, *(gb(n, 1) for n in host_bytes(size, n_ranks).values())])
        print(f"\n{ranks}, main memory of all, GB\n\n{format_table(rows, markdown=True)}")
    print(f"\ntook {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
