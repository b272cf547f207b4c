"""The configuration object: fvcore's ``CfgNode`` that lets no misspelt key and no unsafe YAML pass."""

from __future__ import annotations

import functools
import logging
import warnings
from ast import literal_eval
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import yaml
from fvcore.common.config import CfgNode as FvcoreCfgNode

from zenith_det.config.defaults import DETECTRON2_DEFAULTS, MOVED_KEYS, ZENITH_DEFAULTS
from zenith_det.config.keys import did_you_mean, leaves, sections
from zenith_det.config.old_names import present_name
from zenith_det.config.yaml_files import Entry, read_entries
from zenith_det.errors import ConfigError, is_printable, one_line, quote

logger = logging.getLogger(__name__)

COMMAND_LINE = "command line"
_VALUE_TYPES = (tuple, list, str, int, float, bool, type(None))  # what yacs lets a key hold
_MAX_INT = 2**63  # what torch and numpy take
_CLOSED = "__closed__"  # in a node's __dict__, as yacs keeps its own state


class CfgNode(FvcoreCfgNode):  # type: ignore[misc, unused-ignore]  # fvcore has no types for it
    """Detectron2's configuration format. It differs from Detectron2's only where there is a mistake:

    1. A *closed* node (every node of :func:`zenith_det.config.get_cfg`) refuses an attribute that it doesn't
       have. ``cfg.BASE_LR = 0.1`` raises and names ``SOLVER.BASE_LR``; Detectron2 accepts it in silence. Adding a
       section (``cfg.MODEL.MY_HEAD = CfgNode()``), as add-ons do, is allowed. After ``cfg.set_new_allowed(True)``
       anything is.
    2. ``merge_from_file``, ``merge_from_list`` and ``merge_from_other_cfg`` raise
       :class:`~zenith_det.errors.ConfigError`, which names the file and line, the key, and what was expected.
       A key that holds a float takes a whole number, and one that holds a text takes digits. ``None`` (in YAML:
       nothing) is refused for keys that can't be empty, see :func:`_never_none`.
    3. YAML that would create Python objects is refused, and so is a Python file.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        path = self.__dict__.get(_CLOSED)
        declares = isinstance(value, FvcoreCfgNode) or name.startswith("COMPUTED_") or self.is_new_allowed()
        if path is not None and name not in self and not declares:
            raise ConfigError(
                f"unknown key {one_line(_join(path, name))}{did_you_mean(_join(path, name), _known_keys())}"
            )
        super().__setattr__(name, value)

    def close(self, path: str = "") -> None:
        """Refuse unknown attributes from now on, here and below. ``path`` is this node's own dotted name."""
        self.__dict__[_CLOSED] = path
        for name, child in self.items():
            if isinstance(child, CfgNode):
                child.close(_join(path, name))

    def assign(self, key: str, value: Any, source: str) -> str:
        """Set one key, as a config file or the command line would.

        Args:
            key: dotted, from this node: ``"SOLVER.BASE_LR"``.
            value: a plain value, or text that stands for one (``"(60000, 80000)"``).
            source: where it comes from, for the error: a file, ``"command line"``.

        Returns:
            The name of the key that was set: the present one where ``key`` is an old one, which is told once; ``""``
            for a deprecated key, which is not set and warned of.

        Raises:
            ConfigError: the key is unknown, renamed or a section, or the value has the wrong type.
        """
        if key in self.__dict__[self.DEPRECATED_KEYS]:
            logger.warning("%s: %s is deprecated and ignored", source, key)
            return ""
        if key in MOVED_KEYS and value is None:
            return ""  # as a Detectron2 configuration writes an old name that was not used
        key = present_name(key)
        if key in self.__dict__[self.RENAMED_KEYS]:
            new_name = self.__dict__[self.RENAMED_KEYS][key]
            hint = f" ({new_name[1]})" if isinstance(new_name, tuple) else ""
            new_name = new_name[0] if isinstance(new_name, tuple) else new_name
            raise ConfigError(f"{source}: {key} has become {new_name}: use that{hint}")

        *path, name = key.split(".")
        node = self._descend(path, key, source)
        if name in node:
            if isinstance(node[name], FvcoreCfgNode):
                inside = ", ".join(list(node[name])[:3])
                raise ConfigError(f"{source}: {key} is a section: give one of its keys ({inside} …)")
            optional = _join(self.__dict__.get(_CLOSED) or "", key) not in _never_none()
            node[name] = _coerced(value, node[name], key, source, optional=optional)
        elif node.is_new_allowed():
            node[name] = _checked(_decoded(value), key, source)
        else:
            raise self._unknown(key, source)
        return key

    def merge_from_file(self, cfg_filename: str, allow_unsafe: bool = False) -> None:
        """Set every key that a YAML file and its ``_BASE_`` files hold.

        Raises:
            ConfigError: a file, key or value that can't be used, or ``allow_unsafe=True``.
        """
        if allow_unsafe:
            raise ConfigError(f"{cfg_filename}: unsafe YAML is never loaded: leave allow_unsafe out")
        for entry in read_entries(cfg_filename):
            self.merge_entry(entry)

    def merge_entry(self, entry: Entry) -> str:
        """Set what one place in a config file says; see :meth:`assign`."""
        if entry.empty_section:
            self._descend(entry.key.split("."), entry.key, entry.where)
            return ""
        return self.assign(entry.key, entry.value, entry.where)

    def merge_from_list(self, cfg_list: Sequence[Any]) -> None:
        """Set keys from ``[key, value, key, value, …]``, as they stand on a command line.

        Raises:
            ConfigError: a key without a value, or a key or value that can't be used.
        """
        for key, value in pairs(cfg_list):
            self.assign(key, value, COMMAND_LINE)

    def merge_from_other_cfg(self, cfg_other: Mapping[str, Any]) -> None:
        """Set every key that another configuration holds.

        Raises:
            ConfigError: a key or value that can't be used.
        """
        for key, value in leaves(cfg_other):
            self.assign(key, value, "the other configuration")

    def dump(self, **kwargs: Any) -> str:
        """Return the whole configuration as YAML that any ``merge_from_file`` takes.

        Args:
            kwargs: for ``yaml.dump``.
        """
        return str(yaml.dump(_plain(self), Dumper=_Dumper, **kwargs))

    @classmethod
    def load_yaml_with_base(cls, filename: str, allow_unsafe: bool = False) -> dict[str, Any]:
        """Return what a YAML file and its ``_BASE_`` files hold, as nested dicts.

        Raises:
            ConfigError: a file that can't be used, or ``allow_unsafe=True``.
        """
        if allow_unsafe:
            raise ConfigError(f"{filename}: unsafe YAML is never loaded: leave allow_unsafe out")
        tree: dict[str, Any] = {}
        for entry in read_entries(filename):
            *path, name = entry.key.split(".")
            node = tree
            for part in path:
                node = node.setdefault(part, {})
                if not isinstance(node, dict):
                    raise ConfigError(f"{entry.where}: {entry.key}: {part} is a value, not a section")
            if entry.empty_section:
                node.setdefault(name, {})
            else:
                node[name] = entry.value
        return tree

    @classmethod
    def _load_cfg_py_source(cls, filename: str) -> FvcoreCfgNode:
        raise ConfigError(f"{filename}: a Python file is never run as a configuration: give a YAML file")

    def _descend(self, path: Sequence[str], key: str, source: str) -> FvcoreCfgNode:
        """Return the section at ``path``; a missing one is made where new keys are allowed."""
        node: Any = self
        for depth, part in enumerate(path, start=1):
            if part not in node and node.is_new_allowed():
                node[part] = type(self)(new_allowed=True)
            if part not in node:
                raise self._unknown(key, source)
            node = node[part]
            if not isinstance(node, FvcoreCfgNode):
                raise ConfigError(
                    f"{source}: {'.'.join(path[:depth])} is a value, not a section: {key} can't be set"
                )
        return node

    def _unknown(self, key: str, source: str) -> ConfigError:
        known = [name for name, _ in leaves(self)] + list(sections(self))
        return ConfigError(f"{source}: unknown key {one_line(key)}{did_you_mean(key, known)}")


