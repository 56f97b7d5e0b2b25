"""The rooms of the package are layers: a module imports from its own room and the rooms below it, never from above."""

import ast
import graphlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

PACKAGE = Path(__file__).parent.parent / "trainer"

# From the bottom up: modules, or packages that stand for all their modules.
ROOMS = (
    "trainer.version",
    "trainer.errors",
    "trainer.exit_status",
    "trainer.config.settings",
    "trainer.config.refusals",
    "trainer.config.schedule",
    "trainer.config.overrides",
    "trainer.config.file",
    "trainer.config",
    "trainer.system",
    "trainer.hardware",
    "trainer.execution",
    "trainer.storybook",
    "trainer.text",
    "trainer.tokenizers",
    "trainer.data",
    "trainer.model",
    "trainer.optimizers",
    "trainer.decoding",
    "trainer.distributed",
    "trainer.scoring",
    "trainer.runs",
    "trainer.exchange",
    "trainer.monitoring",
    "trainer.reports",
    "trainer.training",
    "trainer.planning",
    "trainer.commands",
    "trainer.loaded",
    "trainer",
    "trainer.parser",
    "trainer.completion",
    "trainer.verbs",
    "trainer.cli",
    "trainer.__main__",
)

# Packages that load TensorFlow, or that take as long: modules that have to answer at once import these late.
SLOW = frozenset(
    ["tensorflow", "keras", "keras_nlp", "keras_hub", "tensorflow_text", "tensorflow_datasets", "apache_beam"]
)
# What the command must not load either before it watches for signals.
SLOW_TO_WATCH = SLOW | {"numpy", "pydantic", "rich", "argcomplete"}

# The modules that may import inside a function, and the packages that are too slow for their top.
LATE = {
    "trainer": SLOW_TO_WATCH,
    "trainer.cli": SLOW_TO_WATCH,
    "trainer.completion": frozenset(["argcomplete"]),
    "trainer.verbs": SLOW,
    "trainer.system.progress": SLOW_TO_WATCH,
    "trainer.system.terminal": SLOW_TO_WATCH,
    "trainer.system.storage": SLOW,
    "trainer.data.beam": SLOW,
    "trainer.text.datasets": SLOW,
    # It takes a second, and most texts are in files that do not need it.
    "trainer.text.arrow": frozenset(["pyarrow"]),
    "trainer.text.tables": frozenset(["pyarrow"]),
    "trainer.tokenizers.tokenizer_files": SLOW,
    "trainer.tokenizers.vocabulary": SLOW,
    "trainer.model.build": SLOW,
    "trainer.distributed.workers": SLOW,
    "trainer.runs.run_folder": SLOW,
    # It changes how `input` reads, and can write to the terminal: only for the prompt loop.
    "trainer.commands.generate": frozenset(["readline"]),
    "trainer.commands.doctor": SLOW,
    "trainer.exchange.open": SLOW,
    "trainer.exchange.export": SLOW,
    "trainer.exchange.starting_weights": SLOW,
    # A program for another environment: JAX reads the environment variables that the top of this module sets.
    "trainer.planning.compile_hlo": frozenset(["jax", "jaxlib", "jax_plugins"]),
}


class Import(NamedTuple):
    """One import of a module by another.

    Attributes:
        importer: the name of the module that imports.
        imported: the name of the module or of the other package's module.
        place: the file and line of the statement.
        is_late: whether the statement is inside a function.
        is_for_types: whether the statement is under `if TYPE_CHECKING:`.
    """

    importer: str
    imported: str
    place: str
    is_late: bool
    is_for_types: bool

    def __str__(self) -> str:
        return f"{self.importer} -> {self.imported}"


def imports_in(package: Path) -> list[Import]:
    """Returns all imports of all modules of a package."""
    files = {
        ".".join(file.relative_to(package.parent).with_suffix("").parts).removesuffix(".__init__"): file
        for file in sorted(package.rglob("*.py"))
    }
    return [
        each
        for name, file in files.items()
        for each in _imports_under(ast.parse(file.read_text(encoding="utf-8")), name, str(file), frozenset(files))
    ]


