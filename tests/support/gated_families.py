"""The gated norms of transformers by family, and the fused module of each."""

from transformers.models.bamba.modeling_bamba import BambaRMSNormGated
from transformers.models.falcon_h1.modeling_falcon_h1 import FalconH1RMSNormGated
from transformers.models.granitemoehybrid.modeling_granitemoehybrid import (
    GraniteMoeHybridRMSNormGated,
)
from transformers.models.mamba2.modeling_mamba2 import MambaRMSNormGated
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHRMSNormGated
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextRMSNormGated
from transformers.models.zamba2.modeling_zamba2 import Zamba2RMSNormGated

from fused_rmsnorm import RMSNormGated

FAMILIES = {
    "mamba2": lambda: MambaRMSNormGated(64, group_size=16, eps=1e-5),
    "zamba2": lambda: Zamba2RMSNormGated(64, group_size=32, eps=1e-5),
    "bamba": lambda: BambaRMSNormGated(64, group_size=64, eps=1e-5),
    "granitemoehybrid": lambda: GraniteMoeHybridRMSNormGated(64, group_size=64, eps=1e-5),
    "nemotron_h": lambda: NemotronHRMSNormGated(64, group_size=16, eps=1e-5),
    "qwen3_next": lambda: Qwen3NextRMSNormGated(64, eps=1e-5),
    "falcon_h1": lambda: FalconH1RMSNormGated(64, eps=1e-5, n_groups=4),
    "falcon_h1 gate first": lambda: FalconH1RMSNormGated(64, 1e-5, 4, norm_before_gate=False),
}


def fused_twin(module, family: str) -> RMSNormGated:
    norm_first = getattr(module, "norm_before_gate", family == "qwen3_next")
    n_groups = getattr(module, "n_groups", None)
    return RMSNormGated(
        64,
        module.variance_epsilon,
        group_size=64 // n_groups if n_groups else getattr(module, "group_size", None),
        norm_before_gate=norm_first,
        casting_mode="torch" if "falcon" in family else "llama",
    )
