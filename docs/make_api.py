#!/usr/bin/env python
"""Write docs/API.md from the docstrings: python docs/make_api.py

Sources are read, not imported, so that the page is the same with and without Detectron2.
"""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "API.md"
HEAD = """# Names for programs

`python docs/make_api.py` makes this page from the docstrings. Import all of these names from `zenith_det`:

    from zenith_det import ZENITH, load_config

A name is imported when you first use it, and torch, torchvision or Detectron2 with it if it needs one. The packages
(`zenith_det.data`, `zenith_det.evaluation`, …) have more names in their `__all__`. Anything that isn't in an `__all__`
may change at any time.
"""

Definition = ast.FunctionDef | ast.ClassDef


def public_names() -> dict[str, list[str]]:
    """Module -> the names that ``zenith_det`` takes from it, in the order of its ``if TYPE_CHECKING:``."""
    tree = ast.parse((ROOT / "zenith_det" / "__init__.py").read_text(encoding="utf-8"))
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    imports = [node for node in block.body if isinstance(node, ast.ImportFrom)]
    return {str(node.module): [alias.name for alias in node.names] for node in imports}


def source(module: str) -> Path:
    path = ROOT.joinpath(*module.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def find(module: str, name: str) -> tuple[str, Definition | str]:
    """Where a name is defined, followed through re-exports: (module, its definition or a value's docstring)."""
    path = source(module)
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            if any((alias.asname or alias.name) == name for alias in node.names):
                return find(f"{package}.{node.module}" if node.level else str(node.module), name)
        elif isinstance(node, Definition):
            if node.name == name:
                return module, node
        elif isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == f"{name}.__doc__":
            return module, inspect.cleandoc(ast.literal_eval(node.value))
    raise LookupError(f"{module} defines no {name}, or has no docstring for it")


def describe(name: str, module: str) -> Iterator[str]:
    """The lines of one name."""
    home, node = find(module, name)
    yield from (f"### {name}", "", f"From `{home}`.", "")
    if isinstance(node, str):
        yield from (markdown(node), "")
    elif isinstance(node, ast.ClassDef):
        methods = list(methods_of(home, node).values())
        made = next((method for method in methods if method.name == "__init__"), None)
        yield from code_block(signature(name, made) if made else f"class {name}")
        yield from text_of(node)
        for method in methods:
            if not method.name.startswith("_") or method.name == "__call__":
                called = "(…)" if method.name == "__call__" else f".{method.name}"
                yield from (f"#### {name}{called}", "")
                if not any(isinstance(d, ast.Name) and d.id == "property" for d in method.decorator_list):
                    yield from code_block(signature(method.name, method))
                yield from text_of(method)
    else:
        yield from code_block(signature(name, node))
        yield from text_of(node)


def methods_of(module: str, node: ast.ClassDef) -> dict[str, ast.FunctionDef]:
    """A class's methods by name, those that it has from this package's classes included."""
    found = {method.name: method for method in node.body if isinstance(method, ast.FunctionDef)}
    for base in node.bases:
        try:
            home, definition = find(module, ast.unparse(base))
        except (LookupError, OSError):  # of another library
            continue
        if isinstance(definition, ast.ClassDef):
            found = {**found, **{k: v for k, v in methods_of(home, definition).items() if k not in found}}
    return found


def signature(name: str, function: ast.FunctionDef) -> str:
    """``name(a, b=1) -> int``, without ``self``, one argument a line where it is long."""
    words = ast.unparse(function.args)
    words = re.sub(r"^(self|cls)(, |$)", "", words)
    returns = (
        f" -> {ast.unparse(function.returns)}" if function.returns and function.name != "__init__" else ""
    )
    line = f"{name}({words}){returns}"
    if len(line) <= 100:
        return line
    parts = re.split(r", (?![^\[(]*[\])])", words)
    return f"{name}(\n    " + ",\n    ".join(parts) + f",\n){returns}"


def code_block(text: str) -> Iterator[str]:
    yield from ("```python", text, "```", "")


def text_of(node: Definition) -> Iterator[str]:
    """A docstring as Markdown."""
    yield markdown(ast.get_docstring(node) or "")
    yield ""


def markdown(text: str) -> str:
    """Google's docstring sections and Sphinx's roles in Markdown."""
    # GitHub's own blocks for formulas.
    text = re.sub(
        r"^\.\. math::\n\n?((?: .*\n|\n)*?)(?=\S|\Z)", r"```math\n\1```\n\n", text, flags=re.MULTILINE
    )
    text = re.sub(r"^Example::\n\n((?: {4}.*\n?|\n)+)", example, text, flags=re.MULTILINE)
    text = re.sub(r" ::$", "", text, flags=re.MULTILINE)
    text = re.sub(r"^(=+ =[= ]*)\n((?:.+\n)+)", table, text, flags=re.MULTILINE)
    text = re.sub(r":math:`([^`]+)`", r"$\1$", text)
    text = re.sub(r":\w+:`~[\w.]*?(\w+)`", r"`\1`", text)
    text = re.sub(r":\w+:`[!.]?([^`]+)`", r"`\1`", text)
    text = re.sub(r"(?<!`)``(?!`)", "`", text).replace("`::\n", "`:\n")
    text = re.sub(r"::$", ":", text, flags=re.MULTILINE)
    lines: list[str] = []
    section = ""
    for line in text.splitlines():
        if match := re.fullmatch(r"(Args|Returns|Raises|Attributes|Yields|Note|Example):", line):
            section = match[1]
            lines += [f"**{section}**", ""]
        elif section and line and not line.startswith(" "):
            section = ""
            lines.append(line)
        elif section:
            # An entry of a list, or the continuation of one.
            inner = line[4:]
            entry = re.match(r"(\*{0,2}[\w.]+(?:, \*{0,2}\w+)*): (.*)", inner)
            if section in ("Returns", "Yields", "Note", "Example") or not line:
                lines.append(inner)
            elif entry:
                lines.append(f"- `{entry[1]}`: {entry[2]}")
            else:
                lines.append(f"  {inner.strip()}")
        else:
            lines.append(line)
    return "\n".join(lines).strip()


def example(match: re.Match[str]) -> str:
    """A section of code, as a block of it."""
    return f"**Example**\n\n```python\n{inspect.cleandoc(match[1])}\n```\n"


def table(match: re.Match[str]) -> str:
    """A simple table of reStructuredText, under its first rule, in Markdown."""
    starts = [0, *(m.end() for m in re.finditer(r"= +(?==)", match[1]))]
    rows = [
        [line[a:b].strip() for a, b in zip(starts, [*starts[1:], None])]
        for line in match[2].splitlines()
        if not line.startswith("=")
    ]
    rows.insert(1, ["---"] * len(starts))
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def page() -> str:
    """The whole page."""
    parts = [HEAD]
    for module, names in public_names().items():
        parts.append(f"## {module}\n")
        for name in names:
            parts.append("\n".join(describe(name, module)))
    return re.sub(r"\n{3,}", "\n\n", "\n".join(parts)).strip() + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(PAGE)
