"""The command `transformers`, for models of this library: `serve` looks a model's class up among Transformers' own.

    python examples/transformers_serve.py serve OUT --continuous-batching --trust-remote-code

Nothing in the library writes into Transformers, so it is this process that adds the names.
"""

from __future__ import annotations

import transformers
from transformers.cli.transformers import main

import modeling_mla


def add_architectures() -> None:
    """Puts this library's causal language models where `architectures` of a configuration is looked up."""
    for name in modeling_mla.__all__:
        if name.endswith("ForCausalLM"):
            setattr(transformers, name, getattr(modeling_mla, name))


if __name__ == "__main__":
    add_architectures()
    main()
