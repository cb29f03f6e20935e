"""Exports to PEFT and to a fused directory, loaded by transformers and peft on torch's CPU: log-probs against ours.

Run by scripts/interop, in an environment that has torch and peft. Exits 1 where the largest difference exceeds
TOLERANCE.
"""

from __future__ import annotations

import os
import sys
import tempfile
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
import transformers

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

import tiny  # noqa: E402

from mlx_dmpo import assets  # noqa: E402
from mlx_dmpo.config import ExportSettings  # noqa: E402
from mlx_dmpo.core.selfcheck import choose_scorer  # noqa: E402
from mlx_dmpo.core.tree import EncodedGroup, pad_groups  # noqa: E402
from mlx_dmpo.data import formats  # noqa: E402
from mlx_dmpo.model import adapters, loading  # noqa: E402
from mlx_dmpo.model.encode import Encoder  # noqa: E402
from mlx_dmpo.prompts.orders import first_negatives  # noqa: E402
from mlx_dmpo.tools import export  # noqa: E402

TOLERANCE = 1e-3  # nats, on sums over an answer of 10 to 60 tokens, in float32
EXAMPLES = 4


@dataclass
class Case:
    name: str
    model: Path
    data: Path
    adapter: dict[str, Any]


def cases(directory: Path) -> list[Case]:
    data = tiny.write_data(directory / "data")
    found = []
    for kind in ("qwen3", "qwen2", "llama"):
        base = tiny.save_model(directory / kind, kind=kind)
        found.append(Case(f"tiny {kind}, LoRA on all layers", base, data, {}))
    base = directory / "qwen3"
    found += [
        Case(
            "tiny qwen3, LoRA on the last 2 layers",
            base,
            data,
            {"num_layers": 2, "keys": ("self_attn.q_proj", "mlp.down_proj")},
        ),
        Case(
            "tiny qwen3, LoRA on single layers",
            base,
            data,
            {"keys": ("model.layers.0.mlp.up_proj", "model.layers.2.self_attn.v_proj")},
        ),
        Case("tiny qwen3, DoRA", base, data, {"kind": "dora"}),
        Case(
            "tiny qwen3, untied, LoRA with embeddings and head",
            tiny.save_model(directory / "untied", tied=False),
            data,
            {"num_layers": 1, "keys": ("model.embed_tokens", "lm_head", "self_attn.q_proj")},
        ),
    ]
    if (assets.model_dir() / "config.json").is_file():
        found += [
            Case(f"embedded model, {k}", assets.model_dir(), assets.data_dir(), {"kind": k}) for k in ("lora", "dora")
        ]
    shared = Path(os.environ.get("MLX_DMPO_SHARED") or ROOT.parent / "shared")
    real = shared / "models" / "ml1m-qwen3"
    if real.is_dir():
        found += [
            Case(f"ml1m-qwen3, {k}", real, shared / "data" / "ml-1m-pairs", {"kind": k}) for k in ("lora", "dora")
        ]
    return found


def in_torch(network: Any, groups: list[EncodedGroup]) -> np.ndarray:
    """Log-probs of every branch's answer, each sequence alone."""
    found = []
    with torch.no_grad():
        for group in groups:
            for tail, n in zip(group.tails, group.answer_lengths, strict=True):
                tokens = torch.tensor(np.concatenate([group.prefix, tail]), dtype=torch.long)
                logps = torch.log_softmax(network(tokens[None, :-1]).logits[0, -n:].float(), dim=-1)
                found.append(logps.gather(1, tokens[-n:, None]).sum().item())
    return np.array(found)


def largest(case: Case, directory: Path) -> tuple[float, float, float]:
    """Largest difference of PEFT, of the fused directory, and (for scale) of the base without the adapter from ours, in
    nats.
    """
    adapter = tiny.save_adapter(case.model, directory / "adapter", **case.adapter)
    settings = ExportSettings(
        model=str(case.model), adapter_path=str(adapter), data=str(case.data), examples=0, dtype="float32"
    )
    base = loading.load(settings)
    adapters.load_adapter(base, adapter)
    base.model.eval()
    encoder = Encoder(base.tokenizer)
    examples = [first_negatives(e, 1) for e in formats.load_examples(case.data, "valid")[:EXAMPLES]]
    groups = [encoder.encode(e, [(True, False)] * len(e.negatives)) for e in examples]
    batch = pad_groups(groups)
    ours = np.array(choose_scorer(base.model, base.vocabulary).logps(base.model, batch))[batch.answer_mask.any(axis=-1)]

    as_peft = export.export(replace(settings, to="peft")).path
    fused = export.export(settings).path
    auto = transformers.AutoModelForCausalLM
    plain = auto.from_pretrained(case.model, dtype=torch.float32).eval()
    alone = in_torch(plain, groups)
    adapted = in_torch(peft.PeftModel.from_pretrained(plain, str(as_peft)).eval(), groups)
    whole = in_torch(auto.from_pretrained(fused, dtype=torch.float32).eval(), groups)
    return tuple(float(np.abs(theirs - ours).max()) for theirs in (adapted, whole, alone))  # type: ignore[return-value]


def main() -> None:
    transformers.utils.logging.disable_progress_bar()
    warnings.simplefilter("ignore", FutureWarning)
    print(
        f"torch {torch.__version__}, transformers {transformers.__version__}, peft {peft.__version__}; largest "
        "difference, nats"
    )
    print(f"{'':<52}{'PEFT':>10}{'fused':>10}{'base alone':>12}")
    worst = 0.0
    with tempfile.TemporaryDirectory() as directory:
        for n, case in enumerate(cases(Path(directory))):
            in_peft, fused, alone = largest(case, Path(directory) / str(n))
            print(f"{case.name:<52}{in_peft:>10.2g}{fused:>10.2g}{alone:>12.2g}", flush=True)
            assert alone > 100 * TOLERANCE, "the adapter does nothing: the comparison would show nothing"
            worst = max(worst, in_peft, fused)
    print(f"worst {worst:.2g}, allowed {TOLERANCE:g}")
    raise SystemExit(worst > TOLERANCE)


if __name__ == "__main__":
    main()
