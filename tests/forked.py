"""Programs in processes of their own, forked from one that has imported the library, which takes seconds."""

import atexit
import gc
import multiprocessing as mp
import os
import runpy
import socket
import sys
import tempfile
import threading
import time
from pathlib import Path


def _main(argv, env, output):
    """The life of a program: as `python argv`, with its exit code."""
    at = os.open(output, os.O_WRONLY | os.O_APPEND)
    os.dup2(at, 1)
    os.dup2(at, 2)
    # files of Python that are not those of the server
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    os.environ.clear()
    os.environ.update(env)
    # that of the server need not be gone through
    gc.freeze()
    from shardtensor.observe import guard

    # what the import would have done
    guard.start_from_environment()
    sys.argv = argv
    sys.path.insert(0, str(Path(argv[0]).parent))
    os._exit(_ran(argv[0]))


def _ran(script):
    """The exit code of a script, once all is done that Python does at the end."""
    code = 0
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as e:
        code = e.code if isinstance(e.code, int) else int(e.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    return code


class Program:
    """`python script args` without the start of Python, as a subprocess.Popen that wrote to a file."""

    def __init__(self, script, *args, env=os.environ):
        context = mp.get_context("forkserver")
        context.set_forkserver_preload(["shardtensor", "shardtensor.checkpoint"])
        descriptor, self.output = tempfile.mkstemp(prefix="program-")
        os.close(descriptor)
        argv = [str(script), *map(str, args)]
        self.process = context.Process(target=_main, args=(argv, dict(env), self.output))
        self.process.start()

    @property
    def text(self):
        return Path(self.output).read_text()

    def until(self, said, seconds=150):
        """Wait until the program has said that, or ended."""
        end = time.monotonic() + seconds
        while said not in self.text and self.process.is_alive() and time.monotonic() < end:
            time.sleep(0.05)

    def ended(self, seconds=150):
        """(exit code, output) of the program."""
        self.process.join(seconds)
        if self.process.exitcode is None:
            self.process.kill()
            self.process.join()
            raise TimeoutError(f"did not end in {seconds} s: {self.text}")
        text = self.text
        os.unlink(self.output)
        return self.process.exitcode, text

    def signal(self, number):
        os.kill(self.process.pid, number)


def free_port():
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


def ranks(script, count, *args, **env):
    """The ranks of one program, by torchrun's variables but without its agent."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "OMPI", "PMI"))}
    clean |= {"OMP_NUM_THREADS": "1", "WORLD_SIZE": str(count), "MASTER_ADDR": "localhost"}
    clean |= {"MASTER_PORT": str(free_port()), **env}
    return [
        Program(script, *args, env=clean | {"RANK": str(r), "LOCAL_RANK": str(r)})
        for r in range(count)
    ]


AGENT = """
import sys
{}
from forked import under_agent
under_agent(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
"""


def _rank(argv):
    sys.argv = argv
    sys.path.insert(0, str(Path(argv[0]).parent))
    # the agent waits for what a rank that ends well returns
    if code := _ran(argv[0]):
        os._exit(code)


def under_agent(count, restarts, argv):
    """The ranks of a program as forks of torchrun's agent."""
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(
        1, 1, count, run_id=str(os.getpid()), max_restarts=restarts, start_method="fork",
        rdzv_backend="c10d", rdzv_endpoint="localhost:0", monitor_interval=0.1,
    )  # fmt: skip
    elastic_launch(config, _rank)(argv)


def torchrun(folder, count, script, *args, restarts=0, loads="", **env):
    """(exit code, output) of `torchrun --standalone --nproc-per-node count script args`.

    loads: imports of the agent, which the ranks need not make.
    """
    agent = folder / "agent.py"
    agent.write_text(AGENT.format(loads))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **env}
    return Program(agent, count, restarts, script, *args, env=environment).ended(250)
