"""Files of sampled responses, SeqKD's data, and the command that samples."""

import io
import json
import os
import sys

import numpy as np
import pytest
from helpers import (
    GOLDEN,
    Interrupted,
    after_device,
    call_command,
    fork_ranks,
    greedy_by_transformers,
    soft_prompt,
    talker_config,
    tiny_model,
    tiny_tokenizer,
    transformers_model,
    wait_for,
    write_checkpoint,
    write_rows,
)

from data.models import sampling
from data.models.hub import model_hash
from data.models.prompts import save_prompt
from data.models.sampling import decode_response, main, sample_all, sample_to_file
from data.process import dist
from data.process.command_line import run_command_line
from data.sets.rows import fill_template, read_rows
from sample import row_uniforms, sample

# --- A file of responses ---

FILE_NEW_TOKENS = 100
LONG = 4  # the row whose request is over the limit
ROWS = [
    {
        "instruction": "Write a task." * (1 + n % 3),
        "input": "many " * 200 if n == LONG else "café" * (n % 2),
        "output": [f"answer {n}", "another"],
        "topic": n,
    }
    for n in range(13)
]
ASKED = [(n, row) for n, row in enumerate(ROWS) if n != LONG]


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return read_rows(write_rows(tmp_path_factory.mktemp("rows") / "train.jsonl", ROWS))


@pytest.fixture(scope="module")
def talker_model():
    return tiny_model(talker_config())


def write_responses(model, rows, path, batch_size=4):
    key = (10, "responses")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampling, "sampling_batch_size", lambda *_, **limits: batch_size)
        sample_to_file(model, tiny_tokenizer(), rows, key, path, FILE_NEW_TOKENS)


@pytest.fixture(scope="module")
def complete(talker_model, rows, tmp_path_factory):
    """The content of the file."""
    path = tmp_path_factory.mktemp("complete") / "train.jsonl"
    write_responses(talker_model, rows, path)
    return path.read_bytes()


def test_a_line_has_the_row_and_the_response_of_the_model(talker_model, complete):
    tokenizer = tiny_tokenizer()
    for line, (n, row) in zip(complete.splitlines(), ASKED, strict=True):
        request = tokenizer.encode_ordinary(fill_template(row["instruction"], row["input"]))
        u = row_uniforms(FILE_NEW_TOKENS, 10, "responses", n)[None]
        eos_token_id = tokenizer.eot_token
        [response], _ = sample(talker_model, [request], u, eos_token_id, FILE_NEW_TOKENS)
        assert json.loads(line) == {
            "instruction": row["instruction"],
            "input": row["input"],
            "output": tokenizer.decode(response).removesuffix("<|endoftext|>"),
            "ids": response,
            "reference": f"answer {n}",
        }


def test_ids_have_an_end_of_text_only_if_the_response_finished(complete):
    eos_token_id = tiny_tokenizer().eot_token
    ids = [json.loads(line)["ids"] for line in complete.splitlines()]
    cut_off = [row for row in ids if row[-1] != eos_token_id]
    assert 1 < len(cut_off) < len(ids) - 1
    assert all(eos_token_id not in row[:-1] for row in ids)
    assert all(len(row) == FILE_NEW_TOKENS for row in cut_off)


