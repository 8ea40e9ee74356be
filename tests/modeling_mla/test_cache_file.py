"""A prefix on disk continues as if it had just been computed, and nothing else is taken for it."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import assert_close, random_ids, tiny_model

from modeling_mla import LatentCache
from modeling_mla.transformers_seams_mla import cache_argument, cache_of

PREFIX = random_ids(2, 9)
PER_LAYER = {"kv_lora_ranks": [5, 16], "qk_rope_head_dims": [2, 4], "rope_inv_freq": [[0.7], [1.1, 0.02]]}


@pytest.fixture
def saved(tmp_path):
    model = tiny_model(**PER_LAYER)
    with torch.no_grad():
        cache = cache_of(model(PREFIX))
    cache.save(tmp_path / "prefix.safetensors", model, PREFIX)
    return model, cache, tmp_path / "prefix.safetensors"


@torch.no_grad()
def test_prefix_keeps_every_bit_and_can_be_continued(saved):
    model, cache, path = saved
    loaded, ids = LatentCache.load(path, model)
    assert torch.equal(ids, PREFIX)
    assert loaded.get_seq_length() == 9
    for actual, expected in zip(loaded.layers, cache.layers, strict=True):
        assert torch.equal(actual.keys, expected.keys)
        assert torch.equal(actual.values, expected.values)
    question = random_ids(2, 4)
    answers = [model(question, **cache_argument(own)).logits for own in (loaded, cache)]
    assert torch.equal(answers[0], answers[1])


def test_generation_from_a_saved_prefix_is_the_same_every_time(saved):
    model, _, path = saved
    question = torch.cat((PREFIX, random_ids(2, 3)), dim=1)
    expected = model.generate(question, max_new_tokens=6, do_sample=False, use_cache=False)
    for _ in range(2):
        cache, _ = LatentCache.load(path, model)
        answer = model.generate(question, **cache_argument(cache), max_new_tokens=6, do_sample=False)
        assert torch.equal(answer, expected)


def test_nothing_but_the_whole_file_appears(saved):
    _, _, path = saved
    assert [file.name for file in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("change", ["values", "adapter", "dtype"])
def test_another_model_is_refused(saved, change):
    model, _, path = saved
    message = "written by another model"
    if change == "values":
        with torch.no_grad():
            model.model.layers[1].self_attn.kv_a_proj_with_mqa.weight.mul_(1.01)
    elif change == "adapter":
        peft = pytest.importorskip("peft")
        config = peft.LoraConfig(r=2, target_modules=["kv_a_proj_with_mqa"], init_lora_weights=False)
        peft.inject_adapter_in_model(config, model)
    else:
        model, message = model.float(), "holds torch.float64 latents, the model is torch.float32"
    with pytest.raises(ValueError, match=message):
        LatentCache.load(path, model)


@pytest.mark.parametrize("damage", ["truncated", "not safetensors", "one value", "tokens", "foreign"])
def test_damaged_files_are_refused(saved, damage):
    model, _, path = saved
    content = path.read_bytes()
    if damage == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "not safetensors":
        path.write_bytes(b"prefix")
    elif damage == "foreign":
        save_file({"weight": torch.ones(2)}, path)
    else:
        tensors = load_file(path)
        name = "input_ids" if damage == "tokens" else "layers.1.latents"
        original = tensors[name].contiguous().view(torch.uint8).numpy().tobytes()
        tensors[name].view(-1)[3] += 1
        changed = tensors[name].contiguous().view(torch.uint8).numpy().tobytes()
        assert content.count(original) == 1
        path.write_bytes(content.replace(original, changed))
    with pytest.raises(ValueError, match=r"prefix\.safetensors (is damaged|is no prefix)"):
        LatentCache.load(path, model)


def test_tokens_that_are_not_the_prefix_are_refused(tmp_path):
    model = tiny_model()
    cache = cache_of(model(PREFIX))
    for wrong in (PREFIX[:, :5], PREFIX[:1]):
        with pytest.raises(ValueError, match=r"the cache is \(2, 9\)"):
            cache.save(tmp_path / "prefix.safetensors", model, wrong)


def test_a_missing_file_is_told(tmp_path):
    with pytest.raises(FileNotFoundError):
        LatentCache.load(tmp_path / "nothing.safetensors", tiny_model())


@torch.no_grad()
def test_prefix_of_a_cropped_cache(tmp_path):
    model = tiny_model()
    cache = cache_of(model(PREFIX))
    cache.crop(-4)
    cache.save(tmp_path / "prefix.safetensors", model, PREFIX[:, :5])
    loaded, _ = LatentCache.load(tmp_path / "prefix.safetensors", model)
    assert_close(model(PREFIX[:, 5:], **cache_argument(loaded)).logits, model(PREFIX).logits[:, 5:])
