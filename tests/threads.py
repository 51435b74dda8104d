"""Backward on a thread of its own, as that of a GPU: what Python keeps for a thread is not there."""

import threading
from contextlib import contextmanager

import torch
from torch.autograd import Variable
from torch.testing._internal.distributed import multi_threaded_pg as threaded

from shardtensor.comm import observers
from shardtensor.ranks import workers


def _inherited():
    """Whether there is what torch's threads inherit, and ours do not: modes, levels, profilers."""
    modes = torch._C._len_torch_dispatch_stack() or torch._C._len_torch_function_stack()
    level = torch._C._functorch.maybe_current_level() is not None
    return modes or level or torch._C._autograd._profiler_enabled()


def unseen(fn):
    """fn, whose frames are no lines that a user could open: torch's threads have none."""
    fn.__code__ = fn.__code__.replace(co_filename="<the engine>")
    return fn


class Engine:
    """Torch's engine, whose backward passes each run on a new thread."""

    def __init__(self, engine):
        self.engine, self.passes = engine, 0

    def __getattr__(self, name):
        return getattr(self.engine, name)

    @unseen
    def run_backward(self, *args, **kwargs):
        create_graph = len(args) >= 4 and args[3]
        # which the library has where it is called
        if create_graph or _inherited():
            return self.engine.run_backward(*args, **kwargs)
        self.passes += 1
        rank, done = observers.thread.__dict__, {}
        world = getattr(threaded.ThreadLocalWorld._world, "world", None)

        @unseen
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
