"""Converts mutants of tiny checkpoints, each in bounded time: ``python tests/conversion/fuzz.py --mutants 1000``.

Ends with code 1 where one hangs, reads outside its folder, is published and wrong, leaves a partial output, or ends in
an internal error.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from queue import SimpleQueue
from tempfile import TemporaryDirectory

import psutil

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2])]
os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}

from commands import mla  # noqa: E402 (the path comes first)
from fuzz_outcomes import Mutant, Outcome, try_mutant  # noqa: E402
from fuzz_sources import save_sound  # noqa: E402

SECONDS = 20
"""Of processor time: what takes more hangs, whatever else the machine does."""
_WAITED_SECONDS = 10 * SECONDS
_START_SECONDS = 300
_ADDRESS_SPACE = 12 * 2**30
Serve = Callable[[Connection, int, Path], None]
FAULTS = (Outcome.INTERNAL, Outcome.HANG, Outcome.OUTSIDE, Outcome.WRONG, Outcome.LEFT)


class Worker:
    """A process that tries mutants one after the other; a new one takes its place where it hangs or dies.

    Args:
        sound: folder of the checkpoints that are mutated.
        serve: what the process runs.
    """

    def __init__(self, seed: int, sound: Path, serve: Serve | None = None) -> None:
        self._seed, self._sound, self._serve = seed, sound, serve or _serve
        self._process: ForkServerProcess | None = None

    def run(self, index: int) -> Mutant:
        """The mutant ``index`` of the seed."""
        if self._process is None:
            self._process = self._started()
        self._connection.send(index)
        outcome, told = Outcome.HANG, f"more than {SECONDS} s"
        if self._answers(self._process):
            try:
                return self._connection.recv()
            except EOFError:
                outcome, told = Outcome.INTERNAL, "the process died"
        self.close()
        return Mutant(self._seed, index, "", outcome, told)

    def close(self) -> None:
        """Ends the process; another `run` starts one again."""
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._connection.close()
            self._process = None

    def _started(self) -> ForkServerProcess:
        context = multiprocessing.get_context("forkserver")
        self._connection, other = context.Pipe()
        process = context.Process(target=self._serve, args=(other, self._seed, self._sound), daemon=True)
        process.start()
        other.close()
        assert self._connection.poll(_START_SECONDS), "the worker does not start"
        self._connection.recv()
        return process

    def _answers(self, process: ForkServerProcess) -> bool:
        began, deadline = _processor_seconds(process), time.monotonic() + _WAITED_SECONDS
        while not self._connection.poll(1):
            if _processor_seconds(process) - began > SECONDS or time.monotonic() > deadline:
                return False
        return True


def _processor_seconds(process: ForkServerProcess) -> float:
    with suppress(psutil.NoSuchProcess):
        parent = psutil.Process(process.pid)
        return sum(sum(one.cpu_times()[:4]) for one in (parent, *parent.children(recursive=True)))
    return 0.0


def _serve(connection: Connection, seed: int, sound: Path) -> None:
    import resource

    import torch
    from transformers.utils import logging

    torch.set_num_threads(1)
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    resource.setrlimit(resource.RLIMIT_AS, (_ADDRESS_SPACE, _ADDRESS_SPACE))
    with TemporaryDirectory() as folder:
        # Imports and the default text take longer than a mutant.
        sound_one = mla("convert", sound / "single", Path(folder) / "out", "--method", "exact")
    assert sound_one.exit_code == 0, sound_one.output
    connection.send(None)
    while True:
        index = connection.recv()
        with TemporaryDirectory() as folder:
            connection.send(try_mutant(seed, index, sound, Path(folder)))


def try_mutants(seed: int, indices: Iterable[int], processes: int = 1) -> Iterator[Mutant]:
    """Tries the mutants ``indices`` of ``seed``, and gives them as they are done."""
    with TemporaryDirectory() as folder, ThreadPoolExecutor(processes) as threads:
        save_sound(Path(folder))
        idle: SimpleQueue[Worker] = SimpleQueue()
        workers = [Worker(seed, Path(folder)) for _ in range(processes)]
        for worker in workers:
            idle.put(worker)

        def run(index: int) -> Mutant:
            worker = idle.get()
            try:
                return worker.run(index)
            finally:
                idle.put(worker)

        try:
            yield from threads.map(run, indices)
        finally:
            for worker in workers:
                worker.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mutants", type=int, default=1000, help="how many; default 1000")
    parser.add_argument("--seed", type=int, default=0, help="of all that is drawn; default 0")
    parser.add_argument("--only", type=int, help="the number of one mutant")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="at a time; default one a core")
    options = parser.parse_args()
    counts: Counter[Outcome] = Counter()
    indices = range(options.mutants) if options.only is None else [options.only]
    for mutant in try_mutants(options.seed, indices, options.processes):
        counts[mutant.outcome] += 1
        if mutant.outcome in FAULTS or options.only is not None:
            print(mutant, flush=True)
    print(", ".join(f"{counts[outcome]} {outcome}" for outcome in Outcome))
    sys.exit(any(counts[fault] for fault in FAULTS))


if __name__ == "__main__":
    main()