def pairs(words: Sequence[Any]) -> Iterator[tuple[str, Any]]:
    """Yield ``(key, value)`` from a flat list of them.

    Raises:
        ConfigError: the last key has no value.
    """
    for index in range(0, len(words), 2):
        key = str(words[index])
        if index + 1 == len(words):
            hint = ": write KEY VALUE, with a space" if "=" in key else ": overrides are KEY VALUE pairs"
            raise ConfigError(f"{COMMAND_LINE}: {one_line(key)} has no value{hint}")
        yield key, words[index + 1]


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        """Write equal values out twice: a reader wants values, not ``&id001`` and ``*id001``."""
        return True


def _plain(node: Mapping[str, Any]) -> dict[str, Any]:
    return {key: _plain(value) if isinstance(value, Mapping) else value for key, value in node.items()}


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _known_keys() -> list[str]:
    return [key for defaults in (DETECTRON2_DEFAULTS, ZENITH_DEFAULTS) for key, _ in leaves(defaults)]


@functools.cache
def _never_none() -> frozenset[str]:
    """The keys that ``None`` says nothing about: all with another default but Detectron2's norms, where it is no
    norm, like ``""``. What an add-on's key may hold isn't known here."""
    both = (*leaves(DETECTRON2_DEFAULTS), *leaves(ZENITH_DEFAULTS))
    return frozenset(key for key, default in both if default is not None and not key.endswith(".NORM"))


