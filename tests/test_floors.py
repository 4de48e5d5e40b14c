"""Structure of the package: imports go down the floors, one door per third-party system, short functions."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "priorzero"
FILES = sorted(PACKAGE.rglob("*.py"))

# From the bottom to the top. A module imports from lower floors, and from its own folder.
FLOORS: list[set[str]] = [
    {"types"},
    {"runtime"},
    {"settings"},
    {"config"},
    {"search", "envs"},
    {"llm", "world_model"},
    {"policy"},
    {"play"},
    {"runs"},
    {"preflight"},
    {"agent", "pretraining"},
    {"learning", "run_state"},
    {"training_run", "saved_agent", "saved_world_model", "exporting"},
    {"train", "cluster"},
    {"entry", "evaluate", "export", "games", "pretrain", "report", "watch"},
    {"ray_entry", "doctor"},
    {"cli"},
]
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}

# Third-party system -> the modules, or folders, that may import it.
DOORS: dict[str, tuple[str, ...]] = {
    "jericho": ("envs",),
    "textworld": ("envs",),
    "minigrid": ("envs",),
    "gymnasium": ("envs",),
    "vllm": ("llm.engines",),
    "peft": ("llm.models",),
    "transformers": ("llm", "play.text_encoder", "runtime.quiet"),
    "lzero": ("world_model",),
    "ding": ("world_model",),
    "tensorboardX": ("runs",),
    "tensorboard": ("runs",),
    "wandb": ("runs.loggers",),
    "ray": ("cluster",),
    "orz": ("cluster",),
    "pydantic": ("settings", "config"),
    "huggingface_hub": ("llm",),
}

# runs/ gets state dicts and plain records, never a model.
RECORDS_OF_THE_WORLD_MODEL = {"priorzero.world_model.records", "priorzero.world_model.segment"}
MODEL_ROOMS = {"policy", "llm", "world_model"}

MAX_LINES = 60
TABLES = {"unizero_config"}  # functions that are a table


def module_name(path: Path) -> str:
    """``envs.worker`` for ``priorzero/envs/worker.py``, ``envs`` for ``priorzero/envs/__init__.py``."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path) for path in FILES}


def imports(tree: ast.AST, *, module_level_only: bool = False) -> set[str]:
    """Full names of the imported modules."""
    found: set[str] = set()
    for node in module_level(tree) if module_level_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, "imports are absolute"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            modules = {name for name in names if name.removeprefix("priorzero.") in MODULES}
            found |= modules or {node.module}
    return found


def module_level(tree: ast.AST) -> Iterator[ast.AST]:
    """The nodes that run when the module is imported; ``if TYPE_CHECKING`` does not."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        yield node
        yield from module_level(node)


def violations(name: str, source: str) -> list[str]:
    """What is wrong with the imports of the module ``name``."""
    room, wrong = name.split(".")[0], []
    for imported in sorted(imports(ast.parse(source))):
        top, _, rest = imported.partition(".")
        target = rest.split(".")[0]
        if top == "priorzero" and rest:
            if target != room and FLOOR[target] >= FLOOR[room]:
                wrong.append(f"{name} (floor {FLOOR[room]}) imports {imported} (floor {FLOOR[target]})")
            if room == "runs" and target in MODEL_ROOMS and imported not in RECORDS_OF_THE_WORLD_MODEL:
                wrong.append(f"{name} imports {imported}, but runs/ knows no model")
        elif top in DOORS and not any(name == door or name.startswith(f"{door}.") for door in DOORS[top]):
            wrong.append(f"{name} imports {top}, which only {', '.join(DOORS[top])} may import")
    return wrong


def cycle(graph: Mapping[str, set[str]]) -> list[str]:
    """The modules that are in an import cycle or lead to one."""
    remaining = {name: set(targets) for name, targets in graph.items()}
    while leaves := [name for name, targets in remaining.items() if not targets & remaining.keys()]:
        for name in leaves:
            del remaining[name]
    return sorted(remaining)


def long_functions(source: str) -> list[str]:
    """Functions of more than :data:`MAX_LINES` lines."""
    return [
        f"{node.name} has {lines} lines"
        for node in ast.walk(ast.parse(source))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        and (lines := node.end_lineno - node.lineno + 1) > MAX_LINES
        and node.name not in TABLES
    ]


def untyped_settings(source: str) -> list[str]:
    """Parameters and attributes called ``settings`` or ``cfg`` that are annotated ``Any``."""
    found = []
    for node in ast.walk(ast.parse(source)):
        name = node.arg if isinstance(node, ast.arg) else getattr(getattr(node, "target", None), "id", "")
        annotation = getattr(node, "annotation", None)
        if name in ("settings", "cfg") and annotation is not None and ast.unparse(annotation) == "Any":
            found.append(f"line {node.lineno}: {name}: Any")
    return found


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_imports_go_down_the_floors_and_through_the_doors(path):
    name = module_name(path)
    if name == "":  # priorzero/__init__.py
        tree = ast.parse(path.read_text())
        assert imports(tree, module_level_only=True) == set()
        assert imports(tree) == {"priorzero.envs.registry"}  # when register_game is used
        return
    assert name.split(".")[0] in FLOOR, f"{name} has no floor; give it one in this test"
    assert violations(name, path.read_text()) == []


def test_floors_have_no_empty_room():
    assert FLOOR.keys() == {name.split(".")[0] for name in MODULES} - {""}


def test_architecture_page_lists_all_modules():
    page = (PACKAGE.parent / "docs" / "architecture.md").read_text()
    listed = set(re.findall(r"`(\w+(?:\.py|/))`", page))
    modules = {f"{name.removeprefix('envs.')}.py" for name in MODULES if name.startswith("envs.")}
    rooms = {f"{room}/" if (PACKAGE / room).is_dir() else f"{room}.py" for room in FLOOR}
    assert (modules | rooms) - listed == set()


def test_imports_have_no_cycle():
    graph = {
        name: {
            imported.removeprefix("priorzero.")
            for imported in imports(ast.parse(path.read_text()), module_level_only=True)
        }
        for path in FILES
        if (name := module_name(path))
    }
    assert cycle(graph) == []


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_functions_are_short_and_settings_are_typed(path):
    source = path.read_text()
    assert long_functions(source) == [] and untyped_settings(source) == []


def test_structure_checks_can_fail():
    assert violations("llm.priors", "from priorzero.policy import PriorZeroPolicy")
    assert violations("train", "import jericho")
    assert violations("runs.saver", "from priorzero.world_model.unizero import UniZeroLearner")
    assert cycle({"a": {"b", "numpy"}, "b": {"c"}, "c": {"b"}, "d": set()}) == ["a", "b", "c"]
    assert long_functions("def f():" + "\n    x = 1" * MAX_LINES) == ["f has 61 lines"]
    assert untyped_settings("def f(settings: Any): ...") and untyped_settings("class A:\n    settings: Any")


def test_train_fits_its_limit():
    assert len((PACKAGE / "train.py").read_text().splitlines()) <= 250


def test_imports_of_games_configuration_and_command_line_load_no_large_package():
    code = (
        "import sys, priorzero.entry, priorzero.envs; print({'jericho', 'lzero'} & set(sys.modules))\n"
        "import priorzero.envs.jericho_game; print({'torch', 'spacy', 'transformers', 'textworld'} & set(sys.modules))"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout == "set()\nset()\n"
