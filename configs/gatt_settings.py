"""Settings of the Ghost Attention stages (paper §3.3, App. A.3.5; recipe sheet §6)."""

from dataclasses import dataclass, field

from configs.errors import UserError
from configs.sampling_settings import SamplingSettings


def _check_shares(settings: object, *names: str) -> None:
    for name in names:
        value = getattr(settings, name)
        if not 0.0 <= value <= 1.0:
            raise UserError(f"{name}: {value} is not a share; give a number from 0 to 1")


def _check_positive(settings: object, *names: str) -> None:
    for name in names:
        value = getattr(settings, name)
        if value < 1:
            raise UserError(f"{name}: {value}; give at least 1")


@dataclass(kw_only=True)
class InstructionSettings:
    """Which instructions are given, how they are worded and where they stand."""

    kinds: list[str] | None = field(
        default=None,
        metadata={
            "help": "Instruction kinds to draw from: figure, hobby, last_word, first_word (default: these four), "
            "language, haiku, one_sentence, lower_case, max_words, bullets."
        },
    )
    max_constraints: int = field(
        default=1,
        metadata={
            "help": "Constraints of one instruction at most: each has 1 to so many, of kinds that can stand together."
        },
    )
    values_file: str | None = field(
        default=None,
        metadata={
            "help": "JSON {kind: [values]} to teach instead of the starter lists; only its kinds are drawn from."
        },
    )
    unseen_values_file: str | None = field(
        default=None, metadata={"help": "The same for values that are only measured; none may be taught too."}
    )
    short_share: float = field(default=0.5, metadata={"help": "Share of instructions in the shortened wording."})
    system_slot_share: float = field(
        default=0.5, metadata={"help": "Share of dialogues with the instruction in the system message, not in turn 1."}
    )