def test_a_file_of_responses_reads_back_as_training_rows(complete, tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_bytes(complete)
    for n, (row, line) in enumerate(
        zip(read_rows(path, sampled=True), complete.splitlines(), strict=True)
    ):
        line = json.loads(line)
        assert (row.index, row.references, list(row.ids)) == (n, (line["output"],), line["ids"])


@pytest.mark.parametrize("batch_size", [1, 5, 64])
def test_the_file_does_not_depend_on_the_batch_size(
    talker_model, rows, complete, tmp_path, batch_size
):
    write_responses(talker_model, rows, tmp_path / "train.jsonl", batch_size)
    assert (tmp_path / "train.jsonl").read_bytes() == complete


def test_an_interrupted_run_resumes_and_writes_the_same_bytes(
    talker_model, rows, complete, tmp_path, monkeypatch
):
    path, calls = tmp_path / "train.jsonl", []

    def interrupted_sample_all(model, requests, *args, **kwargs):
        calls.append(len(requests))
        if len(calls) == 3:
            raise Interrupted
        return sample_all(model, requests, *args, **kwargs)

    monkeypatch.setattr(sampling, "sample_all", interrupted_sample_all)
    with pytest.raises(Interrupted):
        write_responses(talker_model, rows, path)
    assert os.listdir(tmp_path) == ["train.jsonl.partial"]
    eight_lines = b"".join(complete.splitlines(keepends=True)[:8])
    assert (tmp_path / "train.jsonl.partial").read_bytes() == eight_lines
    write_responses(talker_model, rows, path)
    assert path.read_bytes() == complete
    assert calls == [4, 4, 4, 4]  # twelve rows, and four that were interrupted
    assert os.listdir(tmp_path) == ["train.jsonl"]


@pytest.mark.parametrize(
    "n_lines, n_bytes", [(0, 1), (0, 0), (1, 40), (5, -1), (7, 30), (11, -1), (12, 0)]
)
def test_a_run_resumes_after_a_partial_line(
    talker_model, rows, complete, tmp_path, n_lines, n_bytes
):
    """n_bytes: of the line after the complete ones; -1 for all but its newline."""
    lines = complete.splitlines(keepends=True)
    partial_line = lines[n_lines][:n_bytes] if n_bytes else b""
    content = b"".join(lines[:n_lines]) + partial_line
    (tmp_path / "train.jsonl.partial").write_bytes(content)
    write_responses(talker_model, rows, tmp_path / "train.jsonl", batch_size=64)
    assert (tmp_path / "train.jsonl").read_bytes() == complete
    assert os.listdir(tmp_path) == ["train.jsonl"]


def test_two_ranks_write_the_same_bytes(talker_model, rows, complete, tmp_path):
    partial = b"".join(complete.splitlines(keepends=True)[:4])[:-20]
    (tmp_path / "resumed.jsonl.partial").write_bytes(partial)

    def write_two_files():
        dist.init_process()
        for name in ("new", "resumed"):
            write_responses(talker_model, rows, tmp_path / f"{name}.jsonl", batch_size=3)

    ranks = fork_ranks(write_two_files, 2, tmp_path / "log")
    assert wait_for(ranks, 60) == [0, 0], (tmp_path / "log0").read_text()
    for name in ("new", "resumed"):
        assert (tmp_path / f"{name}.jsonl").read_bytes() == complete
    assert not list(tmp_path.glob("*.partial"))


# --- The command ---


@pytest.fixture(scope="module")
def talker(tmp_path_factory):
    """A checkpoint directory with its tokenizer."""
    return write_checkpoint(tmp_path_factory.mktemp("talker"), talker_config(), tiny_tokenizer())


def run(capsys, *arguments):
    main([*map(str, arguments)])
    return capsys.readouterr().out


def records(capsys, *arguments):
    return [json.loads(line) for line in run(capsys, *arguments, "--json").splitlines()]


def encode(instruction, input=""):
    return tiny_tokenizer().encode_ordinary(fill_template(instruction, input))


def test_the_greedy_command_gives_the_golden_tokens(talker):
    options = ("--instruction", "Write a task.", "--greedy", "--max-new", 20, "--json")
    process = call_command(main, talker, *options)
    assert process.returncode == 0
    assert process.stderr.startswith("device: CPU, ")
    assert after_device(process.stderr) == ""
    record = json.loads(process.stdout)
    assert record.keys() == {"instruction", "input", "text", "ids", "log_probs", "finished"}
    assert record["ids"] == json.loads(GOLDEN.read_text())["command"]
    assert record["instruction"] == "Write a task."
    assert record["input"] == ""
    assert record["finished"] is False


def test_the_greedy_command_gives_the_tokens_of_transformers(talker, tmp_path, capsys):
    hf, eos_token_id = transformers_model(talker_config()), tiny_tokenizer().eot_token
    rows = [
        {"instruction": "Write."},
        {"instruction": "Say it.", "input": "café"},
        {"instruction": "Describes the task with an input", "output": "x"},
    ]
    file = write_rows(tmp_path / "rows.jsonl", rows)
    found = records(capsys, talker, "--file", file, "--greedy", "--max-new", 15)
    for row, record in zip(rows, found, strict=True):
        request = encode(row["instruction"], row.get("input", ""))
        assert record["ids"] == greedy_by_transformers(hf, request, 15, eos_token_id)


@pytest.mark.parametrize("extreme", [["--temperature", "0.0001"], ["--top-p", "0.000001"]])
def test_at_the_limits_the_most_likely_tokens_are_sampled(talker, capsys, extreme):
    options = ["--instruction", "Write.", "--max-new", 8]
    [greedy] = records(capsys, talker, *options, "--greedy")
    [record] = records(capsys, talker, *options, *extreme)
    assert record["ids"] == greedy["ids"]
    assert record["log_probs"] == pytest.approx([0.0] * len(record["ids"]), abs=1e-3)


def test_of_two_ranks_one_prints(talker, tmp_path):
    arguments = [str(talker), "--instruction", "Write.", "--max-new", "5", "--input", "many " * 200]
    ranks = fork_ranks(lambda: main(arguments), 2, tmp_path / "log")
    assert wait_for(ranks, 60) == [0, 0]
    first, second = ((tmp_path / f"log{rank}").read_text() for rank in range(2))
    assert "1 of 1 requests were shortened to fit\n" in first and first.count("\n") >= 3
    assert second == ""


def test_an_instruction_prints_its_text_and_a_file_prints_headings(talker, tmp_path, capsys):
    options = ["--max-new", 12, "--seed", 3]
    instruction = ["--instruction", "Write.", "--input", "abc"]
    rows = [{"instruction": "Write.", "input": "abc"}, {"instruction": "Read."}]
    file = write_rows(tmp_path / "rows.jsonl", rows)
    texts = [record["text"] for record in records(capsys, talker, "--file", file, *options)]
    # The first row of a file has the random numbers of --instruction.
    assert run(capsys, talker, *instruction, *options) == f"{texts[0]}\n"
    expected = f"### Write.\n{texts[0]}\n\n### Read.\n{texts[1]}\n\n"
    assert run(capsys, talker, "--file", file, *options) == expected
    other_seed = run(capsys, talker, *instruction, "--max-new", 12, "--seed", 4)
    without_input = run(capsys, talker, *instruction[:2], *options)
    assert f"{texts[0]}\n" not in (other_seed, without_input)


def test_the_options_are_those_of_sample(talker, talker_model, capsys):
    options = {"temperature": 0.8, "top_k": 50, "top_p": 0.9, "no_repeat_ngram": 2}
    arguments = ["--instruction", "Write.", "--max-new", 30]
    for name, value in options.items():
        arguments += [f"--{name.replace('_', '-')}", value]
    [record] = records(capsys, talker, *arguments)
    tokenizer, u = tiny_tokenizer(), row_uniforms(30, 10, "sample", 0)[None]
    [response], [log_probs] = sample(
        talker_model, [encode("Write.")], u, tokenizer.eot_token, 30, **options
    )
    assert record["ids"] == response
    assert record["text"] == decode_response(response, tokenizer)
    np.testing.assert_allclose(record["log_probs"], log_probs, atol=1e-5)


def test_a_soft_prompt_is_prepended(talker, talker_model, tmp_path, capsys):
    P = soft_prompt(5)
    save_prompt(P, tmp_path)
    arguments = [talker, "--instruction", "Write.", "--greedy", "--max-new", 20]
    [bare] = records(capsys, *arguments)
    [prompted] = records(capsys, *arguments, "--prompt", tmp_path)
    eos_token_id = tiny_tokenizer().eot_token
    [expected], _ = sample(talker_model, [encode("Write.")], None, eos_token_id, 20, P=P)
    assert prompted["ids"] == expected != bare["ids"]
    assert records(capsys, *arguments, "--prompt", tmp_path / "prompt.safetensors") == [prompted]


def test_a_prompt_of_another_teacher_or_of_none_is_warned_of(talker, tmp_path, capsys):
    arguments = [talker, "--instruction", "Write.", "--max-new", 2, "--prompt", tmp_path]
    path = tmp_path / "prompt.safetensors"
    tuned_for_another = f"was tuned for the teacher out/x, and {talker} is another model"
    unknown = "does not say which teacher it was tuned for"
    for teacher, problem in (
        ((), unknown),
        (("out/x", "0" * 64), tuned_for_another),
        (("elsewhere/m\udce9", model_hash(talker)), None),
    ):
        save_prompt(soft_prompt(5), tmp_path, *teacher)
        main(list(map(str, arguments)))
        expected = f"warning: {path}: {problem}\n" if problem else ""
        assert after_device(capsys.readouterr().err) == expected


@pytest.mark.parametrize("name", ["-", "/dev/stdin", "/dev/fd/PIPE"])
def test_instructions_come_through_a_pipe(talker, tmp_path, capsys, name):
    """Standard input, or what the shell gives for <(COMMAND)."""
    file = write_rows(
        tmp_path / "rows.jsonl", [{"instruction": "Write."}, {"instruction": "Read."}]
    )
    expected = run(capsys, talker, "--file", file, "--max-new", 5)
    stdin, (read, write) = os.dup(0), os.pipe()
    os.write(write, file.read_bytes())
    os.close(write)
    os.dup2(read, 0)
    printed = run(capsys, talker, "--file", name.replace("PIPE", str(read)), "--max-new", 5)
    os.dup2(stdin, 0)
    for descriptor in (read, stdin):
        os.close(descriptor)
    assert printed == expected


def test_a_response_reports_whether_it_finished(talker, tmp_path, capsys):
    file = write_rows(tmp_path / "rows.jsonl", [{"instruction": "Write."}] * 12)
    found = records(capsys, talker, "--file", file, "--max-new", 100)
    for record in found:
        assert record["finished"] == (record["ids"][-1] == tiny_tokenizer().eot_token)
        assert "<|endoftext|>" not in record["text"]
    assert {record["finished"] for record in found} == {True, False}


def test_the_best_checkpoint_of_a_run_is_found(talker, tmp_path, capsys):
    (tmp_path / "best").symlink_to(talker)
    options = ["--instruction", "Write.", "--max-new", 5]
    assert run(capsys, tmp_path, *options) == run(capsys, talker, *options)


def test_a_long_request_is_shortened_and_reported(talker, capsys):
    main([str(talker), "--instruction", "Write.", "--input", "many " * 200, "--max-new", "5"])
    assert after_device(capsys.readouterr().err) == "1 of 1 requests were shortened to fit\n"


@pytest.mark.parametrize("options", [[], ["--json"]], ids=["text", "json"])
def test_text_that_the_terminal_cannot_show_is_escaped(talker, tmp_path, monkeypatch, options):
    """A request with half a surrogate pair, on an ASCII terminal."""
    rows = [{"instruction": "a\ud800b"}, {"instruction": "Write."}]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    stdout = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stdout)
    arguments = [str(talker), "--file", str(path), "--max-new", "3", *options]
    run_command_line(lambda: main(arguments))
    assert b"Write." in stdout.buffer.getvalue()
