"""The layout: imports point one way, the package imports fast, and `envs` has one import name."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "purejaxppo"

# Every module and every folder of the library, the lowest first. Each imports only from those above
# it in this list; the modules of a folder also import one another, without a circle. The core ends
# with `train` and runs on any device without a disk. From `analysis` on, the code runs on the host.
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
        "setup",
        "optimizer",
        "rollout",
        "updates",
        "train",
        "population",
    ),
    *("analysis", "policies", "runs", "sweeps", "rlhf", "cli", "__main__"),
)

# Modules and folders that may import even less.
ONLY = {
    "envs": {"types"},
    "trees": {"types"},
    "keys": {"types", "validation"},
    "advantages": {"types"},
    "losses": {"types"},
    "analysis": {"types", "config", "metrics"},
    "policies": {*ORDER[: ORDER.index("train")]},
    "rollout": {"types", "envs", "keys", "networks", "normalize", "shards"},
    "updates": {"types", "config", "keys", "losses", "shards"},
    "__main__": {"cli"},
}


def modules():
    """The path of every module by its name without `purejaxppo.`; a folder's is its `__init__`."""
    paths = [
        path for path in PACKAGE.rglob("*.py") if "envs" not in path.relative_to(PACKAGE).parts
    ]
    by_relative_path = {path.relative_to(PACKAGE): path for path in paths}
    by_relative_path |= {path.relative_to(ROOT): path for path in (ROOT / "envs").rglob("*.py")}
    by_name = {
        ".".join(name.with_suffix("").parts).removesuffix(".__init__"): path
        for name, path in by_relative_path.items()
    }
    assert by_name.pop("__init__") == PACKAGE / "__init__.py"
    return by_name


MODULES = modules() if PACKAGE.exists() else {}


def imported_modules(path):
    """The library's modules that a file imports anywhere, including imports for types only."""
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
    remaining = dict(imports)
    while remaining:
        free = [module for module, names in remaining.items() if not names & remaining.keys()]
        assert free, f"a circle among {sorted(remaining)}"
        for module in free:
            del remaining[module]


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


def test_importing_the_package_takes_at_most_half_a_second_and_no_plotting():
    code = """
import sys, time
import jax
start = time.perf_counter()
import purejaxppo
seconds = time.perf_counter() - start
print(seconds, *sorted({"gymnax", "matplotlib", "pandas", "flax"} & set(sys.modules)))
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
def test_importing_envs_at_the_top_level_fails_and_names_purejaxppo_envs():
    code, _, error = run("import envs", cwd=ROOT)
    assert code == 1
    assert (
        error.splitlines()[-1].startswith("ImportError")
        and "purejaxppo.envs" in error.splitlines()[-1]
    )


@pytest.mark.checkout
def test_classes_of_the_library_inherit_only_from_kinds_that_hold_data():
    """An algorithm is a function."""
    kinds = {"NamedTuple", "Protocol", "Module", "ValueError"}
    for path in [PACKAGE / "__init__.py", *MODULES.values()]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                bases = {
                    base.attr if isinstance(base, ast.Attribute) else base.id for base in node.bases
                }
                assert bases <= kinds, f"{path.name}: {node.name}"
