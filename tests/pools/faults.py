"""Injects faults into workers, waits for conditions, and observes processes and sockets."""

import contextlib
import ipaddress
import os
import signal
import socket
import threading
import time
from pathlib import Path

import numpy as np


class Faults:
    """Intercepts workers that are threads of this process.

    Attributes:
        behaviours: By worker, functions of the model and a batch that are called in place of the model.
    """

    def __init__(self):
        self.behaviours = {}
        self._gates = []

    def __call__(self, worker, compute, batch):
        return self.behaviours.get(worker, lambda compute, batch: compute(batch))(compute, batch)

    def block(self, *workers):
        """Makes workers wait until `release`."""
        gate = threading.Event()
        self._gates.append(gate)

        def wait(compute, batch):
            gate.wait(60)
            return compute(batch)

        self.behaviours.update(dict.fromkeys(workers, wait))

    def release(self):
        """Makes all workers compute again, the blocked ones too."""
        self.behaviours.clear()
        while self._gates:
            self._gates.pop().set()

    def replace(self, worker, behaviour):
        self.behaviours[worker] = behaviour


class FileFaults:
    """Intercepts workers in other processes: each behaves as a file of its number says and writes its pid to a file."""

    def __init__(self, folder):
        self.folder = str(folder)

    def __call__(self, worker, compute, batch):
        pid_file = Path(self.folder) / f"pid{worker}"
        if not pid_file.exists() or pid_file.read_text() != str(os.getpid()):
            pid_file.with_suffix(".new").write_text(str(os.getpid()))
            pid_file.with_suffix(".new").replace(pid_file)
        file = Path(self.folder) / f"behaviour{worker}"
        behaviour = file.read_text() if file.exists() else ""
        if behaviour.startswith("wait"):
            time.sleep(float(behaviour.split()[1]))
        if behaviour == "raise":
            raise OSError("no disk")
        answer = compute(batch)
        return {
            "NaN": lambda: answer * np.nan,
            "shape": lambda: answer[:1],
            "dtype": lambda: answer.astype(np.float64),
        }.get(behaviour, lambda: answer)()

    def set_behaviour(self, behaviour, *workers):
        """Makes workers "raise", "wait" so many seconds, or answer "NaN", another "shape" or "dtype"; "" for none."""
        for worker in workers:
            (Path(self.folder) / f"behaviour{worker}").write_text(behaviour)

    def clear(self):
        """Makes all workers compute again."""
        for path in Path(self.folder).glob("behaviour*"):
            path.unlink()

    def pid(self, worker):
        return int((Path(self.folder) / f"pid{worker}").read_text())

    def signal(self, number, *workers):
        for worker in workers:
            os.kill(self.pid(worker), number)

    def kill(self, *workers):
        self.signal(signal.SIGKILL, *workers)


def wait_until(condition, seconds=60.0):
    """Waits until a condition holds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def returned_shares(responses):
    return np.flatnonzero(responses.returned).tolist()


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def is_ray_worker(pid):
    """Returns whether a process is one of Ray that runs an actor."""
    with contextlib.suppress(OSError):
        return "ray::" in Path(f"/proc/{pid}/cmdline").read_text()
    return False


def running_processes(session):
    """Finds the pids of a session's processes, without zombies, which have ended already."""
    pids = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            # The command's name, in brackets, may hold anything.
            state, _, _, process_session = (process / "stat").read_text().rpartition(")")[2].split()[:4]
            if int(process_session) == session and state != "Z":
                pids.append(int(process.name))
    return pids


def listening_addresses(is_chosen):
    """Finds the addresses at which processes listen, in the kernel's tables.

    Args:
        is_chosen: Called with a process's folder in /proc and its command line; returns whether it is one of them.
    """
    inodes = set()
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if is_chosen(process, (process / "cmdline").read_text()):
                links = [os.readlink(fd) for fd in (process / "fd").iterdir()]
                inodes |= {link[8:-1] for link in links if link.startswith("socket:")}
    addresses = []
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            _, local, _, state, *_, inode = line.split()[:10]
            if state == "0A" and inode in inodes:
                words = bytes.fromhex(local.split(":")[0])
                octets = b"".join(words[i : i + 4][::-1] for i in range(0, len(words), 4))
                address = ipaddress.ip_address(octets)
                addresses.append(getattr(address, "ipv4_mapped", None) or address)
    return addresses
