#!/usr/bin/env python3
"""Trains a GPT of the shape that trainer's has with PyTorch, some steps at a time, for scripts/benchmarks/step.py and
scripts/benchmarks/time_to_loss.py.

    .venv-torch/bin/python scripts/benchmarks/torch_gpt.py JOB.json

The benchmarks run it in an environment that has PyTorch and nothing of trainer's. Each line of standard input is a
number of steps to take; the answer, a line of JSON, has the seconds that one of them took. The line `evaluate` scores
the validation text.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

if __name__ == "__main__" and (len(sys.argv) != 2 or sys.argv[1].startswith("-")):
    is_asked = sys.argv[1:] in (["-h"], ["--help"])
    print(__doc__, end="", file=sys.stdout if is_asked else sys.stderr)
    sys.exit(0 if is_asked else 2)

import torch
from torch import nn
from torch.nn import functional

INITIAL_STDDEV = 0.02
# Token 0 of trainer's vocabularies: it is in no text, and as a target it is not scored.
PADDING = 0
# The tokens that are scored at a time.
SCORED_TOKENS = 1 << 13


class Block(nn.Module):
    """A transformer block: causal self-attention and a feed-forward layer.

    Args:
        shape: the section `model` of trainer's config, as everywhere in this file.
    """

    def __init__(self, shape: dict[str, Any]) -> None:
        super().__init__()
        hidden, intermediate, bias = shape["hidden_dim"], shape["intermediate_dim"], shape["use_bias"]
        self.num_heads, self.head_dim = shape["num_heads"], hidden // shape["num_heads"]
        self.pre_norm = shape["pre_norm"]
        self.activation = {"relu": functional.relu, "gelu": functional.gelu}[shape["activation"]]
        attention = self.num_heads * self.head_dim
        self.query_key_value = nn.Linear(hidden, 3 * attention, bias=bias)
        self.attention_output = nn.Linear(attention, hidden, bias=bias)
        self.attention_norm = nn.LayerNorm(hidden, bias=bias)
        self.intermediate = nn.Linear(hidden, intermediate, bias=bias)
        self.output = nn.Linear(intermediate, hidden, bias=bias)
        self.feedforward_norm = nn.LayerNorm(hidden, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Transforms float [batch, sequence, hidden_dim]."""
        if self.pre_norm:
            x = x + self.attend(self.attention_norm(x))
            return x + self.output(self.activation(self.intermediate(self.feedforward_norm(x))))
        x = self.attention_norm(x + self.attend(x))
        return self.feedforward_norm(x + self.output(self.activation(self.intermediate(x))))

    def attend(self, x: torch.Tensor) -> torch.Tensor:
        """Attends from each position to itself and to the positions before it."""
        batch, sequence, _ = x.shape
        x = self.query_key_value(x).view(batch, sequence, 3, self.num_heads, self.head_dim)
        query, key, value = x.permute(2, 0, 3, 1, 4).unbind()  # each [batch, heads, sequence, head_dim]
        x = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.attention_output(x.transpose(1, 2).reshape(batch, sequence, -1))


