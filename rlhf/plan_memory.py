"""Memory of one PPO process from shapes and settings: weights by role, and the peak of each phase. [pure]

All figures are bytes of one process. They count tensors, as a GPU's allocator does, and neither the CUDA context nor
what an allocator loses to fragments. docs/planning.md says how far this is from measured peaks.

Letters: D hidden, A attention width, K key/value width, F feed-forward width, H heads, r LoRA rank, V vocabulary.
"""

from dataclasses import dataclass

from rlhf.losses import CHUNK_ELEMENTS
from rlhf.plan_shapes import Shape

# NF4 (QLoRA, arXiv 2305.14314): 4 bits, one 8-bit scale a block of 64, one float32 scale of these a block of 256.
NF4_BYTES = (4 + 8 / 64 + 32 / (64 * 256)) / 8
ADAM_STATES = 2  # the two moments, each as wide as the weight


@dataclass(frozen=True)
class Plan:
    """What the arithmetic needs of a run. Widths are bytes a number."""

    shape: Shape
    lora: bool
    rank: int
    modules: tuple[str, ...]
    four_bit: bool  # the frozen matrices
    frozen_width: int
    trained_width: int  # weights that are trained in full; adapters are float32
    autocast: bool  # products in bfloat16, those of sampling on a CPU only
    checkpointing: bool
    token_budget: int
    shards: int  # processes that share weights, gradients and states; 1: every process has all
    gather: bool  # sharded weights come together for sampling and scoring
    responses: int  # of this process and iteration
    per_prompt: int  # of them, to one prompt
    prompt_tokens: int  # longest
    response_tokens: int  # longest
    sampler_rows: int
    sampler_columns: int  # of the cache over all rows
    feed_tokens: int  # of prompts computed at once


@dataclass(frozen=True)
class Role:
    """A model, or its part on the shared base: bytes before sharding."""

    name: str
    weights: float
    gradients: float = 0.0
    optimizer: float = 0.0
    shared: bool = False  # an adapter and heads on the base

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimizer


def frozen_bytes(plan: Plan) -> float:
    """A frozen language model: its matrices in 4 bits where asked; embeddings, norms and head are never quantised."""
    linear = plan.shape.linear_parameters
    rest = plan.shape.parameters() - linear
    return linear * (NF4_BYTES if plan.four_bit else plan.frozen_width) + rest * plan.frozen_width


def scalar_model_bytes(plan: Plan) -> float:
    """A frozen reward model of its own, which is not quantised."""
    return float(plan.shape.parameters(scalar_head=True) * plan.frozen_width)


def trained_role(name: str, parameters: int, width: int, frozen: float = 0.0, shared: bool = False) -> Role:
    """Weights, gradients and AdamW's moments of `parameters` numbers, and `frozen` bytes of weights beside them."""
    own = float(parameters * width)
    return Role(name, own + frozen, own, ADAM_STATES * own, shared)


def policy_roles(plan: Plan, reference: str) -> list[Role]:
    """Base, policy and reference. `reference`: `adapter` (a frozen one), `off` (the base alone), `model` (its own)."""
    if not plan.lora:
        policy = trained_role("policy", plan.shape.parameters(), plan.trained_width)
        return [policy, Role("reference", frozen_bytes(plan))]
    adapter = plan.shape.lora_parameters(plan.rank, plan.modules)
    return [
        Role("base", frozen_bytes(plan)),
        trained_role("policy", adapter, 4, shared=True),
        Role("reference", frozen_bytes(plan))
        if reference == "model"
        else Role("reference", 4.0 * adapter if reference == "adapter" else 0.0, shared=True),
    ]


def value_role(plan: Plan, start: str, rank: int) -> Role:
    """The value model by what it starts from: `trunk` (a head on the policy), `adapter` (one on the base), `borrowed`
    (one on the merged helpfulness model, which is there anyway), `model` (one on a merged model, or all its weights).
    """
    if start == "trunk":
        return trained_role("value", plan.shape.hidden, 4, shared=True)
    if not plan.lora:
        return trained_role("value", plan.shape.parameters(scalar_head=True), plan.trained_width)
    trained = plan.shape.lora_parameters(rank, plan.modules) + plan.shape.hidden
    own = scalar_model_bytes(plan) if start == "model" else 0.0
    return trained_role("value", trained, 4, own, shared=start != "model")


def scorer_role(plan: Plan, name: str, on_base: bool, rank: int) -> Role:
    """A reward model or judge: a frozen adapter with its scalar head, or a model of its own."""
    if on_base:
        return Role(name, 4.0 * (plan.shape.lora_parameters(rank, plan.modules) + plan.shape.hidden), shared=True)
    return Role(name, scalar_model_bytes(plan))


