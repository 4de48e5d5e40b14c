"""The import floors: a module imports from lower floors only, and each third-party system is behind one door."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "priorzero"

FLOORS = [
    {"types"},
    {"timeline", "config", "priors", "losses", "completions", "metrics", "vocabulary", "tree"},
    {"envs", "models", "lightzero", "prompts", "concurrency", "records", "process_group"},
    {"engines", "text_encoder", "segment"},
    {"llm_learner", "buffer", "search", "exploration"},
    {"policy", "ppo"},
    {"player", "demo"},
    {"collector", "evaluator", "checkpoint"},
    {"saving", "teller"},
    {"train"},
    {"cluster", "entry"},
    {"ray_entry"},
]
FLOOR = {module: number for number, modules in enumerate(FLOORS) for module in modules}
DOORS = {
    "jericho": {"envs"},
    "textworld": {"envs"},
    "lzero": {"lightzero", "segment", "buffer", "search", "policy"},
    "ding": {"policy"},
    "transformers": {"models", "engines", "text_encoder"},
    "peft": {"models"},
    "vllm": {"engines"},
    "tensorboardX": {"metrics"},
    "ray": {"cluster"},
    "orz": {"cluster"},
}


def unit(path: Path) -> str:
    """``priorzero/envs/worker.py`` belongs to ``envs``, ``priorzero/types.py`` is ``types``."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(source: str) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute here"
            found.add(node.module or "")
            if node.module == "priorzero":
                found |= {f"priorzero.{alias.name}" for alias in node.names}
    return found


def violations(name: str, source: str) -> list[str]:
    wrong = []
    for imported in imports(source):
        top, _, rest = imported.partition(".")
        if top == "priorzero" and rest:
            target = rest.split(".")[0]
            if target != name and target in FLOOR and FLOOR[target] >= FLOOR[name]:
                wrong.append(f"{name} (floor {FLOOR[name]}) imports {target} (floor {FLOOR[target]})")
        elif top in DOORS and name not in DOORS[top]:
            wrong.append(f"{name} imports {top}, which belongs in {sorted(DOORS[top])}")
    return wrong


FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_no_arrow_goes_up(path):
    name = unit(path)
    if name == "__init__":
        assert imports(path.read_text()) == set()
        return
    assert name in FLOOR, f"{name} has no floor; give it one in this test"
    assert violations(name, path.read_text()) == []


def test_the_check_can_fail():
    assert violations("priors", "from priorzero.policy import PriorZeroPolicy")
    assert violations("segment", "from priorzero import text_encoder")
    assert violations("train", "import jericho")
    assert violations("types", "import priorzero.config")
    assert not violations("train", "from priorzero.policy import PriorZeroPolicy")


def test_worker_processes_and_configuration_need_no_torch():
    code = "import sys, priorzero.envs, priorzero.config, priorzero.entry; print('torch' in sys.modules)"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "False"
