"""The shape of the code base: who may import whom, and how files are named, sized and opened.

The rules are the tables below; each check takes the root of a tree and returns its breaches, one
line each. Every check runs over this repository, and over a small tree made to break it.
"""

import ast
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]

PACKAGES = ("data_pipeline", "launcher", "tsmoe")
SOURCE_FOLDERS = (*PACKAGES, "benchmarks", "tests")


@dataclass(frozen=True, kw_only=True)
class Ban:
    """What the modules of a package may not import."""

    package: str
    names: tuple[str, ...]
    but_in: str = ""
    """The one part of the package that may."""
    but_from: tuple[str, ...] = ()
    """The parts of what is banned that all may import."""


BANS = (
    Ban(package="data_pipeline", names=("tsmoe", "launcher", "torch", "deepspeed")),
    Ban(package="launcher", names=("tsmoe", "data_pipeline", "torch", "deepspeed")),
    Ban(package="tsmoe", names=("deepspeed",), but_in="engine"),
    Ban(package="tsmoe", names=("launcher",), but_in="commands"),
    Ban(
        package="tsmoe",
        names=("data_pipeline",),
        but_in="commands",
        but_from=(
            "record",
            "shards",
            "table",
            "table_file",
            "time_column",
            "errors",
            "sources.rows",
            "steps.split",
        ),
    ),
)

# The parts of tsmoe, lowest layer first: a part imports from its own layer and those before it.
LAYERS = (
    (
        "errors",
        "exit_code",
        "config",
        "batch",
        "host_memory",
        "launcher_watch",
        "ranks",
        "run_folder",
    ),
    ("nn",),
    ("moe",),
    ("heads", "models", "losses"),
    ("data", "checkpoint", "inference"),
    ("engine", "cost"),
    ("train", "evaluate", "report", "status"),
    ("finetune", "preflight"),
    ("tasks",),
    ("commands", "__main__"),
)
LAYER_OF = {part: layer for layer, parts in enumerate(LAYERS) for part in parts}

# Parts of tsmoe that must load in an instant, so torch only inside their functions.
WITHOUT_TORCH = ("config", "commands", "report", "status", "run_folder")
SLOW_PACKAGES = ("torch", "deepspeed", "pandas", "pyarrow", "numpy")

LINES_AT_MOST = 400
EMPTY_NAME = re.compile(r"_*(utils?|helpers?|common|misc|new_.*|improved_.*|.*_v\d+)")

# Modules and functions whose files can run code when they are loaded.
PICKLES = (
    "pickle",
    "_pickle",
    "cloudpickle",
    "dill",
    "joblib",
    "shelve",
    "torch.load",
    "torch.save",
)


@dataclass(frozen=True)
class Import:
    """One imported name, absolute: `from a.b import c` gives "a.b.c"."""

    name: str
    line: int
    is_at_load: bool
    """True when importing the module runs it: outside functions and `if TYPE_CHECKING`."""

    def is_of(self, module: str) -> bool:
        return f"{self.name}.".startswith(f"{module}.")


@dataclass(frozen=True)
class Source:
    """One Python file of the tree."""

    path: Path
    """Relative to the root of the tree."""
    text: str

    @property
    def tree(self) -> ast.Module:
        return ast.parse(self.text, filename=str(self.path))

    @property
    def package(self) -> str:
        return self.path.parts[0]

    @property
    def part(self) -> str:
        """The part of the package it belongs to: "engine" for tsmoe/engine/protocol.py."""
        return self.path.parts[1].removesuffix(".py")

    def imports(self) -> Iterator[Import]:
        return _imports(self.tree, self.path.parent.parts, is_at_load=True)


def _imports(tree: ast.AST, folder: tuple[str, ...], *, is_at_load: bool) -> Iterator[Import]:
    for node in ast.iter_child_nodes(tree):
        runs_later = False
        match node:
            case ast.Import(names=names):
                yield from (Import(alias.name, node.lineno, is_at_load) for alias in names)
            case ast.ImportFrom(module=module, names=names, level=level):
                start = folder[: len(folder) - level + 1] if level else ()
                base = ".".join((*start, module) if module else start)
                for alias in names:
                    yield Import(f"{base}.{alias.name}", node.lineno, is_at_load)
            case ast.Call(func=called, args=[ast.Constant(value=str(name)), *_]):
                if ast.unparse(called).endswith(("import_module", "__import__")):
                    yield Import(name, node.lineno, is_at_load)
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.Lambda():
                runs_later = True
            case ast.If(test=condition):
                runs_later = ast.unparse(condition).endswith("TYPE_CHECKING")
        yield from _imports(node, folder, is_at_load=is_at_load and not runs_later)


def sources(root: Path, folders: tuple[str, ...] = PACKAGES) -> list[Source]:
    return [
        Source(path.relative_to(root), path.read_text(encoding="utf-8"))
        for folder in folders
        for path in sorted((root / folder).rglob("*.py"))
    ]


