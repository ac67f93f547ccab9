"""What DESIGN.md says of the files: who may import whom, and that the names in it exist."""

from __future__ import annotations

import ast
import functools
import re
from graphlib import TopologicalSorter
from pathlib import Path

HERE = Path(__file__).parent
FILES = {path.stem: path for path in HERE.glob("*.py") if not path.stem.startswith("test_")}
DESIGN = (HERE / "DESIGN.md").read_text()
DESIGN_BESIDE = re.compile("sandbox|simulate|bench|crawl_checker$")
DESIGN_FAMILIES = {
    "crawl": re.compile("crawl_|frontier$|robots$|scope$|feed_parse$"),
    "api": re.compile("(aggregate_app|upstreams|telemetry|openapi|report)$"),
    "logs": re.compile("log_|ingest_logs$"),
    "market": re.compile("market_"),
}
DESIGN_PROGRAMS = {
    *("crawl_threads", "crawl_async", "crawl_processes", "aggregate_app", "ingest_logs", "market_pipeline"),
}


@functools.cache
def design_tree(name: str) -> ast.Module:
    return ast.parse(FILES[name].read_text())


def design_imports(name: str) -> set[str]:
    """The files of the project that a file imports at its head."""
    found = {alias.name for node in design_tree(name).body if isinstance(node, ast.Import) for alias in node.names}
    found |= {node.module or "" for node in design_tree(name).body if isinstance(node, ast.ImportFrom)}
    return found & FILES.keys()


def design_beside(name: str) -> bool:
    return DESIGN_BESIDE.match(name) is not None


def test_design_imports_have_no_cycle_and_go_one_way() -> None:
    graph = {name: design_imports(name) for name in FILES}
    TopologicalSorter(graph).prepare()  # raises CycleError
    for leaf in ("coordination", "html_parse", "log_parse", "market_trade", "report", "serving"):
        assert not graph[leaf], leaf
    for name, imported in graph.items():
        if name.startswith("sandbox"):
            assert all(each.startswith("sandbox") for each in imported), name
        elif not design_beside(name):
            assert not any(map(design_beside, imported)), name
            assert not imported & DESIGN_PROGRAMS, name


def test_design_families_do_not_import_each_other() -> None:
    def family(name: str) -> str | None:
        return next((family for family, pattern in DESIGN_FAMILIES.items() if pattern.match(name)), None)

    found = {
        (name, other)
        for name in FILES
        for other in design_imports(name)
        if not design_beside(name) and family(name) and family(other) not in (None, family(name))
    }
    assert found == {("market_kafka", "log_spool"), ("market_kafka", "log_store")}


def test_design_layers_are_those_of_the_imports() -> None:
    rows = re.findall(r"^\| [^|]+ \| (`[^|]+) \|$", DESIGN.partition("\n## Layers")[2].partition("\n## ")[0], re.M)
    layer: dict[str, int] = {}
    for number, row in enumerate(rows):
        for pattern in re.findall(r"`(\w+\*?)`", row):
            for path in HERE.glob(f"{pattern}.py"):
                layer.setdefault(path.stem, number)
    assert FILES.keys() <= layer.keys()
    assert [(name, other) for name in FILES for other in design_imports(name) if layer[other] > layer[name]] == []


def design_knows(name: str, path: str) -> bool:
    """Whether a file has a name: a class, a function, a constant, or what a class has or sets."""
    first, *rest = path.split(".")
    source = FILES[name].read_text()
    for node in design_tree(name).body:
        if isinstance(node, ast.ClassDef) and node.name == first and rest:
            inside = ast.get_source_segment(source, node) or ""
            (member,) = rest
            return re.search(rf"\bdef {member}\(|\bself\.{member}\b", inside) is not None
    return not rest and re.search(rf"^(class|def|async def) {first}\b|^{first}\b.*=", source, re.M) is not None


def test_design_names_exist() -> None:
    written = " ".join(re.findall(r"`([^`]+)`", DESIGN))
    names = set(re.findall(rf"\b({'|'.join(FILES)})\.([\w.]*\w)", written))
    names = {(name, path) for name, path in names if path not in ("py", "toml")}
    assert len(names) > 100
    assert [f"{name}.{path}" for name, path in sorted(names) if not design_knows(name, path)] == []


def test_design_tests_exist() -> None:
    names = set(re.findall(r"`(test_(?!all\b)\w+|[A-Z]+_[A-Z_]+)`", DESIGN))
    text = (HERE / "test_all.py").read_text()
    assert len(names) > 25
    assert [name for name in sorted(names) if not re.search(rf"^(def |async def |){name}\b", text, re.M)] == []
