"""Settings of PPO. Defaults are Llama 2's (paper 3.2.3; recipe sheet 5), where it is silent recipe sheet 10's."""

from dataclasses import dataclass, field

from configs.errors import UserError


@dataclass(kw_only=True)
class PPOSettings:
    """Models, data, objective and optimisation of one PPO run."""

    prompt_files: list[str] = field(default_factory=list, metadata={"help": "Prompt files; rows carry `is_safety`."})
    eval_prompt_file: str | None = field(default=None, metadata={"help": "Held-out prompts; none: no evaluation."})
    helpfulness_model_path: str = field(default="", metadata={"help": "Folder of the helpfulness reward model."})
    safety_model_path: str = field(default="", metadata={"help": "Folder of the safety reward model."})
    reference_model: str = field(
        default="start",
        metadata={"help": "pi_0 of Eq. 4: `start` (the policy at the start) or `sft` (sft_model_path)."},
    )
    sft_model_path: str | None = field(default=None, metadata={"help": "The SFT model, for reference_model: sft."})
    value_model: str = field(
        default="helpfulness",
        metadata={
            "help": "Where values come from: a model that starts as the `helpfulness` reward model, as the `policy` "
            "or as `value_model_path` (`path`), or a head on the policy's own hidden states (`trunk`)."
        },
    )
    value_model_path: str | None = field(
        default=None, metadata={"help": "Reward model that the value model starts from, for value_model: path."}
    )
    max_prompt_tokens: int = field(default=1024, metadata={"help": "Longer prompts are refused by the reader."})
    max_reject_share: float = field(default=0.05, metadata={"help": "Share of bad rows above which the run stops."})
    max_new_tokens: int = field(default=512, metadata={"help": "Longest response, in tokens."})
    temperature: float = field(default=1.0, metadata={"help": "Of sampling, and so of the policy that is trained."})

    total_iterations: int = field(default=200, metadata={"help": "Iterations; the paper ran 200 to 400."})
    responses_per_prompt: int = field(
        default=1,
        metadata={"help": "Responses to each prompt, side by side in a batch; their prompt is computed once."},
    )
    batch_size: int = field(default=512, metadata={"help": "Responses an iteration, over all processes."})
    mini_batch_size: int = field(default=64, metadata={"help": "Responses a gradient step, over all processes."})
    ppo_epochs: int = field(default=1, metadata={"help": "Passes over an iteration's responses; the paper's is 1."})
    token_budget: int = field(
        default=0, metadata={"help": "Tokens of a micro-batch, padding included; 0: 8192 on a GPU, 768 on a CPU."}
    )
    learning_rate: float = field(default=1e-6, metadata={"help": "Constant learning rate of the policy."})
    value_learning_rate: float = field(default=9e-6, metadata={"help": "Constant learning rate of the value model."})
    weight_decay: float = field(default=0.1, metadata={"help": "AdamW weight decay, of matrices only."})
    adam_beta1: float = field(default=0.9, metadata={"help": "AdamW beta1."})
    adam_beta2: float = field(default=0.95, metadata={"help": "AdamW beta2."})
    adam_epsilon: float = field(default=1e-5, metadata={"help": "AdamW epsilon."})
    max_grad_norm: float = field(default=1.0, metadata={"help": "Clip of the policy's and the value model's gradient."})
    gradient_checkpointing: bool = field(default=False, metadata={"help": "Recompute activations: less memory."})
    bf16: bool = field(
        default=False,
        metadata={"help": "Autocast to bfloat16 outside sampling, weights as they are; recomputes old log-probs."},
    )
    recompute_logprobs: bool = field(
        default=False,
        metadata={"help": "Old log-probs from the trained model instead of the sampler's (one pass more)."},
    )

    kl_coef: float = field(default=0.01, metadata={"help": "beta of Eq. 4; the paper: 0.01 to 13B, 0.005 above."})
    safety_threshold: float = field(default=0.15, metadata={"help": "R_s below which safety decides the reward."})
    missing_eos_penalty: float = field(
        default=0.0, metadata={"help": "Taken from the raw combined score of a response cut off by max_new_tokens."}
    )
    clip_range: float = field(default=0.2, metadata={"help": "Clip of the probability ratio."})
    value_clip_range: float = field(default=0.2, metadata={"help": "Clip of the value's move; 0: off."})
    value_coef: float = field(default=0.1, metadata={"help": "Weight of the value loss."})
    gamma: float = field(default=1.0, metadata={"help": "Discount of GAE."})
    gae_lambda: float = field(default=0.95, metadata={"help": "lambda of GAE."})
    whiten_advantages: bool = field(default=True, metadata={"help": "Whiten advantages over the iteration's tokens."})

    eval_steps: int = field(
        default=10, metadata={"help": "Iterations between held-out evaluations; 0: only the first and the last."}
    )
    eval_prompts: int = field(default=256, metadata={"help": "Held-out prompts used, from the top of the file."})
    gold: str = field(
        default="none",
        metadata={"help": "simulated: log the simulated world's gold scores at held-out evaluations; chooses nothing."},
    )
    save_best: bool = field(
        default=False, metadata={"help": "Keep the policy with the best held-out reward - beta * KL as the result."}
    )
    max_kl_nats: float | None = field(
        default=None, metadata={"help": "Stop when the mean KL to the reference, in nats a response, passes this."}
    )
    save_steps: int = field(default=0, metadata={"help": "Iterations between checkpoints; 0: none."})
    num_samples: int = field(
        default=4,
        metadata={"help": "Decoded responses written at each logging step, and to held-out prompts at evaluations."},
    )

    @property
    def value_path(self) -> str:
        """The reward model that the value model starts from; empty where it starts from the policy."""
        paths = {"helpfulness": self.helpfulness_model_path, "path": self.value_model_path or ""}
        return paths.get(self.value_model, "")

    def __post_init__(self) -> None:
        if self.reference_model not in ("sft", "start"):
            raise UserError(f"reference_model: {self.reference_model!r} is neither `sft` nor `start`")
        if self.value_model not in ("helpfulness", "policy", "trunk", "path"):
            raise UserError(f"value_model: {self.value_model!r} is none of `helpfulness`, `policy`, `trunk` and `path`")
        if (self.value_model == "path") != (self.value_model_path is not None):
            raise UserError("value_model_path and value_model: path go together; give both or neither")
        if self.gold not in ("simulated", "none"):
            raise UserError(f"gold: {self.gold!r} is neither `simulated` nor `none`")
        if self.reference_model == "sft" and not self.sft_model_path:
            raise UserError("reference_model: sft needs sft_model_path")
        if self.responses_per_prompt < 1 or self.mini_batch_size % self.responses_per_prompt:
            raise UserError(
                f"responses_per_prompt: {self.responses_per_prompt} does not divide mini_batch_size "
                f"{self.mini_batch_size}"
            )
        if self.batch_size % self.mini_batch_size:
            raise UserError(
                f"batch_size {self.batch_size} is not a multiple of mini_batch_size {self.mini_batch_size}: some"
                " responses would be sampled and never trained on"
            )
        if not 0.0 <= self.max_reject_share < 1.0:
            raise UserError(f"max_reject_share must be in [0, 1), not {self.max_reject_share}")
        if self.token_budget < 0:
            raise UserError(f"token_budget: {self.token_budget} tokens; 0 takes what suits the device")
        if self.temperature <= 0:
            raise UserError(f"temperature: {self.temperature} gives no distribution to train")
        if self.save_best and not self.eval_prompt_file:
            raise UserError("save_best needs eval_prompt_file: without held-out prompts there is no best")
