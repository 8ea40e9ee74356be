"""What its own verification contradicts is not published."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_families import FAMILIES, save_family
from tiny_source import convert, save_source, write_text

from conversion.checkpoint.reader import SafetensorsReader
from conversion.errors import SourceError, VerificationError
from conversion.evaluation.agreement import refuse_contradiction
from conversion.evaluation.reference import check_reference
from conversion.evaluation.verify import Verification
from conversion.layers import MLAWeights
from conversion.methods.attention_aware.method import AttentionAwareMethod
from conversion.methods.exact import ExactMethod
from conversion.sources import open_source


@pytest.fixture(scope="module")
def verification(tmp_path_factory: pytest.TempPathFactory) -> Verification:
    """Of an exact conversion."""
    folder = tmp_path_factory.mktemp("agreement")
    source = save_source(folder / "source", dtype=torch.float32)
    return convert(source, folder / "out", method="exact").report.verification


@pytest.mark.parametrize(
    ("rounded_to", "kl", "layer"),
    [
        (None, 1e-4, 1e-5),
        (torch.float32, 1e-4, 1e-5),
        (torch.float16, 1e-4, 1e-5),
        (torch.bfloat16, 64 * 2**-14, 4 * 2**-14),
    ],
)
def test_limits_of_an_exact_conversion(
    verification: Verification, rounded_to: torch.dtype | None, kl: float, layer: float
) -> None:
    promise = {"lossless": True, "rounded_to": rounded_to, "vocabulary": 258}
    first, second, *others = verification.domains

    def found(kl: float, layer: float) -> Verification:
        domains = (first, replace(second, kl=kl), *others)
        return replace(verification, domains=domains, layer_errors=(0.0, layer, 0.0))

    refuse_contradiction(found(0.99 * kl, 0.99 * layer), **promise)
    with pytest.raises(VerificationError, match=f"KL .* on {second.text}, .* above the .* nothing is published"):
        refuse_contradiction(found(1.01 * kl, 0), **promise)
    with pytest.raises(VerificationError, match=r"layer 1's attention output is .* above the .* nothing is published"):
        refuse_contradiction(found(0, 1.01 * layer), **promise)


def test_a_router_may_choose_other_experts_where_weights_are_rounded(verification: Verification) -> None:
    found = replace(verification, domains=tuple(replace(domain, kl=0.03) for domain in verification.domains))
    promise = {"lossless": True, "vocabulary": 258}
    refuse_contradiction(found, rounded_to=torch.bfloat16, routed=True, **promise)
    for rounded_to, routed in ((torch.bfloat16, False), (torch.float16, True), (None, True)):
        with pytest.raises(VerificationError, match=r"KL .* above the .* nothing is published"):
            refuse_contradiction(found, rounded_to=rounded_to, routed=routed, **promise)


@pytest.mark.parametrize(("source", "limit", "shown"), [(20.0, 258, "258"), (600.0, 2400, "2,400")])
def test_limits_of_a_compressed_conversion(verification: Verification, source: float, limit: float, shown: str) -> None:
    promise = {"lossless": False, "rounded_to": torch.bfloat16, "vocabulary": 258}

    def found(perplexity: float, layer: float) -> Verification:
        errors = (0.0, layer, 0.0)
        return replace(verification, perplexity_source=source, perplexity=perplexity, layer_errors=errors)

    refuse_contradiction(found(0.99 * limit, 15.9), **promise)
    with pytest.raises(VerificationError, match=f"perplexity is .* above the {shown} .* a larger cache"):
        refuse_contradiction(found(1.01 * limit, 0), **promise)
    with pytest.raises(VerificationError, match=r"layer 1's attention output is 16.1, above the 16 .* a larger cache"):
        refuse_contradiction(found(limit / 2, 16.1), **promise)


@pytest.mark.parametrize(("method", "scale"), [(ExactMethod, 1.01), (AttentionAwareMethod, 30.0)])
def test_a_method_that_goes_wrong_publishes_nothing(
    method: type, scale: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, text = save_source(tmp_path / "source"), write_text(tmp_path / "text.txt")
    original = method.factorise

    def wrong(self: object, *args: object) -> MLAWeights:
        weights = original(self, *args)
        return replace(weights, o_proj=scale * weights.o_proj)

    monkeypatch.setattr(method, "factorise", wrong)
    monkeypatch.setattr(method, "refit", lambda *_: None)
    with pytest.raises(VerificationError, match="nothing is published"):
        convert(source, tmp_path / "out", method=method.name, tokens=256, calibration=str(text))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source", "text.txt"]


@pytest.mark.long
def test_rounding_is_no_contradiction(tmp_path: Path) -> None:
    for family in [name for name in FAMILIES if "-" not in name]:
        source = save_family(tmp_path / family, family, dtype=torch.float32)
        for dtype in ("bfloat16", "float16"):
            convert(source, tmp_path / f"{family}-{dtype}", method="exact", dtype=dtype)


@pytest.fixture
def two_sets(tmp_path: Path) -> Path:
    """Shards with their index, and beside them an older model in one file."""
    source = save_source(tmp_path / "source", max_shard_size="100KB")
    older = save_source(tmp_path / "older", initializer_range=0.1)
    (older / "model.safetensors").rename(source / "model.safetensors")
    return source


def assert_refused(source: Path, output: Path) -> None:
    with pytest.raises(SourceError):
        convert(source, output, method="exact")
    assert not [path for path in output.parent.iterdir() if output.name in path.name]


def test_older_weights_beside_shards_are_refused(two_sets: Path, tmp_path: Path) -> None:
    assert_refused(two_sets, tmp_path / "out")


def test_weights_that_the_configuration_names_are_converted(tmp_path: Path) -> None:
    """As Transformers loads them, whatever lies beside them under the usual name."""
    source = save_source(tmp_path / "source")
    other = save_source(tmp_path / "other", initializer_range=0.1)
    (other / "model.safetensors").rename(source / "other.safetensors")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"transformers_weights": "other.safetensors"}))
    output = convert(source, tmp_path / "out", method="exact").output
    loaded, converted = load_file(source / "other.safetensors"), load_file(output / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(converted[name], loaded[name])
    assert not torch.equal(converted[name], load_file(source / "model.safetensors")[name])


def test_an_adapter_is_refused(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    source = save_source(tmp_path / "source", dtype=torch.float32)
    model = peft.get_peft_model(
        open_source(str(source)).causal_lm.from_pretrained(source), peft.LoraConfig(target_modules=["q_proj"])
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_()
    model.save_pretrained(source)
    assert_refused(source, tmp_path / "out")


@pytest.mark.parametrize("shards", ["1GB", "100KB"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_sound_reference_has_the_tensors_that_are_converted(
    family: str, tied: bool, shards: str, tmp_path: Path
) -> None:
    folder = save_family(tmp_path / "source", family, dtype=torch.bfloat16, tie_word_embeddings=tied)
    check_reference(open_source(str(folder)))


@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.2.self_attn.k_proj.weight", "lm_head.weight"])
def test_another_tensor_is_named(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_source(str(save_source(tmp_path / "source", tie_word_embeddings=False)))
    original = SafetensorsReader.pieces

    def other(self: SafetensorsReader, asked: str) -> Iterator[torch.Tensor]:
        for piece in original(self, asked):
            yield piece * (1 + 1e-6) if asked == name else piece

    monkeypatch.setattr(SafetensorsReader, "pieces", other)
    with pytest.raises(SourceError, match=f"loads another {name} from .*source"):
        check_reference(source)


def test_a_tensor_that_is_not_loaded_is_named(tmp_path: Path) -> None:
    source = open_source(str(save_source(tmp_path / "source")))
    source.tensors  # noqa: B018 (opens the file that is changed next)
    tensors = load_file(tmp_path / "source" / "model.safetensors")
    tensors = {name.replace("layers.0.", "layers.7."): tensor for name, tensor in tensors.items()}
    (tmp_path / "source" / "model.safetensors").unlink()
    save_file(tensors, tmp_path / "source" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SourceError, match=r"does not load all of .*source: 'model.layers.0\."):
        check_reference(source)
