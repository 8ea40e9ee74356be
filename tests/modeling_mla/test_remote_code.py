"""A saved checkpoint carries its code: it works in a process in which the package cannot be imported."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from prepared_processes import run_prepared
from safetensors.torch import load_file
from tiny import VOCABULARY, assert_close, random_ids, tiny_model
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from modeling_mla import LlamaMLAForCausalLM
from modeling_mla.latent_code_mla import uniform_code

IDS = random_ids(2, 7)
TEXT = ["the latent cache holds one latent for every token", "the rotary key is shared by all heads"]
TEMPLATE = "{% for message in messages %}{{ message['content'] }} {% endfor %}"

PREAMBLE = """
import sys

class NoPackage:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "modeling_mla":
            raise ImportError(name + " is hidden")

sys.meta_path.insert(0, NoPackage())
try:
    import modeling_mla
except ImportError:
    pass
else:
    raise AssertionError("the package must not be importable")
import torch
import transformers

checkpoint, again, transformers.dynamic_module_utils.HF_MODULES_CACHE = sys.argv[1:]
ids = torch.load(checkpoint + "/ids.pt")
"""

LOADING = """
config = transformers.AutoConfig.from_pretrained(checkpoint, trust_remote_code=True)
assert type(config).__name__ == "LlamaMLAConfig", type(config)
results = {}
for name in ("", "ForCausalLM", "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering"):
    auto = getattr(transformers, "AutoModel" + name)
    model = auto.from_pretrained(checkpoint, trust_remote_code=True)
    assert type(model).__name__ == "LlamaMLA" + (name or "Model"), type(model)
    results[name] = model(ids)[0].detach()
model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, trust_remote_code=True)
for name, options in {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True},
    "beams": {"do_sample": False, "num_beams": 3},
    "static": {"do_sample": False, "cache_implementation": "static", "disable_compile": True},
}.items():
    torch.manual_seed(3)
    results[name] = model.generate(ids, max_new_tokens=6, **options)
output = model(ids)
results["cache"] = type(output.cache if "cache" in output else output.past_key_values).__name__
torch.save(results, again + ".pt")
model.save_pretrained(again)
reloaded = transformers.AutoModelForCausalLM.from_pretrained(again, trust_remote_code=True)
assert torch.equal(reloaded(ids).logits, model(ids).logits)
"""

CODED = """
model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, trust_remote_code=True)
output = model(ids)
layers = (output.cache if "cache" in output else output.past_key_values).layers
assert {type(layer).__name__ for layer in layers} == {"CodedLatentLayer"}, layers
tokens = model.generate(ids, max_new_tokens=6, do_sample=False)
torch.save({"logits": output.logits.detach(), "tokens": tokens}, again + ".pt")
"""

PIPELINE = """
import json