class GPT(nn.Module):
    """A decoder-only transformer. It has neither dropout nor document masks."""

    def __init__(self, shape: dict[str, Any], vocabulary_size: int, sequence_length: int) -> None:
        super().__init__()
        hidden = shape["hidden_dim"]
        self.token_embedding = nn.Embedding(vocabulary_size, hidden)
        self.position_embedding = nn.Embedding(sequence_length, hidden)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape["num_layers"]))
        self.final_norm = nn.LayerNorm(hidden, bias=shape["use_bias"]) if shape["pre_norm"] else nn.Identity()
        self.unembedding = nn.Linear(hidden, vocabulary_size, bias=shape["use_bias"] and not shape["tied_embeddings"])
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=INITIAL_STDDEV)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
            if isinstance(module, Block):
                # As in GPT-2 and nanoGPT: each block adds two such outputs to the sum that passes through all blocks.
                for output in (module.attention_output, module.output):
                    nn.init.normal_(output.weight, std=INITIAL_STDDEV / (2 * shape["num_layers"]) ** 0.5)
        if shape["tied_embeddings"]:
            self.unembedding.weight = self.token_embedding.weight

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Returns the mean loss in nats of int64 [batch, sequence] targets, without padding."""
        x = self.token_embedding(tokens) + self.position_embedding(torch.arange(tokens.shape[1]))
        for block in self.blocks:
            x = block(x)
        logits = self.unembedding(self.final_norm(x))
        return functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=PADDING)


class Training:
    """A model, its optimizer and the examples that it is trained on.

    Args:
        job: the keys config (trainer's whole config), vocabulary_size, is_compiled, and rows (the path of a file of
            int32 tokens). Rows of sequence + 1 tokens begin after each other, or stride tokens apart if there is a key
            stride. The key learning_rates has the rate of each step, unless it is constant; the key validation has the
            path of the rows to score.
    """

    def __init__(self, job: dict[str, Any]) -> None:
        train, optimizer = job["config"]["train"], job["config"]["optimizer"]
        torch.manual_seed(train["seed"])
        length = train["sequence_length"]
        self.batch_size = train["global_batch_size"]
        self.rows = rows_of(job["rows"], length, job.get("stride", length + 1))
        self.validation = rows_of(job["validation"], length, length + 1) if "validation" in job else None
        self.model = GPT(job["config"]["model"], job["vocabulary_size"], length)
        self.parameters = list(self.model.parameters())
        self.is_mixed = train["precision"] == "mixed_bfloat16"
        self.clip_norm = optimizer["clip_norm"]
        matrices = [parameter for parameter in self.parameters if parameter.dim() > 1]
        vectors = [parameter for parameter in self.parameters if parameter.dim() == 1]
        self.optimizer = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": optimizer["weight_decay"]}, {"params": vectors, "weight_decay": 0.0}],
            lr=optimizer["learning_rate"],
            betas=(optimizer["beta_1"], optimizer["beta_2"]),
            eps=optimizer["epsilon"],
            fused=True,
        )
        self.learning_rates: list[float] | None = job.get("learning_rates")
        self.num_taken = 0
        self.loss_of = torch.compile(self.model) if job["is_compiled"] else self.model

    def take(self, num_steps: int) -> tuple[float, float]:
        """Trains some steps; returns the seconds of one step, and the mean loss in nats."""
        total = torch.zeros([])
        start = time.perf_counter()
        for _ in range(num_steps):
            batch = self.rows[torch.randint(len(self.rows), (self.batch_size,))].long()
            if self.learning_rates is not None:
                for group in self.optimizer.param_groups:
                    group["lr"] = self.learning_rates[self.num_taken]
            self.num_taken += 1
            self.optimizer.zero_grad(set_to_none=True)
            with torch.autocast("cpu", torch.bfloat16, enabled=self.is_mixed):
                loss = self.loss_of(batch[:, :-1].contiguous(), batch[:, 1:].contiguous())
            loss.backward()
            nn.utils.clip_grad_norm_(self.parameters, self.clip_norm)
            self.optimizer.step()
            total += loss.detach()
        return (time.perf_counter() - start) / num_steps, total.item() / num_steps

    def evaluate(self) -> tuple[float, int]:
        """Returns the mean loss in nats of the validation rows, and the number of their targets."""
        assert self.validation is not None
        loss_sum, num_targets = 0.0, 0
        rows_at_once = max(1, SCORED_TOKENS // self.validation.shape[1])
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=self.is_mixed):
            for rows in self.validation.split(rows_at_once):
                inputs, targets = rows[:, :-1].long().contiguous(), rows[:, 1:].long().contiguous()
                num_of_rows = int((targets != PADDING).sum())
                loss_sum += self.model(inputs, targets).item() * num_of_rows
                num_targets += num_of_rows
        return loss_sum / num_targets, num_targets


def rows_of(file: str, length: int, stride: int) -> torch.Tensor:
    """Returns rows of length + 1 tokens, stride tokens apart, int32 [rows, length + 1], of a file of tokens."""
    tokens = torch.from_file(file, size=Path(file).stat().st_size // 4, dtype=torch.int32)
    return tokens.unfold(0, length + 1, stride)


def main() -> None:
    """Trains as the job describes, until standard input ends."""
    training = Training(json.loads(Path(sys.argv[1]).read_text()))
    num_parameters = sum(parameter.numel() for parameter in training.parameters)
    print(json.dumps({"num_parameters": num_parameters, "version": f"PyTorch {torch.__version__}"}), flush=True)
    answered = time.process_time()
    for line in sys.stdin:
        idle_cpu_secs = time.process_time() - answered
        if line.strip() == "evaluate":
            loss, num_tokens = training.evaluate()
            figures = {"loss": loss, "num_tokens": num_tokens}
        else:
            secs, loss = training.take(int(line))
            figures = {"step_secs": secs, "loss": loss}
        print(json.dumps({**figures, "idle_cpu_secs": idle_cpu_secs}), flush=True)
        answered = time.process_time()


if __name__ == "__main__":
    main()
