"""An import inside a function waits for something: what is slow to load or optional, or a circle."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache

from test_house import MODULES, ROOT, dotted

# What is worth waiting for; numpy is there whenever anything is computed.
SLOW = {
    "torch", "triton", "scipy", "pyarrow", "matplotlib", "jinja2", "hypothesis", "datasets", "transformers",
    "tokenizers", "regex", "gguf", "pytest", "rich",
}  # fmt: skip
# What the entrance imports can fail, and is told in one line: it imports nothing outside a function.
ENTRANCE = ROOT / "verify/__main__.py"
FILES = {dotted(path): path for path in MODULES}


def of_import(node: ast.Import | ast.ImportFrom) -> set[str]:
    """Modules that an import loads; of `from package import name` also package.name, if it is one."""
    if isinstance(node, ast.Import):
        return {alias.name for alias in node.names}
    names = {f"{node.module}.{alias.name}" for alias in node.names}
    return {node.module or ""} | (names & FILES.keys())


def at_top(body: list[ast.stmt]) -> Iterator[ast.Import | ast.ImportFrom]:
    """Imports that run when a module is loaded; not those for types alone."""
    for node in body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        elif isinstance(node, ast.If) and "TYPE_CHECKING" not in ast.unparse(node.test):
            yield from at_top(node.body + node.orelse)
        elif isinstance(node, ast.Try):
            yield from at_top(node.body)


@cache
def loads(name: str) -> frozenset[str]:
    """The modules that one module loads by itself; packages are loaded with what is in them."""
    tree = ast.parse(FILES[name].read_text())
    found = {other for node in at_top(tree.body) for other in of_import(node)}
    parts = [other.split(".") for other in found]
    return frozenset({".".join(x[:i]) for x in parts for i in range(1, len(x) + 1)})


@cache
def all_loaded(name: str) -> frozenset[str]:
    """And what those load."""
    seen, left = set(), [name]
    while left:
        if (next_ := left.pop()) not in seen:
            seen.add(next_)
            left += loads(next_) if next_ in FILES else ()
    return frozenset(seen)


def inside(tree: ast.Module) -> Iterator[ast.ImportFrom]:
    """Imports of ours inside functions."""
    for function in ast.walk(tree):
        if isinstance(function, ast.FunctionDef):
            for node in ast.walk(function):
                if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("verify"):
                    yield node


def test_an_import_inside_a_function_waits_for_something() -> None:
    needless = set()
    for path in MODULES:
        own = dotted(path)
        has = {x.split(".")[0] for x in all_loaded(own)}
        for node in inside(ast.parse(path.read_text())) if path != ENTRANCE else ():
            loaded = {x for name in of_import(node) for x in all_loaded(name)}
            member = own.startswith(f"{node.module}.")
            if own not in loaded and not member and not ({x.split(".")[0] for x in loaded} - has) & SLOW:
                needless.add(f"{path.relative_to(ROOT)}:{node.lineno}: {node.module}")
    assert needless == set()
