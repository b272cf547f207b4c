"""Measurements that anyone can repeat; ``tools/benchmark.py`` is the command.

One module per subject gives :class:`~zenith_det.benchmarking.reporting.Comparison` objects; ``measuring``
takes the times, ``reporting`` shows and keeps them.
"""