def _imports_under(
    node: ast.AST, name: str, file: str, modules: frozenset[str], is_late: bool = False, is_for_types: bool = False
) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        imported: list[str] = []
        if isinstance(child, ast.Import):
            imported = [alias.name for alias in child.names]
        elif isinstance(child, ast.ImportFrom):
            assert not child.level and child.module, f"{file}:{child.lineno}: write the whole name of the module"
            # `from trainer.data import shards` imports trainer.data.shards.
            full = {f"{child.module}.{alias.name}" for alias in child.names}
            imported = sorted({each if each in modules else child.module for each in full})
        for each in imported:
            yield Import(name, each, f"{file}:{getattr(child, 'lineno', 0)}", is_late, is_for_types)
        is_function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        is_check = isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING")
        yield from _imports_under(child, name, file, modules, is_late or is_function, is_for_types or is_check)


def room_of(module: str, rooms: tuple[str, ...]) -> str:
    """Returns the room of a module: the longest name among the rooms that begins the module's."""
    fitting = [room for room in rooms if f"{module}.".startswith(f"{room}.")]
    # The name of a package stands for its modules, except the top package: each module there is a room by itself.
    fitting = [room for room in fitting if "." in room or module == room]
    assert fitting, f"{module} has no room; move it into one, or add it to ROOMS where it belongs"
    return max(fitting, key=len)


def arrows_up(imports: list[Import], rooms: tuple[str, ...]) -> Iterator[tuple[Import, str]]:
    """Yields the imports from a room above, each with a message."""
    package = rooms[0].partition(".")[0]
    for each in imports:
        if each.imported.partition(".")[0] != package:
            continue
        own, other = room_of(each.importer, rooms), room_of(each.imported, rooms)
        if rooms.index(other) > rooms.index(own):
            yield each, f"{each.place}: {each}: the room {other} is above {own}; import downwards only"


def cycle(imports: list[Import]) -> list[str]:
    """Returns the modules of a cycle, or nothing."""
    imported_by: dict[str, set[str]] = {}
    for each in imports:
        imported_by.setdefault(each.importer, set()).add(each.imported)
    try:
        graphlib.TopologicalSorter(imported_by).prepare()
    except graphlib.CycleError as error:
        return list(error.args[1])
    return []


def loads(module: str, packages: frozenset[str], imports: list[Import]) -> bool:
    """Whether importing a module loads one of these packages, by the imports at the top of the modules on the way."""
    reached, to_visit = {module}, [module]
    while to_visit:
        here = to_visit.pop()
        if here.partition(".")[0] in packages:
            return True
        for each in imports:
            is_at_top = each.importer == here and not each.is_late and not each.is_for_types
            if is_at_top and each.imported not in reached:
                reached.add(each.imported)
                to_visit.append(each.imported)
    return False


def late_imports(imports: list[Import], late: dict[str, frozenset[str]]) -> Iterator[tuple[Import, str]]:
    """Yields the imports inside functions that have no reason to be there, each with a message."""
    for each in imports:
        if not each.is_late:
            continue
        if each.importer not in late:
            yield each, f"{each.place}: {each}: inside a function; import it at the top of the module"
        elif not loads(each.imported, late[each.importer], imports):
            yield each, f"{each.place}: {each}: inside a function, but loads nothing slow; import it at the top"


def test_imports_point_downwards_without_a_cycle_and_are_late_only_for_slow_packages():
    imports = imports_in(PACKAGE)
    assert not [message for _, message in (*arrows_up(imports, ROOMS), *late_imports(imports, LATE))]
    assert not (found := cycle(imports)), f"a cycle: {' -> '.join(found)}"


def test_every_module_that_may_import_late_does():
    users = {each.importer for each in imports_in(PACKAGE) if each.is_late}
    assert set(LATE) <= users, f"delete from LATE: {sorted(set(LATE) - users)}"


def test_the_command_loads_only_the_standard_library_before_it_watches_for_signals():
    imports = imports_in(PACKAGE)
    third_party = frozenset(each.imported.partition(".")[0] for each in imports) - sys.stdlib_module_names - {"trainer"}
    assert {"tensorflow", "pydantic", "numpy"} <= third_party
    for module in ("trainer", "trainer.cli"):
        assert not loads(module, third_party, imports)
    assert loads("trainer.config.settings", third_party, imports)


