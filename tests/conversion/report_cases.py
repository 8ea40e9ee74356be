"""Reports of every kind, as `report.json` holds them, of models that nobody made."""

from __future__ import annotations

from typing import Any

LAYERS = 6
DOMAINS = ("held-out prose", "held-out code", "held-out <chat> & more")
VERSIONS = {"modeling-mla": "0.1.0", "torch": "2.13.0"}
CONTEXTS = [2**power for power in range(10, 21)]


def score(text: str, place: int) -> dict[str, Any]:
    return {
        "text": text, "windows": 2, "window": 1024, "perplexity_source": 10.0 + place, "perplexity": 12.5 + 2 * place,
        "kl": 0.1 * (1 + place), "top1_agreement": 0.9 - 0.1 * place, "max_abs_logit_error": 3.0,
    }  # fmt: skip


def verification(**fields: Any) -> dict[str, Any]:
    continuation = {
        "text": DOMAINS[0], "prompt": "<script>alert(1)</script> Once", "source": " upon a time\nthere was",
        "converted": " upon a hill\nthere was", "equal_tokens": 2,
    }  # fmt: skip
    found = score("all texts", 0) | {
        "windows": 6, "domains": [score(name, place) for place, name in enumerate(DOMAINS)],
        "layer_errors": [0.01 * (1 + layer) for layer in range(LAYERS)], "left_out": None, "tensors": 40,
        "tensors_unchanged": 20, "cache_bytes_per_token_source": 1000, "cache_bytes_per_token": 240,
        "cache_bytes_held": 256_000, "greedy_match": 0.4, "greedy_tokens": 5, "route_error": 1e-6,
        "decode_error": 2e-6, "continuations": [continuation], "far_off": [DOMAINS[1]],
    }  # fmt: skip
    return found | fields


def memory() -> dict[str, list[int]]:
    return {
        "contexts": CONTEXTS,
        "source": [1000 * tokens for tokens in CONTEXTS],
        "converted": [240 * tokens + 10_240 for tokens in CONTEXTS],
    }


def conversion(coded: bool = True) -> dict[str, Any]:
    layers = [
        {
            "kv_lora_rank": 64 + 32 * (layer % 3), "qk_rope_head_dim": 16, "latent_bits": 4 if coded else 16,
            "rope_bits": 6 if coded else 16, "rotated": False,
            "attention_output_error": None if layer == 0 else 0.01 * layer, "sensitivity": 0.5 + layer,
        }
        for layer in range(LAYERS)
    ]  # fmt: skip
    recipe = {"source": "org/tiny", "method": "attention_aware", "cache": "25%", "layout": "free", "seed": 0}
    return {
        "kind": "conversion", "recipe": recipe, "plan": {"family": "llama"}, "layers": layers,
        "verification": verification(), "memory": memory(), "versions": VERSIONS,
    }  # fmt: skip


def without_samples() -> dict[str, Any]:
    """A conversion whose result was not run whole."""
    report = conversion()
    for name in ("greedy_match", "greedy_tokens", "route_error", "decode_error", "continuations"):
        del report["verification"][name]
    report["verification"] |= {"left_out": "it takes 9 GB of memory, and 1 GB are available", "far_off": []}
    for layer in report["layers"]:
        layer["sensitivity"] = layer["attention_output_error"] = None
    return report


def verified(**fields: Any) -> dict[str, Any]:
    recall = {"context": 1024, "samples": 8, "needle_source": 1.0, "needle": 0.5, "copy_source": 0.9, "copy": 0.8}
    tasks = {"arc_easy": {"acc": {"source": 0.5, "converted": 0.45}}}
    report = {
        "kind": "verification", "model": "tiny-25", "against": "org/tiny", "seed": 0, "verification": verification(),
        "recall": recall, "tasks": tasks, "memory": memory(), "versions": VERSIONS, "origin": healing(),
    }  # fmt: skip
    return report | fields


def healing(improved: bool = True) -> dict[str, Any]:
    before = dict(zip(DOMAINS, (0.4, 0.6, 0.5), strict=True))
    stages = [("layers", 1), ("layers", 2), ("logits", 3), ("logits", 4), ("long", 5)] if improved else []
    looks = [
        {
            "stage": stage, "step": 10 * place, "tokens": 1000 * place, "seconds": 60.0 * place,
            "kl": {name: kl / (1 + place) for name, kl in before.items()}, "loss": 0.3, "held_out": None,
        }
        for stage, place in stages
    ]  # fmt: skip
    after = looks[-1]["kl"] if improved else before
    recipe = {"model": "tiny-25", "teacher": "org/tiny", "data": ["default:1"], "full": False, "seed": 0}
    recipe["stages"] = [{"stage": "layers", "window": 64}, {"stage": "logits", "window": 64}]
    return {
        "kind": "healing", "recipe": recipe, "versions": VERSIONS, "before": before, "after": after,
        "improved": improved, "steps": 50, "tokens": 5000, "seconds": 300.0, "trained_parameters": 123_456,
        "note": None if improved else "no step was better", "looks": looks, "kl_before": 0.5,
        "kl_after": sum(after.values()) / 3, "origin": conversion(),
    }  # fmt: skip


def sweep(dry: bool = False) -> dict[str, Any]:
    sizes = []
    for place, (cache, share) in enumerate((("50%", 0.5), ("25%", 0.25), ("12.5%", 0.125))):
        sizes.append({
            "cache": cache, "precision": "4 + 6 bits" if place else "bfloat16", "bytes_share": share,
            "perplexity": 10.1 + place**2, "kl": 0.01 + 0.2 * place,
            "top1_agreement": 0.97 - 0.1 * place, "domains": [score(name, place) for name in DOMAINS],
            "greedy_tokens": 0 if dry else 5, "continuations": [] if dry else verification()["continuations"],
            "folder": None if dry else cache, "memory": {str(n): int(1000 * n * share) for n in (1024, 32768, 131072)},
            "decode_ms": None if dry else {"1024": 5.0, "32768": 9.0 - place, "131072": None},
        })  # fmt: skip
    source_memory = {str(tokens): 1000 * tokens for tokens in (1024, 32768, 131072)}
    return {
        "kind": "sweep", "source": {"name": "org/tiny", "revision": None if dry else "a1b2c3"}, "text": "held-out text",
        "windows": 10, "window": 1024, "dtype": "bfloat16",
        "source_figures": {
            "perplexity": 10.0, "cache_bytes_per_token": 1000, "memory": source_memory,
            "decode_ms": None if dry else {"1024": 4.0, "32768": 12.0, "131072": 40.0},
        },
        "sizes": sizes,
        "quantised_source": [
            {"bits": bits, "bytes_share": bits / 16, "perplexity": 10.2 + 4 - bits, "kl": 0.02, "top1_agreement": 0.9}
            for bits in (4, 3, 2)
        ],
        "refused": {"2%": "it leaves fewer than one value"} if dry else {},
        "recommended": "25%", "recommendation": "25% keeps 87% of the tokens; `mla heal out/25%` brings it nearer.",
        "seconds": 600.0, "versions": VERSIONS,
    }  # fmt: skip


ALL = {
    "conversion": conversion(),
    "conversion without bits": conversion(coded=False),
    "conversion not run whole": without_samples(),
    "verification": verified(),
    "verification of an unknown checkpoint": verified(origin=None),
    "healing": healing(),
    "healing that gained nothing": healing(improved=False),
    "healing of an unknown checkpoint": healing() | {"origin": None},
    "sweep": sweep(),
    "dry sweep": sweep(dry=True),
}