def saved_bytes_per_token(plan: Plan) -> float:
    """Bytes that one decoder layer keeps for backward, per token: a Llama layer of transformers under SDPA.

    Let s be the width of the residual stream (that of the weights), a the width of products (2 in bfloat16 or under
    autocast, else 4), c the copies of a product's input. Autograd keeps:

    - each of the two norms: its input in float32 (for the square and the scaling; the stream itself where s = 4), 4D,
      one float32 scale, and where its weight is trained the scaled input, sD;
    - q and k after rotation, v and the output, for SDPA's backward: a(2A + 2K), and 4H for the log-sum-exp. Rotation
      keeps nothing of its own: its factors need no gradient;
    - the input of gate's SiLU, its result and up's result: 3aF;
    - the input of each matrix whose weight is trained. All weights: q, k, v share one, gate and up another, o's is
      SDPA's output: sD + sD + aF; autocast from float32 makes a copy in bfloat16 for each matrix: 10D + 2F.
      LoRA: the base keeps none, its adapters do: nothing is copied in float32, else every adapter casts its input to
      float32 (autocast: back to bfloat16), c = 4 (2) bytes a number of every adapted matrix's input. And A's output,
      r numbers for each.
    """
    shape = plan.shape
    width = plan.frozen_width if plan.lora else plan.trained_width
    product = 2 if plan.autocast else width
    inputs = {name: size for name, (size, _) in shape.matrices.items()}
    kept = 2 * (4 * shape.hidden + 4)
    kept += product * (2 * shape.attention_width + 2 * shape.kv_width) + 4 * shape.heads
    kept += product * 3 * shape.feed_forward
    if plan.lora:
        low_rank = 2 if plan.autocast else 4
        copied = product == 2
        if copied:
            kept += low_rank * sum(inputs[name] for name in plan.modules)
        else:
            kept += 4 * shape.hidden * any(name in plan.modules for name in ("q_proj", "k_proj", "v_proj"))
            kept += 4 * shape.hidden * any(name in plan.modules for name in ("gate_proj", "up_proj"))
            kept += 4 * shape.feed_forward * ("down_proj" in plan.modules)
        kept += low_rank * plan.rank * len(plan.modules)
    else:
        kept += 2 * width * shape.hidden  # the norms' scaled inputs
        separate = plan.autocast and width == 4
        kept += 2 * 5 * shape.hidden if separate else 2 * product * shape.hidden
        kept += product * shape.feed_forward
    return float(kept)


def cast_weight_bytes(plan: Plan) -> float:
    """Bfloat16 copies of one layer's weights that autocast makes and backward keeps."""
    if not plan.autocast:
        return 0.0
    base = 0 if plan.lora and (plan.frozen_width == 2 or plan.four_bit) else plan.shape.linear_parameters
    adapter = plan.shape.lora_parameters(plan.rank, plan.modules) if plan.lora else 0
    return 2.0 * (base + adapter) / plan.shape.layers


def stream_width(plan: Plan) -> int:
    """Bytes a number of the hidden states between layers."""
    return plan.frozen_width if plan.lora else plan.trained_width


def layer_work_bytes(plan: Plan, backward: bool) -> float:
    """Per token, what comes and goes inside a layer at its widest, the feed-forward part.

    Forward: the stream and the norm's output, and three rows of F (gate's result, up's, their product); an adapter on
    up adds its own product and the scaled one, in float32. Backward, with the layer's kept tensors still whole: the
    gradients of the product and of its two factors, the stream's gradient twice; an adapter adds one of F in float32.
    """
    shape, product = plan.shape, 2 if plan.autocast else stream_width(plan)
    low_rank = 4 if plan.lora and product == 2 else 0
    if backward:
        return (3 * product + low_rank) * shape.feed_forward + 2 * stream_width(plan) * shape.hidden
    adapter = 2 * 4 * shape.feed_forward if plan.lora else product * shape.feed_forward
    return 2 * stream_width(plan) * shape.hidden + 2 * product * shape.feed_forward + adapter


def head_work_bytes(plan: Plan, tokens: int, backward: bool) -> float:
    """Logits of one chunk of `tokens` response tokens (rlhf/losses.py) with what is made from them.

    Forward: the logits and two more of their size for the entropy. Backward of a chunk: the logits, the gradient
    through the log-sum-exp and the one through the pick, and their sum, four in all. A bfloat16 head adds its product.
    """
    elements = min(CHUNK_ELEMENTS, tokens * plan.shape.vocabulary)
    return elements * (4.0 * (4 if backward else 3) + (stream_width(plan) if stream_width(plan) == 2 else 0))


