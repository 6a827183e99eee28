"""The estimate of GPU memory in tests/memory.py, on models small enough to run in full."""

import gc
from contextlib import nullcontext
from types import SimpleNamespace

import memory
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from torch.nn.parallel import DistributedDataParallel

from data.models import sampling
from data.process import dist
from data.runs.methods import METHODS
from data.runs.paper import PAPER_COSTS
from model import GPT, Config

STUDENT, TEACHER = Config(1, 64, 1, 512, 1024), Config(2, 128, 2, 512, 1024)
TINY = {"base": STUDENT, "medium": STUDENT, "large": STUDENT, "xl": TEACHER}


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setattr(memory, "CONFIGS", TINY)
    monkeypatch.setattr(memory, "VALIDATION_ROWS", 8)
    monkeypatch.setattr(memory, "MAX_LENGTH", 64)
    monkeypatch.setattr(memory, "MAX_REQUEST", 32)
    monkeypatch.setattr(memory, "MAX_NEW_TOKENS", 32)


def estimate(kind, n_ranks=1, dtype="bfloat16", n_tokens=256, card=1e9):
    return memory.estimate((kind, "base"), n_ranks, dtype, n_tokens, card)


# ---- counting ------------------------------------------------------------------------------------


def test_a_storage_counts_once_until_it_is_freed_in_blocks_of_512_bytes():
    with FakeTensorMode(), memory.Meter() as meter:
        a = torch.zeros(1, 128)
        view = a.expand(100, -1).T[3:]
        assert meter.now == 512
        b = torch.ones(129) + 1
        assert (meter.now, meter.peak) == (512 + 1024, 512 + 2 * 1024)
        a.add_(1)
        assert meter.now == 512 + 1024
        meter.mark("first")
        del a, b
        assert meter.now == 512
        meter.mark("second", extra=5)
        meter.mark("first")
        del view
    assert meter.now == 0
    assert meter.moments == {"first": 512 + 2 * 1024, "second": 512 + 1024}


def test_the_count_is_that_of_pytorchs_memory_tracker():
    def train_step():
        model = GPT(TEACHER)
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        hidden = model(torch.zeros(8, 64, dtype=torch.long))
        model.logits(hidden).logsumexp(-1).sum().backward()
        optimizer.step()

    with FakeTensorMode(), memory.Meter() as meter:
        train_step()
    with FakeTensorMode(), MemTracker() as tracker:
        train_step()
    [peak] = tracker.get_tracker_snapshot("peak").values()
    assert meter.peak == pytest.approx(peak["Total"], rel=0.02)


def test_fake_tensors_take_what_real_ones_take(monkeypatch):
    fake = estimate("promptkd", 2)
    gc.collect()
    monkeypatch.setattr(memory, "FakeTensorMode", lambda **kwargs: nullcontext())
    real = estimate("promptkd", 2)
    assert real.keys() == fake.keys()
    for moment, n_bytes in real.items():
        assert fake[moment] == pytest.approx(n_bytes, rel=0.02), moment


class GpuMeter(memory.Meter):
    """What PyTorch's allocator measures."""

    def __init__(self):
        super().__init__()
        self.start = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))

    def mark(self, moment, extra=0):
        self.now = torch.cuda.memory_allocated() - self.start
        self.peak = torch.cuda.max_memory_allocated() - self.start
        super().mark(moment, extra)
        torch.cuda.reset_peak_memory_stats()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", dist.DTYPES)
@pytest.mark.parametrize("kind", ["sft", "promptkd"])
def test_the_estimate_is_what_a_gpu_measures(kind, dtype, monkeypatch):
    monkeypatch.undo()  # full size
    # conftest.py hides the GPU, and autocast would do nothing.
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    estimated = estimate(kind, 1, dtype, 1024, 25.4e9)
    gc.collect()
    monkeypatch.setattr(memory, "FakeTensorMode", lambda **kwargs: nullcontext())
    monkeypatch.setattr(memory, "Meter", GpuMeter)
    monkeypatch.setattr(memory, "DEVICE", torch.device("cuda"))
    measured = estimate(kind, 1, dtype, 1024, 25.4e9)
    for moment, n_bytes in measured.items():
        assert estimated[moment] == pytest.approx(n_bytes, rel=0.15), moment


