"""Conversations in a model's chat template, rendered by a process of its own: a template is a program of a stranger's.

It may refuse a conversation, never end, or write without limit. Transformers runs it in a sandbox, which bounds what it
may reach, but neither time nor memory.
"""

from __future__ import annotations

import json
import resource
import signal
import subprocess
import sys
from functools import cache
from typing import Any

from transformers.utils.chat_template_utils import render_jinja_template

_SECONDS = 5
"""Processor time for all conversations, in seconds."""
_MEMORY = 2**30
"""Address space of the process, in bytes; it needs a fifth of that for itself."""
_CHARACTERS = 100_000
"""The length of one rendered conversation at most."""
_REASON = 100

Conversation = list[dict[str, str]]


class TemplateError(Exception):
    """A chat template that does not render; the message says why, as the end of a sentence."""


def render(template: str, conversations: list[Conversation], variables: dict[str, Any]) -> tuple[str, ...]:
    """Renders conversations as ``apply_chat_template`` does.

    Args:
        template: Jinja source.
        conversations: each the messages of one, with their role and content.
        variables: the special tokens by name.

    Raises:
        TemplateError: it refuses a conversation, fails, or needs too much time, memory or text.
    """
    answer = _answered(json.dumps({"template": template, "conversations": conversations, "variables": variables}))
    if "failure" in answer:
        raise TemplateError(answer["failure"])
    return tuple(answer["rendered"])


@cache
def _answered(task: str) -> dict[str, Any]:
    # Without this module's folder in front of the path, where its modules would hide others of their names.
    command = [sys.executable, "-P", __file__]
    done = subprocess.run(command, input=task, capture_output=True, encoding="utf-8", check=False)
    if done.returncode in (-signal.SIGXCPU, -signal.SIGKILL):
        return {"failure": f"takes more than {_SECONDS} s"}
    if done.returncode:
        return {"failure": f"ends the process that renders it, with code {done.returncode}"}
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def _answer(task: dict[str, Any]) -> dict[str, Any]:
    rendered = []
    for conversation in task["conversations"]:
        try:
            ((text,), _) = render_jinja_template([conversation], chat_template=task["template"], **task["variables"])
        except MemoryError:
            return {"failure": f"needs more than {_MEMORY // 2**30} GiB of memory"}
        except Exception as error:
            # Jinja's own, those of the template, and whatever its expressions raise.
            return {"failure": f"fails ({type(error).__name__}: {str(error)[:_REASON]})"}
        if len(text) > _CHARACTERS:
            return {"failure": f"makes {len(text)} characters of one conversation"}
        rendered.append(text)
    return {"rendered": rendered}


def _limit() -> None:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    seconds = int(usage.ru_utime + usage.ru_stime) + _SECONDS
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))


if __name__ == "__main__":
    _limit()
    json.dump(_answer(json.load(sys.stdin)), sys.stdout)
