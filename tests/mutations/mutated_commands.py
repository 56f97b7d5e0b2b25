"""Mutated prompts, options, and environment variables."""

import contextlib
import json
import os
import random
import re
import shutil
from pathlib import Path
from typing import Any

from mutated_values import ENGLISH, NUMBERS, TEXTS, mutated_bytes, mutated_json, mutated_text, nasty, prompt_text
from mutation_lab import (
    TOKENIZERS,
    Answer,
    Lab,
    as_argument,
    expect,
    expect_message,
    expect_no_leftovers,
    judge,
    write_inputs,
)


def prompt(lab: Lab, rng: random.Random) -> bool:
    """A prompt, and the other options of generate."""
    from trainer.errors import UserError

    kind = rng.choice(TOKENIZERS)
    text = prompt_text(rng) if rng.random() < 0.8 else mutated_text(rng, rng.choice(("The cat", "고양이", "", ENGLISH)))
    run = lab.loaded(kind)
    with contextlib.suppress(UserError):
        tokens = run.tokenizer.encode(text)
        expect(not {run.tokenizer.bos_id, run.tokenizer.pad_id} & {*tokens}, f"a special token among {tokens}")
    if rng.random() < 0.95:
        stop = None if rng.random() < 0.7 else mutated_text(rng, rng.choice(TEXTS)[:5])
        # With a sliding window a text may be longer than the context, and goes on for as long as it is told to.
        options = {"num_tokens": 3, "sliding_window": True} if rng.random() < 0.6 else {"num_tokens": nasty(rng)}
        options |= {"seed": rng.choice((3, 2**63, -1, nasty(rng))), "stop": stop}
        lab.note("generate", (kind, text, options))
        try:
            with lab.heard() as heard:
                (written,) = run.generate([text], **options)
        except UserError as error:
            expect_message(lab, error)
            return False
        judge(Answer(0, *heard), (0,))
        tokenizer = run.tokenizer.wrapped
        expect(tokenizer.is_lossy or kind == "char" or written.startswith(text), f"{text!r} became {written!r}")
        return True
    text = as_argument(text)
    words = ["generate", str(lab.seed(kind) / "run"), "--prompt", text]
    words += (
        ["--sampler", rng.choice(("greedy", "top-p", "top-k", "beam", "random", "min-p"))] if rng.random() < 0.5 else []
    )
    words += rng.sample(["--json", "--sliding-window"], rng.choice((0, 0, 1, 2)))
    names = ["k", "p", "min-p", "temperature", "repetition-penalty", "length-penalty", "num-tokens", "stop", "seed"]
    names += ["stop-token", "num-samples", "num-beams", "batch-size", "sampler"]
    for name in rng.sample(names, rng.choice((0, 1, 1, 2))):
        value = nasty(rng)
        if isinstance(value, int) and value > 64 and name in ("num-samples", "num-beams"):
            value = 3  # More samples would rightly take much time and memory.
        words += [f"--{name}", mutated_text(rng, str(value)) if rng.random() < 0.2 else str(value)]
    words += ["--num-tokens", "3"] if "--num-tokens" not in words else []
    answer = lab.trainer(*map(as_argument, words))
    return not answer.status


def prompts(lab: Lab, rng: random.Random) -> bool:
    """A file of prompts."""
    kind = rng.choice(TOKENIZERS)
    texts = [prompt_text(rng)[:80] for _ in range(rng.choice((1, 5, 20)))]
    is_json = rng.random() < 0.6
    lines = [json.dumps({"prompt": text}, ensure_ascii=rng.random() < 0.5) for text in texts] if is_json else texts
    whole = "\n".join(lines).encode(errors="surrogatepass")
    given = mutated_bytes(rng, whole, ENGLISH.encode()) if rng.random() < 0.3 else whole
    path = lab.write("prompts.jsonl" if is_json else "prompts.txt", given)
    words = [str(lab.seed(kind) / "run"), "--prompts", str(path), "--num-tokens", "2", "--sliding-window"]
    answer = lab.trainer("generate", *words)
    if answer.status:
        return False
    written = [json.loads(line) for line in answer.out.split("\n")[:-1]]
    if is_json and given == whole:
        expect([each["prompt"] for each in written] == texts, f"{texts} became {written}")
    expect(all(isinstance(each["text"], str) for each in written), f"texts {written}")
    return True


