"""What hangs on a release of Transformers stands in one file, and nothing of Transformers is changed."""

import ast
import functools
import threading
from pathlib import Path

import pytest
import torch
from tiny import random_ids, tiny_config, tiny_model
from transformers import LlamaConfig, LlamaForCausalLM

import modeling_mla
from modeling_mla import LatentCache, LlamaMLAForCausalLM
from modeling_mla import transformers_seams_mla as seams

FILES = sorted(Path(modeling_mla.__file__).parent.glob("*.py"))
SEAMS = "transformers_seams_mla.py"
PUBLIC = {"transformers", "transformers.utils"}
every_file = pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)


def external_names(tree: ast.Module) -> set[str]:
    """Names that a file imports from outside the package."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import) or (isinstance(node, ast.ImportFrom) and not node.level):
            names |= {(alias.asname or alias.name).partition(".")[0] for alias in node.names}
    return names


@every_file
def test_private_parts_of_transformers_are_imported_in_one_file(file):
    """A family may import the body that it changes."""
    modules = {
        node.module
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.ImportFrom) and not node.level and node.module.partition(".")[0] == "transformers"
    }
    private = {name for name in modules - PUBLIC if not name.startswith("transformers.models.")}
    assert file.name == SEAMS or not private


@every_file
def test_nothing_is_assigned_to_what_is_not_ours(file):
    tree = ast.parse(file.read_text())
    external, found = external_names(tree), []
    for node in ast.walk(tree):
        targets = node.targets if isinstance(node, ast.Assign | ast.Delete) else [getattr(node, "target", None)]
        for target in targets:
            while isinstance(target, ast.Attribute) and isinstance(target.value, ast.Attribute):
                target = target.value
            if isinstance(target, ast.Attribute) and isinstance(target.value, ast.Name):
                found += [ast.unparse(node)] if target.value.id in external else []
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("setattr", "delattr"):
            # By name alone nobody sees whose attribute it is; the one place copies functions that it has just made.
            found += [ast.unparse(node)] if (file.name, ast.unparse(node.args[0])) != (SEAMS, "copied") else []
    assert not found


def test_another_thread_builds_stock_models_meanwhile():
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, head_dim=8
    )
    failures, built, done = [], 0, threading.Event()

    def build_stock() -> None:
        nonlocal built
        while not done.is_set():
            try:
                assert type(LlamaForCausalLM(config).model.layers[0].self_attn).__name__ == "LlamaAttention"
            except Exception as error:
                failures.append(error)
            built += 1

    thread = threading.Thread(target=build_stock)
    thread.start()
    for _ in range(60):
        LlamaMLAForCausalLM(tiny_config())
    done.set()
    thread.join()
    assert built > 5
    assert not failures


@pytest.mark.parametrize("name", seams.CACHE_NAMES)
@pytest.mark.parametrize("whole", [True, False])
def test_a_cache_is_taken_under_the_name_of_any_release(name, whole, recwarn):
    model, ids = tiny_model(), random_ids(1, 9)
    cache, run = LatentCache(config=model.config), model if whole else model.model
    with torch.no_grad():
        expected = run(ids)[0]
        run(ids[:, :6], **{name: cache})
        assert cache.get_seq_length() == 6
        assert torch.allclose(run(ids[:, 6:], **{name: cache})[0], expected[:, 6:])
    assert all("is deprecated" in str(warning.message) for warning in recwarn)


@pytest.mark.parametrize("release", ["5.22.0", "5.99.1", "6.0.0.dev0"])
def test_an_untested_release_is_named_once(release, monkeypatch):
    messages = []
    seams.logger.warning_once.cache_clear()
    monkeypatch.setattr(seams.transformers, "__version__", release)
    monkeypatch.setattr(seams.logger, "warning", messages.append)
    for _ in range(2):
        seams.warn_of_untested_release()
    assert len(messages) == 1
    assert all(version in messages[0] for version in (release, *seams.TESTED_RELEASES))


def _plain(x):
    return helper(x)


def helper(x):
    return x + 1


def passing(function):
    @functools.wraps(function)
    def wrapper(x):
        return 10 * function(x)

    return wrapper


def test_functions_with_other_globals():
    doubled = seams.with_globals(_plain, helper=lambda x: 2 * x)
    decorated = seams.with_globals(passing(passing(_plain)), helper=lambda x: 2 * x)
    assert (doubled(5), decorated(5), _plain(5), passing(_plain)(5)) == (10, 1000, 6, 60)
    assert decorated.__name__ == "_plain"
    assert seams.with_globals(functools.lru_cache(_plain), helper=helper) is None
    assert seams.names_used(passing(_plain)) == {"helper"}


def test_a_body_that_does_not_name_a_class_cannot_be_built_with_another():
    from modeling_mla.modeling_mla import built_with

    with pytest.raises(TypeError, match="LlamaForCausalLM does not build LlamaAttention"):
        built_with(LlamaForCausalLM, LlamaAttention=torch.nn.Identity)
