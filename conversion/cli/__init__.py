"""The command line: ``mla sweep | families | backends | inspect | plan | convert | run | verify | heal | export``.

In: arguments. Out: results on stdout, everything else on stderr, and an exit code. A new command is one file with one
function, and one name in `COMMANDS`.
"""

from .app import make_app
from .backends import backends
from .convert import convert
from .export import export
from .families import families
from .heal import heal
from .inspect import inspect
from .plan import plan
from .run import run
from .sweep import sweep
from .verify import verify

COMMANDS = (sweep, families, backends, inspect, plan, convert, run, verify, heal, export)

app = make_app(COMMANDS)


def main() -> None:
    """Runs the console script ``mla``."""
    app()
