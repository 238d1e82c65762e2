"""The layout: imports point one way, the package is light to import, and `envs` has one import name only."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "purejaxppo"
HOST = {"policy", "evaluation", "fitting", "plots", "__main__"}  # the layer for people; no core module needs it

# What each module of the core may import from the library; all may import types.
ALLOWED = {
    "types": set(),
    "checks": set(),
    "config": {"checks"},
    "distributions": set(),
    "advantages": set(),
    "losses": set(),
    "keys": set(),
    "networks": {"distributions", "config", "keys"},
    "shards": set(),
    "normalize": {"shards"},
    "rollout": {"keys", "normalize", "shards", "envs"},
    "metrics": {"losses"},
    "iterations": {"config"},
    "starting": {"config", "normalize", "trees"},
    "trees": set(),
    "updates": {"losses", "distributions", "config", "keys", "shards", "updates"},
    "train": {
        "config",
        "distributions",
        "keys",
        "networks",
        "normalize",
        "rollout",
        "advantages",
        "losses",
        "updates",
        "metrics",
        "iterations",
        "starting",
        "envs",
    },
    "envs": {"envs"},
}


def imported_modules(path):
    """The top-level parts of purejaxppo that a file imports, wherever in it the import stands."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            if node.module == "purejaxppo":
                names |= {alias.name for alias in node.names}
            elif (node.module or "").startswith("purejaxppo."):
                names.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            names |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("purejaxppo.")}
    return names


@pytest.mark.checkout
@pytest.mark.parametrize("module", ALLOWED)
def test_imports_point_up_the_table_only(module):
    folder = ROOT / "envs" if module == "envs" else PACKAGE / module
    files = sorted(folder.glob("*.py")) if folder.is_dir() else [PACKAGE / f"{module}.py"]
    assert files
    for path in files:
        extra = imported_modules(path) - ALLOWED[module] - {"types"}
        assert not extra, f"{path.relative_to(ROOT)} imports {', '.join(sorted(extra))}"
        assert not imported_modules(path) & HOST


@pytest.mark.checkout
def test_every_module_has_its_place_in_the_table_or_in_the_host_layer():
    modules = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__"}
    core = modules & set(ALLOWED)
    assert core == {name for name in ALLOWED if (PACKAGE / f"{name}.py").exists()} and len(core) == 16
    host = modules - core
    assert host >= HOST
    for path in (PACKAGE / f"{name}.py" for name in core):
        assert not imported_modules(path) & host


def run(code, cwd=None):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=cwd, check=False)
    return done.returncode, done.stdout.strip(), done.stderr.strip()


def test_importing_the_package_takes_half_a_second_at_most_and_no_plotting():
    code = """
import sys, time
import jax
start = time.perf_counter()
import purejaxppo
print(time.perf_counter() - start, *sorted({"gymnax", "matplotlib", "pandas", "flax"} & set(sys.modules)))
"""
    results = [run(code)[1].split() for _ in range(3)]
    assert min(float(seconds) for seconds, *_ in results) < 0.5
    assert not results[0][1:]


def test_importing_the_core_does_not_import_gymnax_or_matplotlib():
    code = """
import sys
from purejaxppo import Config, make_train, envs
print(sorted({"gymnax", "matplotlib", "pandas", "seaborn"} & set(sys.modules)))
"""
    assert run(code)[1] == "[]"


@pytest.mark.checkout
def test_envs_as_a_top_level_name_says_its_right_name():
    code, _, error = run("import envs", cwd=ROOT)
    assert code == 1
    assert error.splitlines()[-1].startswith("ImportError") and "purejaxppo.envs" in error.splitlines()[-1]


@pytest.mark.checkout
def test_no_class_in_the_library_inherits_but_from_the_kinds_that_hold_data():
    """An algorithm is a function."""
    kinds = {"NamedTuple", "Protocol", "Module", "ValueError"}
    for path in [*PACKAGE.glob("*.py"), *(PACKAGE / "updates").glob("*.py"), *(ROOT / "envs").glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                bases = {base.attr if isinstance(base, ast.Attribute) else base.id for base in node.bases}
                assert bases <= kinds, f"{path.name}: {node.name}"
