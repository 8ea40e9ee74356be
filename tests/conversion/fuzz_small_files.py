"""Mutations of a checkpoint's small files: configuration, generation defaults, tokenizer, chat template."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from fuzz_weights import STRANGE, Mutation, text_changed

_RUNNING = {
    "_attn_implementation": "flash_attention_2",
    "attn_implementation": "evil/kernel",
    "return_dict": False,
    "output_attentions": True,
    "use_cache": False,
    "transformers_weights": "../outside/model.safetensors",
    "auto_map": {"AutoConfig": "evil--code.Config", "AutoModelForCausalLM": "modeling_evil.Model"},
    "custom_pipelines": {"text-generation": {"impl": "evil.Pipeline"}},
    "quantization": {"group_size": 64, "bits": 4},
    "quantization_config": {"quant_method": "gptq", "bits": 4},
    "softmax_scale": 2.0,
    "latent_norm": "rms_norm",
    "kv_lora_rank": 8,
    "rope_inv_freq": [[1.0]],
    "sliding_window": 4,
    "layer_types": ["full_attention"] * 3,
    "rope_scaling": {"rope_type": "yarn", "factor": 2.0},
    "rope_theta": 10.0,
    "partial_rotary_factor": 0.5,
    "pretraining_tp": 2,
    "torch_dtype": "auto",
    "dtype": "int64",
    "tie_word_embeddings": True,
    "architectures": ["LlamaForSequenceClassification"],
    "configuration_files": ["../outside/config.json", "config.4.0.0.json"],
    "text_config": {"hidden_size": 8},
    "to_dict": 5,
    "cache_bytes_per_token": 5,
}
"""Fields that say how a model is run, that are named as ours are, or that mean another model; and a value of each."""
_ROPE = ("rope_type", "rope_theta", "factor", "attention_factor", "original_max_position_embeddings")
_TOKENIZER = {
    "auto_map": {"AutoTokenizer": ["evil--code.Tokenizer", None]},
    "is_local": False,
    "local_files_only": True,
    "fast_tokenizer_files": ["../outside/tokenizer.4.0.0.json"],
    "tokenizer_file": "../outside/tokenizer.json",
    "tokenizer_class": "EvilTokenizer",
    "model_max_length": 8,
    "additional_special_tokens": ["<a>", "<b>"],
    "add_prefix_space": True,
    "clean_up_tokenization_spaces": True,
}
_TEMPLATES = (
    "{{ raise_exception('no') }}",
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "{{ 'x' * 9999999999 }}",
    "{% if",
    "{{ messages.x.y }}",
    "",
    "{{ cycler.__init__.__globals__.os.system('true') }}",
)


def small_file_mutations(source: Path) -> list[Mutation]:
    """Those that fit the kind of checkpoint: a GGUF has no small files."""
    if not (source / "config.json").is_file():
        return []
    config = [config_field_changed, config_field_changed, config_field_added, config_rope_changed]
    tokenizer = [tokenizer_ids_changed, tokenizer_part_changed, tokenizer_field_added, template_changed]
    return [*config, *tokenizer, small_text_changed, small_file_replaced, generation_field_changed]


def _edit(path: Path, field: str, value: Any) -> str:
    values = json.loads(path.read_text())
    values[field] = value
    if value is ...:
        del values[field]
    path.write_text(json.dumps(values))
    return f"{field} in {path.name} is {str(value)[:60]!r}"


def config_field_changed(draw: random.Random, source: Path, outside: Path) -> str:
    path = source / "config.json"
    return _edit(path, draw.choice(sorted(json.loads(path.read_text()))), draw.choice((*STRANGE, ...)))


def config_field_added(draw: random.Random, source: Path, outside: Path) -> str:
    field = draw.choice(sorted(_RUNNING))
    value = _RUNNING[field] if draw.random() < 0.7 else draw.choice(STRANGE)
    return _edit(source / "config.json", field, value)


def config_rope_changed(draw: random.Random, source: Path, outside: Path) -> str:
    types = ("default", "linear", "yarn", "llama3", "dynamic", "longrope", "proportional", "x")
    rope = {"rope_type": draw.choice(types), "rope_theta": 1000.0}
    for field in draw.sample(_ROPE, draw.randrange(len(_ROPE))):
        rope[field] = draw.choice((*STRANGE, 2.0, 32))
    return _edit(source / "config.json", "rope_parameters", rope)


def tokenizer_ids_changed(draw: random.Random, source: Path, outside: Path) -> str:
    path = source / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    token = draw.choice(sorted(vocabulary))
    value = draw.choice((0, 257, 258, 10_000, 2**31, 2**32, 2**63, -1, "x", None, ...))
    vocabulary["new" if draw.random() < 0.3 else token] = value
    if value is ...:
        vocabulary.pop("new", None) or vocabulary.pop(token, None)
    path.write_text(json.dumps(tokenizer))
    return f"token {token!r} has id {value}"


def tokenizer_part_changed(draw: random.Random, source: Path, outside: Path) -> str:
    path = source / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    added = {"content": "<new>", "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    added |= {"id": draw.choice((258, 259, 2**31, -1)), "special": draw.random() < 0.5}
    part = draw.choice(("added_tokens", *sorted(tokenizer), *sorted(tokenizer)))
    tokenizer[part] = [*tokenizer["added_tokens"], added] if part == "added_tokens" else draw.choice(STRANGE)
    path.write_text(json.dumps(tokenizer))
    return f"{part} in tokenizer.json is {str(tokenizer[part])[:60]!r}"


def tokenizer_field_added(draw: random.Random, source: Path, outside: Path) -> str:
    field = draw.choice(sorted(_TOKENIZER))
    value = _TOKENIZER[field] if draw.random() < 0.7 else draw.choice(STRANGE)
    return _edit(source / "tokenizer_config.json", field, value)


def template_changed(draw: random.Random, source: Path, outside: Path) -> str:
    template = draw.choice(_TEMPLATES)
    (source / "chat_template.jinja").write_text(template)
    return f"the chat template is {template!r}"


def small_text_changed(draw: random.Random, source: Path, outside: Path) -> str:
    return text_changed(draw, draw.choice(sorted(source.glob("*.json"))))


def small_file_replaced(draw: random.Random, source: Path, outside: Path) -> str:
    file = draw.choice(sorted([*source.glob("*.json"), *source.glob("*.jinja")]))
    how = draw.choice(("deleted", "link outside", "link to nothing", "folder"))
    file.unlink()
    if how == "link outside":
        file.symlink_to(f"../{outside.name}/{file.name}")
    elif how == "link to nothing":
        file.symlink_to("nothing")
    elif how == "folder":
        file.mkdir()
    return f"{file.name}: {how}"


def generation_field_changed(draw: random.Random, source: Path, outside: Path) -> str:
    fields = ("temperature", "eos_token_id", "max_length", "do_sample", "custom_generate", "cache_implementation", "x")
    return _edit(source / "generation_config.json", draw.choice(fields), draw.choice(STRANGE))