# The checks.


def banned_imports(root: Path) -> list[str]:
    return [
        f"{source.path}:{found.line} imports {found.name}: {source.package}.{source.part} may not"
        for ban in BANS
        for source in sources(root, (ban.package,))
        for found in source.imports()
        for name in ban.names
        if found.is_of(name)
        and source.part != ban.but_in
        and not any(found.is_of(f"{name}.{part}") for part in ban.but_from)
    ]


def parts_without_a_layer(root: Path) -> list[str]:
    return [
        f"{source.path}: tsmoe.{source.part} stands in no layer; add it to LAYERS"
        for source in sources(root, ("tsmoe",))
        if source.part not in (*LAYER_OF, "__init__")
    ]


def upward_imports(root: Path) -> list[str]:
    breaches = []
    for source in sources(root, ("tsmoe",)):
        own_layer = LAYER_OF.get(source.part, -1)  # tsmoe/__init__.py lies below everything
        for found in source.imports():
            package, _, name = found.name.partition(".")
            imported = name.partition(".")[0]
            if package == "tsmoe" and LAYER_OF.get(imported, -1) > own_layer:
                breaches.append(
                    f"{source.path}:{found.line} imports {found.name}: "
                    f"{imported} lies above {source.part}"
                )
    return breaches


def torch_at_load(root: Path) -> list[str]:
    return [
        f"{source.path}:{found.line} imports {found.name} at module level: do it in the function"
        for source in sources(root, ("tsmoe",))
        if source.part in WITHOUT_TORCH
        for found in source.imports()
        if found.is_of("torch") and found.is_at_load
    ]


def pickles(root: Path) -> list[str]:
    breaches = []
    for source in sources(root):
        uses = [(found.name, found.line) for found in source.imports()]
        for node in ast.walk(source.tree):
            match node:
                case ast.Attribute():
                    uses.append((ast.unparse(node), node.lineno))
                case ast.keyword(arg="allow_pickle", value=ast.Constant(value=True)):
                    breaches.append(f"{source.path}:{node.value.lineno} allows pickle")
        breaches += [
            f"{source.path}:{line} uses {name}: safetensors and JSON only"
            for name, line in uses
            if name in PICKLES or name.partition(".")[0] in PICKLES
        ]
    return breaches


def long_files(root: Path) -> list[str]:
    return [
        f"{source.path}: {lines} lines, {LINES_AT_MOST} at most"
        for source in sources(root, SOURCE_FOLDERS)
        if (lines := len(source.text.splitlines())) > LINES_AT_MOST
    ]


def names_that_say_nothing(root: Path) -> list[str]:
    return [
        f"{source.path}: name it after what it holds"
        for source in sources(root, SOURCE_FOLDERS)
        if any(EMPTY_NAME.fullmatch(part.removesuffix(".py")) for part in source.path.parts)
    ]


def modules_without_a_docstring(root: Path) -> list[str]:
    return [
        f"{source.path}: opens with no docstring"
        for source in sources(root, (*PACKAGES, "benchmarks"))
        if source.text.strip()
        and (source.path.name.startswith("__") or not source.path.name.startswith("_"))
        and not ast.get_docstring(source.tree)
    ]


def folders_of_one_file(root: Path) -> list[str]:
    breaches = []
    for folder in sorted({root / source.path.parent for source in sources(root)}):
        content = [
            entry.name
            for entry in folder.iterdir()
            if entry.name not in ("__init__.py", "__pycache__") and not entry.name.startswith(".")
        ]
        if len(content) == 1:
            breaches.append(f"{folder.relative_to(root)}/ holds only {content[0]}")
    return breaches


