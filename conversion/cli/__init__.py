"""The command line: ``mla sweep | inspect | plan | convert | run | verify | chat | compare | heal | export | ...``.

In: arguments. Out: results on stdout, everything else on stderr, and an exit code. A new command is one file with one
function, and one name in `COMMANDS`.
"""

from .app import make_app
from .backends import backends
from .chat import chat
from .compare import compare
from .convert import convert
from .export import export
from .families import families
from .heal import heal
from .inspect import inspect
from .plan import plan
from .push import push
from .run import run
from .sweep import sweep
from .verify import verify

COMMANDS = (sweep, inspect, plan, convert, run, verify, chat, compare, heal, export, push, families, backends)

app = make_app(COMMANDS)


def main() -> None:
    """Runs the console script ``mla``."""
    app(prog_name="mla")
