"""Starts an OpenAI-compatible server on loopback and chats with it: what the `serve_*.py` examples have in common."""

from __future__ import annotations

import json
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

HOST = "127.0.0.1"
_PATIENCE = 600
"""Seconds for a server to load its model."""


def free_port() -> int:
    """A port of loopback that nothing listens on."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return probe.getsockname()[1]


@contextmanager
def serving(command: Sequence[str], port: int, environment: dict[str, str] | None = None) -> Iterator[str]:
    """Runs a server for as long as the block lasts; gives its address once it listens.

    Raises:
        RuntimeError: it ended before, or does not listen.
    """
    address = f"http://{HOST}:{port}"
    server = subprocess.Popen(command, env=environment)
    try:
        started = time.monotonic()
        while not _listens(port):
            if server.poll() is not None:
                raise RuntimeError(f"{command[0]} ended with exit code {server.returncode}; see its output above.")
            if time.monotonic() - started > _PATIENCE:
                raise RuntimeError(f"{command[0]} does not listen at {address} after {_PATIENCE} s.")
            time.sleep(0.5)
        yield address
    finally:
        server.terminate()
        server.wait()


def chat(address: str, model: str, prompt: str, max_tokens: int = 40) -> Iterator[str]:
    """The pieces of an answer as they come (server-sent events of ``/v1/chat/completions``), greedy."""
    body = {
        "model": model,
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": max_tokens,
        "temperature": 0.0,
        "stream": True,
    }
    request = urllib.request.Request(
        f"{address}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=_PATIENCE) as response:
        for line in response:
            data = line.decode().strip().removeprefix("data:").strip()
            if data.startswith("{"):
                for choice in json.loads(data).get("choices", []):
                    yield choice.get("delta", {}).get("content") or ""


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex((HOST, port)) == 0
