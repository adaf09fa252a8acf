"""A sweep's runs on a Ray cluster: one task for each, tried again when its worker dies.

Every machine must see this project, its Python environment, the data and the output folder under the same paths, as on
a shared file system: a run that begins anew on another machine then goes on from its checkpoint.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from engine.interrupts import ending_with_parent
from gradproj.errors import InputError

RETRIES = 5  # after a worker has died
SHARE = 0.25  # of a GPU: one small network does not fill it
POLL_SECONDS = 0.2
STOP_SECONDS = 20  # a stopped run may take this long to save its state


class Cluster:
    """A connection to a Ray cluster.

    Args:
        address: of its head node; "local" starts one on this machine's cores.
        root: the folder that holds the package, importable by every worker.
        cpus: of each run: threads.
        gpus: of each run, perhaps a fraction; None for SHARE of one where the cluster has any.
    Raises:
        InputError: Ray is not installed, or the cluster cannot be reached or has not what one run needs.
    """

    def __init__(self, address: str, root: Path, cpus: int, gpus: float | None) -> None:
        try:
            import ray
        except ImportError as error:
            raise InputError("--ray needs a package that is not here: pip install -e '.[cluster]'") from error
        self.ray = ray
        environment = {"env_vars": {"PYTHONPATH": str(root)}}
        try:
            ray.init(address=address, runtime_env=environment, log_to_driver=False, logging_level="ERROR")
        except (ConnectionError, OSError, RuntimeError, ValueError) as error:
            raise InputError(f"no Ray cluster at {address!r}: {' '.join(str(error).split())[:200]}") from error
        have = ray.cluster_resources()
        if gpus is None:
            gpus = SHARE if have.get("GPU") else 0
        self.resources = {"num_cpus": cpus, "num_gpus": gpus}
        rooms = [have.get("CPU", 0) // cpus] + ([have.get("GPU", 0) // gpus] if gpus else [])
        self.n_at_once = int(min(rooms))
        if self.n_at_once < 1:
            ray.shutdown()
            raise InputError(
                f"the cluster has {have.get('CPU', 0):g} CPUs and {have.get('GPU', 0):g} GPUs; a run needs {cpus} and "
                f"{gpus:g} (OMP_NUM_THREADS, --gpus_per_run)"
            )

    def start(self, command: Sequence[str], log: Path, environment: Mapping[str, str]) -> RemoteProcess:
        """Hand a command to the cluster, its output appended to a log."""
        work = self.ray.remote(execute).options(max_retries=RETRIES, **self.resources)
        return RemoteProcess(
            self.ray, work.remote(list(command), str(log.resolve()), dict(environment), str(Path.cwd()))
        )

    def close(self) -> None:
        """Leave the cluster; one that was started here ends."""
        self.ray.shutdown()


class RemoteProcess:
    """What a sweep needs of a subprocess.Popen, for a command on a cluster."""

    def __init__(self, ray, reference) -> None:
        self.ray, self.reference = ray, reference

    def poll(self) -> int | None:
        """The exit code; None while it is waiting or at work."""
        try:
            return self.wait(0)
        except subprocess.TimeoutExpired:
            return None

    def wait(self, timeout: float | None = None) -> int:
        """The exit code, once it is there."""
        try:
            return self.ray.get(self.reference, timeout=timeout)
        except self.ray.exceptions.GetTimeoutError as error:
            raise subprocess.TimeoutExpired("a run on the cluster", timeout) from error
        except self.ray.exceptions.TaskCancelledError:
            return 128 + signal.SIGTERM
        except self.ray.exceptions.RayError:  # its workers died, and all the retries
            return 128 + signal.SIGKILL

    def terminate(self) -> None:
        """Let it save its state and end."""
        self.ray.cancel(self.reference, force=False)

    def kill(self) -> None:
        """End it now."""
        self.ray.cancel(self.reference, force=True)


def execute(command: Sequence[str], log: str, environment: Mapping[str, str], folder: str) -> int:
    """On a worker: run a command to its end; returns its exit code. Cancelling (KeyboardInterrupt) stops it gently."""
    with Path(log).open("a", encoding="utf-8") as file:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            cwd=folder,
            env={**os.environ, **environment},
            preexec_fn=ending_with_parent(signal.SIGKILL),  # it must not hold the run's folder against a retry
        )
        try:
            while process.poll() is None:  # Ray's cancelling cannot break into a wait
                time.sleep(POLL_SECONDS)
            return process.returncode
        finally:  # the code is there, or the task was cancelled
            with contextlib.suppress(OSError):
                process.terminate()
            try:
                process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