def _decoded(value: Any) -> Any:
    """Return the value that a text stands for, by yacs's rule: a Python literal, or else the text itself."""
    if not isinstance(value, str):
        return value
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "1if" and "\d" are texts here, nothing to warn of
            return literal_eval(value)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return value


def _checked(value: Any, key: str, source: str) -> Any:
    """Return ``value`` if a key can hold it and a run can use and write it."""
    waiting = [value]
    while waiting:
        item = waiting.pop()
        problem = ""
        if type(item) not in _VALUE_TYPES and not (type(item) is dict and item is not value):
            problem = f"a key can't hold a {type(item).__name__}"
        elif type(item) is int and not -_MAX_INT <= item < _MAX_INT:
            problem = "whole numbers have 64 bits at most"
        elif type(item) is str and not is_printable(item.replace("\n", " ").replace("\t", " ")):
            problem = "a text can't hold control characters or halves of characters"
        if problem:
            raise ConfigError(f"{source}: {key} is {quote(value)}: {problem}")
        if isinstance(item, (tuple, list)):
            waiting.extend(item)
        elif isinstance(item, dict):
            waiting.extend((*item.keys(), *item.values()))
    return value


def _coerced(raw: Any, current: Any, key: str, source: str, *, optional: bool) -> Any:
    """Return ``raw`` as the type that ``current`` has; ``optional``: it may be ``None``.

    Beyond yacs (equal types, list for tuple, anything for ``None``): a whole number for a float, and for a
    text whatever text would otherwise stand for something else (``OUTPUT_DIR 2024``).
    """
    value = _decoded(raw)
    if isinstance(current, str) and isinstance(raw, str) and not isinstance(value, (str, type(None))):
        return _checked(raw, key, source)
    value = _checked(value, key, source)
    if value is None and current is not None and not optional:
        raise _wrong_type(value, current, key, source)
    if type(value) is type(current) or value is None or current is None:
        return value
    if isinstance(current, (tuple, list)) and isinstance(value, (tuple, list)):
        return type(current)(value)
    if isinstance(current, float) and type(value) is int:
        return float(value)
    raise _wrong_type(value, current, key, source)


def _wrong_type(value: Any, current: Any, key: str, source: str) -> ConfigError:
    expected = {"int": "an int", "str": "a text"}.get(type(current).__name__, f"a {type(current).__name__}")
    # Whoever wrote nothing may have meant just that.
    example = f", such as {current!r}" if current not in ("", (), []) or value is None else ""
    return ConfigError(f"{source}: {key} is {quote(value)}: {expected} is needed{example}")
