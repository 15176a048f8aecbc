"""Injects faults into workers, and observes processes and sockets."""

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
    """Replaces the computation of workers that are threads of this process."""

    def __init__(self):
        self.does = {}
        self._waiting_for = []

    def __call__(self, worker, compute, batch):
        return self.does.get(worker, lambda compute, batch: compute(batch))(compute, batch)

    def waits(self, *numbers):
        """Has workers wait until `go_on`."""
        go = threading.Event()
        self._waiting_for.append(go)

        def wait(compute, batch):
            go.wait(60)
            return compute(batch)

        self.does.update(dict.fromkeys(numbers, wait))

    def go_on(self):
        """Has all workers compute again, those that wait too."""
        self.does.clear()
        while self._waiting_for:
            self._waiting_for.pop().set()

    def fails(self, worker, answer):
        self.does[worker] = answer


class FileFaults:
    """Replaces the computation of workers in other processes by what a file says; notes their pids."""

    def __init__(self, folder):
        self.folder = str(folder)

    def __call__(self, worker, compute, batch):
        own = Path(self.folder) / f"pid{worker}"
        if not own.exists() or own.read_text() != str(os.getpid()):
            own.with_suffix(".new").write_text(str(os.getpid()))
            own.with_suffix(".new").replace(own)
        file = Path(self.folder) / f"does{worker}"
        does = file.read_text() if file.exists() else ""
        if does.startswith("wait"):
            time.sleep(float(does.split()[1]))
        if does == "raise":
            raise OSError("no disk")
        answer = compute(batch)
        return {
            "NaN": lambda: answer * np.nan,
            "shape": lambda: answer[:1],
            "dtype": lambda: answer.astype(np.float64),
        }.get(does, lambda: answer)()

    def tell(self, does, *workers):
        for worker in workers:
            (Path(self.folder) / f"does{worker}").write_text(does)

    def forget(self):
        for path in Path(self.folder).glob("does*"):
            path.unlink()

    def pid(self, worker):
        return int((Path(self.folder) / f"pid{worker}").read_text())

    def signal(self, number, *workers):
        for worker in workers:
            os.kill(self.pid(worker), number)

    def kill(self, *workers):
        self.signal(signal.SIGKILL, *workers)


def until(condition, seconds=60.0):
    """Waits until it holds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def returned(responses):
    return np.flatnonzero(responses.returned).tolist()


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def alive_in_ray(pid):
    """Whether it is a process of Ray that runs an actor."""
    with contextlib.suppress(OSError):
        return "ray::" in Path(f"/proc/{pid}/cmdline").read_text()
    return False


def processes_of_session(session):
    """The numbers of those that run; not of those that have ended and that nobody has asked about yet."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            # The command's name, in brackets, may hold anything.
            state, _, _, of = (process / "stat").read_text().rpartition(")")[2].split()[:4]
            if int(of) == session and state != "Z":
                found.append(int(process.name))
    return found


def sockets_of(chosen):
    """Addresses that processes listen at, from the kernel's tables."""
    inodes = set()
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if chosen(process, (process / "cmdline").read_text()):
                links = [os.readlink(fd) for fd in (process / "fd").iterdir()]
                inodes |= {link[8:-1] for link in links if link.startswith("socket:")}
    found = []
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            _, local, _, state, *_, inode = line.split()[:10]
            if state == "0A" and inode in inodes:
                words = bytes.fromhex(local.split(":")[0])
                octets = b"".join(words[i : i + 4][::-1] for i in range(0, len(words), 4))
                address = ipaddress.ip_address(octets)
                found.append(getattr(address, "ipv4_mapped", None) or address)
    return found