HOUSE = {
    "cellar/pipes.py": "import slow\n",
    "cellar/lamp.py": "import os\n",
    "kitchen/stove.py": "from house.cellar.pipes import water\nfrom house.cellar import lamp\n",
    "door.py": "def open():\n    import house.kitchen.stove\n",
}
HOUSE_ROOMS = ("house.cellar", "house.kitchen", "house.door")


def faults_of_house(root: Path, **changed: str) -> list[str]:
    """Returns what is wrong with the imports of a small package, after changes to some of its files."""
    contents = HOUSE | {f"{name.replace('__', '/')}.py": content for name, content in changed.items()}
    for name, content in contents.items():
        file = root / "house" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content)
    imports = imports_in(root / "house")
    late = {"house.door": frozenset({"slow"})}
    found = cycle(imports)
    faults = [message for _, message in (*arrows_up(imports, HOUSE_ROOMS), *late_imports(imports, late))]
    return [message.removeprefix(f"{root}/") for message in faults] + ([" -> ".join(found)] if found else [])


def test_a_reversed_arrow_is_found_wherever_it_stands(tmp_path: Path):
    assert faults_of_house(tmp_path) == []
    up = "house.cellar.lamp -> house.kitchen.stove: the room house.kitchen is above house.cellar; import downwards only"
    around = "house.kitchen.stove -> house.cellar.lamp -> house.kitchen.stove"
    for statement in (
        "import house.kitchen.stove",
        "from house.kitchen import stove",
        "from house.kitchen.stove import x",
    ):
        found, circle = faults_of_house(tmp_path, cellar__lamp=f"import os\n{statement}\n")
        assert found == f"house/cellar/lamp.py:2: {up}"
        assert set(circle.split(" -> ")) == set(around.split(" -> "))
    for_types = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import house.kitchen.stove\n"
    assert faults_of_house(tmp_path, cellar__lamp=for_types)[0] == f"house/cellar/lamp.py:3: {up}"
    inside = "def light():\n    import house.kitchen.stove\n"
    assert f"house/cellar/lamp.py:2: {up}" in faults_of_house(tmp_path, cellar__lamp=inside)


def test_a_cycle_within_a_room_is_found(tmp_path: Path):
    (found,) = faults_of_house(
        tmp_path, cellar__pipes="import slow\nimport house.cellar.lamp\n", cellar__lamp="import house.cellar.pipes\n"
    )
    assert set(found.split(" -> ")) == {"house.cellar.pipes", "house.cellar.lamp"}


def test_a_late_import_is_found_unless_the_module_may_and_what_it_loads_is_slow(tmp_path: Path):
    late = "from house.cellar.pipes import water\ndef light():\n    import house.cellar.lamp\n"
    assert faults_of_house(tmp_path, kitchen__stove=late) == [
        "house/kitchen/stove.py:3: house.kitchen.stove -> house.cellar.lamp: inside a function; import it at the top "
        "of the module"
    ]
    unneeded = "house.door -> {}: inside a function, but loads nothing slow; import it at the top"
    for each in ("house.cellar.lamp", "os"):
        found = faults_of_house(tmp_path, door=f"def open():\n    import {each}\n")
        assert found == [f"house/door.py:2: {unneeded.format(each)}"]
    # The stove loads something slow by way of the pipes, unless it imports them for types only, or late itself.
    for_types = "import typing\nif typing.TYPE_CHECKING:\n    from house.cellar.pipes import water\n"
    found = faults_of_house(tmp_path, kitchen__stove=for_types)
    assert found == [f"house/door.py:2: {unneeded.format('house.kitchen.stove')}"]
    within = "def cook():\n    import house.cellar.pipes\n"
    assert f"house/door.py:2: {unneeded.format('house.kitchen.stove')}" in faults_of_house(
        tmp_path, kitchen__stove=within
    )


def test_a_module_without_a_room_is_named(tmp_path: Path):
    with pytest.raises(AssertionError, match=r"house\.attic has no room; move it into one, or add it to ROOMS"):
        faults_of_house(tmp_path, attic="import house.door\n")
