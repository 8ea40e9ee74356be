"""What importing the package costs and does, and that its own use of deprecated calls is an error in tests."""

import subprocess
import sys
import time
import warnings

import pytest

BASELINE = "import torch, transformers; from transformers import LlamaForCausalLM, GenerationMixin"


def seconds(statement: str) -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", statement], check=True, capture_output=True)
    return time.perf_counter() - start


def test_import_takes_little_more_than_transformers():
    # The least of up to three, alternating, so that a burst of load meets both.
    baseline = own = float("inf")
    for _ in range(3):
        baseline, own = min(baseline, seconds(BASELINE)), min(own, seconds("import modeling_mla"))
        if own < 1.5 * baseline:
            break
    assert own < 1.5 * baseline, f"{own:.2f} s against {baseline:.2f} s"


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


@pytest.mark.parametrize("category", [DeprecationWarning, FutureWarning])
def test_deprecated_calls_of_the_package_are_errors(category):
    with pytest.raises(category):
        warnings.warn_explicit("old", category, "cache_mla.py", 1, module="modeling_mla.cache_mla")
