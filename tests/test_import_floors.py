"""The floors of the house: a file imports lower floors, or earlier files of its own folder. Read with `ast`."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("miniinfer_jax", "sharding")
# From the ground up. A module stands on the first floor that names it or the nearest package above it.
FLOORS: list[set[str]] = [
    {"sharding", "miniinfer_jax.pallas_kernels", "miniinfer_jax.config", "miniinfer_jax.sampling_params"},
    {"miniinfer_jax.outputs", "miniinfer_jax.sequence"},
    {"miniinfer_jax.params", "miniinfer_jax.batch", "miniinfer_jax.kv_cache"},
    {"miniinfer_jax.ops"},
    {"miniinfer_jax.models", "miniinfer_jax.sampling"},
    {"miniinfer_jax.weights", "miniinfer_jax.tokenizer"},
    {"miniinfer_jax.engine"},
    {"miniinfer_jax.prompts", "miniinfer_jax.llm"},
    {"miniinfer_jax.benchmark", "miniinfer_jax.batch_lines", "miniinfer_jax.batch_file", "miniinfer_jax.replay"},
    {"miniinfer_jax.cli"},
]
STANDARD_LIBRARY_ONLY = (
    "miniinfer_jax.config",
    "miniinfer_jax.sampling_params",
    "miniinfer_jax.outputs",
    "miniinfer_jax.sequence",
)
DECIDERS = (
    *("page_allocator", "host_pages", "prefix_cache", "inheritance", "sequence_pages"),
    *("policies", "waiting_queue", "step_budget", "lifecycle", "scheduler"),
)


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))}
# The door of the package imports lazily, by name: it stands outside the floors.
CHECKED = [name for name in MODULES if name != "miniinfer_jax"]


def imports_of(name: str, module_level_only: bool = False) -> set[str]:
    """Every module that `name` imports, also inside functions, unless only those at import time are wanted."""
    tree = ast.parse(MODULES[name].read_text())
    typing_only = {
        child
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
        for child in ast.walk(node)
    }
    nodes = tree.body if module_level_only else list(ast.walk(tree))
    found: set[str] = set()
    for node in nodes:
        if node in typing_only:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} has a relative import; write the whole name"
            found.add(node.module or "")
            found |= {f"{node.module}.{alias.name}" for alias in node.names if f"{node.module}.{alias.name}" in MODULES}
    return found


def floor_of(name: str) -> int:
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        prefix = ".".join(parts[:length])
        for number, names in enumerate(FLOORS):
            if prefix in names:
                return number
    raise AssertionError(f"{name} stands on no floor: add it to FLOORS and to the README's map")


@pytest.mark.parametrize("name", CHECKED)
def test_imports_only_lower_floors(name):
    own = floor_of(name)
    for imported in imports_of(name):
        if imported.split(".")[0] not in PACKAGES or imported == "miniinfer_jax":
            continue
        other = floor_of(imported)
        assert other <= own, f"{name} (floor {own}) imports {imported} (floor {other})"


@pytest.mark.parametrize("name", CHECKED)
def test_no_module_imports_in_a_circle(name):
    seen, todo = set(), [name]
    while todo:
        for imported in imports_of(todo.pop()) & set(CHECKED):
            assert imported != name or name.endswith(imported), f"{name} imports itself through others"
            if imported not in seen:
                seen.add(imported)
                todo.append(imported)


@pytest.mark.parametrize("name", [n for n in CHECKED if n.startswith(("sharding", "miniinfer_jax.pallas_kernels"))])
def test_ground_floor_imports_only_jax(name):
    tops = {imported.split(".")[0] for imported in imports_of(name)}
    assert "miniinfer_jax" not in tops or name.startswith("miniinfer_jax.pallas_kernels")
    assert not tops & {"flax", "numpy", "torch", "transformers"}


def test_host_types_import_only_the_standard_library():
    import sys

    for name in STANDARD_LIBRARY_ONLY:
        for imported in imports_of(name):
            top = imported.split(".")[0]
            assert top in sys.stdlib_module_names or imported in (*STANDARD_LIBRARY_ONLY, "miniinfer_jax"), (
                f"{name} imports {imported}"
            )


def reached_from(name: str) -> set[str]:
    """All modules that importing `name` loads, through the project's own ones; parent packages included."""
    seen: set[str] = set()
    todo = [name]
    while todo:
        current = todo.pop()
        if current in seen:
            continue
        seen.add(current)
        if current in MODULES:
            parents = {current.rsplit(".", length)[0] for length in range(1, current.count(".") + 1)}
            todo += [*imports_of(current, module_level_only=True), *parents]
    return seen


def test_the_files_that_decide_never_load_jax():
    deciders = [f"miniinfer_jax.engine.{name}" for name in DECIDERS if f"miniinfer_jax.engine.{name}" in MODULES]
    assert deciders
    for name in deciders:
        tops = {imported.split(".")[0] for imported in reached_from(name)}
        assert not tops & {"jax", "jaxlib", "numpy", "flax", "torch"}, f"{name} loads {tops}"


def test_only_the_engine_compiles():
    for name in CHECKED:
        # params compiles initializers, before there is an engine; the decoder's inner jit only shares traces.
        exceptions = ("miniinfer_jax.params", "miniinfer_jax.models.decoder", "miniinfer_jax.benchmark")
        allowed = name.startswith(("miniinfer_jax.engine", *exceptions))
        calls = [
            ast.unparse(node.func)
            for node in ast.walk(ast.parse(MODULES[name].read_text()))
            if isinstance(node, ast.Call)
        ]
        assert allowed or not {"jax.jit", "jit"} & set(calls), f"{name} calls jax.jit"


def test_models_never_see_a_sequence():
    for name in CHECKED:
        if name.startswith(("miniinfer_jax.models", "miniinfer_jax.ops", "miniinfer_jax.sampling.")):
            assert not any(imported.startswith("miniinfer_jax.engine") for imported in imports_of(name))
            assert "miniinfer_jax.sequence" not in imports_of(name)


def test_nothing_imports_torch():
    for name in MODULES:
        assert not any(imported.split(".")[0] == "torch" for imported in imports_of(name)), name
