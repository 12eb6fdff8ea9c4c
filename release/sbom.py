"""What a distribution is made of, as CycloneDX JSON beside it: python release/sbom.py FILE...

A wheel holds this project's own code, pybind11 (headers out of torch, compiled into the two Python
modules), CUDA's runtime and CUB where the CUDA half was built, and nothing else; torch is what it
needs to run. A source distribution holds this project's own code alone.
"""

import hashlib
import json
import re
import sys
import uuid
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
VERSION = (ROOT / "python" / "fused_rmsnorm" / "VERSION").read_text().strip()
Component = dict[str, Any]


def component(name: str, version: str, license_: str, **others: Any) -> Component:
    kind = "name" if " " in license_ else "id"  # an identifier of SPDX has no spaces
    return {
        "type": "library",
        "bom-ref": name,
        "name": name,
        **({"version": version} if version else {}),
        "licenses": [{"license": {kind: license_}}],
        **others,
    }


def compiled_in(summary: str) -> list[Component]:
    """``summary``: what the build said of itself (summary.txt in its folder)."""
    parts = [component("pybind11", "", "BSD-3-Clause", scope="required")]
    cuda = re.search(r"nvcc ([\d.]+), CUB ([\d.]+)", summary)
    if cuda:
        eula = "NVIDIA CUDA Toolkit EULA"
        parts.append(component("cudart-static", cuda[1], eula, scope="required"))
        parts.append(component("cub", cuda[2], "BSD-3-Clause", scope="required"))
    return parts


def sbom(distribution: Path, summary: str) -> dict[str, Any]:
    """The same for the same bytes: its serial number is made of their hash."""
    digest = hashlib.sha256(distribution.read_bytes()).hexdigest()
    main = component(
        "fused-rmsnorm",
        VERSION,
        "BSD-3-Clause",
        purl=f"pkg:pypi/fused-rmsnorm@{VERSION}?file_name={distribution.name}",
        hashes=[{"alg": "SHA-256", "content": digest}],
    )
    parts = compiled_in(summary) if distribution.suffix == ".whl" else []
    torch = component("torch", "", "BSD-3-Clause", purl="pkg:pypi/torch", scope="excluded")
    torch["description"] = "needed to run (>= 2.11), not contained"
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": f"urn:uuid:{uuid.uuid5(uuid.NAMESPACE_URL, digest)}",
        "version": 1,
        "metadata": {"component": main},
        "components": [*parts, torch],
        "dependencies": [
            {"ref": "fused-rmsnorm", "dependsOn": [part["bom-ref"] for part in (*parts, torch)]}
        ],
    }


def write(distribution: Path, summary: str = "") -> Path:
    """Beside the distribution, as NAME.cdx.json."""
    target = distribution.with_name(distribution.name + ".cdx.json")
    target.write_text(json.dumps(sbom(distribution, summary), indent=1) + "\n")
    return target


if __name__ == "__main__":
    for name in sys.argv[1:]:
        print(write(Path(name)))
