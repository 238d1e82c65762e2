"""The layout: imports point one way, the package is light to import, and `envs` has one import name only."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "purejaxppo"

# Every module and every folder of the library, the lowest first: each imports from those above it only, and the modules
# of a folder from one another without a circle. `train` and what stands above it is the core, which runs on any device
# without a disk; from `analysis` on is the host.
ORDER = (
    *(
        "version",
        "types",
        "envs",
        "validation",
        "purejaxrl_config",
        "config",
        "keys",
        "trees",
        "advantages",
        "losses",
        "shards",
    ),
    *(
        "normalize",
        "metrics",
        "iterations",
        "networks",
        "starting",
        "rollout",
        "updates",
        "train",
        "population",
    ),
    *("analysis", "policies", "runs", "sweeps", "cli", "__main__"),
)

# Those that may import even less.
ONLY = {
    "envs": {"types"},
    "trees": {"types"},
    "keys": {"types", "validation"},
    "advantages": {"types"},
    "losses": {"types"},
    "analysis": {"types", "config", "metrics"},
    "policies": {*ORDER[: ORDER.index("train")]},
    "rollout": {"types", "envs", "keys", "normalize", "shards"},
    "updates": {"types", "config", "keys", "losses", "shards"},
    "__main__": {"cli"},
}


def modules():
    """Every module of the library by its name without `purejaxppo.`; a folder is named by its `__init__`."""
    paths = [
        path for path in PACKAGE.rglob("*.py") if "envs" not in path.relative_to(PACKAGE).parts
    ]
    named = {path.relative_to(PACKAGE): path for path in paths}
    named |= {path.relative_to(ROOT): path for path in (ROOT / "envs").rglob("*.py")}
    found = {
        ".".join(name.with_suffix("").parts).removesuffix(".__init__"): path
        for name, path in named.items()
    }
    assert found.pop("__init__") == PACKAGE / "__init__.py"
    return found


MODULES = modules() if PACKAGE.exists() else {}


def imported_modules(path):
    """The modules of the library that a file imports, wherever in it the import stands, also for types only."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                names.add(full if full.removeprefix("purejaxppo.") in MODULES else node.module)
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return {
        name.removeprefix("purejaxppo.") for name in names if name.split(".")[0] == "purejaxppo"
    }


def layer(module):
    return module.split(".")[0]


@pytest.mark.checkout
@pytest.mark.parametrize("module", MODULES)
def test_imports_point_one_way(module):
    place = layer(module)
    allowed = ONLY.get(place, {*ORDER[: ORDER.index(place)]}) | {place}
    for name in imported_modules(MODULES[module]):
        assert name in MODULES, f"{module} imports {name}: name the module, not the package"
        assert layer(name) in allowed, f"{module} imports {name}"


@pytest.mark.checkout
def test_no_circle_of_imports():
    imports = {module: imported_modules(path) - {module} for module, path in MODULES.items()}
    left = dict(imports)
    while left:
        free = [module for module, names in left.items() if not names & left.keys()]
        assert free, f"a circle among {sorted(left)}"
        for module in free:
            del left[module]


@pytest.mark.checkout
def test_the_table_has_every_module_and_no_folder_is_small():
    assert {layer(module) for module in MODULES} == set(ORDER) and len(set(ORDER)) == len(ORDER)
    folders = [path.parent for path in MODULES.values() if path.name == "__init__.py"]
    for folder in folders:
        assert len(list(folder.glob("*.py"))) > 3, (
            f"{folder} has fewer than three files besides its __init__"
        )


def run(code, cwd=None):
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=cwd, check=False
    )
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
    assert (
        error.splitlines()[-1].startswith("ImportError")
        and "purejaxppo.envs" in error.splitlines()[-1]
    )


@pytest.mark.checkout
def test_no_class_in_the_library_inherits_but_from_the_kinds_that_hold_data():
    """An algorithm is a function."""
    kinds = {"NamedTuple", "Protocol", "Module", "ValueError"}
    for path in [PACKAGE / "__init__.py", *MODULES.values()]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                bases = {
                    base.attr if isinstance(base, ast.Attribute) else base.id for base in node.bases
                }
                assert bases <= kinds, f"{path.name}: {node.name}"
