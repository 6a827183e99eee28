"""The limits of the layout, and that README and docs name only what exists."""

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT

TOP_LEVEL = {
    *("model.py", "prompt.py", "losses.py", "sample.py", "train.py", "evaluate.py"),
    *("exposure_bias.py", "data", "tests", "docs", "README.md", "LICENSE", "requirements.txt"),
    *("pyproject.toml", ".gitignore", ".ci"),
}
MAX_LINES = {
    "losses.py": 250,  # with room for another loss
    "prompt.py": 100,
    "train.py": 570,  # with room for two more methods
    "sample.py": 280,
    "model.py": 305,
    "evaluate.py": 415,
    "exposure_bias.py": 285,
    "data/sets/demo.py": 420,
}
MAX_DATA_LINES, MAX_FUNCTION_LINES, MAX_COLUMNS = 350, 60, 100
CORE = ("model.py", "losses.py", "prompt.py", "sample.py")

PRODUCT = sorted([*ROOT.glob("*.py"), *(ROOT / "data").rglob("*.py")])
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def relative(path):
    return path.relative_to(ROOT).as_posix()


def lines_of(path):
    return path.read_text(encoding="utf-8").splitlines()


product_file = pytest.mark.parametrize("path", PRODUCT, ids=relative)
any_file = pytest.mark.parametrize(
    "path", [*PRODUCT, *sorted((ROOT / "tests").rglob("*.py"))], ids=relative
)
document = pytest.mark.parametrize("path", DOCUMENTS, ids=relative)


# ---- the limits of the code ----------------------------------------------------------------------


@product_file
def test_files_keep_to_their_number_of_lines(path):
    assert len(lines_of(path)) <= MAX_LINES.get(relative(path), MAX_DATA_LINES)


@product_file
def test_functions_keep_to_their_number_of_lines(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    lengths = {node.name: node.end_lineno - node.lineno + 1 for node in functions}
    assert {name: n for name, n in lengths.items() if n > MAX_FUNCTION_LINES} == {}


@any_file
def test_lines_keep_to_their_number_of_columns(path):
    lines = enumerate(lines_of(path), start=1)
    assert [number for number, line in lines if len(line) > MAX_COLUMNS] == []


@any_file
def test_the_formatter_is_never_switched_off(path):
    switch = "# fmt" + ":"
    assert switch not in path.read_text(encoding="utf-8")


def imported_modules(path):
    """What a file imports, by dotted name, but for what it imports only as a command."""
    tree, found = ast.parse(path.read_text(encoding="utf-8")), set()
    command = [
        node for node in tree.body if ast.unparse(node).startswith("if __name__ == '__main__'")
    ]
    tree.body = [node for node in tree.body if node not in command]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def test_modules_import_each_other_without_circles():
    modules = {relative(path)[:-3].replace("/", "."): path for path in PRODUCT}
    imports = {name: imported_modules(path) & set(modules) for name, path in modules.items()}
    assert "losses" in imports["train"]
    assert "data.process.dist" in imports["train"]
    while free := [name for name, needed in imports.items() if not needed]:
        for name in free:
            del imports[name]
        for needed in imports.values():
            needed -= set(free)
    assert imports == {}


@pytest.mark.parametrize("name", CORE)
def test_the_core_imports_the_standard_library_torch_numpy_and_itself_only(name):
    imported = {module.partition(".")[0] for module in imported_modules(ROOT / name)}
    allowed = {*sys.stdlib_module_names, "torch", "numpy", *(Path(core).stem for core in CORE)}
    assert imported <= allowed


PROGRAMS = {"train", "evaluate", "exposure_bias"}


@product_file
def test_only_programs_import_programs(path):
    if path.parent != ROOT:
        assert imported_modules(path) & PROGRAMS == set()


def test_top_level_has_only_the_names_of_the_layout():
    command = ["git", "-C", str(ROOT), "ls-files"]
    try:
        files = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    assert {Path(name).parts[0] for name in files.splitlines()} <= TOP_LEVEL


# ---- what README and docs say --------------------------------------------------------------------


def code_blocks(path, language):
    return re.findall(rf"^```{language}\n(.*?)^```", path.read_text(encoding="utf-8"), re.M | re.S)


def code_without_docstring(path, name):
    """The lines of a function in a file, without its docstring and blank lines."""
    [function] = [
        node
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef) and node.name == name
    ]
    docstring = function.body[0]
    assert isinstance(docstring, ast.Expr)
    lines = lines_of(path)
    kept = lines[function.lineno - 1 : docstring.lineno - 1]
    kept += lines[docstring.end_lineno : function.end_lineno]
    return [line for line in kept if line.strip()]


