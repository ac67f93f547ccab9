"""What no program needs is not among the mechanisms: who uses each public name of coordination.py.

    python -m tests.test_unused [coordination primitives]

prints the table. How it matches, by the text alone: a top-level name counts as used where a file imports it from the
mechanism's file and names it once more. A method or property counts where it is an attribute of something that is
called like what holds an object of its class somewhere in the same room (assigned from a call of the class, annotated
with it, entered as it, assigned from what is called so or from a method that is annotated to return one, each of a
tuple of such), or of the call itself. So two things of one name in one room
are not told apart. What a mechanism names counts as soon as the mechanism is used itself, its own methods only where
``__dunder__`` methods name them; the names of a file of mechanisms that is not asked for count as used. Programs
are the files at the top, their rooms and ``runtime``, but no test, bench, sandbox or simulator.
"""

from __future__ import annotations

import ast
import functools
import sys
from collections import defaultdict
from collections.abc import Iterator

import pytest

from tests.test_design import BELOW, FILES, tree, trees

__all__ = ["trees"]  # the fixture holds here too

CHECKED = ["coordination", "primitives"]
"""The files of mechanisms each name of which has to be used."""

MECHANISMS = ["coordination", "primitives"]

PROGRAMS = [name for name in FILES if name.partition(".")[0] in BELOW.keys() - {*MECHANISMS, "sandbox"}]


def is_public(name: str) -> bool:
    return not name.startswith("_")


def top_level(file: str) -> Iterator[tuple[str, ast.stmt]]:
    """The names that a file defines, with what defines them."""
    for node in tree(file).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.name, node
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            yield node.target.id, node
        elif isinstance(node, ast.Assign):
            for target in node.targets:
                if isinstance(target, ast.Name):
                    yield target.id, node


def methods(node: ast.stmt) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for each in node.body if isinstance(node, ast.ClassDef) else ():
        if isinstance(each, ast.FunctionDef | ast.AsyncFunctionDef):
            yield each


def public_names(file: str) -> list[str]:
    """``name`` and ``Class.method`` of all that is for others."""
    found = []
    for name, node in top_level(file):
        if is_public(name):
            found += [name, *(f"{name}.{method.name}" for method in methods(node) if is_public(method.name))]
    return found


def last_name(node: ast.expr) -> str | None:
    """``x`` of ``x`` and of ``self.x``."""
    return node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else None


def classes_in(node: ast.expr | None, classes: set[str]) -> set[str]:
    """Those that an annotation, or a value, is made of."""
    if isinstance(node, ast.Tuple | ast.List | ast.Dict | ast.Lambda) or node is None:
        return set()
    return {each.id for each in ast.walk(node) if isinstance(each, ast.Name)} & classes


@functools.cache
def returned() -> dict[str, set[str]]:
    """For each ``Class.method``, the classes that its answer is annotated with."""
    owned = [(name, node) for file in MECHANISMS for name, node in top_level(file)]
    return {
        f"{name}.{each.name}": classes_in(each.returns, {name for name, _ in owned})
        for name, node in owned
        for each in methods(node)
    }


def bound(nodes: list[ast.AST], classes: set[str]) -> Iterator[tuple[str, str]]:
    """Pairs of a name and the class of an object that is called so."""
    found: dict[str, set[str]] = defaultdict(set)
    aliases: list[tuple[str, str]] = []
    answers: list[tuple[str, str, str]] = []
    for node in nodes:
        pairs: list[tuple[ast.expr, ast.expr | None]] = []
        if isinstance(node, ast.Assign):
            for target in node.targets:
                if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                    pairs += zip(target.elts, node.value.elts, strict=False)
                pairs.append((target, node.value))
        elif isinstance(node, ast.AnnAssign):
            pairs += [(node.target, node.annotation), (node.target, node.value)]
        elif isinstance(node, ast.arg) and node.annotation is not None:
            pairs.append((ast.Name(node.arg), node.annotation))
        elif isinstance(node, ast.withitem) and node.optional_vars is not None:
            pairs.append((node.optional_vars, node.context_expr))
        elif isinstance(node, ast.NamedExpr):
            pairs.append((node.target, node.value))
        elif isinstance(node, ast.For) and isinstance(node.iter, ast.Tuple):
            pairs += [(node.target, each) for each in node.iter.elts]
        for target, value in pairs:
            if (name := last_name(target)) is not None:
                found[name] |= classes_in(value, classes)
                if value is not None and (other := last_name(value)) is not None:
                    aliases.append((name, other))
                if isinstance(value, ast.Call) and isinstance(value.func, ast.Attribute):
                    answers.append((name, last_name(value.func.value) or "", value.func.attr))
    for name, other in aliases:
        found[name] |= found[other]
    made = returned()
    for name, holder, method in answers:
        found[name] |= {cls for held in found[holder] for cls in made.get(f"{held}.{method}", set()) & classes}
    yield from ((name, cls) for name, held in found.items() for cls in held)


