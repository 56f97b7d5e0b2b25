"""Laws of scripts/launch/kubernetes_job.py: what it prints is read as Kubernetes reads it.

kubeflow-trainer-api has the schemas of Kubernetes and of JobSet, as classes that are generated from them.
"""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from kubeflow_trainer_api import models

from trainer.distributed import meeting
from trainer.distributed.meeting import meeting_secs
from trainer.distributed.workers import read_tf_config

SCRIPT = Path(__file__).parent.parent / "scripts" / "launch" / "kubernetes_job.py"
TRAIN = ["trainer", "train", "configs/quickstart.toml", "--or-resume", "run_folder=/runs/gpt"]


def run(*arguments):
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def printed(n, *options, command=TRAIN):
    """The service and the job."""
    process = run("-n", n, "--name", "gpt", "--image", "registry.example/trainer:1", *options, *command)
    assert (process.returncode, process.stderr) == (0, "")
    manifest = json.loads(process.stdout)
    assert (manifest["apiVersion"], manifest["kind"]) == ("v1", "List")
    service, _, job = manifest["items"]
    return service, job


def printed_jobset(n, *options):
    """The secret and the JobSet."""
    process = run(
        "-n", n, "--name", "gpt", "--image", "registry.example/trainer:1", "--kind", "jobset", *options, *TRAIN
    )
    assert (process.returncode, process.stderr) == (0, "")
    return json.loads(process.stdout)["items"]


SCHEMAS = {
    ("v1", "Service"): models.IoK8sApiCoreV1Service,
    ("v1", "Secret"): models.IoK8sApiCoreV1Secret,
    ("batch/v1", "Job"): models.IoK8sApiBatchV1Job,
    ("jobset.x-k8s.io/v1alpha2", "JobSet"): models.JobsetV1alpha2JobSet,
}


def read_by_schema(item):
    """An object as its schema keeps it: a field of another type is an error, and an unknown one is left out."""
    return SCHEMAS[item["apiVersion"], item["kind"]].from_dict(item).to_dict()


def pod_of(job):
    return job["spec"]["template"]["spec"]


def expand(text, known):
    """Does to a text what Kubernetes does: $(NAME) is a variable that is known, $$ a dollar."""
    return re.sub(r"\$\$|\$\(([^)]*)\)", lambda m: "$" if m[0] == "$$" else known.get(m[1], m[0]), text)


def environment(job, index):
    """The variables of a pod's container; each may refer to those before it."""
    annotations = {"metadata.annotations['batch.kubernetes.io/job-completion-index']": str(index)}
    known = {}
    for entry in pod_of(job)["containers"][0]["env"]:
        if "value" in entry:
            known[entry["name"]] = expand(entry["value"], known)
        elif "secretKeyRef" in entry["valueFrom"]:
            known[entry["name"]] = str(entry["valueFrom"]["secretKeyRef"])
        else:
            known[entry["name"]] = annotations[entry["valueFrom"]["fieldRef"]["fieldPath"]]
    return known


@pytest.mark.parametrize("n", [1, 2, 11])
def test_each_pod_is_the_worker_of_its_index_at_the_name_that_the_service_gives_it(n):
    service, job = printed(n)
    for index in range(n):
        workers = read_tf_config(environment(job, index)["TF_CONFIG"])
        assert workers.number == index
        assert workers.addresses == tuple(f"gpt-{i}.gpt:2222" for i in range(n))
    # A pod's name is its index under the job's name, in the domain of the headless service that selects it.
    assert (job["kind"], job["apiVersion"], job["metadata"]["name"]) == ("Job", "batch/v1", "gpt")
    assert job["spec"]["completionMode"] == "Indexed"
    assert job["spec"]["completions"] == job["spec"]["parallelism"] == n
    assert (service["kind"], service["apiVersion"], service["spec"]["clusterIP"]) == ("Service", "v1", "None")
    assert service["metadata"]["name"] == pod_of(job)["subdomain"] == "gpt"
    assert service["spec"]["selector"] == {"job-name": "gpt"}


