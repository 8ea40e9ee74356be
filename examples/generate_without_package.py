"""Answers a prompt with a converted checkpoint where this project's package cannot be imported.

    python -I examples/generate_without_package.py OUT "What is the capital of France?"

The checkpoint carries its own code: stock Transformers with ``trust_remote_code=True`` is all that it needs.
"""

from __future__ import annotations

import argparse
import importlib.abc
import sys


class _Absent(importlib.abc.MetaPathFinder):
    """Makes the project's packages unimportable, however they are installed."""

    def find_spec(self, fullname: str, path: object, target: object = None) -> None:
        if fullname.partition(".")[0] in ("modeling_mla", "conversion"):
            raise ModuleNotFoundError(f"No module named {fullname!r}", name=fullname)


def main() -> None:
    """Reads the command line, makes sure that the package is out of reach, and prints the answer."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint")
    parser.add_argument("prompt")
    parser.add_argument("--max-new-tokens", type=int, default=60)
    arguments = parser.parse_args()

    sys.meta_path.insert(0, _Absent())
    try:
        import modeling_mla  # noqa: F401
    except ModuleNotFoundError:
        print("modeling_mla cannot be imported here.")
    else:
        raise SystemExit("modeling_mla was imported; this proves nothing.")

    from transformers import pipeline

    generate = pipeline("text-generation", arguments.checkpoint, trust_remote_code=True)
    print(f"model class: {type(generate.model).__module__}.{type(generate.model).__qualname__}")
    chat = generate.tokenizer.chat_template is not None
    prompt = [{"role": "user", "content": arguments.prompt}] if chat else arguments.prompt
    answer = generate(prompt, max_new_tokens=arguments.max_new_tokens, do_sample=False, return_full_text=False)
    print(f"> {arguments.prompt}\n{answer[0]['generated_text'].strip()}")


if __name__ == "__main__":
    main()
