"""Files for clusters and images, held to the schemas of those who read them."""

import copy
import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import jsonschema
import kubernetes_validate
import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
DATA = Path(__file__).parents[1] / "data"
MANIFESTS = sorted((ROOT / "examples" / "kubernetes").glob("*.yaml"))
SCHEMAS = [json.loads(path.read_text()) for path in sorted((DATA / "kubernetes").glob("*.json"))]
CUSTOM = {(entry["apiVersion"], entry["kind"]): entry["schema"] for entry in SCHEMAS}
USERS_MISTAKE, TRY_AGAIN = 2, 75


def documents() -> list:
    found = [(path.stem, document) for path in MANIFESTS for document in yaml.safe_load_all(path.read_text())]
    return [pytest.param(document, id=f"{name}-{document['kind']}") for name, document in found]


def strict(schema: dict) -> dict:
    """A schema that refuses unknown keys, as the API server does with `fieldValidation: Strict`."""
    schema = copy.deepcopy(schema)

    def close(node: dict) -> None:
        if node.get("x-kubernetes-int-or-string"):
            node.pop("type", None)
        if "properties" in node:
            node.setdefault("additionalProperties", False)
        for child in [*node.get("properties", {}).values(), *node.get("anyOf", [])]:
            close(child)
        for key in ("items", "additionalProperties"):
            if isinstance(node.get(key), dict):
                close(node[key])

    close(schema)
    schema["properties"]["metadata"] = {"type": "object", "required": ["name"]}
    return schema


def validate(document: dict) -> None:
    """Hold a document to its schema; what it holds of Kubernetes' own, to Kubernetes'."""
    kind = (document["apiVersion"], document["kind"])
    if kind not in CUSTOM:
        kubernetes_validate.validate(document, kubernetes_validate.latest_version(), strict=True)
        return
    jsonschema.Draft7Validator(strict(CUSTOM[kind])).validate(document)
    for spec in pods_of(document):
        inner = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "inner"}, "spec": spec}
        kubernetes_validate.validate(inner, kubernetes_validate.latest_version(), strict=True)
    for spec in jobs_of(document):
        inner = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "inner"}, "spec": spec}
        kubernetes_validate.validate(inner, kubernetes_validate.latest_version(), strict=True)


def inside(node, key: str) -> list:
    """Everything of that key, at any depth."""
    children = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    return [found for name, child in children for found in ([child] if name == key else []) + inside(child, key)]


def pods_of(document: dict) -> list[dict]:
    return [spec for spec in [*inside(document, "spec"), document["spec"]] if "containers" in spec]


def jobs_of(document: dict) -> list[dict]:
    return [spec for spec in inside(document, "spec") if "podFailurePolicy" in spec]


@pytest.mark.parametrize("document", documents())
def test_a_manifest_is_what_its_schema_asks_for(document):
    validate(document)


@pytest.mark.parametrize("document", documents())
def test_a_mistyped_key_at_any_depth_is_found(document):
    """The check above can fail: every third mapping in turn is given a key that nobody knows."""
    free = ("metadata", "labels", "limits", "requests", "selector")  # any key may stand there
    hurt = 0
    for path in [path for path in mappings(document) if not set(path) & set(free)][::3]:
        wrong = copy.deepcopy(document)
        node = wrong
        for step in path:
            node = node[step]
        node["noSuchKey"] = 1
        with pytest.raises((jsonschema.ValidationError, kubernetes_validate.ValidationError)):
            validate(wrong)
        hurt += 1
    assert hurt


def mappings(node, path: tuple = ()) -> list[tuple]:
    if isinstance(node, list):
        return [found for index, child in enumerate(node) for found in mappings(child, (*path, index))]
    if not isinstance(node, dict):
        return []
    return [path] + [found for name, child in node.items() for found in mappings(child, (*path, name))]


@pytest.mark.parametrize("document", [entry for entry in documents() if pods_of(entry.values[0])])
def test_a_pod_has_time_to_save_shared_memory_its_gpus_and_no_root(document):
    for pod in pods_of(document):
        assert pod["terminationGracePeriodSeconds"] >= 300
        assert pod["securityContext"]["runAsNonRoot"] and pod["securityContext"]["runAsUser"] != 0
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        for container in pod["containers"]:
            memory = [mount["name"] for mount in container["volumeMounts"] if mount["mountPath"] == "/dev/shm"]  # noqa: S108
            assert volumes[memory[0]]["emptyDir"]["medium"] == "Memory"
            assert {mount["name"] for mount in container["volumeMounts"]} == set(volumes)
            assert container["securityContext"]["capabilities"]["add"] == ["IPC_LOCK"]
    assert any("nvidia.com/gpu" in limits for path in MANIFESTS for limits in inside(yaml_of(path), "limits"))