# A check, one file with its text, and what the check says of it; empty where the file is sound.
CASES: tuple[tuple[Callable[[Path], list[str]], str, str, str], ...] = (
    (
        banned_imports,
        "data_pipeline/a.py",
        "x = 1\nfrom torch import nn",
        "a.py:2 imports torch.nn",
    ),
    (banned_imports, "data_pipeline/a.py", "def f(): import tsmoe.batch", "imports tsmoe.batch"),
    (banned_imports, "data_pipeline/a.py", "import_module('deepspeed.comm')", "deepspeed.comm"),
    (banned_imports, "data_pipeline/a.py", "import torches\nfrom . import record", ""),
    (
        banned_imports,
        "launcher/plan.py",
        "from data_pipeline import record",
        "launcher.plan may not",
    ),
    (banned_imports, "launcher/plan.py", "from .spec import LaunchSpec", ""),
    (banned_imports, "tsmoe/checkpoint/a.py", "import deepspeed as ds", "tsmoe.checkpoint may not"),
    (banned_imports, "tsmoe/engine/a.py", "import deepspeed", ""),
    (banned_imports, "tsmoe/train/a.py", "from launcher import spec", "imports launcher.spec"),
    (banned_imports, "tsmoe/commands/a.py", "import launcher.spec, data_pipeline.build", ""),
    (banned_imports, "tsmoe/data/a.py", "from data_pipeline import build", "data_pipeline.build"),
    (banned_imports, "tsmoe/data/a.py", "from data_pipeline.shards import Reader", ""),
    (parts_without_a_layer, "tsmoe/attic/a.py", "", "tsmoe.attic stands in no layer"),
    (parts_without_a_layer, "tsmoe/batch.py", "", ""),
    (upward_imports, "tsmoe/nn/a.py", "from ..moe import layer", "moe lies above nn"),
    (upward_imports, "tsmoe/engine/a.py", "if TYPE_CHECKING: import tsmoe.train", "tsmoe.train"),
    (upward_imports, "tsmoe/__init__.py", "from tsmoe import batch", "imports tsmoe.batch"),
    (upward_imports, "tsmoe/moe/a.py", "from tsmoe import __version__, moe, nn, ranks", ""),
    (
        torch_at_load,
        "tsmoe/commands/a.py",
        "try: import torch.nn\nfinally: pass",
        "imports torch.nn",
    ),
    (torch_at_load, "tsmoe/commands/a.py", "def run(): import torch", ""),
    (torch_at_load, "tsmoe/config/a.py", "if TYPE_CHECKING: import torch", ""),
    (pickles, "tsmoe/checkpoint/a.py", "x = torch.load(path)['model']", "uses torch.load"),
    (pickles, "tsmoe/checkpoint/a.py", "from torch import save", "uses torch.save"),
    (pickles, "launcher/a.py", "import pickle", "uses pickle"),
    (pickles, "data_pipeline/a.py", "numpy.load(path, allow_pickle=True)", "allows pickle"),
    (pickles, "data_pipeline/a.py", "numpy.load(path, allow_pickle=False)", ""),
    (pickles, "tsmoe/checkpoint/a.py", "from safetensors.torch import load, save", ""),
    (long_files, "tests/test_a.py", "\n" * 401, "tests/test_a.py: 401 lines"),
    (long_files, "tests/test_a.py", "\n" * 400, ""),
    (names_that_say_nothing, "tsmoe/utils/mask.py", "", "utils/mask.py: name it after"),
    (names_that_say_nothing, "launcher/plan_v2.py", "", "launcher/plan_v2.py: name it after"),
    (names_that_say_nothing, "launcher/miscellany.py", "", ""),
    (modules_without_a_docstring, "tsmoe/nn/norm.py", "import torch", "norm.py: opens with no"),
    (modules_without_a_docstring, "tsmoe/nn/__init__.py", "import torch", "opens with no"),
    (modules_without_a_docstring, "tsmoe/nn/norm.py", "'Norms.'", ""),
    (modules_without_a_docstring, "tsmoe/nn/__init__.py", "", ""),
    (folders_of_one_file, "tsmoe/nn/norm.py", "", "tsmoe/nn/ holds only norm.py"),
)
CHECKS = list(dict.fromkeys(case[0] for case in CASES))


def plant(root: Path, name: str, text: str) -> None:
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_text(text, encoding="utf-8")


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_repository_has_no(check: Callable[[Path], list[str]]) -> None:
    breaches = check(REPOSITORY)
    assert not breaches, "\n" + "\n".join(breaches)


@pytest.mark.parametrize(("check", "name", "text", "says"), CASES)
def test_check_tells_a_breach_from_its_neighbour(
    tmp_path: Path, check: Callable[[Path], list[str]], name: str, text: str, says: str
) -> None:
    plant(tmp_path, name, text)
    breaches = check(tmp_path)
    assert says in "\n".join(breaches)
    assert bool(breaches) == bool(says), breaches


def test_folder_of_two_files_is_sound(tmp_path: Path) -> None:
    for name in ("nn/__init__.py", "nn/norm.py", "nn/graph.py", "batch.py"):
        plant(tmp_path, f"tsmoe/{name}", "")
    assert folders_of_one_file(tmp_path) == []


def slow_packages_after(statements: str) -> list[str]:
    """Run statements in a fresh interpreter and say which slow packages it then holds."""
    question = f"import sys; print(*[name for name in {SLOW_PACKAGES} if name in sys.modules])"
    command = [sys.executable, "-c", f"{statements}\n{question}"]
    process = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
    return process.stdout.splitlines()[-1].split()


def test_import_and_help_load_nothing_slow() -> None:
    assert slow_packages_after("import tsmoe") == []
    show_help = """
import sys
from tsmoe.__main__ import main
sys.argv = ["tsmoe", "--help"]
try:
    main()
except SystemExit as stopped:
    assert not stopped.code, stopped.code
"""
    assert slow_packages_after(show_help) == []


def test_probe_for_slow_packages_sees_one() -> None:
    assert slow_packages_after("import numpy") == ["numpy"]
