"""Settings of PPO. Defaults are Llama 2's (paper 3.2.3; recipe sheet 5), where it is silent recipe sheet 10's."""

from dataclasses import dataclass, field

from configs.errors import UserError
from configs.scoring_settings import ScoringSettings

AT_LEAST = {"max_prompt_tokens": 1, "max_new_tokens": 1, "total_iterations": 1, "responses_per_prompt": 1,
            "batch_size": 1, "mini_batch_size": 1, "ppo_epochs": 1, "sampling_token_budget": 1, "eval_prompts": 1,
            "token_budget": 0, "eval_steps": 0, "save_steps": 0, "num_samples": 0, "judge_patience": 0,
            "learning_rate": 0, "value_learning_rate": 0, "weight_decay": 0, "kl_coef": 0, "missing_eos_penalty": 0,
            "value_clip_range": 0, "value_coef": 0}  # fmt: skip
ABOVE_0 = ("temperature", "adam_epsilon", "max_grad_norm", "clip_range", "max_kl_nats", "kl_target")
BELOW_1 = ("adam_beta1", "adam_beta2", "max_reject_share")
SHARES = ("gamma", "gae_lambda")


@dataclass(kw_only=True)
class PPOSettings(ScoringSettings):
    """Models, data, objective and optimisation of one PPO run."""

    prompt_files: list[str] = field(default_factory=list, metadata={"help": "Prompt files; rows carry `is_safety`."})
    eval_prompt_file: str | None = field(default=None, metadata={"help": "Held-out prompts; none: no evaluation."})
    judge_helpfulness_model_path: str = field(
        default="",
        metadata={
            "help": "Helpfulness reward model trained on the prompts that helpfulness_model_path has not seen: judges "
            "held-out responses, and save_best goes by it."
        },
    )
    judge_safety_model_path: str = field(default="", metadata={"help": "The same for safety; both or neither."})
    judge_patience: int = field(
        default=0,
        metadata={"help": "Stop after so many held-out evaluations in a row without a new best; 0: never."},
    )
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
    sampling_engine: str = field(
        default="in_process",
        metadata={"help": "`in_process` or `continuous_batching` (for CUDA; recomputes old log-probs)."},
    )

    total_iterations: int = field(default=200, metadata={"help": "Iterations; the paper ran 200 to 400."})
    responses_per_prompt: int = field(
        default=1,
        metadata={"help": "Responses to each prompt, side by side in a batch; their prompt is computed once."},
    )
    batch_size: int = field(default=512, metadata={"help": "Responses an iteration, over all processes."})
    mini_batch_size: int = field(default=64, metadata={"help": "Responses a gradient step, over all processes."})
    ppo_epochs: int = field(default=1, metadata={"help": "Passes over an iteration's responses; the paper's is 1."})
    token_budget: int = field(
        default=0,
        metadata={"help": "Tokens of a micro-batch, padding included; 0: 8192 on a GPU, 768 on a CPU, 2048 with bf16."},
    )
    sampling_token_budget: int = field(
        default=32_768,
        metadata={"help": "Prompt and response tokens that the sampler's cache holds; fewer: less memory."},
    )
    gather_weights: bool = field(
        default=True,
        metadata={
            "help": "Under FSDP2 or ZeRO-3: bring sharded weights together once an iteration to sample and score; "
            "false: layer by layer at every forward, each decoded token too, for models that no GPU holds whole."
        },
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
        metadata={
            "help": "Autocast to bfloat16, weights as they are (sampling on a CPU only); recomputes old log-probs."
        },
    )
    recompute_logprobs: bool = field(
        default=False,
        metadata={"help": "Old log-probs from the trained model instead of the sampler's (one pass more)."},
    )

    importance_cap: float = field(
        default=2.0,
        metadata={
            "help": "Where old log-probs are recomputed: cap of the weight pi_old / pi_sampler of each token's policy "
            "loss; 0: no weights."
        },
    )

    kl_coef: float = field(
        default=0.01,
        metadata={"help": "beta of Eq. 4, the first one if adaptive; the paper: 0.01 to 13B, 0.005 above."},
    )
    kl_estimator: str = field(
        default="k1", metadata={"help": "Of the penalty at each token: `k1`, `k2` or `k3`; the KL reported is k1's."}
    )
    kl_controller: str = field(
        default="fixed", metadata={"help": "`fixed`, or `adaptive`: beta is moved towards kl_target (Ziegler et al.)."}
    )
    kl_target: float | None = field(
        default=None, metadata={"help": "Of kl_controller: adaptive: mean KL to the reference, in nats a response."}
    )
    kl_horizon: int = field(
        default=10_000, metadata={"help": "Of kl_controller: adaptive: responses over which beta may move by 20 %."}
    )
    center_scores: str = field(
        default="none",
        metadata={
            "help": "What is taken from a score before whitening, as pairs give a model no zero, nor any prompt one."
            " `model`: the deciding model's mean over the first iteration (piecewise reward); `prompt`: that, then the"
            " mean of the prompt's other responses (responses_per_prompt above 1)."
        },
    )
    missing_eos_penalty: float = field(
        default=0.0, metadata={"help": "Taken from the raw combined score of a response cut off by max_new_tokens."}
    )
    truncated_responses: str = field(
        default="keep",
        metadata={"help": "Responses cut off by max_new_tokens: `keep`, or `mask`: no part in losses and whitening."},
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
        default=False,
        metadata={
            "help": "Keep the policy with the best held-out reward - beta * KL as the result; the judge's reward where "
            "there is one."
        },
    )
    max_kl_nats: float | None = field(
        default=None,
        metadata={
            "help": "Stop when the mean KL to the reference, in nats a response, passes this; save_best keeps no policy"
            " beyond it where it has one within."
        },
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
        self.check_scoring()
        self._check_ranges()
        if self.reference_model not in ("sft", "start"):
            raise UserError(f"reference_model: {self.reference_model!r} is neither `sft` nor `start`")
        if self.value_model not in ("helpfulness", "policy", "trunk", "path"):
            raise UserError(f"value_model: {self.value_model!r} is none of `helpfulness`, `policy`, `trunk` and `path`")
        if (self.value_model == "path") != (self.value_model_path is not None):
            raise UserError("value_model_path and value_model: path go together; give both or neither")
        if self.gold not in ("simulated", "none"):
            raise UserError(f"gold: {self.gold!r} is neither `simulated` nor `none`")
        if self.gold == "simulated" and not self.eval_prompt_file:
            raise UserError("gold: simulated scores held-out responses; it needs eval_prompt_file")
        if self.reference_model == "sft" and not self.sft_model_path:
            raise UserError("reference_model: sft needs sft_model_path")
        if self.reference_model == "start" and self.sft_model_path:
            raise UserError("sft_model_path has no effect with reference_model: start; set reference_model: sft")
        if self.mini_batch_size % self.responses_per_prompt:
            raise UserError(
                f"responses_per_prompt: {self.responses_per_prompt} does not divide mini_batch_size "
                f"{self.mini_batch_size}"
            )
        if self.batch_size % self.mini_batch_size:
            raise UserError(
                f"batch_size {self.batch_size} is not a multiple of mini_batch_size {self.mini_batch_size}: some"
                " responses would be sampled and never trained on"
            )
        if self.save_best and not self.eval_prompt_file:
            raise UserError("save_best needs eval_prompt_file: without held-out prompts there is no best")
        self._check_centering()
        self._check_sampling()
        self._check_kl()
        self._check_judge()
        if self.truncated_responses not in ("keep", "mask"):
            raise UserError(f"truncated_responses: {self.truncated_responses!r} is neither `keep` nor `mask`")
        if self.truncated_responses == "mask" and self.missing_eos_penalty:
            raise UserError(
                "missing_eos_penalty has no effect with truncated_responses: mask, which leaves cut-off responses out"
            )

    @property
    def recomputes(self) -> bool:
        """True where old log-probs come from the trained model: the sampler's would differ, or the user wants it.

        bfloat16 autocast rounds far from the sampler's float32; another engine has other kernels.
        """
        return self.recompute_logprobs or self.bf16 or self.sampling_engine != "in_process"

    def _check_ranges(self) -> None:
        """UserError for a number outside its range; nan is outside of each."""
        for name, low in AT_LEAST.items():
            if not low <= (value := getattr(self, name)) < float("inf"):
                raise UserError(f"{name}: {value}; give a finite number, {low} or more")
        for name in ABOVE_0:
            value = getattr(self, name)
            if value is not None and not (0 < value < float("inf") or (name == "max_grad_norm" and value > 0)):
                raise UserError(f"{name}: {value}; give a finite number above 0")
        for name in (*BELOW_1, *SHARES):
            if not 0 <= (value := getattr(self, name)) <= 1 or (value == 1 and name in BELOW_1):
                raise UserError(f"{name}: {value}; give 0 to {'below ' * (name in BELOW_1)}1")

    def _check_centering(self) -> None:
        if self.center_scores not in ("none", "model", "prompt"):
            raise UserError(f"center_scores: {self.center_scores!r} is none of `none`, `model` and `prompt`")
        if self.center_scores == "model" and self.reward_combination != "piecewise":
            raise UserError(f"center_scores: model is for reward_combination: piecewise, not {self.reward_combination}")
        if self.center_scores == "model" and self.reward_functions and not self.reward_model_paths:
            raise UserError("center_scores: model is for two reward models, not for reward_functions alone")
        if self.center_scores == "model" and self.value_model == "path":
            raise UserError(
                "center_scores does not know where scores of value_model_path have their zero; use another value_model"
            )
        if self.center_scores == "prompt" and self.responses_per_prompt < 2:
            raise UserError(
                "center_scores: prompt compares a prompt's responses; set responses_per_prompt to 2 or more"
            )
        if self.center_scores == "prompt" and self.value_path:
            raise UserError(
                f"center_scores: prompt leaves nothing of a score that a value model from a reward model (value_model: "
                f"{self.value_model}) starts out with; use `policy` or `trunk`"
            )

    def _check_sampling(self) -> None:
        if self.sampling_engine == "server":
            raise UserError(
                "sampling_engine: server cannot serve PPO: it would go on sampling from the weights it has loaded while"
                " every iteration changes the policy; use in_process or continuous_batching"
            )
        if self.sampling_engine == "auto":
            raise UserError(
                "sampling_engine: auto would choose by timing, and a resumed run could choose otherwise; name"
                " in_process or continuous_batching"
            )
        if self.sampling_engine not in ("in_process", "continuous_batching"):
            raise UserError(
                f"sampling_engine: {self.sampling_engine!r} is neither `in_process` nor `continuous_batching`"
            )
        if not self.gather_weights and self.sampling_engine != "in_process":
            raise UserError(
                f"gather_weights: false samples in lockstep, which sampling_engine: {self.sampling_engine} does not; "
                "use in_process"
            )
        if self.importance_cap != 0 and not 1.0 <= self.importance_cap < float("inf"):
            raise UserError(f"importance_cap: {self.importance_cap}; give at least 1, or 0 for no weights")

    def check_importance(self) -> None:
        """UserError where `importance_cap` was chosen and has no effect. To be called once the weights' dtype is known:
        bfloat16 weights set recompute_logprobs."""
        if not self.recomputes and self.importance_cap != type(self).importance_cap:
            raise UserError(
                "importance_cap has no effect where the sampler's log-probs are the old ones; set recompute_logprobs"
            )

    def _check_kl(self) -> None:
        if self.kl_estimator not in ("k1", "k2", "k3"):
            raise UserError(f"kl_estimator: {self.kl_estimator!r} is none of `k1`, `k2`, `k3`")
        if self.kl_controller == "fixed":
            for name in ("kl_target", "kl_horizon"):
                if getattr(self, name) != getattr(type(self), name):
                    raise UserError(f"{name} has no effect with kl_controller: fixed; set kl_controller: adaptive")
            return
        if self.kl_controller != "adaptive":
            raise UserError(f"kl_controller: {self.kl_controller!r} is neither `fixed` nor `adaptive`")
        if self.kl_target is None:
            raise UserError("kl_controller: adaptive needs kl_target, in nats a response")
        if self.kl_coef == 0:
            raise UserError("kl_controller: adaptive multiplies kl_coef: from 0 it never moves; start above 0")
        if self.kl_horizon < self.batch_size:
            raise UserError(
                f"kl_horizon {self.kl_horizon} is below batch_size {self.batch_size}: beta would jump by more than 20 %"
                " an iteration"
            )

    def _check_judge(self) -> None:
        if bool(self.judge_helpfulness_model_path) != bool(self.judge_safety_model_path):
            raise UserError("judge_helpfulness_model_path, judge_safety_model_path: name both or neither")
        if self.judge_helpfulness_model_path and not self.eval_prompt_file:
            raise UserError("judge_helpfulness_model_path needs eval_prompt_file: the judge scores held-out responses")
        if self.judge_patience and not self.judge_helpfulness_model_path:
            raise UserError(f"judge_patience {self.judge_patience}: 0, or more with a judge_helpfulness_model_path")
        if self.judge_patience and not self.save_best:
            raise UserError("judge_patience needs save_best: true; without it the run would hand over what came after")
        if self.judge_patience and not self.eval_steps:
            raise UserError(
                "judge_patience has no effect with eval_steps: 0, which evaluates at the start and end only"
            )
