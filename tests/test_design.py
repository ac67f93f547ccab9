"""DESIGN.md: who may import whom, late imports included, and that the names in it exist."""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator
from graphlib import TopologicalSorter

import pytest

from tests.helpers.base import HERE

FILES = {
    ".".join(path.relative_to(HERE).with_suffix("").parts): path
    for path in (*HERE.glob("*.py"), *HERE.glob("*/*.py"), *HERE.glob("tests/*/*.py"))
}


TEXT = (HERE / "DESIGN.md").read_text()


ROOMS = {"crawl", "api", "logs", "market"}


PROGRAMS = {
    "crawl_threads": "crawl",
    "crawl_async": "crawl",
    "aggregate_app": "api",
    "ingest_logs": "logs",
    "market_pipeline": "market",
}
"""The room of each."""


BELOW = {  # what a room, or a file at the top, may import besides itself
    "coordination": set[str](),
    "charsets": set[str](),
    "html_parse": {"charsets"},
    "sandbox": set[str](),
    "primitives": {"coordination"},
    "runtime": {"primitives", "coordination"},
    **{room: {"runtime", "primitives", "coordination", "html_parse", "charsets"} for room in ROOMS},
    **{name: {room, "runtime", "primitives", "coordination", "sandbox"} for name, room in PROGRAMS.items()},
}


BESIDE = {"simulator", "bench", "tests", "test_all", "conftest"}
"""These may import all of the above, which import none of them."""


LEAVES = (
    *("coordination", "charsets", "logs.parse", "market.trade", "api.report"),
    *("runtime.monitor", "runtime.options", "runtime.stderr"),
)
"""These import nothing of the project, their own room included."""


DEMO = {("crawl.cli", "sandbox"), ("logs.demo", "sandbox"), ("market.demo", "sandbox")}
"""What is allowed all the same. (Both crawlers have the same command line, and so the same demo.)"""


@functools.cache
def tree(name: str) -> ast.Module:
    return ast.parse(FILES[name].read_text())


def statements(node: ast.AST, *, that_run: bool = False) -> Iterator[ast.AST]:
    """A file's statements, nested ones too; with ``that_run``, but for those below ``if TYPE_CHECKING:``."""
    for name in ("body", "handlers", "orelse", "finalbody", "cases"):
        if name == "body" and that_run and isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        below = getattr(node, name, ())
        for each in below if isinstance(below, list) else ():
            yield each
            yield from statements(each, that_run=that_run)


@functools.cache
def imports(name: str, that_run: bool = False) -> set[str]:
    """The files of the project that a file imports; no room by itself."""
    found = set[str]()
    for node in statements(tree(name), that_run=that_run):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, name
            found |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found & FILES.keys()


def test_imports_have_no_cycle() -> None:
    TopologicalSorter({name: imports(name, that_run=True) for name in FILES}).prepare()  # raises CycleError


def test_imports_go_down_only() -> None:
    rooms = {name: name.partition(".")[0] for name in FILES}
    assert set(rooms.values()) == BELOW.keys() | BESIDE
    wrong = [
        (name, imported)
        for name, room in rooms.items()
        if room not in BESIDE
        for imported in {rooms[each] for each in imports(name)} - {room} - BELOW[room]
        if (name, imported) not in DEMO
    ]
    assert wrong == []
    assert [name for name in LEAVES if imports(name)] == []


def test_each_room_says_what_enters_and_what_never_happens() -> None:
    for path in [*HERE.glob("*/__init__.py"), *HERE.glob("tests/*/__init__.py")]:
        first, *rest = ast.parse(path.read_text()).body
        assert isinstance(first, ast.Expr) and 5 <= len(str(ast.literal_eval(first.value)).splitlines()) <= 12, path
        assert not rest or path.parent.name == "tests", path  # which has to stand in for absent packages first


@pytest.fixture(scope="module", autouse=True)
def trees() -> Iterator[None]:
    """They are a million objects, which each collection in a later test would look at."""
    yield
    tree.cache_clear()


def knows(name: str, path: str) -> bool:
    """Whether a file has a name: a class, a function, a constant, or what a class has or sets."""
    first, *rest = path.split(".")
    source = FILES[name].read_text()
    for node in tree(name).body:
        if isinstance(node, ast.ClassDef) and node.name == first and rest:
            inside = ast.get_source_segment(source, node) or ""
            (member,) = rest
            return re.search(rf"\bdef {member}\(|\bself\.{member}\b", inside) is not None
    return not rest and re.search(rf"^(class|def|async def) {first}\b|^{first}\b.*=", source, re.M) is not None


def test_names_exist() -> None:
    written = " ".join(re.findall(r"`([^`]+)`", TEXT))
    names = set(re.findall(rf"\b({'|'.join(map(re.escape, FILES))})\.([\w.]*\w)", written))
    names = {(name, path) for name, path in names if path not in ("py", "toml")}
    assert len(names) > 100
    assert [f"{name}.{path}" for name, path in sorted(names) if not knows(name, path)] == []


def test_tests_exist() -> None:
    names = set(re.findall(r"`(test_(?!all\b)\w+|[A-Z]+_[A-Z_]+)`", TEXT))
    text = "\n".join(path.read_text() for path in (HERE / "tests").rglob("*.py"))
    assert len(names) > 25
    assert [name for name in sorted(names) if not re.search(rf"^(def |async def |){name}\b", text, re.M)] == []