def test_readme_quotes_algorithm_1_and_its_losses_as_they_are():
    quoted = "".join(code_blocks(ROOT / "README.md", "python")).splitlines()
    code = code_without_docstring(ROOT / "train.py", "promptkd_step")
    for loss in ("prompt_loss", "student_loss"):
        code += code_without_docstring(ROOT / "losses.py", loss)
    assert [line for line in quoted if line.strip()] == code


def test_readme_maps_the_paper_to_the_code():
    lines = lines_of(ROOT / "README.md")
    start = lines.index("| paper | code |")
    end = next(i for i in range(start, len(lines)) if not lines[i].startswith("|"))
    table = "\n".join(lines[start:end])
    for name in ("train.promptkd_step", "losses.student_loss", "prompt.response_hidden"):
        assert f"`{name}`" in table


def test_readme_quotes_the_first_table_of_memory():
    table = "| stage | bfloat16, GB"
    quoted, full = (
        path.read_text(encoding="utf-8").partition(table)[2].partition("\n\n")[0].splitlines()
        for path in (ROOT / "README.md", ROOT / "docs" / "memory.md")
    )
    assert len(quoted) == 2 + 4  # the rest of the header, the rule, four stages
    assert [line for line in quoted if line not in full] == []


def inline_code(path):
    """The `code` spans outside of blocks."""
    text = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.M | re.S)
    return re.findall(r"`([^`\n]+)`", text)


def resolve(name):
    """The object of a dotted name, or AttributeError or ModuleNotFoundError."""
    parts = name.split(".")
    n = 3 if parts[0] == "data" else 1
    found = importlib.import_module(".".join(parts[:n]))
    for part in parts[n:]:
        found = getattr(found, part)
    return found


@document
def test_every_name_in_a_module_exists(path):
    modules = "|".join([*(file.stem for file in ROOT.glob("*.py")), r"data\.\w+\.\w+"])
    pattern = re.compile(rf"(?<!\w)(?:{modules})(?:\.(?!py\b)\w+)+")
    names = [name for code in inline_code(path) for name in re.findall(pattern, code)]
    names = [name for name in names if not name.endswith((".json", ".jsonl", ".md"))]
    if relative(path) == "README.md":
        assert len(names) > 10
    for name in names:
        resolve(name)


@document
def test_every_file_that_is_named_exists(path):
    text = path.read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)#]+)", text) if "://" not in link]
    assert [link for link in links if not (path.parent / link).exists()] == []
    files = set(re.findall(r"(?<![\w/])(?:(?:data|tests)/(?:\w+/)?|docs/)?\w+\.py\b", text))
    known = {relative(file) for file in [*PRODUCT, *(ROOT / "tests").rglob("*.py")]}
    known |= {Path(name).name for name in known}
    assert sorted(files - known) == []


@document
def test_every_option_exists(path):
    names = ("bench.py", "conftest.py", "memory.py", "study/miniature.py")
    others = [ROOT / "tests" / name for name in names]
    sources = [*PRODUCT, *others]
    known = set().union(*(re.findall(r'"(--[\w-]+)"', file.read_text()) for file in sources))
    # argparse's; torchrun's; SLURM's; pip's; pytest's; ruff's
    known |= {"--help", "--nproc_per_node", "--max-restarts", "--durations", "--check"}
    known |= {"--signals-to-handle", "--shutdown-timeout", "--nnodes", "--rdzv_backend"}
    known |= {"--rdzv_endpoint", "--rdzv_id", "--nodes", "--ntasks-per-node", "--gpus-per-node"}
    known |= {"--signal", "--kill-on-bad-exit"}
    known |= {"--skew"}  # of the worked example
    known |= {"--no-index", "--find-links", "--no-deps", "--python-version", "--only-binary"}
    text = re.sub(r"^\|[\s|:-]+$", "", path.read_text(encoding="utf-8"), flags=re.M)
    options = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", text))
    assert sorted(options - known) == []


def test_readme_has_the_commands_that_others_read():
    lines = lines_of(ROOT / "README.md")
    assert "pip install -r requirements.txt && python train.py" in lines
    assert "pip install -r requirements.txt && python -m pytest tests/" in lines
