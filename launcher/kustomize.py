"""What `kubectl kustomize` makes of the folders under k8s/, as far as they use it: resources, components, and JSON
patches (RFC 6902) with a target. Called by `k8s_render`, so that it needs no kubectl; tests compare the two.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonpatch
import yaml

Manifest = dict[str, Any]

_KNOWN = {"apiVersion", "kind", "resources", "components", "patches"}


def build(folder: Path) -> list[Manifest]:
    """All manifests of a kustomization, patched. Raises ValueError for one that says more than is known here."""
    file = folder / "kustomization.yaml"
    kustomization = yaml.safe_load(file.read_text())
    if unknown := set(kustomization) - _KNOWN:
        raise ValueError(f"{file}: {', '.join(sorted(unknown))} is not known here")
    found: list[Manifest] = []
    for name in [*kustomization.get("resources", []), *kustomization.get("components", [])]:
        path = folder / name
        found += build(path) if path.is_dir() else _read(path)
    for patch in kustomization.get("patches", []):
        target, operations = patch["target"], yaml.safe_load(patch["patch"])
        matching = [manifest for manifest in found if _is_meant(manifest, target)]
        if not matching:
            raise ValueError(f"{file}: there is no {target} to be patched")
        for manifest in matching:
            jsonpatch.apply_patch(manifest, operations, in_place=True)
    return found


def _read(path: Path) -> list[Manifest]:
    # By way of JSON: what YAML says once and names again has to be several things here.
    return [json.loads(json.dumps(manifest)) for manifest in yaml.safe_load_all(path.read_text())]


def _is_meant(manifest: Manifest, target: dict[str, str]) -> bool:
    named = target.get("name")
    return bool(
        manifest["kind"] == target["kind"] and (named is None or manifest["metadata"]["name"] == named)
    )
