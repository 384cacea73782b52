"""Docstrings of the standard library and of installed packages, read as syntax trees and never imported."""

import ast
import hashlib
import importlib.util
import logging
import sysconfig
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from grads_dist.demo.size import STDLIB

logger = logging.getLogger(__name__)

MAX_SIGNATURE_CHARS = 160
# Tests, bundled programs and data written as modules: not what these packages explain to a reader.
SKIPPED_FOLDERS = frozenset(
    "site-packages dist-packages test tests testing idlelib lib2to3 turtledemo ensurepip pydoc_data".split()
)
FunctionNode = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Definition:
    """A public function, method or class and its docstring."""

    qualified_name: str
    """Module, class and name, such as `json.JSONEncoder.encode`."""
    signature: str
    """`encode(self, o)` of a function, `JSONEncoder(object)` of a class: no module, no annotations."""
    kind: str
    """`function` or `class`."""
    docstring: str
    """As `inspect.cleandoc` leaves it."""


def read_definitions(packages: Sequence[str], max_files: int) -> list[Definition]:
    """Return the documented public definitions of `packages`, in order of package, file and line.

    Of a package with more than `max_files` files those with the smallest hash of their path are read, so that
    the choice is the same everywhere and spread over the package. One that is not installed is left out.
    """
    definitions = []
    for package in packages:
        root = package_root(package)
        if root is None:
            logger.info("%s is not installed: its docstrings are left out", package)
            continue
        prefix = () if package == STDLIB else (package,)
        for path in _chosen_files(root, max_files):
            definitions.extend(read_file(path, _module_name(path.relative_to(root), prefix)))
    return definitions


def package_root(package: str) -> Path | None:
    """Return the folder of an installed top-level package, without importing it; None where it is absent."""
    if package == STDLIB:
        return Path(sysconfig.get_path("stdlib"))
    spec = importlib.util.find_spec(package)
    return Path(spec.origin).parent if spec is not None and spec.origin is not None else None


def read_file(path: Path, module: str) -> list[Definition]:
    """Return the documented public definitions of one file, by line; none where it is not valid Python."""
    try:
        with warnings.catch_warnings():
            # Invalid escapes in other people's strings are not news to whoever runs the demo.
            warnings.simplefilter("ignore")
            tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError) as error:
        logger.debug("%s is left out: %s", path, error)
        return []
    return list(_definitions(tree.body, module))


def _chosen_files(root: Path, max_files: int) -> list[Path]:
    names = [path.relative_to(root) for path in root.rglob("*.py") if _is_public(path.relative_to(root))]
    chosen = sorted(names, key=lambda name: hashlib.sha256(name.as_posix().encode()).digest())[:max_files]
    return [root / name for name in sorted(chosen)]


def _is_public(name: Path) -> bool:
    parts = (*name.parts[:-1], name.stem)
    return all(part == "__init__" or part[0] != "_" for part in parts) and SKIPPED_FOLDERS.isdisjoint(parts)


def _module_name(name: Path, prefix: tuple[str, ...]) -> str:
    parts = (*prefix, *name.with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _definitions(body: Sequence[ast.stmt], scope: str) -> Iterator[Definition]:
    for node in body:
        if isinstance(node, FunctionNode | ast.ClassDef):
            if not node.name.startswith("_"):
                yield from _definition(node, scope)
        elif isinstance(node, ast.If | ast.Try):
            # Definitions behind a version or an import check are as public as any other.
            yield from _definitions([*node.body, *node.orelse], scope)


def _definition(node: FunctionNode | ast.ClassDef, scope: str) -> Iterator[Definition]:
    name = f"{scope}.{node.name}"
    docstring = ast.get_docstring(node)
    if docstring:
        kind = "class" if isinstance(node, ast.ClassDef) else "function"
        yield Definition(name, _signature(node), kind, docstring)
    if isinstance(node, ast.ClassDef):
        yield from _definitions(node.body, name)


def _signature(node: FunctionNode | ast.ClassDef) -> str:
    if isinstance(node, ast.ClassDef):
        inside = ", ".join(ast.unparse(base) for base in node.bases)
        if not inside:
            return node.name
    else:
        arguments = node.args
        for argument in ast.walk(arguments):
            if isinstance(argument, ast.arg):
                argument.annotation = None
        inside = ast.unparse(arguments)
    signature = f"{node.name}({inside})"
    return signature if len(signature) <= MAX_SIGNATURE_CHARS else f"{node.name}(...)"
