#!/usr/bin/env python3
r"""Prints a Kubernetes job that runs a command as several workers, each in a pod; kubectl starts it.

    scripts/launch/kubernetes_job.py -n 4 --name gpt --image IMAGE --gpus 8 --claim CLAIM --mount /runs \
        trainer train quickstart --or-resume run_folder=/runs/gpt | kubectl apply -f -

Each worker gets its own TF_CONFIG, and all get the same secret, with which they prove that they belong together. The
run's folder has to be on a claim that all pods can write to (ReadWriteMany). A pod that fails starts its command again;
with --or-resume the command then goes on with the run.

With --kind jobset it prints a JobSet (v1alpha2), whose controller has to be in the cluster. There all pods are made
anew when one fails, so that a pod whose node is gone starts on another node at once.

This program changes nothing; kubectl does. With --dry-run the secret is left out, so that what it prints can be kept.
"""

import argparse
import json
import re
import secrets
import sys

PORT = 2222
SECRET = "TRAINER_MEETING_SECRET"
INDEX = "JOB_COMPLETION_INDEX"

# Pods start minutes apart if images are pulled and nodes added. A pod that fails waits up to 5 minutes before its next
# start; workers that wait less than that for each other may never meet.
MEETING_SECS = 600

# A worker that is lost ends the others, and all start again. After this many losses the job fails and gives its GPUs
# back, because starting again does not mend the cause.
NUM_LOSSES = 20

# The time to finish a step or an evaluation, and to write a checkpoint.
GRACE_SECS = 300


def manifest(options: argparse.Namespace) -> dict:
    """Returns a List of the secret that the pods share and the job; a plain job also needs a service, which gives the
    pods their names.
    """
    secret = {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {"name": options.name},
        "stringData": {} if options.dry_run else {SECRET: secrets.token_hex(16)},
    }
    items = [secret, jobset(options)] if options.kind == "jobset" else [service(options), secret, job(options)]
    return {"apiVersion": "v1", "kind": "List", "items": items}


def service(options: argparse.Namespace) -> dict:
    """Returns the service that gives the pods of a plain job their names."""
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": options.name},
        "spec": {
            "clusterIP": "None",
            "selector": {"job-name": options.name},
            # A worker finds the others before it is ready, so its address has to be published before that.
            "publishNotReadyAddresses": True,
            "ports": [{"port": PORT, "protocol": "TCP"}],
        },
    }


def job(options: argparse.Namespace) -> dict:
    """Returns a plain job, whose pods start again one by one."""
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": options.name},
        "spec": {
            **indexed(options),
            # The limit counts the starts of all pods together.
            "backoffLimit": NUM_LOSSES * options.n,
            "template": {
                # The same pod starts again on its node, with its image and its name.
                "spec": {"restartPolicy": "OnFailure", "subdomain": options.name, **pod(options)}
            },
        },
    }


def jobset(options: argparse.Namespace) -> dict:
    """Returns a JobSet of one job, whose pods are all made anew when one fails."""
    template = {
        "spec": {
            **indexed(options),
            # The JobSet counts, not the job.
            "backoffLimit": 0,
            "template": {"spec": {"restartPolicy": "Never", **pod(options)}},
        }
    }
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {"name": options.name},
        "spec": {
            # The JobSet makes the service; its name is the JobSet's.
            "network": {"enableDNSHostnames": True, "publishNotReadyAddresses": True},
            # Blocking: a pod that still saves holds the run's lock.
            "failurePolicy": {"maxRestarts": NUM_LOSSES, "restartStrategy": "BlockingRecreate"},
            "replicatedJobs": [{"name": "worker", "replicas": 1, "template": template}],
        },
    }


def indexed(options: argparse.Namespace) -> dict:
    """Returns the part of a job that numbers its pods."""
    return {"completionMode": "Indexed", "completions": options.n, "parallelism": options.n}


def hostname(options: argparse.Namespace, index: int) -> str:
    """Returns the name of a worker's pod in the service's domain."""
    return f"{options.name}-worker-0-{index}" if options.kind == "jobset" else f"{options.name}-{index}"