def test_all_pods_get_the_same_secret_and_each_job_a_new_one():
    secrets = []
    for _ in range(2):
        process = run("-n", 2, "--name", "gpt", "--image", "trainer", *TRAIN)
        _, secret, job = json.loads(process.stdout)["items"]
        assert (secret["kind"], secret["apiVersion"], secret["metadata"]) == ("Secret", "v1", {"name": "gpt"})
        (entry,) = (e for e in pod_of(job)["containers"][0]["env"] if e["name"] == meeting.SECRET_VARIABLE)
        assert entry["valueFrom"] == {"secretKeyRef": {"name": "gpt", "key": meeting.SECRET_VARIABLE}}
        secrets.append(secret["stringData"][meeting.SECRET_VARIABLE])
        assert process.stdout.count(secrets[-1]) == 1
    assert secrets[0] != secrets[1]
    assert len(secrets[0]) == 32


def test_a_command_reaches_the_pods_unchanged():
    _, job = printed(2, command=[*TRAIN, "data.train=$(TF_CONFIG)/$$x/*.txt", "--", "-n", "a b"])
    command = pod_of(job)["containers"][0]["command"]
    known = environment(job, 0)
    assert [expand(word, known) for word in command] == [
        *TRAIN,
        "data.train=$(TF_CONFIG)/$$x/*.txt",
        "--",
        "-n",
        "a b",
    ]


def test_a_pod_that_fails_starts_again_and_waits_for_the_others_longer_than_they_can_take(monkeypatch):
    _, job = printed(4)
    assert pod_of(job)["restartPolicy"] == "OnFailure"
    assert job["spec"]["backoffLimit"] >= 4
    monkeypatch.setenv("TRAINER_MEETING_SECS", environment(job, 0)["TRAINER_MEETING_SECS"])
    # Kubernetes lets at most 5 minutes pass between two starts.
    assert meeting_secs() > 300


def test_a_pod_gets_the_gpus_and_the_claim_and_mounts_nothing_else():
    _, job = printed(2, "--gpus", 8, "--claim", "my-claim", "--mount", "/runs")
    (container,) = pod_of(job)["containers"]
    assert container["image"] == "registry.example/trainer:1"
    assert container["resources"]["limits"] == {"nvidia.com/gpu": "8"}
    volumes = {volume.pop("name"): volume for volume in pod_of(job)["volumes"]}
    mounted = {mount["mountPath"]: volumes[mount["name"]] for mount in container["volumeMounts"]}
    assert mounted == {
        "/runs": {"persistentVolumeClaim": {"claimName": "my-claim"}},
        "/dev/shm": {"emptyDir": {"medium": "Memory"}},
    }
    _, job = printed(2)
    assert pod_of(job)["volumes"] == pod_of(job)["containers"][0]["volumeMounts"] == []
    assert pod_of(job)["containers"][0]["resources"]["limits"] == {}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"-n": 0}, "-n 0: there must be at least 1 worker."),
        ({"--name": "GPT"}, "--name 'GPT' must be a DNS label"),
        ({"--name": "gpt.2"}, "--name 'gpt.2' must be a DNS label"),
        ({"--name": "2gpt"}, "--name '2gpt' must be a DNS label"),
        ({"--name": "gpt-"}, "--name 'gpt-' must be a DNS label"),
        ({"--name": "a" * 62, "-n": 2}, f"is too long: the last worker would be {'a' * 62}-1."),
        ({"--name": "a" * 47, "--kind": "jobset"}, f"is too long: the last worker would be {'a' * 47}-worker-0-1."),
        ({"--kind": "tfjob"}, "argument --kind: invalid choice: 'tfjob' (choose from"),
        ({"--image": ""}, "--image '' is not an image's name: it must be one word."),
        ({"--gpus": -1}, "--gpus -1 must be 0 or more."),
        ({"--claim": "my-claim"}, "--claim and --mount go together"),
        ({"--mount": "/runs"}, "--claim and --mount go together"),
        ({"--claim": "My", "--mount": "/runs"}, "--claim 'My' is not a claim's name"),
        ({"--claim": "my", "--mount": "runs"}, "--mount 'runs' must be a path that begins with /"),
    ],
)
def test_what_kubernetes_would_refuse_is_refused(arguments, message):
    options = {"-n": 2, "--name": "gpt", "--image": "trainer"} | arguments
    process = run(*(word for option in options.items() for word in option), *TRAIN)
    assert (process.returncode, process.stdout) == (2, "")
    assert message in process.stderr