def matrix_work_bytes(plan: Plan) -> float:
    """One matrix at a time: dequantised from 4 bits, or the new gradient of the largest trained weight."""
    largest = max(inputs * outputs for inputs, outputs in plan.shape.matrices.values())
    if not plan.lora:
        return float(max(largest, plan.shape.head_parameters) * plan.trained_width)
    return 2.0 * largest if plan.four_bit else 0.0


def gathered_layer_bytes(plan: Plan) -> float:
    """Sharded weights: one layer whole, the next one on its way, and the embeddings, unless they are the head."""
    if plan.shards == 1:
        return 0.0
    embeddings = 0 if plan.shape.tied else plan.shape.head_parameters
    return stream_width(plan) * (2 * plan.shape.linear_parameters / plan.shape.layers + embeddings)


def rows_and_columns(plan: Plan) -> tuple[int, int]:
    """Rows that decode side by side, and columns of the cache in each (rlhf/sampler.py)."""
    columns = plan.prompt_tokens + plan.response_tokens
    return max(1, min(plan.sampler_rows, plan.responses, plan.sampler_columns // columns)), columns + 1


def cache_bytes(plan: Plan) -> float:
    """Keys and values of the rows that decode, and of the prompts computed to fill them."""
    rows, columns = rows_and_columns(plan)
    staged = min(rows, max(1, plan.feed_tokens // plan.prompt_tokens))
    return plan.shape.kv_bytes(stream_width(plan)) * (rows * columns + staged * (plan.prompt_tokens + 1))


def phase_bytes(plan: Plan, policy_weights: float) -> dict[str, float]:
    """What each phase holds above the roles' own bytes. `policy_weights`: the policy's (and base's) before sharding."""
    shape = plan.shape
    rows, _ = rows_and_columns(plan)
    fed = min(plan.feed_tokens, rows * plan.prompt_tokens)
    own = plan.per_prompt * plan.response_tokens  # a micro-batch has response tokens beside those of their prompt
    scored = plan.token_budget * own // (plan.prompt_tokens + own)
    forward = layer_work_bytes(plan, backward=False)
    moved = matrix_work_bytes(plan) if plan.lora else 0.0
    # Phases without gradients: all weights gathered for each, or layer by layer.
    whole = policy_weights * (1 - 1 / plan.shards) if plan.gather else gathered_layer_bytes(plan)
    sampling = whole + cache_bytes(plan) + moved
    sampling += max(fed * forward, 4 * 4.0 * rows * shape.vocabulary)
    states = plan.token_budget * stream_width(plan) * shape.hidden  # hidden states after the last layer
    scoring = whole + plan.token_budget * forward + moved
    logprobs = max(scoring, whole + states + head_work_bytes(plan, scored, backward=False))
    return {"sample": sampling, "score": scoring, "log-probs": logprobs, "update": update_bytes(plan, scored)}


def update_bytes(plan: Plan, scored: int) -> float:
    """One micro-batch of the policy, from the end of its forward through backward.

    Kept by every layer: all of `saved_bytes_per_token`, or under gradient checkpointing the layer's input alone;
    backward then makes one layer's tensors again. The value model's turn comes after the policy's and needs no logits.
    """
    shape, tokens = plan.shape, plan.token_budget
    layer = tokens * saved_bytes_per_token(plan) + cast_weight_bytes(plan)
    stream = tokens * stream_width(plan) * shape.hidden
    kept = shape.layers * (stream if plan.checkpointing else layer)
    if plan.checkpointing and not plan.lora:
        kept += shape.layers * cast_weight_bytes(plan)  # autocast keeps trained weights' copies to the forward's end
    last = tokens * 4 * shape.hidden + stream + scored * stream_width(plan) * shape.hidden  # final norm, its output
    inside = layer * plan.checkpointing + tokens * layer_work_bytes(plan, backward=True)
    work = max(head_work_bytes(plan, scored, backward=True), inside)
    return kept + last + work + matrix_work_bytes(plan) + gathered_layer_bytes(plan)


def resident_bytes(plan: Plan, roles: list[Role]) -> float:
    """What the roles hold at all times on one process."""
    return sum(role.total for role in roles) / plan.shards


def loading_bytes(plan: Plan, roles: list[Role]) -> float:
    """CPU memory of one process while it loads: every model whole, before it is split and goes to the GPU.

    4-bit weights are quantised on the GPU, one at a time.
    """
    return sum(role.weights for role in roles if not (plan.four_bit and role.name == "base"))
