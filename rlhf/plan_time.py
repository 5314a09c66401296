"""Time of one PPO iteration by arithmetic: products at an assumed share of a GPU's peak, decoding by bandwidth. [pure]

Predictions only. Left out: Python between kernels, launches, attention masks, the cost of 4-bit dequantisation, waiting
for the slowest process, reading and writing files. Expect a real iteration to take longer.
"""

from dataclasses import dataclass

from rlhf.plan_memory import NF4_BYTES, Plan, rows_and_columns, stream_width


@dataclass(frozen=True)
class Device:
    """A GPU and its links. Rates per second; `utilisation` is the share of peak FLOPs that products reach."""

    flops: float
    bandwidth: float  # bytes of its own memory
    link: float  # bytes to and from the other GPUs, one way
    utilisation: float = 0.4
    bandwidth_utilisation: float = 0.6


@dataclass(frozen=True)
class Work:
    """How often an iteration computes what: passes over all tokens, beside sampling and the update."""

    scorers: int  # reward models
    logprob_passes: int  # reference, and old log-probs where they are computed again
    epochs: int
    mean_response: float  # tokens
    mean_prompt: float
    one_trunk: bool = False  # values come out of the policy's own pass


def forward_flops(plan: Plan, context: float, head: bool) -> float:
    """FLOPs of one token with `context` tokens before it: 2 a weight, 4A a token looked at, and the output head."""
    shape = plan.shape
    weights = shape.linear_parameters
    if plan.lora:
        weights += shape.lora_parameters(plan.rank, plan.modules)
    attention = 4 * shape.attention_width * context * shape.layers
    return 2 * weights + attention + (2 * shape.head_parameters if head else 0)


def pass_flops(plan: Plan, work: Work, head: bool) -> float:
    """A forward over this process's tokens, a prompt once for its responses; the head at response tokens only."""
    tokens = tokens_per_response(plan, work)
    share = work.mean_response / tokens
    one = forward_flops(plan, (work.mean_prompt + work.mean_response) / 2, False) + (
        2 * plan.shape.head_parameters * share if head else 0
    )
    return plan.responses * tokens * one


def tokens_per_response(plan: Plan, work: Work) -> float:
    return work.mean_prompt / plan.per_prompt + work.mean_response


def update_flops(plan: Plan, work: Work) -> float:
    """Policy and value: forward, gradients of inputs, gradients of weights (not of a frozen base), and the forward
    again under gradient checkpointing.
    """
    passes = (2 if plan.lora else 3) + plan.checkpointing
    value = 0.0 if work.one_trunk else pass_flops(plan, work, False)
    return work.epochs * passes * (pass_flops(plan, work, True) + value)


def weight_bytes_read(plan: Plan) -> float:
    """What a decode step reads of the policy: every matrix, the head and the adapter, once for all rows."""
    shape = plan.shape
    width = stream_width(plan)
    linear = shape.linear_parameters * (NF4_BYTES if plan.lora and plan.four_bit else width)
    adapter = 4 * shape.lora_parameters(plan.rank, plan.modules) if plan.lora else 0
    return linear + adapter + shape.head_parameters * width


def decode_seconds(plan: Plan, work: Work, device: Device) -> float:
    """Responses decode in waves of as many rows as the cache holds; a step is bound by bandwidth or by FLOPs.

    Weights that stay in parts come together at every step, which all rows share; nothing is taken to overlap with it.
    """
    rows, _ = rows_and_columns(plan)
    steps = plan.responses * work.mean_response / rows
    context = work.mean_prompt + work.mean_response / 2
    read = weight_bytes_read(plan) + rows * context * plan.shape.kv_bytes(stream_width(plan))
    computed = rows * forward_flops(plan, context, True)
    step = max(read / (device.bandwidth * device.bandwidth_utilisation), computed / (device.flops * device.utilisation))
    return steps * (step if plan.gather else step + gather_seconds(plan, device))


def gather_seconds(plan: Plan, device: Device) -> float:
    """All shards of one model brought to every process once."""
    if plan.shards == 1:
        return 0.0
    return stream_width(plan) * plan.shape.parameters() * (1 - 1 / plan.shards) / device.link


def iteration_seconds(plan: Plan, work: Work, device: Device) -> dict[str, float]:
    """Seconds by phase. Sharded weights are gathered for each micro-batch's forward and backward, by the phases without
    gradients once, or where they stay in parts for every forward.
    """
    speed = device.flops * device.utilisation
    micro_batches = -(-plan.responses * tokens_per_response(plan, work) // plan.token_budget)
    gather = gather_seconds(plan, device)
    prefill = (
        plan.responses / plan.per_prompt * work.mean_prompt * forward_flops(plan, work.mean_prompt / 2, False) / speed
    )
    feeds = 1 if plan.gather else -(-plan.responses / plan.per_prompt * work.mean_prompt // plan.feed_tokens)
    scored = 1 if plan.gather else micro_batches
    models = 1 if work.one_trunk else 2
    passes = 2 + plan.checkpointing  # gathers of a micro-batch's update: forward, backward, recomputation
    return {
        "sample": prefill + decode_seconds(plan, work, device) + feeds * gather,
        "score": work.scorers * (pass_flops(plan, work, False) / speed + scored * gather),
        "log-probs": work.logprob_passes * (pass_flops(plan, work, True) / speed + scored * gather)
        + pass_flops(plan, work, False) / speed + scored * gather,
        "update": update_flops(plan, work) / speed + work.epochs * models * passes * micro_batches * gather,
    }  # fmt: skip
