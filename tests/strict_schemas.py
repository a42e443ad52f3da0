"""Manifests against the schemas that the API server would have: a field that no schema knows is an error, too."""

from __future__ import annotations

import copy
import gzip
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import yaml

SPECS = Path(__file__).parent / "specs"
CUSTOM = {
    "MPIJob": "kubeflow.org_mpijobs",
    "TrainingRuntime": "trainer.kubeflow.org_trainingruntimes",
    "TrainJob": "trainer.kubeflow.org_trainjobs",
}
KUBERNETES = "1.33"

SERVICE_MONITOR = {
    "type": "object",
    "required": ["apiVersion", "kind", "metadata", "spec"],
    "properties": {
        "apiVersion": {"const": "monitoring.coreos.com/v1"},
        "kind": {"const": "ServiceMonitor"},
        "metadata": {"type": "object"},
        "spec": {
            "type": "object",
            "required": ["selector", "endpoints"],
            "properties": {
                "selector": {"type": "object"},
                "endpoints": {
                    "type": "array",
                    "items": {
                        "properties": {
                            "port": {"type": "string"},
                            "path": {"type": "string"},
                            "interval": {},
                        },
                        "additionalProperties": False,
                    },
                },
            },
            "additionalProperties": False,
        },
    },
}
"""What the Prometheus Operator's reference says of the fields that we use; its definition is in no package."""


def _object(required: dict[str, Any], **optional: Any) -> dict[str, Any]:
    """With these fields, and no others."""
    return {
        "type": "object",
        "properties": {**required, **optional},
        "required": list(required),
        "additionalProperties": False,
    }


TEXT, NUMBER = {"type": "string"}, {"type": "integer"}
TEXTS = {"type": "object", "additionalProperties": TEXT}
PORT = _object({"number": NUMBER})
TRIGGER = _object(
    {"type": TEXT, "metadata": TEXTS}, metricType={"enum": ["AverageValue", "Value", "Utilization"]}
)
OTHERS = {
    ("monitoring.coreos.com/v1", "ServiceMonitor"): SERVICE_MONITOR["properties"]["spec"],
    ("keda.sh/v1alpha1", "ScaledObject"): _object(
        {
            "scaleTargetRef": _object({"name": TEXT}, kind=TEXT, apiVersion=TEXT),
            "triggers": {"type": "array", "items": TRIGGER, "minItems": 1},
        },
        minReplicaCount=NUMBER,
        maxReplicaCount=NUMBER,
        pollingInterval=NUMBER,
        cooldownPeriod=NUMBER,
    ),
    ("inference.networking.k8s.io/v1", "InferencePool"): _object(
        {
            "selector": _object({"matchLabels": TEXTS}),
            "targetPorts": {"type": "array", "items": PORT, "minItems": 1},
            "endpointPickerRef": _object(
                {"name": TEXT}, port=PORT, failureMode={"enum": ["FailOpen", "FailClose"]}
            ),
        }
    ),
    ("serving.kserve.io/v1beta1", "InferenceService"): _object({"predictor": {"type": "object"}}),
}
"""Specs, as the references of these projects have the fields that we use; their definitions are in no package. The
rest of a predictor is a pod's, and checked as one."""
PREDICTOR_FIELDS = ("minReplicas", "maxReplicas", "scaleMetric", "scaleTarget")


def check(manifest: dict[str, Any]) -> None:
    """Raises jsonschema.ValidationError or kubernetes_validate.ValidationError, which name the field."""
    kind = manifest["kind"]
    if kind in CUSTOM:
        jsonschema.Draft202012Validator(_schema(kind, manifest["apiVersion"])).validate(manifest)
        for template in _templates(manifest):
            # The definitions have pods whole but for what Kubernetes checks beyond types.
            pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}, "spec": template["spec"]}
            kubernetes_validate.validate(pod, KUBERNETES, strict=True)
    elif (spec := OTHERS.get((manifest["apiVersion"], kind))) is not None:
        whole = _object({"apiVersion": TEXT, "kind": TEXT, "metadata": {"type": "object"}, "spec": spec})
        jsonschema.Draft202012Validator(whole).validate(manifest)
        if kind == "InferenceService":
            predictor = manifest["spec"]["predictor"]
            spec = {name: value for name, value in predictor.items() if name not in PREDICTOR_FIELDS}
            pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}, "spec": spec}
            kubernetes_validate.validate(pod, KUBERNETES, strict=True)
    else:
        kubernetes_validate.validate(manifest, KUBERNETES, strict=True)


def _templates(value: Any) -> list[dict[str, Any]]:
    """What in it makes pods."""
    if isinstance(value, list):
        return [template for part in value for template in _templates(part)]
    if not isinstance(value, dict):
        return []
    if "containers" in value.get("spec", {}):
        return [value]
    return [template for part in value.values() for template in _templates(part)]


@cache
def _schema(kind: str, api_version: str) -> dict[str, Any]:
    text = gzip.decompress((SPECS / f"{CUSTOM[kind]}.yaml.gz").read_bytes())
    definition = yaml.load(text, Loader=yaml.CSafeLoader)
    version = api_version.partition("/")[2]
    found = next(one for one in definition["spec"]["versions"] if one["name"] == version)
    return _strict(found["schema"]["openAPIV3Schema"], is_top=True)


def _strict(schema: dict[str, Any], is_top: bool = False) -> dict[str, Any]:
    """The schema with every object closed that lists its fields and doesn't say that it keeps others."""
    schema = copy.copy(schema)
    if schema.pop("x-kubernetes-int-or-string", False):
        return {"type": ["integer", "string"]}
    keeps = schema.pop("x-kubernetes-preserve-unknown-fields", False)
    if "properties" in schema:
        schema["properties"] = {name: _strict(part) for name, part in schema["properties"].items()}
        if is_top:
            schema["properties"]["metadata"] = {"type": "object"}
        if not keeps:
            schema["additionalProperties"] = False
    elif isinstance(schema.get("additionalProperties"), dict):
        schema["additionalProperties"] = _strict(schema["additionalProperties"])
    if "items" in schema:
        schema["items"] = _strict(schema["items"])
    return schema
