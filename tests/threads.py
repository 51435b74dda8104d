"""Backward on a thread of its own, as that of a GPU: what Python keeps for a thread is not there."""

import threading
from contextlib import contextmanager

import torch
from torch.autograd import Variable
from torch.testing._internal.distributed import multi_threaded_pg as threaded

from shardtensor.comm import observers
from shardtensor.ranks import workers


class Engine:
    """Torch's engine, whose backward passes each run on a new thread."""

    def __init__(self, engine):
        self.engine, self.passes = engine, 0

    def __getattr__(self, name):
        return getattr(self.engine, name)

    def run_backward(self, *args, **kwargs):
        if torch._C._len_torch_dispatch_stack() or torch._C._len_torch_function_stack():
            # torch's threads inherit modes, ours do not
            return self.engine.run_backward(*args, **kwargs)
        self.passes += 1
        rank, done = observers.thread.__dict__, {}
        world = getattr(threaded.ThreadLocalWorld._world, "world", None)

        def body():
            # which simulated rank this is
            observers.thread.__dict__.update(rank)
            if world is not None:
                threaded.ThreadLocalWorld._world.world = world
            try:
                with torch.autograd.set_multithreading_enabled(False):
                    done["result"] = self.engine.run_backward(*args, **kwargs)
            except BaseException as e:
                done["error"] = e
            rank.update(observers.thread.__dict__)

        thread = threading.Thread(target=body)
        thread.start()
        thread.join()
        if "error" in done:
            raise done["error"]
        return done["result"]


@contextmanager
def backward_apart():
    """Inside, every backward pass runs on a new thread."""
    kept = Variable._execution_engine
    Variable._execution_engine = engine = Engine(kept)
    try:
        yield engine
    finally:
        Variable._execution_engine = kept


class Apart:
    """A function whose backward passes run apart, in whatever process."""

    def __init__(self, function):
        self.function = function

    def __call__(self, *args):
        with backward_apart():
            return self.function(*args)


@contextmanager
def all_apart():
    """The same in worker processes, too."""
    run = workers.Pool.run
    workers.Pool.run = lambda pool, fn, *args, **kwargs: run(pool, Apart(fn), *args, **kwargs)
    try:
        with backward_apart():
            yield
    finally:
        workers.Pool.run = run
