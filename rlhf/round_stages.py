"""The stages of rounds of rejection sampling, from the settings of all rounds [pure].

A round r is v<r>/ with, where reward models are trained in it, collect_preferences (and, where people label,
import_labels), pairs, reward_helpfulness, reward_safety; then always rejection_sampling, pool_samples, sft,
evaluate_policy; and for a student student_sft and student_evaluate_policy. v0/evaluate_policy is of the policy that
round 1 samples from. No stage depends on how many rounds there will be, so that more can follow.

Names that the blocks of the YAML may use, beside the pipeline's ${output_dir}, ${seed} and ${root}:

    ${round}              the number of the round, from 1
    ${policy}             the newest policy before the round, which the round samples from
    ${pairs}              the folder of all preferences so far
    ${pool}               the pooled samples
    ${helpfulness_model}  the newest reward models
    ${safety_model}
"""

from pathlib import Path
from typing import Any

from configs.errors import UserError
from configs.pipeline_settings import PipelineSettings
from configs.rounds_settings import ONLY_RESCORED, RoundsSettings
from rlhf.pipeline import Stage, fill, read_stages

Row = dict[str, Any]
# What the rounds decide: a block that sets it as well would be overruled in silence, so it is refused.
OWN = {
    "collect_preferences": ("model_name_or_path", "import_labels"),
    "rejection_sampling": ("model_name_or_path", "helpfulness_model_path", "safety_model_path"),
    "pool_samples": ("sample_files", "pool"),
    "sft": ("model_name_or_path",),
    "evaluate_policy": ("model_name_or_path",),
    "student_sft": ("model_name_or_path",),
}


def round_stages(settings: RoundsSettings, student_path: str, rounds: int = 0) -> list[Stage]:
    """All stages of all rounds (or of `rounds`, where given) in their order, settings filled in.

    `student_path` is the model that the student starts from, empty for none. UserError for a field in a block that the
    rounds set themselves, or a fine-tuning that leaves the pool out.
    """
    for name, fields in OWN.items():
        for number in range(1, (rounds or settings.rounds) + 1):
            if own := sorted(settings.block(name, number).keys() & {*fields, "output_dir"}):
                raise UserError(f"{name}: {', '.join(own)} cannot be set here; the rounds fill it in")
    rows: list[Row] = []
    state = _State(settings)
    for number in range(1, (rounds or settings.rounds) + 1):
        rows += _one_round(settings, number, student_path, state)
    pipeline = PipelineSettings(rows, settings.output_dir, settings.seed, settings.parallel_stages)
    return read_stages(pipeline)


class _State:
    """What a round takes over from the rounds before it: paths with ${output_dir}, and names of stages."""

    def __init__(self, settings: RoundsSettings) -> None:
        self.policy, self.policy_stage = settings.policy_path, ""
        self.models = {"helpfulness": settings.helpfulness_model_path, "safety": settings.safety_model_path}
        self.model_stages: list[str] = []
        self.collections: list[str] = list(settings.preference_dirs)
        self.collection_stages: list[str] = []
        self.samples: list[str] = []
        self.sample_stages: list[str] = []
        self.models_of_samples: list[tuple[str, str]] = []