def attributes(nodes: list[ast.AST], holders: dict[str, set[str]], classes: set[str]) -> Iterator[str]:
    """``Class.attribute`` for each attribute of what could be an object of the class, or is the class."""
    for node in nodes:
        if isinstance(node, ast.Attribute):
            name = last_name(node.value)
            for cls in holders.get(name or "", set()) | ({name} & classes if name else classes_in(node.value, classes)):
                yield f"{cls}.{node.attr}"


def uses(checked: list[str]) -> dict[str, set[str]]:
    """For each public name of the files, the programs' files and the mechanisms (by their names) that use it."""
    names = {name for file in checked for name in public_names(file)}
    classes = {name for file in checked for name, node in top_level(file) if isinstance(node, ast.ClassDef)}
    members = {member for member in names if "." in member}
    users: dict[str, set[str]] = defaultdict(set)
    holders: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    for file in PROGRAMS:
        for name, cls in bound(list(ast.walk(tree(file))), classes):
            holders[file.partition(".")[0]][name].add(cls)
    for room in {"crawl", "api", "logs", "market"}:  # what the programs at the top hold, and their rooms
        for file in PROGRAMS:
            if room in BELOW.get(file, ()):
                for name, found in holders[file].items():
                    holders[room][name] |= found
                holders[file] = holders[room]
    for file in PROGRAMS:
        nodes = list(ast.walk(tree(file)))
        imported = {
            alias.asname or alias.name: alias.name
            for node in nodes
            if isinstance(node, ast.ImportFrom) and node.module in checked
            for alias in node.names
        }
        for node in nodes:
            if isinstance(node, ast.Name) and node.id in imported:
                users[imported[node.id]].add(file)
        for member in attributes(nodes, holders[file.partition(".")[0]], classes):
            if member in members:
                users[member].add(file)
    for file in MECHANISMS:
        inside: dict[str, set[str]] = defaultdict(set)
        for name, cls in bound(list(ast.walk(tree(file))), classes):
            inside[name].add(cls)
        for owner, definition in top_level(file):
            nodes = list(ast.walk(definition))
            for node in nodes:
                if isinstance(node, ast.Name) and node.id in names and node.id != owner:
                    users[node.id].add(owner)
            for member in attributes(nodes, inside, classes):
                if member in members and not member.startswith(f"{owner}."):
                    users[member].add(owner)
            for method in methods(definition):
                if method.name.startswith("__"):
                    for member in attributes(list(ast.walk(method)), {"self": {owner}}, classes):
                        if member in members:
                            users[member].add(owner)
    return {name: users[name] for name in sorted(names)}


def used(found: dict[str, set[str]]) -> set[str]:
    """The names that a program uses, or a mechanism that is used itself."""
    reached: set[str] = set()
    private = {name for file in MECHANISMS for name, _ in top_level(file)} - found.keys()
    while True:
        more = {name for name, by in found.items() if by & ({*PROGRAMS} | reached | private)} - reached
        if not more:
            return reached
        reached |= more


CONVENTION = "stats"
"""Each mechanism says what it is doing; its ``repr`` shows that, whether or not a program asks."""


def unused(found: dict[str, set[str]]) -> list[str]:
    reached = used(found)
    return [name for name in found if name not in reached and name.partition(".")[2] != CONVENTION]


KNOWN = {
    "coordination": {"Visited.add": "crawl.frontier", "Semaphore.try_acquire": "api.pages"},
    "primitives": {"TokenBucket.pause": "crawl.hosts", "Permit.ignore": "market.connect"},
}
"""Some uses, each of which is seen in another way."""


@pytest.mark.parametrize("file", CHECKED)
def test_programs_use_each_name(file: str) -> None:
    found = uses([file])
    assert len(found) > 50
    assert unused(found) == []
    for name, user in KNOWN[file].items():
        assert user in found[name]


def main() -> None:
    """Print who uses what."""
    for file in sys.argv[1:] or CHECKED:
        found = uses([file])
        for name, by in found.items():
            programs, others = ", ".join(sorted(by & {*PROGRAMS})), ", ".join(sorted(by))
            print(f"{name:36}{programs or (others and f'through {others}') or '-'}")
        print(f"\nunused of {file}: {', '.join(unused(found)) or 'none'}\n")


if __name__ == "__main__":
    main()
