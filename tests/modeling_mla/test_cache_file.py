"""A prefix on disk continues as if it had just been computed, and nothing else is taken for it."""

import json
import math

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


def read_header(path) -> tuple[dict, bytes]:
    """The header of a safetensors file and what follows it."""
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + size]), content[8 + size :]


def write_header(path, header: dict, data: bytes) -> None:
    encoded = json.dumps(header).encode()
    path.write_bytes(len(encoded).to_bytes(8, "little") + encoded + data)


def deeply(value: object) -> str:
    return "[" * 100_000 + json.dumps(value) + "]" * 100_000


DAMAGES = [None, True, 0, -1, 1e300, 10**30, "", "damaged", [], [5], [5, 16, 16], [16, 5], [5, None], {}, {"a": {}}]


@pytest.mark.parametrize("field", ["format", "model", "content", "kv_lora_ranks", "another", "description"])
def test_every_damage_of_the_description_is_refused(saved, field):
    model, _, path = saved
    header, data = read_header(path)
    written = json.loads(header["__metadata__"]["prefix"])
    changed = [json.dumps(value if field == "description" else written | {field: value}) for value in DAMAGES]
    if field in written:
        changed.append(json.dumps({name: value for name, value in written.items() if name != field}))
        changed.append(json.dumps(written).replace(json.dumps(written[field]), deeply(written[field])))
    if field == "description":
        changed += ["", "{", "1" * 5000, deeply(written), "\ud800"]
    for text in changed:
        header["__metadata__"]["prefix"] = text
        write_header(path, header, data)
        with pytest.raises(ValueError, match=r"prefix\.safetensors (is damaged|is no prefix)"):
            LatentCache.load(path, model)


@pytest.mark.parametrize("field", ["dtype", "shape", "data_offsets", "name"])
@pytest.mark.parametrize("name", ["input_ids", "layers.0.latents", "layers.1.latents"])
def test_every_damage_of_a_tensors_entry_is_refused(saved, name, field):
    model, _, path = saved
    header, data = read_header(path)
    entry = header.pop(name)
    if field == "name":
        changed = [{}, {"layers.7.latents": entry}, {"": entry}]
    elif field == "dtype":
        changed = [{name: entry | {field: dtype}} for dtype in ("I64", "F64", "U64", "F32", "BOOL", "F4", "X", 3, None)]
        changed = [{name: other[name]} for other in changed if other[name]["dtype"] != entry["dtype"]]
    elif field == "shape":
        shape = entry["shape"]
        shapes = [shape[::-1], shape[1:], [1, *shape], [*shape, 1], [], [-1], [10**30], None, "2", [math.prod(shape)]]
        changed = [{name: entry | {field: other}} for other in shapes]
    else:
        start, end = entry[field]
        offsets = [[start, end - 8], [end, start], [start + 8, end + 8], [-1, 4], [0], None, [start, 10**30]]
        changed = [{name: entry | {field: other}} for other in offsets]
    for other in changed:
        write_header(path, header | other, data)
        with pytest.raises(ValueError, match=r"prefix\.safetensors (is damaged|is no prefix)"):
            LatentCache.load(path, model)


def test_no_changed_byte_of_the_header_loads_something_else(saved):
    """What loads in spite of it (a space more) is what was saved."""
    model, cache, path = saved
    content = path.read_bytes()
    size = 8 + int.from_bytes(content[:8], "little")
    random = torch.randint(0, 256, (size, 2), generator=torch.Generator().manual_seed(0))
    refused = 0
    for position, values in enumerate(random.tolist()):
        for value in values:
            path.write_bytes(content[:position] + bytes([value]) + content[position + 1 :])
            try:
                loaded, ids = LatentCache.load(path, model)
            except ValueError:
                refused += 1
                continue
            assert torch.equal(ids, PREFIX)
            for own, other in zip(loaded.layers, cache.layers, strict=True):
                assert torch.equal(own.stored, other.stored)
                assert own.kv_lora_rank == other.kv_lora_rank
    assert refused > 1.9 * size


def test_a_prefix_of_other_rotary_frequencies_is_refused(saved):
    """They are no parameters, and the saved keys are rotated."""
    model, _, path = saved
    other = tiny_model(**PER_LAYER | {"rope_inv_freq": [[0.7], [1.1, 0.03]]})
    assert all(torch.equal(own, model.state_dict()[name]) for name, own in other.state_dict().items())
    with pytest.raises(ValueError, match="written by another model"):
        LatentCache.load(path, other)


def test_a_prefix_of_another_number_of_layers_is_refused(saved):
    _, _, path = saved
    with pytest.raises(ValueError, match="holds 2 layers, the model caches 3"):
        LatentCache.load(path, tiny_model(num_hidden_layers=3))


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