def tf_config(lab: Lab, rng: random.Random) -> bool:
    """TF_CONFIG, and the variables of SLURM."""
    from trainer.config.settings import DistributionConfig
    from trainer.distributed import meeting, workers
    from trainer.errors import UserError

    write_inputs()
    tree: dict[str, Any] = {
        "cluster": {"worker": ["127.0.0.1:1", "127.0.0.1:2", "localhost:3"][: rng.choice((1, 2, 3))]},
        "task": {"type": "worker", "index": rng.choice((0, 1))},
    }
    if rng.random() < 0.2:
        tree["cluster"]["chief"] = ["[::1]:4"]
    variables = {"TF_CONFIG": mutated_json(rng, json.dumps(tree).encode(), b"[::1]:99999 chief ps x")}
    if rng.random() < 0.1:
        name = rng.choice(
            ("TRAINER_MEETING_SECS", "SLURM_STEP_NUM_TASKS", "SLURM_JOB_ID", "SLURM_LOCALID", "SLURM_PROCID")
        )
        variables[name] = mutated_bytes(rng, b"2", b"node[1-3]")
    if rng.random() < 0.05:
        variables |= {"SLURM_STEP_NODELIST": b"n[1-2]", "SLURM_STEP_TASKS_PER_NODE": b"1(x2)", "SLURMD_NODENAME": b"n1"}
        variables |= {"SLURM_STEP_NUM_TASKS": b"2", "SLURM_JOB_ID": b"7", "SLURM_LOCALID": b"0", "SLURM_PROCID": b"0"}
        del variables["TF_CONFIG"]
        name = rng.choice(sorted(variables))
        variables[name] = mutated_bytes(rng, variables[name], b"n[1-999999999999]")
    for name, value in variables.items():
        lab.note(name, value)
        os.environb[name.encode()] = value.replace(b"\0", b"")[:100_000]
    settings = DistributionConfig(kind=rng.choice(("auto", "multi_worker")))
    try:
        with lab.heard():
            found = workers.find_workers(settings)
            if found.are_several:
                meeting.meeting_secs()
    except UserError as error:
        expect_message(lab, error)
        lab.trainer("train", "config.toml", f"distribution.kind={settings.kind}", statuses=(2,))
        return False
    if "TF_CONFIG" in variables:
        given = json.loads(os.environ["TF_CONFIG"] or "{}")
    else:
        given = {}
    if given.get("cluster"):
        expect(list(found.addresses) == given["cluster"]["worker"], f"workers {found.addresses}")
        expect(found.number is not True and found.number == given["task"]["index"], f"index {found.number}")
    if found.are_several and all(re.match(r"(127\.0\.0\.1|localhost|\[::1\]|):", each) for each in found.addresses):
        with contextlib.suppress(UserError), meeting.Meeting(found, 0.05) as together:
            together.agree({})
    return True


def options(lab: Lab, rng: random.Random) -> bool:
    """The command line of the other verbs."""
    write_inputs()
    shutil.copytree(lab.seed("byte") / "prepared", "prepared")
    prepared = str(next(Path("prepared").iterdir()))
    lines = [
        f"inspect {prepared} --examples 2 --split train --sequence-length 8",
        f"inspect {prepared}",
        "inspect config.toml",
        f"evaluate {prepared}",
        f"generate {prepared}",
        "plan config.toml --target gpu:H100x8 --utilisation 0.5",
        "plan config.toml --target tpu:v5e-8",
        "plan config.toml --target cpu --weights --vocabulary-size 300",
        "prepare config.toml --runner local",
        "prepare config.toml -- --runner=X",
        "verify config.toml --replicas x,y",
        "verify config.toml --replicas 1,3 --steps 1",
        f"train --resume {prepared}",
        "train --or-resume text.txt",
        "train",
    ]
    words = rng.choice(lines).split()
    for _ in range(rng.choice((1, 1, 2, 3))):
        i = rng.randrange(1, len(words)) if len(words) > 1 and rng.random() < 0.95 else 0
        values = [place for place in range(2, len(words)) if words[place - 1].startswith("--")]
        what = rng.randrange(8)
        if what == 0:
            del words[i]
        elif what == 1:
            words.insert(i, words[i])
        elif what == 2:
            words[i] = mutated_text(rng, words[i])
        elif what <= 6 and values:
            words[rng.choice(values)] = str(rng.choice((nasty(rng), rng.choice(NUMBERS), rng.randrange(9))))
        else:
            words[i] = str(nasty(rng))
        if not words:
            break
    words = list(map(as_argument, words))
    if words[:1] == ["verify"] and re.search(r"\b[124],[124]\b", " ".join(words)):
        return True  # This would start processes that train.
    answer = lab.trainer(*words, statuses=(0, 1, 2))
    expect_no_leftovers(Path())
    return not answer.status