# ---- what stands in for a GPU and for other ranks ------------------------------------------------


def dropout_bytes(rate):
    """What a forward pass of 4 rows of 64 tokens keeps for the backward pass."""
    with FakeTensorMode(), memory.Meter() as meter, memory.gpu_form(meter, []):
        model, _ = memory.load_model("xl", memory.DEVICE, rate)
        model.train()
        before = meter.now
        hidden = model(torch.zeros(4, 64, dtype=torch.long))
        return meter.now - before - hidden.untyped_storage().nbytes()


def test_dropout_keeps_a_byte_per_element_and_attention_no_matrix():
    n_masks = 1 + 2 * TEACHER.n_layer
    assert dropout_bytes(0.1) - dropout_bytes(0.0) == n_masks * 4 * 64 * 128


@pytest.fixture
def one_rank():
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=store)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("set_to_none", [True, False])
def test_gradients_lie_where_ddp_has_them(set_to_none, one_rank):
    """Whether those of a pass under no_sync are already in the buckets, pass by pass."""

    def run(ddp_class):
        model = torch.nn.Linear(3, 3)
        ddp, in_buckets = ddp_class(model, gradient_as_bucket_view=True), []
        for _ in range(3):
            addresses = []
            for context in (ddp.no_sync(), nullcontext()):
                with context:
                    ddp(torch.ones(2, 3)).sum().backward()
                addresses.append([p.grad.data_ptr() for p in model.parameters()])
            in_buckets.append(addresses[0] == addresses[1])
            model.zero_grad(set_to_none=set_to_none)
        return in_buckets

    assert run(memory.BucketDDP)[1:] == [not set_to_none] * 2
    assert run(DistributedDataParallel)[1:] == run(memory.BucketDDP)[1:]


def test_states_are_sharded_over_the_ranks():
    n = sum(p.numel() for p in GPT(STUDENT).parameters())
    assert memory.shard_bytes("base", 1) == [8 * n]
    shards = memory.shard_bytes("base", 4)
    assert len(shards) == 4 and sum(shards) == 8 * n
    alone, sharded = (estimate("sft", n_ranks) for n_ranks in (1, 4))
    assert alone["saving"] == pytest.approx((4 + 8) * n, rel=0.02)  # weights and states
    assert alone["resuming"] == pytest.approx((4 + 8) * n, rel=0.02)
    # And the gradients, which DDP's buckets keep
    assert sharded["saving"] == pytest.approx((4 + 4) * n + max(shards), rel=0.02)
    assert sharded["resuming"] == pytest.approx((4 + 4) * n + 2 * max(shards), rel=0.02)


# ---- micro-batches, sampling, main memory --------------------------------------------------------


@pytest.mark.parametrize("prompt_length", [0, 7])
@pytest.mark.parametrize("n_tokens", [20, 64, 100, 256])
def test_a_full_batch_has_its_number_of_tokens_or_one_row(n_tokens, prompt_length):
    ids = memory.full_batch(n_tokens, prompt_length).ids
    n_rows, length = ids.shape
    if n_tokens <= 64 + prompt_length:
        assert (n_rows, length) == (1, 64)
    else:
        assert length <= 64
        assert n_tokens - n_rows < n_rows * (length + prompt_length) <= n_tokens


def test_the_default_tokens_are_those_of_the_product():
    settings = [memory.make_settings("sft", size, "float32") for size in ("large", "xl")]
    assert [memory.default_tokens(s) for s in settings] == [2048, 1024]


def test_more_tokens_take_more():
    few, many = (estimate("sft", n_tokens=n)["student step"] for n in (256, 4096))
    assert few < many


