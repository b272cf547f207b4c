"""Starting the processes of a run, and ending them together.

Not by torch's elastic launcher: it kills what it started 30 seconds after a signal, which a save may outlast, and tells
of one failed process alone, be it the one that was killed or one that lost it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import logging
import multiprocessing.connection
import os
import pickle
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from zenith_det.errors import ConfigError, RunStopped, UserError
from zenith_det.files import write_whole
from zenith_det.training.processes.distributed import (
    COLLECTIVE_TIMEOUT,
    barrier,
    join_group,
    leave_group,
    restart_count,
    would_be_restarted,
)
from zenith_det.training.processes.stopping import listen_to_launcher, relaying_signals

# Processes that should join and don't are told of sooner than those that hang in a collective.
JOIN_TIMEOUT = datetime.timedelta(minutes=5)
# From the first process that fails to the others being ended: a moment for their own reports.
GRACE_SECONDS = 1.0
KILL_SECONDS = 10.0
LOOPBACK = "127.0.0.1"


def launch(
    main: Callable[..., Any],
    num_processes: int = 1,
    num_machines: int = 1,
    machine_rank: int = 0,
    dist_url: str = "auto",
    args: Sequence[Any] = (),
    *,
    device: str = "auto",
    join_timeout: datetime.timedelta = JOIN_TIMEOUT,
) -> Any:
    """Run ``main(*args)`` in as many processes as asked for, with a process group around them.

    Args:
        main: importable from its module (processes are spawned).
        num_processes: on each machine.
        num_machines: how many machines run this same command.
        machine_rank: which of them this is, from 0.
        dist_url: ``tcp://host:port`` of machine 0; ``"auto"`` takes a free port, on one machine.
        args: of ``main``; must pickle when processes are started.
        device: ``"auto"`` (CUDA if there is any), ``"cuda"`` or ``"cpu"``: NCCL for CUDA, gloo for the CPU.
        join_timeout: how long to wait for all processes to join.

    Under ``torchrun`` (``RANK``, ``WORLD_SIZE``, ``LOCAL_RANK`` set) the processes exist already: the
    process joins them, and the numbers given here don't count.

    Returns:
        What ``main`` returns, where it ran in this very process (one process, or torchrun); else ``None``.

    Raises:
        UserError: one that ``main`` raised on any rank, once, whatever the number of ranks; a device or
            address that cannot be used; processes that don't join.
        SystemExit: a rank failed otherwise. All others are ended, and its traceback is on standard error.
    """
    if _under_torchrun():
        return _run_under_torchrun(main, args, device, join_timeout)
    if num_processes < 1 or num_machines < 1 or not 0 <= machine_rank < num_machines:
        raise ConfigError(
            f"{num_processes} processes on machine {machine_rank} of {num_machines}: the numbers of "
            "processes and machines are at least 1, and the machine's rank is from 0 to one less"
        )
    cuda = _use_cuda(device, num_processes)
    world_size = num_processes * num_machines
    if world_size == 1:
        return main(*args)
    if num_machines == 1 and dist_url == "auto":
        # This process keeps the meeting point: no port that another program takes in the meantime, and, since
        # objects travel pickled, none that another machine can reach.
        store = _own_store()
        host, port, hosted = LOOPBACK, store.port, True
    else:
        host, port = _parse_url(dist_url, num_machines)
        hosted = False
    start_method = multiprocessing.get_start_method(allow_none=True)
    with tempfile.TemporaryDirectory(prefix="zenith_det_launch_") as reports:
        plan = _Plan(
            main=main, args=tuple(args), world_size=world_size, first_rank=machine_rank * num_processes,
            host=host, port=port, hosted=hosted, local_size=num_processes, cuda=cuda,
            join_timeout=join_timeout, reports=reports, signalled=mp.get_context("spawn").Value("i", 0),
            start_method=start_method,
        )  # fmt: skip
        context = mp.start_processes(_worker, (plan,), num_processes, join=False, start_method="spawn")
        with relaying_signals(plan.signalled, context.processes):
            _watch(context.processes, plan)
    return None


def _own_store() -> Any:
    """A store on the loopback interface alone; of itself torch's listens on all."""
    listening = socket.create_server((LOOPBACK, 0))
    port = listening.getsockname()[1]
    return dist.TCPStore(
        LOOPBACK, port, is_master=True, wait_for_workers=False, master_listen_fd=listening.detach()
    )


