"""Processes of their own that begin with torch and transformers imported, as many tests as need one.

To import them takes a core five seconds or more, which is most of what such tests take. So one process imports them,
and nothing of quantcache, and forks for whoever asks. Between it and a test is a small program that hands over its
arguments, environment, folder and streams, passes signals on and ends as the fork does: it stands for the fork.

Tests of what is imported, of what is read from the environment meanwhile, and of threads want Python as it is.
"""

from __future__ import annotations

import atexit
import functools
import gc
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import types
from pathlib import Path
from typing import IO

CLIENT = """
import json, os, signal, socket, sys
server = socket.socket(socket.AF_UNIX)
server.connect(sys.argv[1])
given = json.dumps([sys.argv[2:], dict(os.environ), os.getcwd()]).encode("ascii")
socket.send_fds(server, [len(given).to_bytes(8, "big")], [0, 1, 2])
server.sendall(given)
answers = server.makefile("r")
pid = int(answers.readline())
for each in (signal.SIGINT, signal.SIGTERM):
    signal.signal(each, lambda number, frame: os.kill(pid, number))
status = int(answers.readline() or 1)
if status < 0:
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, signal.SIG_DFL)
    os.kill(os.getpid(), -status)
os._exit(status)
"""


def python() -> list[str]:
    """What to put in place of ``sys.executable`` before ``-c CODE`` or ``-m MODULE``."""
    if not hasattr(os, "pidfd_open"):  # not Linux
        return [sys.executable]
    return [sys.executable, "-I", "-S", "-c", CLIENT, _server()]


@functools.cache
def _server() -> str:
    """Start the process that forks; gives the path of its socket."""
    path = str(Path(tempfile.mkdtemp(prefix="quantcache-warm-")) / "socket")
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "TRITON_INTERPRET")}
    process = subprocess.Popen(
        [sys.executable, __file__, path],
        env=environment | {"OMP_NUM_THREADS": "1"},
        cwd="/",
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stdin is not None
    with process.stdout:
        assert process.stdout.readline() == b"ready\n"

    def end(stdin: IO[bytes]) -> None:
        stdin.close()
        process.wait()

    atexit.register(end, process.stdin)  # it ends too where this is killed: nobody else can write to it
    return path


def _serve(path: str) -> list[str]:
    """Fork for every client; in the fork, where this returns, everything is as the client has it.

    Args:
        path: Of the socket.

    Returns:
        The arguments of Python.
    """
    gc.disable()
    import torch  # noqa: F401
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM  # noqa: F401

    gc.freeze()  # else every fork would look through all of it, and copy it
    gc.enable()
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the processes that serve one client each
    print("ready", flush=True)
    while True:
        if sys.stdin in select.select([listener, sys.stdin], [], [])[0]:
            Path(path).unlink()
            Path(path).parent.rmdir()
            os._exit(0)
        client, _ = listener.accept()
        if os.fork() == 0:
            listener.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            return _mind(client)
        client.close()


def _mind(client: socket.socket) -> list[str]:
    """Fork once more, as what the client asks for, and tell it how that ends; returns in the fork alone."""
    length, streams, _, _ = socket.recv_fds(client, 8, 3)
    given = b""
    while len(given) < int.from_bytes(length, "big"):
        given += client.recv(1 << 16)
    arguments, environment, folder = json.loads(given)
    pid = os.fork()
    if pid == 0:
        client.close()
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
            os.close(stream)
        # What Python made of the streams depends on what they were.
        sys.stdin = os.fdopen(0, encoding="utf-8", closefd=False)
        sys.stdout = os.fdopen(1, "w", encoding="utf-8", closefd=False)
        sys.stderr = os.fdopen(2, "w", 1, "utf-8", "backslashreplace", closefd=False)
        os.environ.clear()
        os.environ.update(environment)
        os.chdir(folder)
        return arguments
    for stream in (0, 1, *streams):
        os.close(stream)
    client.sendall(f"{pid}\n".encode())
    ended = os.pidfd_open(pid)
    if client in select.select([ended, client], [], [])[0]:  # the client is gone: it was killed
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os._exit(0)
    client.sendall(f"{os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])}\n".encode())
    os._exit(0)


def _main() -> None:
    """Serve; in a fork, do what Python does with its arguments."""
    option, what, *more = _serve(sys.argv[1])
    paths = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    sys.path[0:1] = ["" if option == "-c" else os.getcwd(), *filter(None, paths)]  # in place of this file's folder
    sys.argv = [option, *more]
    if option == "-m":
        runpy.run_module(what, run_name="__main__", alter_sys=True)
        return
    sys.modules["__main__"] = main = types.ModuleType("__main__")
    exec(compile(what, "<string>", "exec"), vars(main))


if __name__ == "__main__":
    _main()
