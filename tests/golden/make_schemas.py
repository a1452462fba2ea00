"""Writes jobset_schema.json.gz: what JobSet v1alpha2 accepts, as a JSON schema, from the models that Kubeflow generates from
JobSet's OpenAPI document. Jobs inside are left to Kubernetes' own schemas (package kubernetes-validate).

    pip install kubeflow-trainer-api==2.3.0 && python tests/golden/make_schemas.py
"""

import gzip
import importlib.metadata
import json
import pathlib

from kubeflow_trainer_api.models.jobset_v1alpha2_job_set import JobsetV1alpha2JobSet

schema = JobsetV1alpha2JobSet.model_json_schema(by_alias=True)
kept = {name: model for name, model in schema["$defs"].items() if name.startswith("Jobset")}
for model in (schema, *kept.values()):
    model["additionalProperties"] = False  # a misspelt field would be dropped by the server
    model.pop("description", None)
    for field in model.get("properties", {}).values():
        field.pop("description", None)
text = json.dumps(schema | {"$defs": kept})
for name in schema["$defs"].keys() - kept.keys():
    text = text.replace(json.dumps({"$ref": f"#/$defs/{name}"}), "{}")
made = {
    "from": f"kubeflow-trainer-api {importlib.metadata.version('kubeflow-trainer-api')}, The Kubeflow Authors",
    "licence": "Apache-2.0",
    "schema": json.loads(text),
}
file = pathlib.Path(__file__).with_name("jobset_schema.json.gz")
file.write_bytes(gzip.compress(json.dumps(made, sort_keys=True).encode(), mtime=0))