def _loopback_interface() -> str | None:
    for name, addresses in psutil.net_if_addrs().items():
        if any(address.address == LOOPBACK for address in addresses):
            return name
    return None


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What a started process needs to know."""

    main: Callable[..., Any]
    args: tuple[Any, ...]
    world_size: int
    local_size: int
    first_rank: int
    host: str
    port: int
    hosted: bool  # the launcher keeps the store, not rank 0
    cuda: bool
    join_timeout: datetime.timedelta
    reports: str  # a directory
    start_method: str | None  # of the launcher's own processes; None: the platform's default
    signalled: Any  # shared integer: the signal that the launcher got, or 0

    def report_file(self, local_rank: int) -> Path:
        return Path(self.reports) / str(local_rank)


def _use_cuda(device: str, num_processes: int) -> bool:
    kind = device.split(":")[0]
    if kind == "auto":
        kind = "cuda" if torch.cuda.is_available() else "cpu"
    if kind != "cuda":
        return False
    if not torch.cuda.is_available():
        raise ConfigError("device cuda: PyTorch sees no CUDA device; use MODEL.DEVICE cpu or auto")
    if num_processes > torch.cuda.device_count():
        raise ConfigError(
            f"{num_processes} processes, but {torch.cuda.device_count()} CUDA devices: lower --num-gpus, "
            "or use MODEL.DEVICE cpu"
        )
    return True


def _parse_url(url: str, num_machines: int) -> tuple[str, int]:
    parts = urlsplit(url)
    try:
        host, port = parts.hostname, parts.port
    except ValueError:
        host = port = None
    if parts.scheme != "tcp" or not host or not port:
        several = f" ({num_machines} machines have to meet somewhere)" if num_machines > 1 else ""
        raise ConfigError(f"--dist-url {url!r}: give tcp://HOST:PORT of machine 0{several}")
    return host, port


def _worker(local_rank: int, plan: _Plan) -> None:
    """Body of a started process; how it ends goes into its report file."""
    rank = plan.first_rank + local_rank
    # The environment is the one place that code without our helpers (loggers, libraries) looks at.
    os.environ.update(LOCAL_RANK=str(local_rank), LOCAL_WORLD_SIZE=str(plan.local_size))
    if plan.hosted and (interface := _loopback_interface()):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)  # gloo, too, listens where others can reach it
    # A spawned process would spawn its loader's workers, too, and each of them imports everything again.
    multiprocessing.set_start_method(plan.start_method, force=True)
    listen_to_launcher(plan.signalled)
    if sys.platform.startswith("linux"):
        # torch.multiprocessing.spawn asks for SIGINT at the launcher's death, which what a shell starts with "&"
        # ignores: this process would train on without a launcher.
        mp._prctl_pr_set_pdeathsig(signal.SIGTERM)  # type: ignore[attr-defined]
    code = 0
    try:
        store = _meet(plan, rank)
        join_group(dist.PrefixStore("run", store), rank, plan.world_size, local_rank, plan.cuda)
        plan.main(*plan.args)
        barrier()
    except KeyboardInterrupt:
        code = 130
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
        if code:
            _report(plan.report_file(local_rank), error, code)
    except BaseException as error:
        code = error.exit_code if isinstance(error, UserError) else 1
        _report(plan.report_file(local_rank), error, code)
    if code:
        # Past the destructors: those of a process group may wait for processes that are gone.
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    leave_group()


def _meet(plan: _Plan, rank: int) -> Any:
    """The key-value store through which the processes find each other."""
    url = f"tcp://{plan.host}:{plan.port}"
    try:
        store = dist.TCPStore(
            plan.host, plan.port, plan.world_size, rank == 0 and not plan.hosted,
            timeout=plan.join_timeout, wait_for_workers=False,
        )  # fmt: skip
        store.add("joined", 1)
        deadline = time.monotonic() + plan.join_timeout.total_seconds()
        while (joined := store.add("joined", 0)) < plan.world_size:
            if time.monotonic() > deadline:
                raise UserError(
                    f"rank {rank}: only {joined} of {plan.world_size} processes joined at {url} within "
                    f"{plan.join_timeout.total_seconds():.0f} s: check --num-machines, --machine-rank and "
                    "--dist-url on each machine"
                )
            time.sleep(0.05)
    except (dist.DistError, RuntimeError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"rank {rank}: no connection at {url} ({reason[:200]}): check --dist-url, and that machine 0 runs"
        ) from error
    return store


@dataclasses.dataclass(frozen=True)
class _Report:
    """How a process ended that did not end well."""

    time: float
    code: int
    error: UserError | None  # a mistake of the user, told by the launcher in one line
    text: str  # the traceback of anything else


def _report(path: Path, error: BaseException, code: int) -> None:
    user_error = error if isinstance(error, UserError) else None
    text = "" if isinstance(error, SystemExit) else "".join(traceback.format_exception(error))
    try:
        data = pickle.dumps(_Report(time.time(), code, user_error, text))
        pickle.loads(data)
    except Exception:  # an error class of its own making that does not survive pickling
        plain = None if user_error is None else UserError(str(user_error))
        data = pickle.dumps(_Report(time.time(), code, plain, text))
    write_whole(path, data)


def _watch(processes: Sequence[Any], plan: _Plan) -> None:
    """Wait for all processes; when one fails, end the others and say why."""
    try:
        while running := [process for process in processes if process.exitcode is None]:
            if any(process.exitcode for process in processes):
                _wait(running, GRACE_SECONDS)
                break
            multiprocessing.connection.wait([process.sentinel for process in running])
        codes = [process.exitcode or 0 for process in processes]
    finally:
        for end in ("terminate", "kill"):  # what still runs: asked first, then not
            alive = [process for process in processes if process.is_alive()]
            for process in alive:
                getattr(process, end)()
            _wait(alive, KILL_SECONDS)
    if not any(codes):
        return
    reports: dict[int, _Report] = {}
    for local_rank in range(len(processes)):
        with contextlib.suppress(OSError):
            reports[local_rank] = pickle.loads(plan.report_file(local_rank).read_bytes())
    # A process that was killed comes first: what the others say then is that they lost it. (Aborted ones
    # may have lost another, too.)
    killed = [i for i, code in enumerate(codes) if code < 0 and not (reports and code == -signal.SIGABRT)]
    for local_rank in killed:
        number = -codes[local_rank]
        name = signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"
        hint = " (out of memory?)" if name == "SIGKILL" else ""
        print(f"rank {plan.first_rank + local_rank} was ended by {name}{hint}", file=sys.stderr)
    if killed:
        raise SystemExit(128 - codes[killed[0]])
    if not reports:
        raise SystemExit(next(code for code in codes if code))
    # The first to fail tells the reason; the others lost it.
    local_rank, first = min(reports.items(), key=lambda item: item[1].time)
    if first.error is not None:
        raise first.error
    if first.text:
        print(f"rank {plan.first_rank + local_rank} failed; all others were ended:", file=sys.stderr)
        print(first.text, file=sys.stderr)
    raise SystemExit(first.code)


def _wait(processes: Sequence[Any], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))


def _under_torchrun() -> bool:
    return all(name in os.environ for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR"))


def _run_under_torchrun(
    main: Callable[..., Any], args: Sequence[Any], device: str, join_timeout: datetime.timedelta
) -> Any:
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    local_rank = int(os.environ["LOCAL_RANK"])
    cuda = _use_cuda(device, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    store, rank, world_size = next(iter(dist.rendezvous("env://", rank, world_size, timeout=join_timeout)))
    # A restarted group (elastic) meets in the same store: its keys must not mix with those before.
    store = dist.PrefixStore(f"zenith_det/{restart_count()}", store)
    store.set_timeout(COLLECTIVE_TIMEOUT)
    join_group(dist.PrefixStore("group", store), rank, world_size, local_rank, cuda)
    try:
        result = main(*args)
        barrier()
    except UserError as error:
        # Each rank meets the same mistake; the first one tells. The agent ends the others.
        first = _first_to_fail(store)
        if isinstance(error, RunStopped) and would_be_restarted():
            # torchrun takes any other exit code for a failure, and would start what was asked to stop.
            if first:
                print(f"{error.label}: {error}", file=sys.stderr, flush=True)
            raise SystemExit(0) from error
        if first:
            raise
        raise SystemExit(error.exit_code) from error
    leave_group()
    return result


def _first_to_fail(store: Any) -> bool:
    try:
        return int(store.add("user_error", 1)) == 1
    except (RuntimeError, OSError):
        return True  # nobody left to ask: better twice than not at all
