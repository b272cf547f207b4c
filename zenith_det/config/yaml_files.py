"""Config files: safe YAML with ``_BASE_``, read into keys that know their file and line."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeGuard

import yaml

from zenith_det.config.finding import find_config_file
from zenith_det.errors import ConfigError, is_printable, quote

BASE_KEY = "_BASE_"
#: Bytes of a config file and its _BASE_ files; every key of Detectron2 and ours at once takes 15,000.
MAX_SIZE = 2**18
#: Files that one configuration may be read from: two _BASE_ lines in each stand for 2^n of n files.
MAX_FILES = 64
MAX_KEY = 200  # characters
_MAX_DEPTH = 16  # Detectron2's own keys are four deep
_MAX_ITEMS = 100_000  # with what aliases and merge keys stand for, which may be more than fits in memory
# What PyYAML's constructors stumble over: !!int '', !!bool maybe, 2024-13-45, 1:00:00:… of any length.
_CONSTRUCTION_ERRORS = (ValueError, ArithmeticError, LookupError, TypeError, AttributeError)
_YAML_PREFIX = "tag:yaml.org,2002:"

# Detectron2's RetinaNet configs give their anchor sizes as this expression for Python's eval. It is known
# by its text, character by character, and nothing is evaluated.
_EVAL_TAG = f"{_YAML_PREFIX}python/object/apply:eval"
_RETINANET_SIZES = "[[x, x * 2**(1.0/3), x * 2**(2.0/3) ] for x in [32, 64, 128, 256, 512 ]]"


@dataclass(frozen=True)
class Entry:
    """One key as a config file gives it.

    Attributes:
        key: dotted, ``"SOLVER.BASE_LR"``.
        value: plain Python: numbers, texts, lists, ``None``.
        file: the file's path, as the user or a ``_BASE_`` line names it.
        line: counted from 1.
        empty_section: the key stands for a section with nothing in it; ``value`` is ``None``.
    """

    key: str
    value: Any
    file: str
    line: int
    empty_section: bool = False

    @property
    def where(self) -> str:
        """``"configs/x.yaml:12"``."""
        return f"{self.file}:{self.line}"


@dataclass
class _Taken:
    """Of what one configuration may take."""

    files: int = 0
    bytes: int = 0


def read_entries(file: str) -> list[Entry]:
    """Return what a config file's ``_BASE_`` files say, then what it says: a later one overrides.

    ``_BASE_`` is a path, relative to the file that names it, or a name as for
    :func:`~zenith_det.config.finding.find_config_file`, or a list of them, the later ones overriding.

    Raises:
        ConfigError: a file is missing, isn't YAML, isn't a mapping, names a Python object, holds a key twice,
            is nested too deep, is its own base, or there are more than :data:`MAX_FILES` or :data:`MAX_SIZE`
            bytes of them.
    """
    return list(_read(os.fspath(file), chain=(), taken=_Taken()))


def _read(file: str, chain: tuple[str, ...], taken: _Taken) -> Iterator[Entry]:
    try:
        real = os.path.realpath(os.path.expanduser(file))
    except (OSError, ValueError) as error:  # a NUL in the name
        raise ConfigError(f"{file}: the config file can't be read: {_one_line(error)}") from None
    if real in chain:
        raise ConfigError(f"{file}: its {BASE_KEY} chain comes back to it: remove a {BASE_KEY} line")
    taken.files += 1
    if taken.files > MAX_FILES:
        raise ConfigError(f"{file}: more than {MAX_FILES} files by {BASE_KEY}: remove a {BASE_KEY} line")
    try:
        entries = list(_parse(file, taken))
    except RecursionError:
        raise ConfigError(f"{file}: nested too deep to be a configuration") from None
    for entry in entries:
        if entry.key == BASE_KEY:
            for base in _base_files(entry):
                yield from _read(base, (*chain, real), taken)
    yield from (entry for entry in entries if entry.key != BASE_KEY)


def _base_files(entry: Entry) -> list[str]:
    names = entry.value if isinstance(entry.value, list) else [entry.value]
    if not names or not all(isinstance(name, str) and name and is_printable(name) for name in names):
        raise ConfigError(
            f"{entry.where}: {BASE_KEY} is {quote(entry.value)}: one or more file names are needed"
        )
    remote = [name for name in names if "://" in name]
    if remote:
        raise ConfigError(f"{entry.where}: {BASE_KEY} {remote[0]} isn't a local file: download it first")
    folder = os.path.dirname(entry.file) or os.curdir
    try:
        return [find_config_file(name, folder).path for name in names]
    except ConfigError as error:
        raise ConfigError(f"{entry.where}: {BASE_KEY}: {error}") from None


def _parse(file: str, taken: _Taken) -> Iterator[Entry]:
    text = _read_bytes(file, MAX_SIZE - taken.bytes)
    taken.bytes += len(text)
    try:
        loader = _SafeLoader(text)
        loader.file = file
        root = loader.get_single_node()
        if root is None:
            raise ConfigError(f"{file}: the file is empty: KEY: value lines are needed")
        _refuse_huge_node(root, file)
        if not _is_plain_mapping(root):
            # Refuses a tag, and names it.
            kind = type(_construct(loader, root, f"{file}:{root.start_mark.line + 1}: this")).__name__
            raise ConfigError(f"{file}: holds a {kind}, not KEY: value lines")
        yield from _walk(loader, root, (), file)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{file}:{mark.line + 1}" if mark else file
        raise ConfigError(f"{where}: not valid YAML: {_one_line(error.problem or error.context)}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{file}: not valid YAML: {_one_line(error)}") from None


def _read_bytes(file: str, most: int) -> bytes:
    try:
        path = os.path.expanduser(file)
        kind = os.stat(path).st_mode
        # A pipe would wait for ever, /dev/zero never end.
        if not stat.S_ISREG(kind) and not stat.S_ISDIR(kind):
            raise ConfigError(f"{file}: the config file can't be read: it is not a regular file")
        with open(path, "rb") as stream:
            text = stream.read(most + 1)
        if len(text) > most:
            raise ConfigError(
                f"{file}: larger than {MAX_SIZE} bytes, with its {BASE_KEY} files: this is no configuration"
            )
        return text
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"{file}: the config file can't be read: {reason}") from None


def _walk(loader: _SafeLoader, node: yaml.MappingNode, path: tuple[str, ...], file: str) -> Iterator[Entry]:
    """Yield the leaves below a mapping."""
    if len(path) > _MAX_DEPTH:
        raise ConfigError(f"{file}:{node.start_mark.line + 1}: nested too deep to be a configuration")
    _refuse_duplicates(node, path, file)
    loader.flatten_mapping(node)  # YAML's "<<"
    for key_node, value_node in node.value:
        line = key_node.start_mark.line + 1
        name = _construct(loader, key_node, f"{file}:{line}: a key")
        if not isinstance(name, str) or not name or len(name) > MAX_KEY or not is_printable(name):
            raise ConfigError(f"{file}:{line}: {quote(name)} can't be a key: a name is needed")
        key = ".".join((*path, name))
        if "." in name:
            raise ConfigError(f"{file}:{line}: {name}: write the sections of a key as nested mappings")
        if not _is_plain_mapping(value_node):
            yield Entry(key, _value(loader, value_node, key, file), file, line)
        elif value_node.value:
            yield from _walk(loader, value_node, (*path, name), file)
        else:
            yield Entry(key, None, file, line, empty_section=True)


def _is_plain_mapping(node: yaml.Node) -> TypeGuard[yaml.MappingNode]:
    return isinstance(node, yaml.MappingNode) and node.tag == f"{_YAML_PREFIX}map"


def _refuse_duplicates(node: yaml.MappingNode, path: tuple[str, ...], file: str) -> None:
    # YAML itself would let the last one win, and so drop a whole section in silence.
    seen: dict[str, int] = {}
    for key_node, _ in node.value:
        line = key_node.start_mark.line + 1
        name = str(key_node.value)
        if name in seen and name != "<<":
            key = ".".join((*path, name))
            raise ConfigError(
                f"{file}:{line}: {key} is here a second time, after line {seen[name]}: merge them"
            )
        seen[name] = line


def _value(loader: _SafeLoader, node: yaml.Node, key: str, file: str) -> Any:
    where = f"{file}:{node.start_mark.line + 1}"
    value = _construct(loader, node, f"{where}: {key}")
    if isinstance(value, (list, dict)):
        _refuse_huge(value, f"{where}: {key}")
    return value


def _construct(loader: _SafeLoader, node: yaml.Node, what: str) -> Any:
    try:
        return loader.construct_object(node, deep=True)
    except _CONSTRUCTION_ERRORS as error:
        raise ConfigError(f"{what} can't be read: {_one_line(error)}") from None


def _refuse_huge_node(root: yaml.Node, file: str) -> None:
    """Refuse a file whose aliases stand for too much, before anything is made of it."""
    sizes: dict[int, int] = {}
    under_way: set[int] = set()

    def size(node: yaml.Node) -> int:
        if id(node) in under_way:
            raise ConfigError(f"{file}:{node.start_mark.line + 1}: not valid YAML: a value that holds itself")
        if id(node) not in sizes:
            under_way.add(id(node))
            children: list[yaml.Node] = []
            if isinstance(node, yaml.SequenceNode):
                children = node.value
            elif isinstance(node, yaml.MappingNode):
                children = [child for pair in node.value for child in pair]
            sizes[id(node)] = 1 + sum(size(child) for child in children)
            under_way.remove(id(node))
        return sizes[id(node)]

    if size(root) > _MAX_ITEMS:
        raise ConfigError(f"{file}: holds too many or too deeply nested values")


def _refuse_huge(value: list[Any] | dict[Any, Any], where: str) -> None:
    waiting: list[tuple[Any, int]] = [(value, 0)]
    count = 0
    while waiting:
        item, depth = waiting.pop()
        count += 1
        if depth > _MAX_DEPTH or count > _MAX_ITEMS:
            raise ConfigError(f"{where} holds too many or too deeply nested values")
        if isinstance(item, (list, dict)):
            waiting.extend(
                (child, depth + 1) for child in (item.values() if isinstance(item, dict) else item)
            )


def _one_line(message: object) -> str:
    return " ".join(str(message).split())


class _SafeLoader(yaml.SafeLoader):
    """PyYAML's safe loader, with a refusal that names the file and the tag."""

    file = ""

    def refuse_tag(self, node: yaml.Node) -> Any:
        if node.tag == _EVAL_TAG and [getattr(item, "value", None) for item in node.value] == [
            _RETINANET_SIZES
        ]:
            return [[x, x * 2 ** (1.0 / 3), x * 2 ** (2.0 / 3)] for x in (32, 64, 128, 256, 512)]
        tag = node.tag.replace(_YAML_PREFIX, "!!")
        where = f"{self.file}:{node.start_mark.line + 1}"
        raise ConfigError(f"{where}: the YAML tag {tag} is refused: a config file holds plain values only")


_SafeLoader.add_constructor(None, _SafeLoader.refuse_tag)