def test_the_longest_name_is_taken_and_a_command_is_needed():
    assert run("-n", 2, "--name", "a" * 61, "--image", "trainer", *TRAIN).returncode == 0
    jobset = run("-n", 2, "--kind", "jobset", "--name", "a" * 46, "--image", "trainer", *TRAIN)
    assert jobset.returncode == 0
    process = run("-n", 2, "--name", "gpt", "--image", "trainer")
    assert process.returncode == 2
    assert "name the command that each worker runs" in process.stderr


@pytest.mark.parametrize("kind", ["job", "jobset"])
def test_the_schemas_of_kubernetes_and_jobset_know_every_field(kind):
    options = ["--gpus", 8, "--claim", "my-claim", "--mount", "/runs", "--kind", kind]
    process = run("-n", 3, "--name", "gpt", "--image", "trainer", *options, *TRAIN)
    items = json.loads(process.stdout)["items"]
    assert [item["kind"] for item in items][-2:] == ["Secret", {"job": "Job", "jobset": "JobSet"}[kind]]
    for item in items:
        assert read_by_schema(item) == item
    # Each is seen: an unknown field, and a value of another type.
    items[-1]["spec"]["replicas"] = 3
    assert read_by_schema(items[-1]) != items[-1]
    items[-1]["metadata"]["name"] = 3
    with pytest.raises(ValueError, match="name"):
        read_by_schema(items[-1])


@pytest.mark.parametrize("n", [1, 11])
def test_a_jobset_s_pods_are_the_workers_at_the_names_that_it_gives_them(n):
    secret, jobset = printed_jobset(n)
    (replicated,) = jobset["spec"]["replicatedJobs"]
    job = replicated["template"]
    for index in range(n):
        workers = read_tf_config(environment(job, index)["TF_CONFIG"])
        # <jobset>-<replicated job>-<number of the job>-<index of the pod>, in the domain of the JobSet's name.
        assert workers.addresses == tuple(f"gpt-worker-0-{i}.gpt:2222" for i in range(n))
        assert workers.number == index
    assert job["spec"]["completionMode"] == "Indexed"
    assert job["spec"]["completions"] == job["spec"]["parallelism"] == n
    assert jobset["spec"]["network"]["enableDNSHostnames"] and "subdomain" not in jobset["spec"]["network"]
    assert secret["metadata"] == jobset["metadata"] == {"name": "gpt"}


def test_one_failed_pod_makes_all_pods_of_a_jobset_anew_after_the_last_has_ended():
    _, jobset = printed_jobset(4)
    job = jobset["spec"]["replicatedJobs"][0]["template"]
    assert (pod_of(job)["restartPolicy"], job["spec"]["backoffLimit"]) == ("Never", 0)
    assert jobset["spec"]["failurePolicy"] == {"maxRestarts": 20, "restartStrategy": "BlockingRecreate"}


def test_a_dry_run_prints_the_same_without_the_secret():
    printed_without = [printed_jobset(2, "--dry-run"), printed_jobset(2, "--dry-run")]
    assert printed_without[0] == printed_without[1]
    (secret, jobset), (dry_secret, dry_jobset) = printed_jobset(2), printed_without[0]
    assert dry_jobset == jobset
    assert dry_secret == secret | {"stringData": {}}


def test_an_unknown_option_and_a_part_of_one_are_refused():
    for option in ("--gpu", "--nodes"):
        refused = run("-n", 2, "--name", "gpt", "--image", "trainer", option, 1, *TRAIN)
        assert (refused.returncode, refused.stdout) == (2, "")
        assert f"unrecognized arguments: {option}" in refused.stderr or "name the command" in refused.stderr