def test_as_many_rows_are_sampled_as_on_a_gpu(monkeypatch):
    weight = SimpleNamespace(device=torch.device("cuda"))
    gpt = SimpleNamespace(config=TEACHER, wte=SimpleNamespace(weight=weight))
    card = SimpleNamespace()
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    for models, share, n_rows in (
        ([gpt], 2.5, 2),
        ([gpt] * 2, 2.5, 1),
        ([gpt], 0.5, 1),
        ([gpt], 99, 7),
    ):
        row = memory.KVCache.row_bytes(TEACHER, 64, "bfloat16")
        card.total_memory = share * row / sampling.CACHE_SHARE
        assert sampling.sampling_batch_size(models, 7, 32, "bfloat16", 32) == n_rows
        assert memory.sampling_rows(models, "bfloat16", 7, card.total_memory) == n_rows


def test_each_row_that_is_sampled_takes_its_keys_and_values(monkeypatch):
    monkeypatch.setattr(memory, "MAX_NEW_TOKENS", 900)
    peaks = []
    for n_rows in (8, 16):
        with FakeTensorMode(), memory.Meter() as meter, memory.gpu_form(meter, []):
            memory.sample_at_full_length([GPT(TEACHER)], n_rows, "bfloat16")
        peaks.append(meter.peak)
    row = memory.KVCache.row_bytes(TEACHER, 932, "bfloat16")
    assert 8 * row < peaks[1] - peaks[0] < 10 * row


def test_saving_takes_the_states_of_the_other_ranks_in_main_memory():
    sizes = [4 * p.numel() for p in GPT(TEACHER).parameters()]
    assert memory.host_bytes("xl", 1)["saving"] == sum(sizes)
    others = sum(memory.shard_bytes("xl", 4)[1:])
    assert memory.host_bytes("xl", 4)["saving"] == others + 4 * max(sizes)


# ---- the tables ----------------------------------------------------------------------------------


def cells_of(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


@pytest.mark.slow
def test_the_tables_have_every_stage_and_moment(capsys):
    memory.main(["--tokens", "128", "--ranks", "2", "--stages", "promptkd-base", "responses"])
    lines, peaks = capsys.readouterr().out.splitlines(), []
    for dtype in ("bfloat16", "float32"):
        start = lines.index(f"2 ranks, {dtype}, GB") + 2
        header, _, responses, promptkd = map(cells_of, lines[start : start + 4])
        assert header == ["stage", *memory.MOMENTS]
        assert all(promptkd) and promptkd[0] == "promptkd-base"
        assert responses[0] == "responses" and len(responses) == len(header)
        [peak] = [cell for cell in promptkd if "*" in cell]
        peaks.append(f"{float(peak.strip('*')):.1f}")
    start = lines.index("2 ranks, the peaks") + 2
    header, _, responses, promptkd = map(cells_of, lines[start : start + 4])
    assert header[1:3] == ["bfloat16, GB", "float32, GB"]
    assert promptkd[:3] == ["promptkd-base", *peaks]
    assert (promptkd[-1], responses[-1]) == ("13.47 (14.40 reserved)", "")


def test_the_peaks_are_those_of_the_moments():
    moments = {"loading": 2.04e9, "sampling": 1e9}
    by_dtype = {"bfloat16": {("sft", "base"): moments}}
    by_dtype["float32"] = {("sft", "base"): moments | {"sampling": 3.26e9}}
    row = cells_of(memory.peaks_table(by_dtype).splitlines()[-1])
    assert row == ["sft-base", "2.0", "3.3", "loading, sampling", "2.36 (2.75 reserved)"]


def test_the_tables_are_of_every_stage_of_the_paper():
    # Those of the teacher, and for each size the init and all methods but pretrain.
    assert len(memory.STAGES) == len(set(memory.STAGES)) == 3 + 3 * len(METHODS)
    assert set(PAPER_COSTS) <= {f"{kind} {size}" for kind, size in memory.STAGES}
    for kind, size in memory.STAGES:
        if kind not in ("responses", "evaluation"):
            s = memory.make_settings(kind, size, "float32")
            needs_teacher = kind in METHODS and METHODS[kind].needs_teacher
            assert (s.teacher is not None) == needs_teacher