def pod(options: argparse.Namespace) -> dict:
    """Returns what the specifications of all workers' pods have in common."""
    workers = [f"{hostname(options, index)}.{options.name}:{PORT}" for index in range(options.n)]
    tf_config = {"cluster": {"worker": workers}, "task": {"type": "worker", "index": f"$({INDEX})"}}
    volumes, mounts = [], []
    if options.claim:
        volumes.append({"name": "claim", "persistentVolumeClaim": {"claimName": options.claim}})
        mounts.append({"name": "claim", "mountPath": options.mount})
    if options.gpus:
        # NCCL exchanges data in /dev/shm, and a container has only 64 MB there.
        volumes.append({"name": "shared-memory", "emptyDir": {"medium": "Memory"}})
        mounts.append({"name": "shared-memory", "mountPath": "/dev/shm"})
    container = {
        "name": "worker",
        "image": options.image,
        # Kubernetes replaces $(NAME) by a variable, and reads $$ as $.
        "command": [word.replace("$", "$$") for word in options.command],
        "env": [
            # First, because TF_CONFIG refers to it.
            {
                "name": INDEX,
                "valueFrom": {
                    "fieldRef": {"fieldPath": "metadata.annotations['batch.kubernetes.io/job-completion-index']"}
                },
            },
            # Without quotes, so that Kubernetes replaces $(...) by a number and not by a string.
            {"name": "TF_CONFIG", "value": json.dumps(tf_config).replace(f'"$({INDEX})"', f"$({INDEX})")},
            {"name": SECRET, "valueFrom": {"secretKeyRef": {"name": options.name, "key": SECRET}}},
            {"name": "TRAINER_MEETING_SECS", "value": str(MEETING_SECS)},
            {"name": "PYTHONUNBUFFERED", "value": "1"},
        ],
        "resources": {"limits": {"nvidia.com/gpu": str(options.gpus)} if options.gpus else {}},
        "volumeMounts": mounts,
    }
    return {
        "terminationGracePeriodSeconds": GRACE_SECS,
        "containers": [container],
        "volumes": volumes,
    }


def main() -> None:
    """Reads the command line and prints the manifest."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("-n", type=int, required=True, help="number of workers")
    parser.add_argument("--name", required=True, help="name of the job and of its service")
    parser.add_argument("--image", required=True, help="container image that has the command")
    parser.add_argument("--kind", choices=("job", "jobset"), default="job", help="what to print (default: %(default)s)")
    parser.add_argument("--gpus", type=int, default=0, help="NVIDIA GPUs for each worker (default: %(default)s)")
    parser.add_argument("--claim", help="persistent volume claim that holds the run's folder")
    parser.add_argument("--mount", help="folder under which pods see the claim")
    parser.add_argument(
        "--dry-run", action="store_true", help="leave out the secret, for a manifest to look at or keep"
    )
    parser.add_argument("command", nargs=argparse.REMAINDER, help="the command that each worker runs")
    options = parser.parse_args()
    check(parser, options)
    json.dump(manifest(options), sys.stdout, indent=2)
    print()


def check(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Ends the program with a message if Kubernetes would refuse an option."""
    if options.n < 1:
        parser.error(f"-n {options.n}: there must be at least 1 worker.")
    if not re.fullmatch("[a-z]([-a-z0-9]*[a-z0-9])?", options.name):
        parser.error(
            f"--name {options.name!r} must be a DNS label: small letters, digits and -; it begins with a letter and "
            "ends with a letter or digit."
        )
    # The name of the last pod has to be a DNS label too. A JobSet also counts the six characters that make it unique.
    longest = hostname(options, options.n - 1)
    if len(longest) > (57 if options.kind == "jobset" else 63):
        parser.error(f"--name {options.name!r} is too long: the last worker would be {longest}.")
    if not options.image or re.search(r"\s", options.image):
        parser.error(f"--image {options.image!r} is not an image's name: it must be one word.")
    if options.gpus < 0:
        parser.error(f"--gpus {options.gpus} must be 0 or more.")
    if (options.claim is None) != (options.mount is None):
        parser.error("--claim and --mount go together: give both, or neither.")
    if options.claim is not None and not re.fullmatch("[a-z0-9]([-.a-z0-9]*[a-z0-9])?", options.claim):
        parser.error(f"--claim {options.claim!r} is not a claim's name: it may have small letters, digits, - and '.'.")
    if options.mount is not None and not re.fullmatch("/[^:]+", options.mount):
        parser.error(f"--mount {options.mount!r} must be a path that begins with / and has no ':'.")
    if not options.command:
        parser.error("name the command that each worker runs, such as: trainer train CONFIG --or-resume")


if __name__ == "__main__":
    main()