@dataclass(kw_only=True)
class GattSettings(InstructionSettings):
    """Building a Ghost Attention data set by sampling from a policy."""

    prompt_files: list[str] = field(
        default_factory=list, metadata={"help": "Prompt records; user turns are drawn from their single-turn prompts."}
    )
    dialogue_files: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Dialogue records whose user turns are asked as they follow each other, in place of turns drawn "
            "from prompt_files, which then serve single turns only (without them: the dialogues' first turns do)."
        },
    )
    num_dialogues: int = field(default=1000, metadata={"help": "Multi-turn dialogues to sample, before any replay."})
    min_turns: int = field(default=2, metadata={"help": "Fewest user turns of a dialogue."})
    max_turns: int = field(default=8, metadata={"help": "Most user turns of a dialogue."})
    plain_dialogue_share: float = field(
        default=0.1,
        metadata={
            "help": "Share of those dialogues without any instruction, so that long plain ones stay as they are."
        },
    )
    change_share: float = field(
        default=0.0,
        metadata={
            "help": "Share of the dialogues with an instruction whose instruction changes in mid-dialogue: another "
            "value of its kind stands in front of one later user turn."
        },
    )
    sampling_context: str = field(
        default="dialogue",
        metadata={
            "help": "What a reply is sampled under: the dialogue so far, or its own user turn (turn), which is enough "
            "as turns are drawn from single prompts: faster, and better where the policy has seen few long dialogues."
        },
    )
    plain_temperature: float | None = field(
        default=None,
        metadata={
            "help": "Sampling temperature of what has no instruction; 1 keeps plain answers as varied as they are "
            "where a low temperature makes obedient ones right; default: temperature."
        },
    )
    max_candidates: int = field(
        default=4, metadata={"help": "Replies drawn for a turn at most: until one obeys, or all of them with a judge."}
    )
    helpfulness_reward_model: str | None = field(
        default=None, metadata={"help": "Reward model that picks the best reply among those that obey; default: none."}
    )
    safety_reward_model: str | None = field(
        default=None, metadata={"help": "Safety reward model beside it: the pick is then by the combined reward."}
    )
    train_on: str = field(
        default="all",
        metadata={"help": "Loss in multi-turn rows: all replies (all were sampled under the instruction) or the last."},
    )
    replay_single_turn_share: float = field(
        default=0.4,
        metadata={"help": "Share of the built rows that are single turns of the same policy, so that turn 1 is kept."},
    )
    replay_plain_part: float = field(
        default=0.5, metadata={"help": "Part of that replay without any instruction; the rest obeys one."}
    )
    replay_files: list[str] = field(default_factory=list, metadata={"help": "Dialogue files to mix in as they are."})
    replay_files_share: float = field(
        default=0.1, metadata={"help": "Share of all rows that comes from replay_files, where there are any."}
    )
    max_length: int = field(default=4096, metadata={"help": "Tokens of the longest sampling context or training row."})
    chunk_size: int = field(
        default=256,
        metadata={
            "help": "Dialogues sampled together; each chunk is a shard that a killed build keeps. In sampling_context "
            "dialogue their keys and values lie in memory, once for the policy and once for each reward model."
        },
    )
    max_reject_share: float = field(default=0.05, metadata={"help": "Larger share of bad prompt rows: stop."})

    def __post_init__(self) -> None:
        _check_shares(self, "short_share", "system_slot_share", "replay_plain_part", "change_share", "max_reject_share")
        if not 0.0 <= self.plain_dialogue_share < 1.0:
            raise UserError(
                f"plain_dialogue_share: {self.plain_dialogue_share} must be at least 0 and below 1: the rest carries"
                " an instruction"
            )
        _check_positive(self, "num_dialogues", "min_turns", "max_candidates", "chunk_size", "max_constraints")
        for name in ("replay_single_turn_share", "replay_files_share"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise UserError(f"{name}: {getattr(self, name)} must be at least 0 and below 1: the rest is dialogues")
        if self.plain_temperature is not None:
            try:
                SamplingSettings(temperature=self.plain_temperature)
            except UserError as error:
                raise UserError(f"plain_{error}") from error
        if self.dialogue_files and self.sampling_context == "turn":
            raise UserError(
                "sampling_context: the turns of dialogue_files may build on each other, so a reply needs those before "
                "it; use dialogue"
            )
        if self.sampling_context not in ("dialogue", "turn"):
            raise UserError(f"sampling_context: '{self.sampling_context}' is unknown; use dialogue or turn")
        if self.train_on not in ("all", "last"):
            raise UserError(f"train_on: '{self.train_on}' is unknown; use all or last")
        if self.change_share and self.max_turns < 2:
            raise UserError("change_share: an instruction can change from turn 2 on; raise max_turns")
        if self.max_turns < self.min_turns:
            raise UserError(f"max_turns: {self.max_turns} is less than min_turns: {self.min_turns}")
        if self.helpfulness_reward_model and self.max_candidates < 2:
            raise UserError(
                f"helpfulness_reward_model: nothing to pick from with max_candidates: {self.max_candidates}; give at "
                "least 2"
            )
        if self.safety_reward_model and not self.helpfulness_reward_model:
            raise UserError(
                "safety_reward_model: it needs helpfulness_reward_model, whose score decides where it is safe"
            )


@dataclass(kw_only=True)
class PersistenceSettings(InstructionSettings):
    """Measuring how long an instruction of the first turn holds (Table 30)."""

    prompt_files: list[str] = field(
        default_factory=list, metadata={"help": "Held-out prompt records; user turns come from the single-turn ones."}
    )
    baseline_model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "A second policy measured on the same dialogues, e.g. the one before the stage."},
    )
    baseline_dir: str | None = field(
        default=None,
        metadata={"help": "In its place: a finished run of this script with the same settings on that policy."},
    )
    helpfulness_reward_model: str | None = field(
        default=None,
        metadata={"help": "Reward model that says how helpful replies without an instruction are; default: none."},
    )
    num_dialogues: int = field(default=200, metadata={"help": "Dialogues for each set of values (seen, unseen)."})
    num_turns: int = field(
        default=20, metadata={"help": "User turns of each dialogue; 0: as many as fit into max_length tokens."}
    )
    change_turn: int = field(
        default=0,
        metadata={
            "help": "Also measure dialogues in which another instruction of the same kind takes the place of the first "
            "at this user turn, from 2; 0: none."
        },
    )
    eval_temperature: float = field(default=0.6, metadata={"help": "Sampling temperature; 0 is greedy."})
    eval_top_p: float = field(default=1.0, metadata={"help": "Nucleus sampling mass."})
    eval_max_new_tokens: int = field(default=64, metadata={"help": "Tokens of a reply at most."})
    max_length: int = field(default=4096, metadata={"help": "Context tokens; a dialogue that fills it stops there."})
    answer_check: str = field(
        default="none",
        metadata={"help": "gold: a turn counts only if it also answers (simulated world); none: the checker decides."},
    )
    answer_threshold: float = field(
        default=0.7,
        metadata={"help": "A reply answers at this part of the gold score of the reply without instruction."},
    )
    measure_unseen: bool = field(default=True, metadata={"help": "Measure values that no stage has taught as well."})
    max_reject_share: float = field(default=0.05, metadata={"help": "Larger share of bad prompt rows: stop."})

    def __post_init__(self) -> None:
        _check_shares(self, "short_share", "system_slot_share", "answer_threshold", "max_reject_share")
        _check_positive(self, "num_dialogues", "eval_max_new_tokens", "max_length", "max_constraints")
        if self.num_turns < 0:
            raise UserError(f"num_turns: {self.num_turns}; give at least 1, or 0 for as many as fit")
        if self.change_turn and not 2 <= self.change_turn <= (self.num_turns or self.change_turn):
            raise UserError(
                f"change_turn: {self.change_turn} must be from 2 to num_turns: {self.num_turns}, or 0 for no change"
            )
        if self.baseline_dir and self.baseline_model_name_or_path:
            raise UserError("baseline_dir: it stands in place of baseline_model_name_or_path; leave one of them out")
        if self.answer_check not in ("gold", "none"):
            raise UserError(f"answer_check: '{self.answer_check}' is unknown; use gold or none")