generator = transformers.pipeline("text-generation", model=checkpoint, trust_remote_code=True)
options = {"max_new_tokens": 6, "do_sample": False}
text = generator("the latent cache", **options)[0]["generated_text"]
chat = generator([{"role": "user", "content": "the rotary key"}], **options)[0]["generated_text"]
json.dump({"text": text, "chat": chat}, open(again + ".json", "w"))
"""


def run_without_package(script: str, checkpoint: Path, again: Path) -> None:
    folder = checkpoint.parent
    (folder / "script.py").write_text(PREAMBLE + script)
    # Code of checkpoints is copied below the last one.
    done = run_prepared(folder / "script.py", checkpoint, again, folder / "modules", folder=folder)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("remote") / "checkpoint"
    tiny_model(
        dtype=torch.float32,
        kv_lora_ranks=[5, 16],
        qk_rope_head_dims=[2, 4],
        rope_inv_freq=[torch.rand(1).tolist(), torch.rand(2).tolist()],
        latent_norm="identity",
        pad_token_id=0,
    ).save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.train_from_iterator(TEXT, trainers.WordLevelTrainer(special_tokens=["<unk>", "<s>"]))
    tokenizer.add_tokens([f"word{index}" for index in range(VOCABULARY - tokenizer.get_vocab_size())])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>")
    fast.chat_template = TEMPLATE
    fast.save_pretrained(folder)
    torch.save(IDS, folder / "ids.pt")
    return folder


def test_every_file_of_the_package_that_is_needed_is_saved(checkpoint):
    saved = {file.name for file in checkpoint.glob("*.py")}
    assert {"llama_mla.py", "attention_mla.py", "cache_mla.py", "routes_mla.py"} <= saved
    assert "from modeling_mla" not in "".join(file.read_text() for file in checkpoint.glob("*.py"))


def test_every_auto_class_and_generation(checkpoint, tmp_path):
    again = tmp_path / "again"
    run_without_package(LOADING, checkpoint, again)
    results = torch.load(f"{again}.pt", weights_only=True)
    model = LlamaMLAForCausalLM.from_pretrained(checkpoint)
    with torch.no_grad():
        assert_close(results["ForCausalLM"], model(IDS).logits, 1e-5)
        assert_close(results[""], model.model(IDS).last_hidden_state, 1e-5)
    assert results["ForTokenClassification"].shape[:2] == IDS.shape
    assert results["cache"] == "LatentCache"
    for name, options in {"greedy": {}, "beams": {"num_beams": 3}, "sampling": {"do_sample": True}}.items():
        torch.manual_seed(3)
        expected = model.generate(IDS, max_new_tokens=6, **({"do_sample": False} | options))
        assert torch.equal(results[name], expected), name
    assert torch.equal(results["static"], results["greedy"])

    first, second = load_file(checkpoint / "model.safetensors"), load_file(again / "model.safetensors")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert {file.name for file in again.glob("*.py")} == {file.name for file in checkpoint.glob("*.py")}
    configs = [json.loads((folder / "config.json").read_text()) for folder in (checkpoint, again)]
    assert configs[0] == configs[1]


def test_a_code_travels_with_its_checkpoint(tmp_path):
    folder, again = tmp_path / "coded", tmp_path / "again"
    model = tiny_model(dtype=torch.float32, latent_code=uniform_code(4, 16, 4).to_dict())
    model.save_pretrained(folder)
    torch.save(IDS, folder / "ids.pt")
    run_without_package(CODED, folder, again)
    results = torch.load(f"{again}.pt", weights_only=True)
    loaded = LlamaMLAForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        assert_close(results["logits"], loaded(IDS).logits, 1e-5)
    assert torch.equal(results["tokens"], loaded.generate(IDS, max_new_tokens=6, do_sample=False))


def test_pipeline_with_text_and_chat(checkpoint, tmp_path):
    again = tmp_path / "pipeline"
    run_without_package(PIPELINE, checkpoint, again)
    answers = json.loads(Path(f"{again}.json").read_text())

    tokenizer, model = AutoTokenizer.from_pretrained(checkpoint), LlamaMLAForCausalLM.from_pretrained(checkpoint)

    def answer(text: str) -> str:
        ids = tokenizer(text, return_tensors="pt").input_ids
        new = model.generate(ids, max_new_tokens=6, do_sample=False)[0, ids.shape[1] :]
        return tokenizer.decode(new, skip_special_tokens=True)

    assert answers["text"] == "the latent cache" + answer("the latent cache")
    content = answer("the rotary key ")
    assert content
    assert answers["chat"] == [
        {"role": "user", "content": "the rotary key"},
        {"role": "assistant", "content": content},
    ]


TWO_CHECKPOINTS = """
results = {}
for name, folder in {"first": checkpoint, "second": again}.items():
    for auto in ("AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoModelForSequenceClassification"):
        loaded = getattr(transformers, auto).from_pretrained(folder, trust_remote_code=True)
        config = loaded if auto == "AutoConfig" else loaded.config
        assert config.written_by == name, (name, auto, config.written_by)
        if auto != "AutoConfig":
            codes = {type(module).__module__ for module in loaded.modules() if "kv_b_proj" in module._modules}
            assert codes == {type(config).__module__.replace("llama_mla", "attention_mla")}, (codes, type(config))
"""


def test_two_checkpoints_in_one_process_run_each_its_own_code(checkpoint, tmp_path):
    folders = [tmp_path / name for name in ("first", "second")]
    for folder in folders:
        shutil.copytree(checkpoint, folder)
        code = folder / "llama_mla.py"
        mark = f'    model_type = "llama_mla"\n    written_by = "{folder.name}"\n'
        code.write_text(code.read_text().replace('    model_type = "llama_mla"\n', mark))
    run_without_package(TWO_CHECKPOINTS, *folders)


TOKENIZER = """
tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint)
assert tokenizer("the latent cache").input_ids, tokenizer
code = [name for name in sys.modules if name.startswith("transformers_modules.")]
assert not code, code
"""


def test_the_tokenizer_runs_no_code_of_the_checkpoint(checkpoint, tmp_path):
    """Where nobody is there to answer, that is: Transformers asks before it looks at the tokenizer's files."""
    run_without_package(TOKENIZER, checkpoint, tmp_path)
