"""How a family's modules are split over processes: heads are, latents are not."""


def mla_tp_plan(body_plan: dict[str, str] | None, attention: str = "self_attn") -> dict[str, str]:
    """A body's tensor-parallel plan, if it has one, with its attention replaced: heads are split, latents are not.

    ``body_plan`` gives styles by module, ``layers.*`` for every layer; ``attention`` is what the body calls its own.
    """
    plan = {name: style for name, style in (body_plan or {}).items() if f".{attention}." not in name}
    return plan | {
        f"layers.*.{attention}.q_proj": "colwise",
        f"layers.*.{attention}.q_b_proj": "colwise",
        f"layers.*.{attention}.q_head_proj": "local_params",
        # Transformers' name for a stack of matrices that is split into stacks.
        f"layers.*.{attention}.q_head_proj.weight": "grouped_gemm",
        f"layers.*.{attention}.kv_b_proj": "colwise",
        f"layers.*.{attention}.o_proj": "rowwise",
    }
