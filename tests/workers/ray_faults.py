"""What workers in other processes do wrong, told by files that both sides see."""

import os
import signal
import time
from pathlib import Path

import numpy as np


class FileFaults:
    """In place of computing, a worker leaves its process's number and does what a file of its number says, if any."""

    def __init__(self, folder):
        self.folder = str(folder)

    def __call__(self, worker, compute, batch):
        own = Path(self.folder) / f"pid{worker}"
        if not own.exists() or own.read_text() != str(os.getpid()):
            own.with_suffix(".new").write_text(str(os.getpid()))
            own.with_suffix(".new").replace(own)
        told = Path(self.folder) / f"does{worker}"
        does = told.read_text() if told.exists() else ""
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
