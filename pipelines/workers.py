"""Processes in which stages run side by side, sharing the cores between them."""

import io
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from functools import partial
from multiprocessing import get_context, parent_process
from threading import Thread

from engine.memory import keep_freed_memory


@contextmanager
def workers(jobs: int) -> Iterator[Callable[..., Future]]:
    """submit(label, function, *arguments) -> future: in this process for one job, else in one of `jobs`.

    Several processes of few threads get more done than one of many where the networks are small. Their output
    lines open with the label."""
    if jobs == 1:
        yield run_here
        return
    threads = max(1, (os.cpu_count() or 1) // jobs)
    with ProcessPoolExecutor(jobs, get_context("spawn"), prepare, (threads,)) as pool:
        yield partial(pool.submit, run_labelled)


def run_here(label: str, function: Callable, *arguments) -> Future:
    """Runs the function at once, with all cores."""
    future: Future = Future()
    try:
        future.set_result(function(*arguments))
    except Exception as error:
        future.set_exception(error)
    return future


def run_labelled(label: str, function: Callable, *arguments):
    """What the function returns; every line that it prints opens with the label."""
    ignored = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with redirect_stdout(Labelled(sys.stdout, label)), redirect_stderr(Labelled(sys.stderr, label)):
            return function(*arguments)
    finally:
        signal.signal(signal.SIGINT, ignored)


def prepare(threads: int) -> None:
    """Ctrl-C reaches every process of the terminal; a worker heeds it while it has work (see run_labelled): a training
    saves its state, an evaluation keeps its ledger. Nor does it outlive the pipeline."""
    os.environ["OMP_NUM_THREADS"] = str(threads)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    Thread(target=end_with_parent, daemon=True).start()
    keep_freed_memory()
    import torch

    torch.set_num_threads(threads)


def end_with_parent() -> None:
    """Waits for the end of the pipeline's process, by whatever signal, and ends this one: what works is interrupted as
    by Ctrl-C first."""
    parent_process().join()
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        os.kill(os.getpid(), signal.SIGINT)
    while signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        time.sleep(0.1)
    os._exit(130)


class Labelled(io.TextIOBase):
    """Passes whole lines on to a stream, each behind a label. Never a terminal, so no bars are drawn."""

    def __init__(self, stream, label: str):
        self.stream, self.label, self.line = stream, label, ""

    def write(self, text: str) -> int:
        *lines, self.line = (self.line + text).split("\n")
        for line in lines:
            self.stream.write(f"{self.label} | {line}\n")
        self.stream.flush()
        return len(text)
