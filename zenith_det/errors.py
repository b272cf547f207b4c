"""The errors that a user can cause, each told in one line."""

from __future__ import annotations


class UserError(Exception):
    """A mistake in something the user gave: a config, a file, an argument.

    The message is one line that says what is wrong, where (file, key, id) and what to do.
    Command-line tools print it as ``error: …`` and exit with code 2; see :func:`zenith_det.cli.run`.
    """


class ConfigError(UserError):
    """A configuration file, key or value that cannot be used."""


class DatasetError(UserError):
    """A dataset, annotation file or image that cannot be used."""


class CheckpointError(UserError):
    """A checkpoint that cannot be read, trusted or matched to the model."""


class TrainingDivergedError(UserError):
    """Losses or gradients stayed non-finite; the message says where and what usually helps."""
