"""The errors that a user can cause, each told in one line."""

from __future__ import annotations


class UserError(Exception):
    """A mistake in something the user gave: a config, a file, an argument.

    The message is one line that says what is wrong, where (file, key, id) and what to do.
    Command-line tools print it as ``error: …`` and exit with :attr:`exit_code`; see :func:`zenith_det.cli.run`.
    """

    #: What a command ends with; 2 is :mod:`argparse`'s.
    exit_code = 2
    #: What its line begins with.
    label = "error"


class ConfigError(UserError):
    """A configuration file, key or value that cannot be used."""


class DatasetError(UserError):
    """A dataset, annotation file or image that cannot be used."""


class CheckpointError(UserError):
    """A checkpoint that cannot be read, trusted or matched to the model."""


class TrainingDivergedError(UserError):
    """Losses or gradients stayed non-finite; the message says where and what usually helps."""


class RanksDisagreeError(UserError):
    """Processes of one run that don't train the same thing; the message names them and what differs."""


class RunStopped(UserError):
    """A run that ended before its time because it was asked to, saved, and can go on with ``--resume``.

    Its exit code is sysexits' ``EX_TEMPFAIL``, "try again later": job scripts tell it from a failure.
    """

    exit_code = 75
    label = "stopped"
