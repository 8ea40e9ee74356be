"""What importing the package brings with it, and that nothing which it calls is deprecated."""

import subprocess
import sys
import warnings
from pathlib import Path

import torch
from tiny import decode, random_ids, tiny_model
from transformers import ContinuousBatchingConfig, GenerationConfig

import modeling_mla

LOADED = "print(*sorted({name.partition('.')[0] for name in sys.modules}))"


def packages(statement: str) -> set[str]:
    """Top-level packages that a process has loaded after ``statement``."""
    command = [sys.executable, "-c", f"import sys; {statement}; {LOADED}"]
    return set(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split())


def test_import_loads_no_package_beyond_those_of_transformers():
    stock = packages("from transformers import LlamaForCausalLM, GenerationMixin, ContinuousBatchingManager")
    assert packages("import modeling_mla") - stock == {"modeling_mla"}


def test_import_needs_no_optional_package():
    script = (
        "import sys\n"
        "for name in ('peft', 'accelerate', 'triton', 'kernels', 'datasets', 'trl'):\n"
        "    sys.modules[name] = None\n"
        "import modeling_mla\n"
        "config = modeling_mla.LlamaMLAConfig(vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1,\n"
        "    num_attention_heads=2, kv_lora_rank=4, qk_nope_head_dim=4, qk_rope_head_dim=2, v_head_dim=4)\n"
        "import torch\n"
        "model = modeling_mla.LlamaMLAForCausalLM(config).eval()\n"
        "model.generate(torch.ones(1, 3, dtype=torch.long), max_new_tokens=2, do_sample=False)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_nothing_deprecated_is_called(tmp_path):
    """By the package itself: a warning is shown at the line that made the call."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model, ids = tiny_model(dtype=torch.float32), random_ids(1, 9)
        decode(model, ids)
        for options in ({}, {"num_beams": 2}, {"cache_implementation": "static", "disable_compile": True}):
            model.generate(ids, max_new_tokens=3, do_sample=False, **options)
        short = GenerationConfig(max_new_tokens=3, do_sample=False, eos_token_id=-1, pad_token_id=0)
        # As many pages as memory holds, which is the default, take half a minute to be filled with zeros.
        paging = ContinuousBatchingConfig(page_size=4, num_blocks=40, max_batch_tokens=16)
        model.generate_batch([ids[0].tolist()], generation_config=short, continuous_batching_config=paging)
        model.train()(ids, labels=ids).loss.backward()
        model.save_pretrained(tmp_path)
        type(model).from_pretrained(tmp_path)
    package = Path(modeling_mla.__file__).parent
    deprecated = (DeprecationWarning, FutureWarning, PendingDeprecationWarning)
    assert not [
        str(warning.message)
        for warning in caught
        if Path(warning.filename).parent == package and issubclass(warning.category, deprecated)
    ]