def yaml_of(path: Path) -> list:
    return list(yaml.safe_load_all(path.read_text()))


@pytest.mark.parametrize("name", ["pretrain_7b", "trainjob"])
def test_a_users_mistake_ends_the_job_and_a_saved_run_goes_on_for_nothing(name):
    (job,) = [
        spec for document in yaml_of(ROOT / f"examples/kubernetes/{name}.yaml") for spec in jobs_of({"": document})
    ]
    actions = {
        value: rule["action"]
        for rule in job["podFailurePolicy"]["rules"]
        for value in rule.get("onExitCodes", {}).get("values", [])
    }
    assert actions == {USERS_MISTAKE: "FailJob", TRY_AGAIN: "Ignore"}
    names = {container["name"] for container in job["template"]["spec"]["containers"]}
    assert set(inside(job, "containerName")) == names


def script() -> str:
    (document,) = yaml_of(ROOT / "examples" / "kubernetes" / "pytorchjob.yaml")
    (pod, other) = pods_of(document)
    assert pod == other and pod["containers"][0]["command"] == ["bash", "-c"]
    return pod["containers"][0]["args"][0]


def fake(folder: Path, body: str) -> dict[str, str]:
    program = folder / "igla-mega"
    program.write_text(f"#!/bin/bash\n{body}\n")
    program.chmod(0o755)
    return {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}"}


@pytest.mark.parametrize(("code", "seen"), [(0, 0), (2, 2), (75, 143), (1, 143), (137, 143)])
def test_a_pytorchjob_sees_the_exit_codes_that_it_tells_apart(code, seen, tmp_path):
    done = subprocess.run(["bash", "-c", script()], env=fake(tmp_path, f"exit {code}"), check=False, timeout=30)
    assert done.returncode == seen


def test_a_pytorchjob_passes_the_request_to_stop_on_and_waits_for_the_save(tmp_path):
    saved = tmp_path / "saved"
    body = f"trap 'sleep 0.5; touch {saved}; exit 75' TERM\ntouch {tmp_path}/ready\nwhile :; do sleep 0.05; done"
    with subprocess.Popen(["bash", "-c", script()], env=fake(tmp_path, body)) as process:
        until = time.monotonic() + 30
        while not (tmp_path / "ready").exists() and time.monotonic() < until:
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 143 and saved.exists()


def test_compose_is_what_its_specification_asks_for():
    schema = json.loads((DATA / "compose-spec.json").read_text())
    compose = yaml.safe_load((ROOT / "docker" / "compose.yaml").read_text())
    validator = jsonschema.Draft7Validator(schema)
    validator.validate(compose)
    compose["services"]["train"]["stop_grace_periodd"] = "10m"
    assert not validator.is_valid(compose)


def test_compose_builds_the_dockerfile_with_arguments_that_it_has_and_its_user():
    compose = yaml.safe_load((ROOT / "docker" / "compose.yaml").read_text())["services"]["train"]
    dockerfile = (ROOT / "docker" / "Dockerfile").read_text()
    assert (ROOT / "docker" / compose["build"]["context"] / compose["build"]["dockerfile"]).is_file()
    assert set(compose["build"]["args"]) <= set(re.findall(r"^ARG (\w+)", dockerfile, re.MULTILINE))
    assert f"USER {compose['user'].split(':')[0]}" in dockerfile
    for source in re.findall(r"^COPY (.+) \S+$", dockerfile, re.MULTILINE):
        assert all((ROOT / path).exists() for path in source.split())


@pytest.mark.parametrize(
    ("arguments", "code"),
    [({}, 1), ({"UNPINNED": "1"}, 0), ({"NGC_DIGEST": "sha256:0"}, 0)],
    ids=["none", "1", "digest"],
)
def test_the_image_refuses_to_be_built_on_a_tag_alone(arguments, code):
    dockerfile = (ROOT / "docker" / "Dockerfile").read_text()
    step = re.search(r"^RUN (if \[\[ -z.*?fi)$", dockerfile, re.MULTILINE | re.DOTALL)[1].replace("\\\n", "\n")
    environment = {"NGC_DIGEST": "", "UNPINNED": "", "PATH": os.environ["PATH"], **arguments}
    done = subprocess.run(["bash", "-euo", "pipefail", "-c", step], env=environment, capture_output=True, text=True)
    assert done.returncode == code and (code == 0 or "NGC_DIGEST=sha256" in done.stderr)