def _one_round(settings: RoundsSettings, number: int, student_path: str, state: _State) -> list[Row]:
    here = f"v{number}"
    folder = "${output_dir}/" + here
    names = {"round": str(number), "policy": state.policy, "pairs": f"{folder}/pairs"}
    names["pool"] = f"{folder}/pool_samples/pooled.jsonl"
    rows: list[Row] = []

    def add(name: str, run: str, needs: list[str], own: Row, block: Row, threads: int = 1) -> str:
        """A stage of this round: `own` before the block's fields, which may name what the round has so far."""
        known = names | {f"{model}_model": path for model, path in state.models.items()}
        rows.append({"name": f"{here}/{name}", "run": run, "needs": [need for need in needs if need],
                     "threads": threads, "settings": fill(own | block, known)})  # fmt: skip
        return f"{here}/{name}"

    def block(name: str) -> Row:
        return settings.block(name, number)

    seed = {"seed": settings.seed + 1000 * number}  # a round draws anew; what is trained and tested keeps its seed
    if settings.retrain_from_round and number >= settings.retrain_from_round:
        own: Row = {"model_name_or_path": state.policy} | seed
        made = add(
            "collect_preferences", "collect_preferences", [state.policy_stage], own, block("collect_preferences")
        )
        collection = f"{folder}/collect_preferences"
        if people_label(block("collect_preferences")):
            own = {"import_labels": f"{folder}/labelled.jsonl"}
            own |= {k: v for k, v in block("collect_preferences").items() if k in ("test_fraction", "max_reject_share")}
            made, collection = add("import_labels", "collect_preferences", [made], own, {}), f"{folder}/import_labels"
        state.collections.append(collection)
        state.collection_stages.append(made)
        pairs = add("pairs", "pool_preferences", state.collection_stages, {"preference_dirs": [*state.collections]}, {})
        for model in ("helpfulness", "safety"):
            own = {"model_name_or_path": state.policy, "objective": model, "train_files": [f"${{pairs}}/{model}.jsonl"]}
            own["eval_files"] = [f"${{pairs}}/{model}_test.jsonl"]
            add(f"reward_{model}", "train_reward", [pairs, state.policy_stage], own, block(f"reward_{model}"))
        state.models = {model: f"{folder}/reward_{model}/model" for model in state.models}
        state.model_stages = [f"{here}/reward_{model}" for model in state.models]

    models = {f"{model}_model_path": path for model, path in state.models.items()}
    if number == 1:  # the start, with the first reward models: what round 1 is compared with
        own = {"model_name_or_path": state.policy, "sft_model_path": settings.policy_path} | models
        add("evaluate_policy", "evaluate_policy", state.model_stages, own, block("evaluate_policy"))
        rows[-1]["name"] = "v0/evaluate_policy"
    own = {"model_name_or_path": state.policy} | models | seed
    before = [state.policy_stage, *state.model_stages]
    state.sample_stages.append(
        add("rejection_sampling", "rejection_sampling", before, own, block("rejection_sampling"))
    )
    state.samples.append(f"{folder}/rejection_sampling/best.jsonl")
    state.models_of_samples.append((state.models["helpfulness"], state.models["safety"]))
    own = {"sample_files": [*state.samples], "pool": settings.pool}
    pool_block = block("pool_samples")
    if settings.pool == "all" and len(set(state.models_of_samples)) > 1:
        own["rank_by"] = "rescored"
    if (own | pool_block).get("rank_by") == "rescored":
        own |= models
        pool_block = {"use_cpu": block("rejection_sampling").get("use_cpu", False)} | pool_block
    elif settings.pool == "all" and settings.retrain_from_round and "rank_by" not in pool_block:
        # The block says how later rounds score anew; this one has the scores of one pair of models yet.
        pool_block = {name: value for name, value in pool_block.items() if name not in ONLY_RESCORED}
    pooled = add("pool_samples", "pool_samples", [*state.sample_stages, *state.model_stages], own, pool_block)

    own = {"model_name_or_path": settings.base_model_path, "train_files": ["${pool}"]}
    _needs_pool(own | block("sft"), "sft")
    state.policy_stage = add("sft", "sft", [pooled], own, block("sft"), settings.parallel_stages)
    state.policy = f"{folder}/sft/model"
    own = {"model_name_or_path": state.policy, "sft_model_path": settings.policy_path} | models
    add("evaluate_policy", "evaluate_policy", [state.policy_stage], own, block("evaluate_policy"))
    if student_path:
        own = {"model_name_or_path": student_path, "train_files": ["${pool}"]} | block("sft")
        _needs_pool(own | block("student_sft"), "student_sft")
        student = add("student_sft", "sft", [pooled], own, block("student_sft"), settings.parallel_stages)
        own = {"model_name_or_path": f"{folder}/student_sft/model", "sft_model_path": settings.policy_path} | models
        add("student_evaluate_policy", "evaluate_policy", [student], own, block("evaluate_policy"))
    return rows


def _needs_pool(fields: Row, name: str) -> None:
    if "${pool}" not in fields["train_files"]:
        raise UserError(f"{name}: train_files does not name ${{pool}}, so nothing of the rounds would be learnt")


def people_label(collect: Row) -> bool:
    """Whether the pairs of a collection wait for people, as rlhf/collect_preferences.py does by default."""
    return collect.get("annotator", "none") == "none"


def waiting_for_people(stages: list[Stage]) -> tuple[int, Path] | None:
    """(index of the first stage that cannot start without labels, the file they belong in); None where none waits."""
    for i, stage in enumerate(stages):
        labelled = stage.settings.get("import_labels")
        if labelled and not stage.done and not Path(labelled).exists():
            return i, Path(labelled)
    return None
